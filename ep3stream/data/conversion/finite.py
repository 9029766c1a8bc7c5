"""The fastest way to see whether numbers are finite."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 16
_FLOAT16_EXPONENT = np.uint16(0x7C00)


def all_finite(values: NDArray[Any]) -> bool:
    """Whether a C-contiguous array holds neither NaN nor infinity."""
    if values.dtype.kind != "f":
        return True
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return all(_is_finite(flat[start : start + _BLOCK]) for start in range(0, flat.size, _BLOCK))


def _is_finite(block: NDArray[Any]) -> bool:
    if block.dtype == np.float16:
        return bool(((block.view(np.uint16) & _FLOAT16_EXPONENT) != _FLOAT16_EXPONENT).all())
    # A sum is the fastest pass over numbers: finite only if all of them are, and if not, they may still be.
    return bool(np.isfinite(np.add.reduce(block)) or np.isfinite(block).all())
