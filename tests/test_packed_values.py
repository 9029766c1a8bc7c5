"""Arrays whose attributes say what their numbers mean, and files with holes, of HDF5 and Zarr as others write them.

`CF` holds the attributes (scale_factor, _FillValue ...) by case; what netCDF4 and xarray read of them is the truth.
"""

from __future__ import annotations

import base64
import os
import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr

import ep3stream
from ep3stream import ConvertConfig
from ep3stream.formats.arrays import open_row_array
from ep3stream.formats.file_holes import hole_bytes

STORED = np.arange(12).reshape(6, 2)
GAP = np.where(STORED == 4, np.nan, STORED)

CF: dict[str, tuple[str, dict[str, Any], Any]] = {
    "scale and offset": ("i2", {"scale_factor": 0.1, "add_offset": 20.0}, STORED * 0.1 + 20),
    "scale alone": ("u1", {"scale_factor": np.float32(0.5)}, STORED * 0.5),
    "offset alone": ("i4", {"add_offset": np.array([1_000_000.0])}, STORED + 1e6),
    "scale, offset and gap": ("i2", {"scale_factor": 2.0, "add_offset": 1.0, "_FillValue": np.int16(4)}, GAP * 2 + 1),
    "gap of integers": ("i4", {"_FillValue": np.array([4], "i4")}, GAP),
    "gap of 64 bits": ("i8", {"_FillValue": np.int64(4)}, GAP),
    "gap of floats": ("f4", {"_FillValue": np.float32(4)}, GAP),
    "gap of another width": ("f4", {"missing_value": 4.0}, GAP),
    "two gaps": ("i2", {"_FillValue": 4, "missing_value": 7}, np.where(STORED == 7, np.nan, GAP)),
    "a list of gaps": ("f8", {"missing_value": np.array([4.0, 7.0])}, np.where(STORED == 7, np.nan, GAP)),
    "gap that no value can be": ("u1", {"_FillValue": -9999}, STORED),
    "gap that is NaN": ("f8", {"_FillValue": np.nan}, STORED),
    "gap in words": ("f8", {"missing_value": "none"}, STORED),
    "scale of one": ("f8", {"scale_factor": 1.0, "add_offset": 0.0}, STORED),
    "without a sign": ("i1", {"_Unsigned": "true", "_FillValue": np.int8(-1)}, STORED),
    "other attributes": ("f8", {"units": "m", "valid_min": 3}, STORED),
}  # fmt: skip


def hdf5(path: Path, x: np.ndarray, attributes: dict[str, Any]) -> Path:
    with h5py.File(path.with_suffix(".nc"), "w") as file:
        file.create_dataset("x", data=x, chunks=(2, 2)).attrs.update(attributes)
    return path.with_suffix(".nc")


def zarr_of(version: int) -> Any:
    def write(path: Path, x: np.ndarray, attributes: dict[str, Any]) -> Path:
        group = zarr.open_group(path, mode="w", zarr_format=version)
        array = group.create_array("x", data=x, chunks=(2, 2))
        array.attrs.update({key: np.asarray(value).tolist() for key, value in attributes.items()})
        return path

    return write


WRITERS = {"hdf5": hdf5, "zarr 2": zarr_of(2), "zarr 3": zarr_of(3)}


def values_of(path: Path, block_rows: int = 3) -> np.ndarray:
    blocks = [block for block, _ in open_row_array(path, "x").blocks(block_rows, 0)]
    return np.ma.concatenate(blocks).astype(float).filled(np.nan)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize(("dtype", "attributes", "expected"), CF.values(), ids=CF)
def test_numbers_are_what_their_attributes_say_and_that_is_told(
    tmp_path, write, dtype, attributes, expected, caplog
):
    path = write(tmp_path / "s.zarr", STORED.astype(dtype), attributes)
    np.testing.assert_array_equal(values_of(path), expected)
    is_changed = not np.array_equal(expected, STORED) or "_Unsigned" in attributes
    assert ("its numbers are read as its attributes say" in caplog.text) == is_changed


def test_integers_meant_without_a_sign_have_none(tmp_path):
    path = hdf5(
        tmp_path / "f",
        np.array([[-1, -2], [3, -128]], "i1"),
        {"_Unsigned": "true", "_FillValue": np.int8(-2)},
    )
    np.testing.assert_array_equal(values_of(path), [[255, np.nan], [3, 128]])


@pytest.mark.parametrize("version", [2, 3])
def test_the_gaps_of_zarr_are_where_xarray_writes_them(tmp_path, version):
    """As Zarr's fill value beside names of the axes in format 2, as base64 of a double in format 3."""
    group = zarr.open_group(tmp_path / "s.zarr", mode="w", zarr_format=version)
    array = group.create_array(
        "x", shape=(6, 2), dtype="f8", chunks=(2, 2), fill_value=4 if version == 2 else 0
    )
    array[:] = STORED
    given = {"_ARRAY_DIMENSIONS": ["n", "f"]} if version == 2 else {}
    array.attrs.update(given or {"_FillValue": base64.b64encode(struct.pack("<d", 4)).decode()})
    np.testing.assert_array_equal(values_of(tmp_path / "s.zarr"), GAP)


def test_a_fill_value_of_plain_zarr_is_a_value(tmp_path):
    group = zarr.open_group(tmp_path / "s.zarr", mode="w", zarr_format=2)
    group.create_array("x", shape=(6, 2), dtype="f8", chunks=(2, 2), fill_value=4)[:] = STORED
    np.testing.assert_array_equal(values_of(tmp_path / "s.zarr"), STORED)


def test_rows_that_netcdf_never_wrote_are_gaps_and_told(tmp_path, caplog):
    with h5py.File(tmp_path / "t.nc", "w") as file:
        x = file.create_dataset("x", (6, 2), "i2", chunks=(2, 2), fillvalue=-9999)
        x[:4] = STORED[:4]
        x.attrs["_FillValue"] = np.int16(-9999)
    assert np.isnan(values_of(tmp_path / "t.nc")).sum() == 4
    assert "4 values were never written and are missing values" in caplog.text


def test_labels_with_a_gap_stay_labels_and_their_row_is_left_out(tmp_path, caplog):
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file["x"] = STORED.astype("f4")
        file["y"] = np.array([0, 1, -1, 1, 0, 1], "i1")
        file["y"].attrs["_FillValue"] = np.int8(-1)
    manifest = ep3stream.convert(tmp_path / "t.h5", tmp_path / "s", ConvertConfig(shuffle=False))
    assert manifest.class_names == ("0", "1")
    assert manifest.splits["train"].n_rows == 5
    assert "target 'y': 1 rows without a value are left out" in caplog.text


@pytest.mark.parametrize("suffix", [".nc", ".nc4", ".h5ad"])
def test_hdf5_under_the_names_of_others_is_read(tmp_path, suffix):
    with h5py.File(tmp_path / f"t{suffix}", "w") as file:
        file["X"], file["obs/y"] = STORED * 1.0, np.arange(6) / 4
    x, y = (f"{tmp_path}/t{suffix}:/{name}" for name in ("X", "obs/y"))
    manifest = ep3stream.convert(None, tmp_path / "s", x_file=x, y_file=y)
    assert manifest.splits["train"].n_rows == 6


@pytest.mark.parametrize("has_its_own", [False, True])
def test_a_virtual_dataset_that_lacks_the_attributes_of_its_sources_is_told(tmp_path, has_its_own, caplog):
    for number in range(2):
        with h5py.File(tmp_path / f"p{number}.nc", "w") as file:
            file["x"] = STORED.astype("i2")
            file["x"].attrs["scale_factor"] = 0.5
    layout = h5py.VirtualLayout((12, 2), "i2")
    for number in range(2):
        layout[6 * number : 6 * number + 6] = h5py.VirtualSource(f"p{number}.nc", "x", (6, 2))
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
        file["x"].attrs.update({"scale_factor": 0.5} if has_its_own else {})
    np.testing.assert_array_equal(values_of(tmp_path / "t.h5")[6:], STORED * (0.5 if has_its_own else 1))
    assert caplog.text.count("attributes that the virtual dataset lacks (scale_factor 0.5)") == (
        not has_its_own
    )


# Holes.

N_ROWS, WRITTEN = 20_000, 100


def reserved_npy(path: Path) -> None:
    array = np.lib.format.open_memmap(path.with_suffix(".npy"), "w+", "f8", (N_ROWS, 2))
    array[:WRITTEN] = 1
    array.flush()


def contiguous_hdf5(path: Path) -> None:
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        file.create_dataset("x", (N_ROWS, 2), "f8")[:WRITTEN] = 1
        file["behind"] = [1.0]


def cut_and_made_longer(path: Path) -> None:
    np.save(path.with_suffix(".npy"), np.ones((N_ROWS, 2)))
    n_bytes = path.with_suffix(".npy").stat().st_size
    os.truncate(path.with_suffix(".npy"), 4096)
    os.truncate(path.with_suffix(".npy"), n_bytes)


def external(path: Path) -> None:
    with path.with_suffix(".bin").open("wb") as raw:
        raw.truncate(N_ROWS * 16)
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        file.create_dataset("x", (N_ROWS, 2), "f8", external=[(f"{path}.bin", 0, N_ROWS * 16)])


HOLES = {each.__name__: each for each in (reserved_npy, contiguous_hdf5, cut_and_made_longer, external)}


@pytest.mark.parametrize("write", HOLES.values(), ids=HOLES)
def test_bytes_that_were_never_written_are_told_and_their_zeros_are_not(tmp_path, write, caplog):
    with (tmp_path / "probe").open("wb") as probe:
        probe.truncate(1 << 20)
    if hole_bytes(tmp_path / "probe", 0, 1 << 20) != 1 << 20:
        pytest.skip("this file system keeps no holes")
    write(tmp_path / "x")
    (path,) = (file for file in tmp_path.iterdir() if file.suffix in (".npy", ".h5"))
    open_row_array(path, "x")
    assert "bytes were never written, or are zeros that were left out of the file" in caplog.text
    assert f"of its {N_ROWS * 16} bytes" in caplog.text


def test_zeros_that_were_written_are_not_told(tmp_path, caplog):
    np.save(tmp_path / "x.npy", np.zeros((N_ROWS, 2)))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = np.zeros((N_ROWS, 2))
    for name in ("x.npy", "x.h5"):
        open_row_array(tmp_path / name, "x")
    assert not caplog.records


def test_holes_are_counted_within_the_range_alone(tmp_path):
    block = 1 << 16
    with (tmp_path / "f").open("wb") as file:
        file.write(b"x" * block)
        file.seek(3 * block)
        file.write(b"x" * block)
        file.truncate(5 * block)
    counts = [
        hole_bytes(tmp_path / "f", a * block, b * block) for a, b in ((0, 5), (0, 1), (0, 2), (1, 3), (4, 9))
    ]
    assert counts == [3 * block, 0, block, 2 * block, block]
