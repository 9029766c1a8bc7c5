"""Whether `tune` helps: a fit by default against a fit with what `tune` found, on test rows.

    python tools/bench_tune.py STORE ... [--minutes 2] [--centers 2000] [--threads 1]

Each store has the splits train and test. Printed for each: the score of both fits on the test rows, by how
much the tuned one is better with the standard error of that (paired, row by row), what was chosen, and seconds of
processor time, by which the minutes of `tune` are counted too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import ep3stream
from ep3stream.config import FitConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stores", nargs="+", type=Path, metavar="STORE")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--centers", type=int, help="of the fits; default: those of fit")
    parser.add_argument("--by", choices=("mse", "accuracy"), default="mse")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for store in options.stores:
        print(compared(store, options.minutes, options.centers, options.by), flush=True)


def compared(store: Path, minutes: float, n_centers: int | None, by: str) -> str:
    """Both fits in a few lines."""
    config = FitConfig()
    if n_centers is not None:
        config = replace(config, solver=replace(config.solver, centers=n_centers))
    began = time.process_time()
    found = ep3stream.tune(store, config, by=by, minutes=minutes, clock=time.process_time)
    tune_s = time.process_time() - began
    default, default_s = test_losses(store, config)
    tuned, tuned_s = (default, default_s) if found.config == config else test_losses(store, found.config)
    gain = default - tuned
    error = gain.std() / np.sqrt(len(gain))
    kernel = found.config.kernel
    ridge = "auto" if found.config.solver.ridge is None else f"{found.config.solver.ridge:g}"
    return "\n".join(
        [
            f"{store.name}: default {1 - default.mean():.4f} in {default_s:.0f} s, "
            f"tuned {1 - tuned.mean():.4f} in {tuned_s:.0f} s: {gain.mean():+.4f} +- {error:.4f}; tune {tune_s:.0f} s, "
            f"{len(found.table)} trials",
            f"    {kernel.name} {kernel.parameters()} x {kernel.sharpness:g}, ridge {ridge}",
            *(f"    {note}" for note in found.notes),
        ]
    )


def test_losses(store: Path, config: FitConfig) -> tuple[np.ndarray, float]:
    """1 - R2 or 1 - accuracy, shared out among the test rows, and seconds of the fit."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        run = ep3stream.fit(store, Path(folder) / "run", config)
        seconds = time.process_time() - began
        model = ep3stream.load(run)
        with ep3stream.open_store(store) as rows:
            split = rows.split("test")
            x, y = split.read_rows(np.arange(split.info.n_rows))
        outputs = model.outputs(torch.from_numpy(x).float()).double().numpy()
        if model.class_names is not None:
            return (outputs.argmax(1) != y).astype(float), seconds
        return (np.square(outputs - y) / y.astype(float).var(0)).mean(1), seconds


if __name__ == "__main__":
    main()
