"""What a fit loses on a store that is sorted by label, by how much of it is mixed in memory.

    python tools/bench_order.py [--rows 60000] [--centers 2000] [--epochs 1] [--directory .bench]

Fashion-MNIST (Debian's package dataset-fashion-mnist), sorted by label, is converted twice: shuffled, and with
--no-shuffle. Both are fitted the same way, the sorted one with windows of more and more segments. Prints the test
scores, how far apart neighbours end up (`ep3stream inspect --order`), and the share of the shuffled fit's error more.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from bench_fashion import read_idx

import ep3stream
from ep3stream.config import ConvertConfig, FitConfig
from ep3stream.conversion.convert import convert
from ep3stream.stream.order import RowOrder, order_quality

SOURCE = "/usr/share/datasets/fashion-mnist"
SEGMENT_BYTES = 1 << 21
WINDOWS = (1, 4, 16, 64)


def main() -> int:
    options = arguments()
    folder = Path(options.directory) / "order"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_sorted(folder, options.rows)
    stores = {name: make(folder, name, name == "shuffled") for name in ("shuffled", "sorted")}
    make(folder, "test", False)
    n_segments = ep3stream.open_store(stores["sorted"]).split("train").info.n_segments
    print(
        f"{'store':>9} {'window':>7} {'rows':>7} {'apart':>7} {'accuracy':>9} {'mse':>8} {'mse more':>9}",
        flush=True,
    )
    best = 0.0
    for name, window in [
        ("shuffled", 1),
        *(("sorted", w) for w in WINDOWS if w < n_segments),
        ("sorted", n_segments),
    ]:
        found = fit(folder, stores[name], window, options)
        best = best or found["mse"]
        print(
            f"{name:>9} {window:>7} {found['window_rows']:>7,} {found['relative']:>7.3f} {found['accuracy']:>9.4f} "
            f"{found['mse']:>8.4f} {found['mse'] / best - 1:>9.1%}",
            flush=True,
        )
    return 0


def save_sorted(folder: Path, n_rows: int) -> None:
    for name, prefix in (("train", "train"), ("test", "t10k")):
        rows = read_idx(SOURCE, f"{prefix}-images-idx3-ubyte.gz")[:n_rows]
        ids = read_idx(SOURCE, f"{prefix}-labels-idx1-ubyte.gz")[:n_rows]
        order = np.argsort(ids, kind="stable")
        rows, ids = rows[order], ids[order]
        np.savez(
            folder / f"{name}.npz",
            x=(rows.reshape(len(rows), -1) / 255).astype(np.float32),
            y=ids.astype(np.int64),
        )


def make(folder: Path, name: str, shuffle: bool) -> Path:
    source, split = ("test", "test") if name == "test" else ("train", "train")
    config = ConvertConfig(splits={split: 1.0}, shuffle=shuffle, segment_bytes=SEGMENT_BYTES)
    convert(folder / f"{source}.npz", folder / f"{name}.zarr", config)
    return folder / f"{name}.zarr"


def fit(folder: Path, store: Path, window: int, options: argparse.Namespace) -> dict[str, Any]:
    """Scores on the test rows, and the order's quality, with windows of so many segments."""
    run = folder / f"{store.stem}-{window}"
    settings = {
        "solver": {"centers": options.centers, "epochs": options.epochs},
        "kernel": {"bandwidth": 10.0},
    }
    settings["data"] = {"scale": "none", "validate": "none"}
    with mock.patch("ep3stream.training.plan.window_segments", return_value=window):
        ep3stream.fit(store, run, FitConfig().with_settings(settings, "bench_order"))
    info = ep3stream.open_store(store).split("train").info
    order = RowOrder(0, info.n_rows, info.segment_rows, window, 2048, np.empty(0, np.int64))
    quality = order_quality(order)
    scores = ep3stream.evaluate(run, folder / "test.zarr", "test")
    return {**scores, "relative": quality.relative, "window_rows": quality.window_rows}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=60_000, type=int)
    parser.add_argument("--centers", default=2000, type=int)
    parser.add_argument("--epochs", default=1.0, type=float)
    parser.add_argument("--directory", default=".bench")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
