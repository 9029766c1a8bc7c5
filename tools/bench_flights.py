"""What people would really use on a table, beside a kernel machine: LightGBM on the flights of `make demo`.

    python tools/bench_flights.py [--seeds 0] [--threads 2] [--directory .bench]

New York's flights of 2013 (examples/flights_table.py) are converted once, 85% to train, 5% to validate, 10% to test.
Every method sees the same rows of that store:

    ridge                on standardised features, origin and carrier as one-hot features
    ep3stream, defaults  `fit` without any option: 5000 centers, Laplacian, median bandwidth, one epoch
    ep3stream, as demo   12,000 centers, bandwidth 4, two epochs: the settings of `make demo`
    ep3stream, product   --kernel product; 5000 centers, one epoch
    LightGBM             its defaults but for --learning-rate and --leaves; origin and carrier as native categories;
                         trees are added until the error on the validation rows has not fallen for 50 of them

Prints R2 and rmse (minutes) on the test rows, and the seconds of training: of ep3stream the call of `fit`, set-up and
reading included; of the others the training alone, on arrays in memory. LightGBM is skipped where it is not
installed: `pip install 'ep3stream[bench]'`.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import ep3stream

EXAMPLES = Path(__file__).parents[1] / "examples"
SPLITS = {"train": 0.85, "validation": 0.05, "test": 0.1}
RIDGE = 1e-3
# The settings of `make demo`: of the solver, and the bandwidth.
DEMO, DEMO_BANDWIDTH = {"centers": 12_000, "epochs": 2}, 4.0
PATIENCE, MOST_TREES = 50, 20_000


@dataclass(frozen=True, slots=True)
class Rows:
    """x, (n, d), and y, (n,), of each split by its name; the names of the d features, one-hot ones as column=value."""

    x: dict[str, NDArray[np.float32]]
    y: dict[str, NDArray[np.float32]]
    names: tuple[str, ...]

    @classmethod
    def of(cls, store: Path) -> Rows:
        """All rows of the store, which fit in memory here."""
        with ep3stream.open_store(store) as rows:
            read = {
                name: rows.split(name).read_rows(np.arange(rows.split(name).info.n_rows)) for name in SPLITS
            }
            names = tuple(rows.manifest.feature_names)
        return cls(
            {name: x for name, (x, _) in read.items()},
            {name: y[:, 0] for name, (_, y) in read.items()},
            names,
        )


@dataclass(frozen=True, slots=True)
class Result:
    """Predictions of the test rows, (n,), and the seconds that training took."""

    method: str
    predicted: NDArray[Any]
    seconds: float


def main() -> int:
    options = arguments()
    logging.getLogger("ep3stream").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    directory = Path(options.directory) / "flights"
    store = flights_store(directory, "flights-onehot.zarr", categories="onehot")
    rows = Rows.of(store)
    print(
        f"{len(rows.y['train']):,} flights to train on, {len(rows.y['test']):,} to test on, "
        f"{len(rows.names)} features, {options.threads} threads"
    )
    print(f"{'method':<34} {'R2':>6} {'rmse':>6} {'seconds':>8}", flush=True)
    y = rows.y["test"].astype(np.float64)
    codes = flights_store(directory, "flights-codes.zarr")
    for result in results(store, codes, rows, directory, options):
        error = float(np.mean((result.predicted - y) ** 2))
        r2 = 1 - error / y.var()
        print(f"{result.method:<34} {r2:>6.3f} {error**0.5:>6.1f} {result.seconds:>8.1f}", flush=True)
    return 0


def flights_store(directory: Path, name: str = "flights.zarr", **settings: Any) -> Path:
    """A store of the flights, made where it is not there yet; the same rows and splits whatever the settings."""
    sys.path.insert(0, str(EXAMPLES))
    import flights_table

    directory.mkdir(parents=True, exist_ok=True)
    table, store = directory / "flights.csv.gz", directory / name
    if not store.exists():
        flights_table.main(str(table))
        ep3stream.convert(
            [table], store, ep3stream.ConvertConfig(target="arr_delay", splits=SPLITS, **settings)
        )
    return store


def results(
    store: Path, codes: Path, rows: Rows, directory: Path, options: argparse.Namespace
) -> Iterator[Result]:
    """Every method in turn."""
    of_codes = Rows.of(codes)
    if not np.array_equal(of_codes.y["test"], rows.y["test"]):
        raise RuntimeError(f"{codes} has other rows than {store}; remove both")
    yield by_ridge(rows)
    for seed in options.seeds:
        yield by_ep3stream("defaults", codes, of_codes, directory, seed, {}, {})
    for seed in options.seeds:
        yield by_ep3stream("as demo", codes, of_codes, directory, seed, DEMO, {"bandwidth": DEMO_BANDWIDTH})
    for seed in options.seeds:
        yield by_ep3stream("product", codes, of_codes, directory, seed, {}, {"name": "product"})
    yield from by_lightgbm(rows, options)


def by_ridge(rows: Rows) -> Result:
    """(X'X + n RIDGE I)^-1 X'y on standardised features, in float64."""
    began = time.perf_counter()
    x, y = rows.x["train"].astype(np.float64), rows.y["train"].astype(np.float64)
    mean, std, offset = x.mean(0), x.std(0), y.mean()
    scale = np.divide(1, std, out=np.zeros_like(std), where=std > 0)
    x = (x - mean) * scale
    weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ (y - offset))
    seconds = time.perf_counter() - began
    return Result("ridge regression", (rows.x["test"] - mean) * scale @ weights + offset, seconds)


def by_ep3stream(
    name: str,
    store: Path,
    rows: Rows,
    directory: Path,
    seed: int,
    solver: dict[str, Any],
    kernel: dict[str, Any],
) -> Result:
    """A fit of its own run directory."""
    run = directory / f"{name.replace(' ', '-')}-{seed}"
    shutil.rmtree(run, ignore_errors=True)
    config = ep3stream.FitConfig(
        solver=ep3stream.SolverConfig(**solver),
        kernel=ep3stream.KernelConfig(**kernel),
        run=ep3stream.RunConfig(seed=seed),
    )
    began = time.perf_counter()
    ep3stream.fit(store, run, config)
    seconds = time.perf_counter() - began
    predicted = np.asarray(ep3stream.load(run).predict(rows.x["test"])).reshape(-1)
    return Result(f"ep3stream, {name}, seed {seed}", predicted, seconds)


def by_lightgbm(rows: Rows, options: argparse.Namespace) -> Iterator[Result]:
    """One model of many trees; nothing where LightGBM is not installed."""
    try:
        import lightgbm
    except ImportError:
        print("LightGBM                           skipped: not installed; pip install 'ep3stream[bench]'")
        return
    columns = {name: with_codes(x, rows.names) for name, x in rows.x.items()}
    n_categorical = columns["train"][1]
    began = time.perf_counter()
    train = lightgbm.Dataset(
        columns["train"][0],
        rows.y["train"],
        categorical_feature=list(range(n_categorical)),
        free_raw_data=False,
    )
    validation = lightgbm.Dataset(columns["validation"][0], rows.y["validation"], reference=train)
    booster = lightgbm.train(
        {
            "objective": "regression",
            "learning_rate": options.learning_rate,
            "num_leaves": options.leaves,
            "num_threads": options.threads,
            "verbosity": -1,
            "seed": options.seeds[0],
        },
        train,
        num_boost_round=MOST_TREES,
        valid_sets=[validation],
        callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
    )
    seconds = time.perf_counter() - began
    yield Result(f"LightGBM, {booster.best_iteration} trees", booster.predict(columns["test"][0]), seconds)


def with_codes(x: NDArray[np.float32], names: tuple[str, ...]) -> tuple[NDArray[np.float32], int]:
    """The one-hot features of each category column as one column of codes, first; then the other features.

    x: (n, d). Returns the new matrix and how many of its leading columns are codes.
    """
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        if "=" in name:
            groups.setdefault(name.partition("=")[0], []).append(place)
    numeric = [place for place, name in enumerate(names) if "=" not in name]
    codes = [x[:, places].argmax(1).astype(np.float32) for places in groups.values()]
    return np.column_stack([*codes, x[:, numeric]]), len(groups)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--learning-rate", default=0.1, type=float, help="LightGBM's")
    parser.add_argument("--leaves", default=31, type=int, help="LightGBM's, of each tree")
    parser.add_argument("--directory", default=".bench")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
