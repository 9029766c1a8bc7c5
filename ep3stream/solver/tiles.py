"""How much of a matrix is worked on at a time, so that no work needs memory that grows with p.

On CPUs a part stays in the cache. On GPUs it has a share of the device's memory: few parts, since the host launches
some programs for each.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

# Of CPUs: rows of a tile, and entries of a strip, whose work tensors stay in the cache too.
TILE_ROWS = 512
_STRIP_ENTRIES = 1 << 18

# Of CPUs: rows that a model predicts at once, beside a tile of its centers.
_PREDICTED_ROWS = 2048

_GPU_SHARE = 512
_FLOAT = 4


def tiles(n_rows: int, rows_each: int) -> Iterator[slice]:
    """Consecutive slices of at most `rows_each` rows that cover `n_rows`."""
    for start in range(0, n_rows, rows_each):
        yield slice(start, min(start + rows_each, n_rows))


def tile_rows(device: torch.device, n_columns: int) -> int:
    """How many rows of a matrix with so many columns are computed at a time."""
    if device.type != "cuda":
        return TILE_ROWS
    return max(TILE_ROWS, gpu_tile_bytes(device) // (_FLOAT * max(1, n_columns)))


def tiles_of(matrix: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix, (n, k), each of which is computed on at once."""
    return tiles(len(matrix), tile_rows(matrix.device, matrix.shape[1]))


def column_strips(n_rows: int, n_columns: int, device: torch.device) -> Iterator[slice]:
    """Consecutive runs of columns of 2^18 entries each, whose work tensors stay in a CPU's cache; of a tile on GPUs."""
    entries = gpu_tile_bytes(device) // _FLOAT if device.type == "cuda" else _STRIP_ENTRIES
    return tiles(n_columns, max(1, entries // max(n_rows, 1)))


def predicted_rows(device: torch.device, n_centers: int, n_columns: int) -> int:
    """How many rows a model of so many centers computes at once. n_columns: of the prepared points.

    On GPUs at least as many as on CPUs, and so many more that neither their block nor their points exceed a tile: with
    few centers the time would otherwise go to launches.
    """
    if device.type != "cuda":
        return _PREDICTED_ROWS
    entries = gpu_tile_bytes(device) // _FLOAT
    return max(_PREDICTED_ROWS, entries // max(n_centers, n_columns, 1))


@functools.cache
def gpu_tile_bytes(device: torch.device) -> int:
    """Bytes of a tile of float32 numbers on this GPU."""
    return int(torch.cuda.get_device_properties(device).total_memory) // _GPU_SHARE
