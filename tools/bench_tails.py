"""Scores on columns with long tails: codes for gaps such as 99999, lognormal columns; beside boosted trees.

Trees see the order of values alone, so that nothing of this troubles them. A made-up problem of five normal columns
that act in pairs, `--rows` rows, three quarters to train on; estimators with 500 centers, 5 epochs and no effects of
crosses, and scikit-learn's HistGradientBoosting. `--beside` runs another checkout on the same rows.

    OMP_NUM_THREADS=1 python tools/bench_tails.py --beside ../checkout-of-before
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

import ep3stream

_CODES = {"1% are 99999": (99_999.0, 0.01), "5% are -999": (-999.0, 0.05), "0.2% are 1e9": (1e9, 0.002)}


def main() -> None:
    """Print one line for each kind of columns, or for the checkout that `--beside` names first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--beside", type=Path, help="another checkout, whose estimators come first")
    options = parser.parse_args()
    if options.beside is not None:
        print(f"{options.beside}:")
        command = [sys.executable, str(Path(__file__).absolute()), "--rows", str(options.rows)]
        environment = os.environ | {"PYTHONPATH": str(options.beside.absolute())}
        subprocess.run(command, check=True, env=environment)
        print("this one:")
    print(f"{'columns':16} {'R2':>6} {'trees':>6} {'accuracy':>9} {'trees':>6}")
    for name, x, y in _problems(options.rows):
        train, test = slice(0, len(x) * 3 // 4), slice(len(x) * 3 // 4, None)
        scores = []
        sizes = {"n_centers": 500, "epochs": 5, "effects": "none", "random_state": 0}
        for target, models in (
            (y, (ep3stream.KernelRegressor(**sizes), HistGradientBoostingRegressor(random_state=0))),
            (y > 0, (ep3stream.KernelClassifier(**sizes), HistGradientBoostingClassifier(random_state=0))),
        ):
            scores += [model.fit(x[train], target[train]).score(x[test], target[test]) for model in models]
        print(f"{name:16} {scores[0]:6.3f} {scores[1]:6.3f} {scores[2]:9.3f} {scores[3]:6.3f}", flush=True)


def _problems(n_rows: int) -> list[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    """The columns by name, x (n, 5), and y (n,), which is the same for all."""
    random = np.random.default_rng(0)
    x = random.standard_normal((n_rows, 5))
    y = np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + np.sin(2 * x[:, 3]) * x[:, 4]
    found = {"normal": x} | {f"exp({power} x)": np.exp(power * x) for power in (1, 2, 3, 5)}
    for name, (code, share) in _CODES.items():
        found[name] = np.where(random.random(x.shape) < share, code, x)
    return [(name, columns, y) for name, columns in found.items()]


if __name__ == "__main__":
    main()
