"""Scores on tables of many columns: where few of them matter, and where the target is linear in all.

Made-up problems of normal columns, `--rows` rows to train on and 3000 to score: estimators as they come, a ridge
regression and scikit-learn's HistGradientBoosting. `--beside` runs another checkout on the same rows.

    OMP_NUM_THREADS=1 python tools/bench_wide.py --beside ../checkout-of-before
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import RidgeCV

import ep3stream

_TEST_ROWS = 3000
_SPARSE_COLUMNS = (8, 40, 150, 300, 1000)


def main() -> None:
    """Print one line for each problem, or for the checkout that `--beside` names first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument(
        "--columns", type=lambda text: tuple(map(int, text.split(","))), default=_SPARSE_COLUMNS
    )
    parser.add_argument("--beside", type=Path, help="another checkout, whose estimators come first")
    options = parser.parse_args()
    if options.beside is not None:
        print(f"{options.beside}:")
        words = ["--rows", str(options.rows), "--columns", ",".join(map(str, options.columns))]
        environment = os.environ | {"PYTHONPATH": str(options.beside.absolute())}
        subprocess.run([sys.executable, str(Path(__file__).absolute()), *words], check=True, env=environment)
        print("this one:")
    print(f"{'problem':34} {'R2':>6} {'s':>4} {'ridge':>6} {'trees':>6}")
    for name, x, y in _problems(options.rows + _TEST_ROWS, options.columns):
        train, test = slice(0, options.rows), slice(options.rows, None)
        began = time.process_time()
        ours = ep3stream.KernelRegressor(random_state=0).fit(x[train], y[train])
        seconds = time.process_time() - began
        peers = RidgeCV(np.logspace(-2, 4, 7)), HistGradientBoostingRegressor(random_state=0)
        scores = [
            model.score(x[test], y[test])
            for model in (ours, *(each.fit(x[train], y[train]) for each in peers))
        ]
        print(f"{name:34} {scores[0]:6.3f} {seconds:4.0f} {scores[1]:6.3f} {scores[2]:6.3f}", flush=True)


def _problems(
    n_rows: int, columns: tuple[int, ...]
) -> list[tuple[str, NDArray[np.float32], NDArray[np.float64]]]:
    """Name, x (n, d) and y (n,) of each: a tenth of a standard deviation of y is noise, or thereabouts."""
    found = []
    for d in columns:
        random = np.random.default_rng(0)
        x = random.standard_normal((n_rows, d)).astype(np.float32)
        y = x[:, 0] * x[:, 1] + x[:, 2] + np.sin(2 * x[:, 3]) + x[:, 4] * np.abs(x[:, 5])
        found.append((f"6 of {d} columns, in pairs", x, y + 0.1 * random.standard_normal(n_rows)))
    random = np.random.default_rng(0)
    x = random.standard_normal((n_rows, 100)).astype(np.float32)
    linear = x @ random.standard_normal(100) / 10 + 0.1 * random.standard_normal(n_rows)
    found.append(("linear in 100 columns", x, linear))
    found.append(("the same and two pairs", x, linear + x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3]))
    found.append(("the same and three sines", x, linear + np.sin(3 * x[:, :3]).sum(1)))
    mixed = random.standard_normal((n_rows, 20)) @ random.standard_normal((20, 300))
    x = (mixed + 0.3 * random.standard_normal((n_rows, 300))).astype(np.float32)
    found.append(
        ("20 factors behind 300 columns", x, np.sin(x[:, :10].sum(1) / 5) + np.abs(x[:, 20:30]).mean(1))
    )
    return found


if __name__ == "__main__":
    main()
