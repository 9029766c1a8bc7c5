"""Offsets of features and targets: what a store, and a model fitted to it, subtract from the user's values.

float32 holds 24 binary digits: of 1776000123 (a time in seconds) it keeps the hundreds, of 1776000123 - 1776000000
everything. So offsets are subtracted in float64 before numbers are rounded, and added in float64 to what is shown.
`conversion/offsets.py` decides which columns have one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Offsets:
    """Of each feature, (d,), and of each target, (c,), float64; 0 where nothing is subtracted."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]

    @classmethod
    def recorded(
        cls, columns: Mapping[str, Any], feature_names: Sequence[str], target_names: Sequence[str]
    ) -> Offsets:
        """Those that the record of a store's columns holds, by name."""
        found = (
            (feature_names, columns.get("columns") or ()),
            (target_names, columns.get("targets") or ()),
        )
        return cls(*(_by_name(names, recorded) for names, recorded in found))

    @classmethod
    def none(cls, n_features: int, n_targets: int) -> Offsets:
        """Nothing is subtracted."""
        return cls(np.zeros(n_features), np.zeros(n_targets))

    def __bool__(self) -> bool:
        """Whether anything is subtracted."""
        return bool(self.x.any() or self.y.any())

    def __sub__(self, other: Offsets) -> Offsets:
        """What is still to be subtracted from values that are less the `other` offsets."""
        return Offsets(self.x - other.x, self.y - other.y)


def _by_name(names: Sequence[str], columns: Iterable[Mapping[str, Any]]) -> NDArray[np.float64]:
    by_name = {column["name"]: float(column["offset"]) for column in columns if "offset" in column}
    return np.array([by_name.get(name, 0.0) for name in names] if by_name else np.zeros(len(names)))


def shifted(values: NDArray[Any], offsets: NDArray[np.float64]) -> NDArray[Any]:
    """values, (b,) or (b, k), less offsets, (1,) or (k,), in float64; the values themselves where all are 0."""
    if not offsets.any():
        return values
    if values.ndim == 1:
        return exact_difference(values, float(offsets[0]))
    moved = values.astype(np.float64)
    for column in np.flatnonzero(offsets):
        moved[:, column] = exact_difference(values[:, column], float(offsets[column]))
    return moved


def exact_difference(values: NDArray[Any], offset: float) -> NDArray[np.float64]:
    """values - offset, (b,), in float64; of 64-bit integers as exact as float64 can hold it.

    Long doubles are 64-bit integers beside gaps.
    """
    is_long = values.dtype.kind == "f" and values.dtype.itemsize > 8
    if not is_long and (values.dtype.kind not in "iu" or values.dtype.itemsize < 8):
        return np.asarray(values, np.float64) - offset
    if not float(offset).is_integer():
        return np.asarray(values, np.float64) - offset
    whole, limits = int(offset), np.iinfo(np.int64 if is_long else values.dtype)
    if is_long or not limits.min <= whole <= limits.max:
        return (values.astype(np.longdouble) - np.longdouble(offset)).astype(np.float64)
    # Modulo 2^64 both differences are right, and the one that is not negative is below 2^64.
    numbers, origin = values.astype(np.uint64), np.uint64(whole % (1 << 64))
    up, down = (numbers - origin).astype(np.float64), (origin - numbers).astype(np.float64)
    return np.where(values >= whole, up, -down)
