"""Whether a fit depends on luck: ten seeds on Fashion-MNIST, and a problem on which the published step size fails.

    python tools/bench_seeds.py [--seeds 0-9] [--epochs 1] [--centers 5000] [--only fashion|teacher]

Fashion-MNIST: Laplacian kernel, bandwidth 10; accuracy and mse on the test rows by seed, then mean, standard deviation
and the worst; `cuts` counts how often the guard took a fit back and halved its step. Exits with 1 if a fit diverges.

Teacher: 64 standard normal features, the target that of a random network of 50 tanh units, without noise; Gaussian
kernel. 2000 Nystrom samples carry each of `--levels` eigenpairs of the data: with too many of them the published step
size is too large. First the published method and rule, then the default ones on the same samples, where the model rank
bounds the level; r2 and mse on rows apart. Then the defaults on those samples, once for each seed.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_memory import regression_spec
from bench_peers import write_data

import ep3stream
from ep3stream.config import Projection, StepRule
from ep3stream.conversion.writer import create_store

FEATURES, UNITS, SAMPLES = 64, 50, 2000
PUBLISHED: tuple[Projection, StepRule] = ("eigenpro", "published")
DEFAULT: tuple[Projection, StepRule] = ("nystrom", "measured")
TEACHER_ROWS, TEACHER_TEST_ROWS = 60_000, 10_000


def main() -> int:
    options = arguments()
    logging.getLogger("ep3stream").setLevel(logging.ERROR)  # Of cuts, which have a column.
    directory = Path(options.directory) / "seeds"
    failed = False
    if options.only != "teacher":
        failed |= fashion(directory, options)
    if options.only != "fashion":
        failed |= teacher(directory, options)
    return int(failed)


def fashion(directory: Path, options: argparse.Namespace) -> bool:
    """A line for each seed and the summary; whether a fit diverged."""
    write_data(directory, options.source)
    print(f"Fashion-MNIST, p={options.centers}, epochs {options.epochs:g}")
    print(f"{'seed':>6} {'accuracy':>9} {'mse':>8} {'cuts':>5} {'seconds':>8}")
    found = []
    for seed in options.seeds:
        config = ep3stream.FitConfig(
            data=ep3stream.DataConfig(scale="none", validate="none"),
            kernel=ep3stream.KernelConfig(bandwidth=10.0),
            solver=ep3stream.SolverConfig(centers=options.centers, epochs=options.epochs),
            run=ep3stream.RunConfig(seed=seed),
        )
        scores, n_cuts, seconds = fitted(directory, config, "accuracy")
        found.append((scores["accuracy"], scores["mse"]))
        row = f"{scores['accuracy']:>9.4f} {scores['mse']:>8.5f}"
        print(f"{seed:>6} {row} {n_cuts:>5} {seconds:>8.1f}", flush=True)
    accuracy, mse = np.array(found).T
    for name, of in (("mean", np.mean), ("std", lambda values: np.std(values, ddof=1))):
        print(f"{name:>6} {of(accuracy):>9.4f} {of(mse):>8.5f}")
    print(f"{'worst':>6} {accuracy.min():>9.4f} {mse.max():>8.5f}")
    return not np.isfinite(found).all()


def teacher(directory: Path, options: argparse.Namespace) -> bool:
    """A line for each level and method, then for each seed; whether one of these diverged."""
    shutil.rmtree(directory, ignore_errors=True)
    write_teacher(directory / "train.zarr")
    print(f"\nTeacher, d={FEATURES}, p={options.centers}, {SAMPLES} samples, epochs {options.epochs:g}")
    print(f"{'level':>6} {'method':<20} {'r2':>9} {'mse':>9} {'cuts':>5} {'seconds':>8}")
    kinds = [(level, *kind) for level in options.levels for kind in (PUBLISHED, DEFAULT)]
    for level, projection, step in kinds:
        teacher_line(directory, options, f"{level}", projection, step, level, 0)
    found = [teacher_line(directory, options, f"seed {seed}", *DEFAULT, 0, seed) for seed in options.seeds]
    summary = f"mean {np.mean(found):.4f}, std {np.std(found, ddof=1):.4f}, worst {np.min(found):.4f}"
    print(f"r2 of {len(found)} seeds: {summary}")
    return not np.isfinite(found).all()


def teacher_line(
    directory: Path,
    options: argparse.Namespace,
    label: str,
    projection: Projection,
    step: StepRule,
    level: int,
    seed: int,
) -> float:
    """Prints it and returns r2, nan if the fit diverged."""
    solver = ep3stream.SolverConfig(
        centers=options.centers,
        projection=projection,
        step=step,
        epochs=options.epochs,
        nystrom_samples=SAMPLES,
        data_rank=level,
    )
    kernel, run = ep3stream.KernelConfig(options.kernel), ep3stream.RunConfig(seed=seed)
    config = ep3stream.FitConfig(
        data=ep3stream.DataConfig(validate="none"), kernel=kernel, solver=solver, run=run
    )
    scores, n_cuts, seconds = fitted(directory, config, "r2")
    row = f"{scores['r2']:>9.4f} {scores['mse']:>9.5f}"
    print(f"{label:>6} {f'{projection}, {step}':<20} {row} {n_cuts:>5} {seconds:>8.1f}", flush=True)
    return float(scores["r2"])


def fitted(directory: Path, config: ep3stream.FitConfig, score: str) -> tuple[dict[str, Any], int, float]:
    """Scores on the test rows, nan if the fit diverges; how often the step was halved; seconds."""
    run = directory / "run"
    shutil.rmtree(run, ignore_errors=True)
    began = time.perf_counter()
    try:
        ep3stream.fit(directory / "train.zarr", run, config)
        seconds = time.perf_counter() - began
        scores = ep3stream.evaluate(run, directory / "test.zarr")
    except ep3stream.DivergedError:
        seconds, scores = time.perf_counter() - began, {score: np.nan, "mse": np.nan}
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return scores, sum(event.get("event") == "rollback" for event in events), seconds


def write_teacher(path: Path) -> None:
    """sum_j b_j tanh(w_j'x), scaled to variance 1; the test rows go to a store beside it."""
    generator = np.random.default_rng(0)
    w = generator.standard_normal((FEATURES, UNITS)) * 2 / np.sqrt(FEATURES)
    b = generator.standard_normal((UNITS, 1)) / np.sqrt(UNITS)
    for split, n_rows in (("train", TEACHER_ROWS), ("test", TEACHER_TEST_ROWS)):
        x = generator.standard_normal((n_rows, FEATURES), dtype=np.float32)
        with create_store(path.with_name(f"{split}.zarr"), regression_spec(FEATURES), "zarr") as writer:
            writer.append(split, x, (np.tanh(x @ w) @ b).astype(np.float32))
            writer.commit()


def arguments() -> argparse.Namespace:
    def integers(text: str) -> range | list[int]:
        first, dash, last = text.partition("-")
        return range(int(first), int(last) + 1) if dash else [int(seed) for seed in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--directory", default=".bench")
    parser.add_argument("--only", choices=("fashion", "teacher"))
    parser.add_argument("--seeds", default="0-9", type=integers)
    parser.add_argument("--centers", default=5000, type=int)
    parser.add_argument("--epochs", default=1, type=float)
    parser.add_argument("--levels", default="200,800", type=integers)
    parser.add_argument("--kernel", default="gaussian", help="of the teacher problem")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
