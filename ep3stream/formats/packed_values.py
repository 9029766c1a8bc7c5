"""Arrays whose attributes say what their numbers mean, as netCDF and xarray write them into HDF5 and Zarr.

    value = stored * scale_factor + add_offset, in float64; `_FillValue` and `missing_value` stand for gaps;
    `_Unsigned` says that integers with a sign were meant without

(Climate and Forecast Metadata Conventions, chapters 2.5.1 and 8.1). Whoever reads such an array by h5py or zarr gets
the stored numbers; what is done here is what netCDF4 and xarray do, and it is told.
"""

from __future__ import annotations

import base64
import binascii
import logging
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.formats.row_array import RowArray, RowBlocks

_logger = logging.getLogger(__name__)

_NAMES = ("scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned")


@dataclass(frozen=True, slots=True)
class PackedValues:
    """What the attributes of an array say of its numbers.

    stored: the type in which the numbers are compared with `gaps`, the stored numbers that stand for nothing.
    scale and offset are None if neither attribute is there.
    """

    stored: np.dtype[Any]
    gaps: tuple[Any, ...]
    scale: tuple[float, float] | None
    said: str

    @classmethod
    def of(cls, attributes: Mapping[str, Any], dtype: np.dtype[Any]) -> PackedValues | None:
        """None if the stored numbers are the values, as in arrays of any other writer."""
        given = {name: attributes[name] for name in _NAMES if name in attributes}
        if not given or dtype.kind not in "iuf":
            return None
        stored = dtype
        if dtype.kind == "i" and _text(given.get("_Unsigned")).lower() == "true":
            stored = np.dtype(dtype.str.replace("i", "u"))
        scale, offset = (_number(given.get(name)) for name in ("scale_factor", "add_offset"))
        gaps = [
            gap.astype(dtype).view(stored)[0]
            for name in ("_FillValue", "missing_value")
            for gap in _numbers(given.get(name), dtype)
        ]
        is_scaled = scale not in (None, 1.0) or offset not in (None, 0.0)
        if not (gaps or is_scaled or stored != dtype):
            return None
        told = ", ".join(f"{name} {_shown(value)}" for name, value in given.items())
        return cls(
            stored,
            tuple(gaps),
            (1.0 if scale is None else scale, offset or 0.0) if is_scaled else None,
            told,
        )

    def is_gap(self, stored: Any) -> bool:
        """Whether a stored number stands for nothing."""
        return any(stored == gap for gap in self.gaps)

    def unpacked(self, array: RowArray) -> RowArray:
        """The array of values, in float64 if they are scaled, masked where the stored numbers stand for nothing."""
        _logger.warning(
            "%s: its numbers are read as its attributes say (%s), as netCDF and xarray do",
            array.name,
            self.said,
        )

        def blocks(block_rows: int, start_row: int) -> RowBlocks:
            for block, end_byte in array.blocks(block_rows, start_row):
                yield self._values(block), end_byte

        dtype = self.stored if self.scale is None else np.dtype(np.float64)
        return replace(array, dtype=dtype, blocks=blocks, is_raw=False)

    def _values(self, block: NDArray[Any]) -> NDArray[Any]:
        stored = block.view(self.stored) if block.dtype != self.stored else block
        values: NDArray[Any] = stored
        if self.scale is not None:
            values = stored.astype(np.float64) * self.scale[0] + self.scale[1]
        if not self.gaps:
            return values
        is_gap = np.isin(stored, self.gaps)
        return np.ma.MaskedArray(values, is_gap) if is_gap.any() else values


def _numbers(value: Any, dtype: np.dtype[Any]) -> list[NDArray[Any]]:
    """The numbers of an attribute that values of this type can be equal to, each as an array of one.

    xarray writes floats as base64 of a double into the JSON of Zarr.
    """
    if isinstance(value, str) and dtype.kind == "f":
        try:
            value = struct.unpack("<d", base64.b64decode(value, validate=True))
        except (binascii.Error, struct.error):
            return []
    found = np.atleast_1d(np.asarray(value)).ravel()
    if value is None or found.dtype.kind not in "iuf":
        return []
    with np.errstate(all="ignore"):
        return [
            found[at : at + 1]
            for at in range(len(found))
            if not np.isnan(found[at])
            and (dtype.kind == "f" or found[at : at + 1].astype(dtype)[0] == found[at])
        ]


def _number(value: Any) -> float | None:
    found = np.asarray(value)
    return float(found.ravel()[0]) if value is not None and found.size and found.dtype.kind in "iuf" else None


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _shown(value: Any) -> str:
    found = np.asarray(value).ravel()
    return " ".join(_text(each) for each in found[:3].tolist())
