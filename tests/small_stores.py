"""Small stores of a smooth function, for tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ep3stream.config import ConvertConfig, FitConfig
from ep3stream.conversion.convert import convert

# Settings, and the same as options, with which nothing depends on what a fit chooses by default: all rows are trained
# on, with a kernel of distances, and no clock decides.
PLAIN = {"data": {"validate": "none"}, "kernel": {"name": "laplacian"}, "run": {"minutes": 0}}
PLAIN_OPTIONS = ["--validate", "none", "--kernel", "laplacian", "--minutes", "none"]


def plain_config(**tables) -> FitConfig:
    """The plain settings, with those of `tables` in their place."""
    return FitConfig().with_settings(PLAIN, "test").with_settings(tables, "test")


def smooth_rows(n_rows: int, n_features: int = 5, seed: int = 0):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((n_rows, n_features)).astype(np.float32)
    y = np.stack([np.sin(x[:, 0]) + x[:, 1] * x[:, 2], np.cos(x[:, 3])], 1).astype(np.float32)
    return x, 10 + 3 * y


def make_store(
    path: Path, task: str = "regression", n_rows: int = 1500, split: str = "train=0.8,test=0.2", **config
):
    """Converts smooth rows to `path`; classes are the three terciles of the first target."""
    from ep3stream.config import parse_splits

    x, y = smooth_rows(n_rows)
    if task == "classification":
        y = np.digitize(y[:, 0], np.quantile(y[:, 0], [1 / 3, 2 / 3])).astype(np.int64)
    folder = path.parent / f"{path.name}.source"
    folder.mkdir()
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    settings = ConvertConfig(splits=parse_splits(split), segment_bytes=4096, memory_bytes=1 << 20, **config)
    convert([], path, settings, x_file=folder / "x.npy", y_file=folder / "y.npy")
    return path
