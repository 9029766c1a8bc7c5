"""Every source format, both store formats, in every order: each row arrives exactly once and whole."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dask.array as da
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.feather as pa_feather
import pyarrow.parquet as pq
import pytest
import zarr

from ep3stream.config import ConvertConfig, Format
from ep3stream.conversion.convert import convert
from ep3stream.conversion.rows import EncodedRows, RowLayout
from ep3stream.conversion.spill import Spill
from ep3stream.store.reader import open_store

N_ROWS = 700
IDS = np.arange(N_ROWS)
# Whole numbers, so that idx can hold them; with zeros, so that svmlight leaves some out; exact in float32.
X = np.column_stack([IDS, -IDS, IDS % 5]).astype(np.float32)
Y = IDS.astype(np.float32)
TABLE = pa.table({"x0": X[:, 0], "x1": X[:, 1], "x2": X[:, 2], "y": Y})
CONFIG = ConvertConfig(task="regression", segment_bytes=4096, memory_bytes=4 * 4096)
HALVES = {"train": 0.5, "test": 0.5}
BATCHES = [(X[i : i + 90], Y[i : i + 90]) for i in range(0, N_ROWS, 90)]


@dataclass(frozen=True, slots=True)
class Source:
    """Arguments of `convert`; tables have their target by name."""

    source: Any = None
    x_file: Path | str | None = None
    y_file: Path | str | None = None
    target: str | None = None


def csv_text(delimiter: str = ",") -> bytes:
    file = io.BytesIO()
    pa_csv.write_csv(TABLE, file, pa_csv.WriteOptions(delimiter=delimiter, quoting_style="none"))
    return file.getvalue()


def table_file(path: Path, data: bytes) -> Source:
    path.write_bytes(data)
    return Source([path], target="y")


def csv_in_zip(path: Path) -> Source:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in/table.csv", csv_text())
    return Source([path], target="y")


def parquet_directory(path: Path) -> Source:
    """Two files of several row groups each, one in a directory of its own."""
    (path / "later").mkdir(parents=True)
    pq.write_table(TABLE.slice(0, 300), path / "1.parquet", row_group_size=110)
    pq.write_table(TABLE.slice(300), path / "later" / "2.parquet", row_group_size=77)
    return Source([path], target="y")


def feather(path: Path) -> Source:
    pa_feather.write_feather(TABLE, path, chunksize=64)
    return Source([path], target="y")


def arrow_stream(path: Path) -> Source:
    with pa.ipc.new_stream(path, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=64)
    return Source([path], target="y")


def npy_pair(directory: Path) -> Source:
    directory.mkdir()
    np.save(directory / "x.npy", X)
    np.save(directory / "y.npy", Y)
    return Source(x_file=directory / "x.npy", y_file=directory / "y.npy")


def npz(path: Path, save: Callable[..., None]) -> Source:
    save(path, x=X, y=Y)
    return Source(path)


def hdf5_arrays(path: Path) -> Source:
    with h5py.File(path, "w") as file:
        file.create_dataset("in/x", data=X, chunks=(50, 2), compression="gzip")
        file.create_dataset("in/labels", data=Y)
    return Source(x_file=f"{path}:/in/x", y_file=f"{path}:/in/labels")


def zarr_group(path: Path) -> Source:
    group = zarr.create_group(path)
    group.create_array("x", data=X, chunks=(50, 2), shards=(100, 4))
    group.create_array("y", data=Y, chunks=(64,))
    return Source(path)


def idx_pair(directory: Path) -> Source:
    """As MNIST has it: images of (rows, 1, 3), here as big-endian int32."""
    directory.mkdir()
    files = directory / "rows-idx3-int.gz", directory / "labels-idx1-int.gz"
    for file, array in zip(files, (X.reshape(-1, 1, 3), Y), strict=True):
        sizes = np.array(array.shape, ">i4").tobytes()
        file.write_bytes(
            gzip.compress(bytes([0, 0, 0x0C, array.ndim]) + sizes + array.astype(">i4").tobytes())
        )
    return Source(x_file=files[0], y_file=files[1])


def svmlight(path: Path) -> Source:
    lines = (
        " ".join([f"{y:g}", *(f"{j}:{value:g}" for j, value in enumerate(row, 1) if value)])
        for row, y in zip(X, Y, strict=True)
    )
    path.write_text("\n".join(lines))
    return Source([path])


def own_split(path: Path) -> Source:
    """The split `train` of a store in order, which holds every row."""
    convert((X, Y), path, replace(CONFIG, shuffle=False))
    return Source(f"{path}:/train" if path.suffix == ".h5" else path / "train")


def dask_pair(_: Path) -> Source:
    return Source((da.from_array(X, chunks=(130, 2)), da.from_array(Y, chunks=90)))


def pandas_frame(_: Path) -> Source:
    return Source(pytest.importorskip("pandas").DataFrame(TABLE.to_pydict()), target="y")


SOURCES: dict[str, Callable[[Path], Source]] = {
    "t.csv": lambda path: table_file(path, csv_text()),
    "t.tsv.gz": lambda path: table_file(path, gzip.compress(csv_text("\t"))),
    "t.csv.zst": lambda path: table_file(path, pa.compress(csv_text(), "zstd", asbytes=True)),
    "t.zip": csv_in_zip,
    "parquet directory": parquet_directory,
    "t.feather": feather,
    "t.arrow": arrow_stream,
    "npy pair": npy_pair,
    "stored.npz": lambda path: npz(path, np.savez),
    "deflated.npz": lambda path: npz(path, np.savez_compressed),
    "arrays.h5": hdf5_arrays,
    "arrays.zarr": zarr_group,
    "idx pair": idx_pair,
    "t.svmlight": svmlight,
    "own.zarr": own_split,
    "own.h5": own_split,
    "numpy pair": lambda _: Source((X, Y)),
    "list of batches": lambda _: Source(BATCHES),
    "function": lambda _: Source(lambda: iter(BATCHES)),
    "iterator": lambda _: Source(iter(BATCHES)),
    "dask pair": dask_pair,
    "pandas": pandas_frame,
    "arrow table": lambda _: Source(TABLE, target="y"),
    "arrow reader": lambda _: Source(TABLE.to_reader(64), target="y"),
}

# Shuffled and split rows go through spill files; those of `straight`, in zarr, from the source into the store.
# These cannot be read again should a number be missing, so their rows go through the sorter.
READ_ONCE = ("iterator", "arrow reader")

WAYS = {
    "shuffled": replace(CONFIG, splits=HALVES),
    "in order": replace(CONFIG, splits=HALVES, shuffle=False),
    "straight": replace(CONFIG, shuffle=False),
}


@pytest.fixture
def n_spills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each spill file that was written."""
    n_rows: list[int] = []
    write = Spill.write

    def note(path: Path, layout: RowLayout, rows: EncodedRows, *others: Any) -> Spill:
        n_rows.append(len(rows))
        return write(path, layout, rows, *others)

    monkeypatch.setattr(Spill, "write", note)
    return n_rows


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("format", ["zarr", "hdf5"])
@pytest.mark.parametrize("name", SOURCES)
def test_every_row_of_every_format_arrives_exactly_once_and_whole(
    tmp_path: Path, n_spills: list[int], name: str, format: Format, way: str
) -> None:
    given = SOURCES[name](tmp_path / name)
    n_spills.clear()
    config = replace(WAYS[way], format=format, target=given.target)
    manifest = convert(given.source, tmp_path / "out", config, x_file=given.x_file, y_file=given.y_file)
    seen = []
    with open_store(tmp_path / "out") as store:
        for split, info in manifest.splits.items():
            x, y = store.split(split).read_rows(np.arange(info.n_rows))
            ids = y[:, 0].astype(int)
            np.testing.assert_array_equal(x, X[ids])
            np.testing.assert_array_equal(y[:, 0], Y[ids])
            assert config.shuffle != bool(np.all(np.diff(ids) > 0))
            seen.append(ids)
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), IDS)
    assert set(manifest.splits) == set(config.splits)
    assert sum(info.n_rows for info in manifest.splits.values()) == N_ROWS
    if (way, format) == ("straight", "zarr") and name not in READ_ONCE:
        assert n_spills == []
    else:
        assert len(n_spills) > 2
        assert sum(n_spills) == N_ROWS
    assert not (tmp_path / ".out.convert").exists()


def test_the_rows_and_their_order_are_the_same_whatever_format_they_come_in(tmp_path: Path) -> None:
    """A split's rows and places hang on their values and the seed alone."""
    digests = set()
    for name in ("t.csv", "t.feather", "npy pair", "t.svmlight", "list of batches"):
        given = SOURCES[name](tmp_path / name)
        config = replace(WAYS["shuffled"], target=given.target)
        store = tmp_path / f"{name}.out"
        manifest = convert(given.source, store, config, x_file=given.x_file, y_file=given.y_file)
        digests.add(tuple(info.digests for info in manifest.splits.values()))
    assert len(digests) == 1
