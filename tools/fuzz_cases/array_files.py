"""Arrays: NPY, NPZ, HDF5, Zarr, and those of Python."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dask.array as da
import h5py
import numpy as np
import torch
import zarr
from hypothesis import strategies as st

from fuzz_cases.known_tables import Column, Table
from fuzz_cases.written import Written, choice, cut, seeds

# -- arrays


def arrays_of(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """x (n, d) and y (n,) or (n, c) in the dtypes of the table; NaN, or 0 in whole numbers, for gaps."""

    def matrix(columns: tuple[Column, ...], dtype: str) -> np.ndarray:
        fill = np.nan if np.dtype(dtype).kind == "f" else 0
        made = np.empty((table.n_rows, len(columns)), dtype)
        for j, column in enumerate(columns):
            made[:, j] = np.array([fill if v is None else v for v in column.values], dtype)
        return made

    assert table.dtype is not None and table.y_dtype is not None  # noqa: PT018
    x, y = matrix(table.features, table.dtype), matrix(table.targets, table.y_dtype)
    return x, y[:, 0] if len(table.targets) == 1 else y


@dataclass(frozen=True)
class ArrayWay:
    """NPY, NPZ, HDF5 and Zarr: byte orders, column order, more axes, chunks, packing, shards."""

    format: str = "npy"
    byte_order: str = "<"
    fortran: bool = False
    version: tuple[int, int] = (1, 0)
    packed: bool = False
    chunks: int = 0
    extra_axes: bool = False
    y_column: bool = False
    nested: bool = False
    filters: str = ""
    layout: str = ""
    zarr_format: int = 3
    shards: bool = False
    seed: int = 0

    @classmethod
    def drawn(cls, format: str) -> st.SearchStrategy[ArrayWay]:
        """Any of these ways."""
        return st.builds(
            cls,
            format=st.just(format),
            byte_order=choice("<", ">"),
            fortran=choice(False, True),
            version=choice((1, 0), (2, 0), (3, 0)),
            packed=st.booleans(),
            chunks=choice(0, 1, 3, 7, 16),
            extra_axes=choice(False, True),
            y_column=choice(False, True),
            nested=choice(False, True),
            filters=choice("", "gzip", "lzf", "shuffle", "fletcher32"),
            layout=choice("", "external", "linked", "virtual"),
            zarr_format=st.sampled_from((3, 2)),
            shards=st.booleans(),
            seed=seeds,
        )

    def write(self, table: Table, folder: Path) -> Written:
        """Writes the table below the folder."""
        x, y = arrays_of(table)
        x, y = (array.astype(array.dtype.newbyteorder(self.byte_order)) for array in (x, y))
        if self.extra_axes and x.shape[1] % 2 == 0:
            x = x.reshape(len(x), 2, -1)
        if self.y_column and y.ndim == 1:
            y = y[:, None]
        if self.fortran:
            x, y = np.asfortranarray(x), np.asfortranarray(y)
        options: dict[str, Any] = {"task": "classification" if table.is_classification else "regression"}
        if random.Random(self.seed).random() < 0.5:
            options = {}
        return getattr(self, f"_{self.format}")(replace(table), x, y, folder, options)

    def _npy(self, table: Table, x: np.ndarray, y: np.ndarray, folder: Path, options: Any) -> Written:
        for name, array in (("x", x), ("y", y)):
            with (folder / f"{name}.npy").open("wb") as stream:
                np.lib.format.write_array(stream, array, version=self.version)
        call = {"x_file": folder / "x.npy", "y_file": folder / "y.npy"}
        return Written(lambda: None, table, options, call)

    def _npz(self, table: Table, x: np.ndarray, y: np.ndarray, folder: Path, options: Any) -> Written:
        (np.savez_compressed if self.packed else np.savez)(folder / "t.npz", x=x, y=y, z=np.arange(3))
        if self.nested:
            call = {"x_file": Path(f"{folder / 't.npz'}:x"), "y_file": Path(f"{folder / 't.npz'}:y")}
            return Written(lambda: None, table, options, call)
        return Written(lambda: folder / "t.npz", table, options)

    def _hdf5(self, table: Table, x: np.ndarray, y: np.ndarray, folder: Path, options: Any) -> Written:
        file = folder / "t.h5"
        with h5py.File(file, "w") as opened:
            group = opened.create_group("deep/er") if self.nested else opened
            for name, array in (("x", x), ("y", y)):
                self._dataset(group, name, array, folder)
        if not self.nested:
            return Written(lambda: file, table, options)
        call = {"x_file": Path(f"{file}:/deep/er/x"), "y_file": Path(f"{file}:/deep/er/y")}
        return Written(lambda: None, table, options, call)

    def _dataset(self, group: Any, name: str, array: np.ndarray, folder: Path) -> None:
        """Chunked and packed, whole, in a file of its own, behind a link, or put together from parts."""
        if self.chunks:
            settings: dict[str, Any] = {"chunks": tuple(min(self.chunks, size) for size in array.shape)}
            if self.filters in ("gzip", "lzf"):
                settings["compression"] = self.filters
            elif self.filters in ("shuffle", "fletcher32"):
                settings[self.filters] = True
            group.create_dataset(name, data=array, **settings)
        elif self.layout == "external":
            raw = [(str(folder / f"{name}.raw"), 0, h5py.h5f.UNLIMITED)]
            group.create_dataset(name, array.shape, array.dtype, external=raw)[...] = array
        elif self.layout in ("linked", "virtual"):
            with h5py.File(folder / f"{name}.h5", "w") as other:
                other["data"] = array
            if self.layout == "linked":
                group[name] = h5py.ExternalLink(f"{name}.h5", "/data")
                return
            layout = h5py.VirtualLayout(array.shape, array.dtype)
            layout[...] = h5py.VirtualSource(f"{name}.h5", "data", array.shape, array.dtype)
            group.create_virtual_dataset(name, layout)
        else:
            group.create_dataset(name, data=array)

    def _zarr(self, table: Table, x: np.ndarray, y: np.ndarray, folder: Path, options: Any) -> Written:
        path = folder / "t.zarr"
        root = zarr.open_group(path, mode="w", zarr_format=self.zarr_format)
        for name, array in (("x", x), ("y", y)):
            chunks = tuple(min(self.chunks or 1000, size) for size in array.shape)
            settings: dict[str, Any] = {"chunks": chunks}
            if self.shards and self.zarr_format == 3:
                settings["shards"] = tuple(2 * size for size in chunks)
            if not self.packed:
                settings["compressors"] = None
            if self.fortran:
                settings["order" if self.zarr_format == 2 else "fill_value"] = (
                    "F" if self.zarr_format == 2 else 0
                )
            root.create_array(name, shape=array.shape, dtype=array.dtype, **settings)[...] = array
        # Zarr leaves out chunks of zeros: they may be refused as lost, or told.
        if not self.nested:
            return Written(lambda: path, table, options, may_refuse=(r"chunk|shard",))
        call = {"x_file": path / "x", "y_file": path / "y"}
        return Written(lambda: None, table, options, call, may_refuse=(r"chunk|shard",))


@dataclass(frozen=True)
class PairWay:
    """Arrays of Python: NumPy, masked, views, torch, Dask; batches in lists, functions and iterators."""

    kind: str = "numpy"
    chunks: int = 3
    seed: int = 0

    @classmethod
    def drawn(cls) -> st.SearchStrategy[PairWay]:
        """Any of these ways."""
        kinds = (
            "numpy",
            "masked",
            "view",
            "torch",
            "dask",
            "list",
            "function",
            "iterator",
            "read-only",
            "fortran",
        )
        return st.builds(cls, kind=st.sampled_from(kinds), chunks=choice(3, 1, 7, 1000), seed=seeds)

    def write(self, table: Table, folder: Path) -> Written:
        """Writes the table below the folder."""
        x, y = arrays_of(table)
        options: dict[str, Any] = {"task": "classification" if table.is_classification else "regression"}
        cuts = cut(len(x), -(-len(x) // self.chunks), random.Random(self.seed))
        makers: dict[str, Callable[[], Any]] = {
            "numpy": lambda: (x, y),
            "masked": lambda: (_masked(table.features, x), _masked(table.targets, y)),
            "view": lambda: (np.repeat(x, 2, axis=0)[::2], y[::-1].copy()[::-1]),
            "torch": lambda: (_tensor(x), _tensor(y)),
            "dask": lambda: (da.from_array(x, chunks=(self.chunks, 2)), da.from_array(y, chunks=self.chunks)),
            "list": lambda: [(x[part], y[part]) for part in cuts],
            "function": lambda: lambda: ((x[part], y[part]) for part in cuts),
            "iterator": lambda: iter([(x[part], y[part]) for part in cuts]),
            "read-only": lambda: (_read_only(x), _read_only(y)),
            "fortran": lambda: (np.asfortranarray(x), np.asfortranarray(y)),
        }
        return Written(makers[self.kind], table, options)


def _masked(columns: tuple[Column, ...], array: np.ndarray) -> np.ndarray:
    """With the gaps masked and something else below the mask."""
    mask = np.column_stack([column.gaps for column in columns]).reshape(array.shape)
    return np.ma.masked_array(np.where(mask, array.dtype.type(1), array), mask)


def _tensor(array: np.ndarray) -> Any:
    return torch.from_numpy(np.ascontiguousarray(array))


def _read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array
