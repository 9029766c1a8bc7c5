"""The whole way on real data: table, store, fit, kill, resume, evaluation, report.

    python examples/flights_demo.py [DIRECTORY]

Predicts the arrival delay of New York's flights of 2013. No setting of the model is given: the fit takes at most two
minutes. It is killed without warning on the way and started again by the same command. A ridge regression on the
same features stands beside the result, and LightGBM where it can be imported (pip install lightgbm).
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flights_table
import numpy as np

import ep3stream

KILL_AFTER_CHECKPOINTS = 2


def main(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    table, store, run = directory / "flights.csv.gz", directory / "flights.zarr", directory / "run"

    heading("1. A table of flights, with what is known before take-off")
    flights_table.main(str(table))

    heading("2. convert: a shuffled, checksummed store with three splits")
    command = [
        "convert",
        table,
        store,
        "--target",
        "arr_delay",
        "--split",
        "train=0.85,validation=0.05,test=0.1",
    ]
    ep3stream_command(*command).wait_successfully()

    heading("3. fit, killed while it trains")
    fit = ["fit", store, run, "--checkpoint-steps", "100"]
    process = ep3stream_command(*fit)
    wait_for_checkpoints(process, run, KILL_AFTER_CHECKPOINTS)
    process.send_signal(signal.SIGKILL)
    process.wait()
    print(f"killed by {signal.Signals(-process.returncode).name}")

    heading("4. The same command again: it resumes")
    ep3stream_command(*fit).wait_successfully()
    ep3stream_command("verify", run).wait_successfully()

    heading("5. evaluate on flights never seen, beside a ridge regression")
    ridge = {"name": "ridge regression", "r2": ridge_r2(store)}
    scores = ep3stream.evaluate(run, store, reference=ridge)
    report = ep3stream.write_report(run)
    print(
        f"kernel machine   R2 {scores['r2']:.3f}   rmse {scores['rmse']:.1f} minutes   {scores['n']} flights"
    )
    print(f"ridge            R2 {ridge['r2']:.3f}")
    if (trees := lightgbm_r2(store)) is not None:
        print(f"LightGBM         R2 {trees:.3f}")

    heading("6. What matters, by how much worse flights are predicted when a column is shuffled")
    told = json.loads((run / "run.json").read_text())
    columns = told["column_weights"]["columns"]
    whole = sum(column["importance"] for column in columns)
    for column in columns[:8]:
        share = column["importance"] / whole
        print(f"{column['name']:24} {share:5.1%}  {'#' * round(100 * share)}")
    if "effects" in told:
        print("\nColumns crossed, and what that explains of the kernel's squared error:")
        for cross in told["effects"]["crosses"]:
            print(f"{cross['explained']:5.1%}  {' x '.join(cross['columns'])}")
    print(f"\nOpen {report}")


class Command(subprocess.Popen[bytes]):
    """`ep3stream ...` as a process of its own."""

    def wait_successfully(self) -> None:
        """Waits for the end; leaves with its exit code if it failed."""
        if self.wait() != 0:
            sys.exit(self.returncode)


def ep3stream_command(*arguments: str | Path) -> Command:
    print("$ ep3stream", *arguments, flush=True)
    return Command([sys.executable, "-m", "ep3stream", *map(str, arguments)])


def wait_for_checkpoints(process: Command, run: Path, n_checkpoints: int) -> None:
    while process.poll() is None:
        if len(list((run / "checkpoints").glob("step-*"))) >= n_checkpoints:
            return
        time.sleep(0.05)
    sys.exit(f"the fit ended before it could be killed, with exit code {process.returncode}")


def n_categories(columns: Mapping[str, Any]) -> dict[str, int]:
    """How many categories each column of codes has, by its name."""
    return {one["name"]: len(one["values"]) for one in columns["columns"] if "values" in one}


def with_indicators(x: np.ndarray, names: Sequence[str], sizes: Mapping[str, int]) -> np.ndarray:
    """Numbers as they are, the code of a category as a 0/1 column for each of its values, and a column of ones."""
    columns = [
        x[:, [j]] if name not in sizes else x[:, [j]] == np.arange(sizes[name])
        for j, name in enumerate(names)
    ]
    return np.concatenate([*columns, np.ones((len(x), 1))], axis=1, dtype=np.float64)


def ridge_r2(store: Path, penalty: float = 1e-3) -> float:
    """R2 on `test` of a ridge regression on standardised numbers and 0/1 features of codes, by sums over `train`."""
    with ep3stream.open_store(store) as rows:
        train, test, names = rows.split("train"), rows.split("test"), rows.manifest.feature_names
        sizes = n_categories(rows.manifest.columns)
        gram, moment = 0.0, 0.0
        for segment in range(train.info.n_segments):
            x, y = train.read_segment(segment)
            x = with_indicators(x, names, sizes)
            gram, moment = gram + x.T @ x, moment + x.T @ y[:, 0]
        # The last column is 1 everywhere: its sums are the means.
        n, mean, y_mean = train.info.n_rows, gram[-1, :-1] / train.info.n_rows, moment[-1] / train.info.n_rows
        covariance = gram[:-1, :-1] / n - np.outer(mean, mean)
        std = np.sqrt(np.maximum(covariance.diagonal(), 0))
        scale = np.divide(1, std, out=np.zeros_like(std), where=std > 1e-12)
        scaled = covariance * scale[:, None] * scale + penalty * np.eye(len(std))
        weights = scale * np.linalg.solve(scaled, scale * (moment[:-1] / n - mean * y_mean))
        x, y = test.read_rows(np.arange(test.info.n_rows))
        x = with_indicators(x, names, sizes)[:, :-1]
    error = y[:, 0] - y_mean - (x - mean) @ weights
    return float(1 - np.mean(error**2) / np.var(y[:, 0]))


def lightgbm_r2(store: Path) -> float | None:
    """R2 on `test` of boosted trees that stop by `validation`, with codes as categories; None if not to be had."""
    try:
        import lightgbm
    except (ImportError, OSError):  # An OSError where the system lacks libgomp.
        return None
    with ep3stream.open_store(store) as rows:
        splits = {name: rows.split(name) for name in ("train", "validation", "test")}
        x, y = {}, {}
        for name, split in splits.items():
            x[name], y[name] = split.read_rows(np.arange(split.info.n_rows))
        names, sizes = rows.manifest.feature_names, n_categories(rows.manifest.columns)
        codes = [place for place, name in enumerate(names) if name in sizes]
    train = lightgbm.Dataset(x["train"], y["train"][:, 0], categorical_feature=codes)
    trees = lightgbm.train(
        {"objective": "regression", "learning_rate": 0.05, "num_leaves": 63, "verbosity": -1, "seed": 0},
        train,
        num_boost_round=5000,
        valid_sets=[lightgbm.Dataset(x["validation"], y["validation"][:, 0], reference=train)],
        callbacks=[lightgbm.early_stopping(50, verbose=False)],
    )
    truth = y["test"][:, 0]
    return float(1 - np.mean((trees.predict(x["test"]) - truth) ** 2) / np.var(truth))


def heading(text: str) -> None:
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".demo"))
