from __future__ import annotations

import gzip
import io
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from ep3stream.config import ConvertConfig
from ep3stream.conversion.open_source import open_source
from ep3stream.errors import SourceError
from ep3stream.formats.arrays import open_row_array
from ep3stream.formats.source import START, RestartPosition, RowSource

X = np.random.default_rng(0).standard_normal((57, 3, 2)).astype(np.float32)


def idx(array: np.ndarray) -> bytes:
    codes = {"u1": 8, "i1": 9, "i2": 0xB, "i4": 0xC, "f4": 0xD, "f8": 0xE}
    code = codes[array.dtype.str[1:]]
    header = bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def save_hdf5(path: Path, x: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("group/x", data=x, chunks=(10, *x.shape[1:]), compression="gzip", fletcher32=True)
    return Path(f"{path}:/group/x")


def save_zarr(path: Path, x: np.ndarray) -> Path:
    group = zarr.open_group(path, mode="w")
    array = group.create_array("train/x", shape=x.shape, dtype=x.dtype, chunks=(5, *x.shape[1:]),
                               shards=(20, *x.shape[1:]))  # fmt: skip
    array[:] = x
    return path / "train" / "x"


def saved(save: Callable[..., Any]) -> Callable[[Path, np.ndarray], Path]:
    def save_and_name(path: Path, x: np.ndarray) -> Path:
        save(path, x)
        return path

    return save_and_name


def member(save: Callable[..., Any]) -> Callable[[Path, np.ndarray], Path]:
    def save_and_name(path: Path, x: np.ndarray) -> Path:
        save(path, other=np.zeros(3), inputs=x)
        return Path(f"{path}:inputs")

    return save_and_name


def by_columns(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asfortranarray(array) for name, array in arrays.items()}


SAVERS: dict[str, Callable[[Path, np.ndarray], Path]] = {
    "x.npy": saved(np.save),
    "fortran.npy": saved(lambda path, x: np.save(path, np.asfortranarray(x))),
    "stored.npz": member(np.savez),
    "deflated.npz": member(np.savez_compressed),
    "columns-stored.npz": member(lambda path, **arrays: np.savez(path, **by_columns(arrays))),
    "columns-deflated.npz": member(lambda path, **arrays: np.savez_compressed(path, **by_columns(arrays))),
    "x-idx3-ubyte": saved(lambda path, x: path.write_bytes(idx(x))),
    "x-idx3-ubyte.gz": saved(lambda path, x: path.write_bytes(gzip.compress(idx(x)))),
    "x.h5": save_hdf5,
    "x.zarr": save_zarr,
}


def rows_of(source: RowSource, block_bytes: int = 1 << 20, start: RestartPosition = START) -> tuple[Any, Any]:
    batches = list(source.batches(block_bytes, start))
    return (
        np.concatenate([np.hstack([p.reshape(b.n_rows, -1) for p in b.numeric]) for b in batches]),
        np.concatenate([np.asarray(b.target) for b in batches]),
    )


@pytest.mark.parametrize("name", SAVERS)
@settings(max_examples=12)
@given(block_rows=st.integers(1, 70), start_row=st.integers(0, 56))
def test_any_block_size_and_any_start_give_the_same_rows(
    tmp_path: Path, name: str, block_rows: int, start_row: int
) -> None:
    array = open_row_array(SAVERS[name](tmp_path / name, X), "x")
    assert (array.shape, array.dtype.newbyteorder("=")) == (X.shape, X.dtype)
    blocks, ends = zip(*array.blocks(block_rows, start_row), strict=True)
    np.testing.assert_array_equal(np.concatenate(blocks), X[start_row:])
    assert max(map(len, blocks)) <= block_rows
    assert list(ends) == sorted(ends)
    assert all(file.is_dir() or ends[-1] <= file.stat().st_size for file in array.files)


@pytest.mark.parametrize(
    "name", ["x.npy", "stored.npz", "deflated.npz", "x-idx3-ubyte", "x-idx3-ubyte.gz", "x.h5"]
)
def test_a_file_truncated_anywhere_is_an_error_and_never_fewer_rows(tmp_path: Path, name: str) -> None:
    path = SAVERS[name](tmp_path / name, X)
    data = (tmp_path / name).read_bytes()
    for end in np.linspace(0, len(data) - 1, 40).astype(int):
        (tmp_path / name).write_bytes(data[:end])
        with pytest.raises(SourceError, match=name):
            list(open_row_array(path, "x").blocks(10, 0))


def test_a_stored_array_longer_than_its_header_says_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(X) + b"more"))
    with pytest.raises(SourceError, match="holds more than its header says"):
        list(open_row_array(path, "x").blocks(100, 0))


@pytest.mark.parametrize("name", ["deflated.npz", "x-idx3-ubyte.gz", "x.h5"])
def test_a_flipped_byte_never_changes_a_value_silently(tmp_path: Path, name: str) -> None:
    path = SAVERS[name](tmp_path / name, X)
    data = bytearray((tmp_path / name).read_bytes())
    found = 0
    for place in np.linspace(len(data) // 4, len(data) * 3 // 4, 30).astype(int):
        data[place] ^= 0x10
        (tmp_path / name).write_bytes(data)
        try:
            blocks = [block for block, _ in open_row_array(path, "x").blocks(10, 0)]
        except SourceError:
            found += 1
        else:
            np.testing.assert_array_equal(np.concatenate(blocks), X)
        data[place] ^= 0x10
    assert found


def test_mnist_like_files_are_flattened_and_keep_their_values(tmp_path: Path) -> None:
    images = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(5, dtype=np.uint8))))
    source = open_source(
        None,
        ConvertConfig(),
        tmp_path / "train-images-idx3-ubyte.gz",
        tmp_path / "train-labels-idx1-ubyte.gz",
    )
    x, y = rows_of(source, block_bytes=20)
    np.testing.assert_array_equal(x, images.reshape(5, 12))
    assert (y.tolist(), source.target.kind, source.label_values) == ([*range(5)], "integer", (0, 1, 2, 3, 4))


@pytest.mark.parametrize("name", ["d.npz", "d.h5", "d.zarr"])
def test_one_file_may_hold_both_arrays(tmp_path: Path, name: str) -> None:
    path, y = tmp_path / name, np.arange(57.0)
    if name == "d.npz":
        np.savez(path, x=X, y=y)
    elif name == "d.h5":
        with h5py.File(path, "w") as file:
            file["x"], file["y"] = X, y
    else:
        group = zarr.open_group(path, mode="w")
        group["x"], group["y"] = X, y
    source = open_source(path, ConvertConfig())
    x_read, y_read = rows_of(source, 100)
    np.testing.assert_array_equal(x_read, X.reshape(57, 6))
    np.testing.assert_array_equal(y_read[:, 0], y)
    assert len(source.files) == (2 if name == "d.zarr" else 1)


def test_x_and_y_may_be_of_different_formats_with_other_chunks(tmp_path: Path) -> None:
    x = SAVERS["x.zarr"](tmp_path / "x.zarr", X)
    np.savez_compressed(tmp_path / "y.npz", labels=np.arange(57) % 3)
    source = open_source([], ConvertConfig(), x, tmp_path / "y.npz:labels")
    x_read, y_read = rows_of(source, 7 * 24)
    np.testing.assert_array_equal(x_read, X.reshape(57, 6))
    np.testing.assert_array_equal(y_read, np.arange(57) % 3)
    (*_, last) = source.batches(7 * 24)
    assert last.next == RestartPosition(0, 57)
    np.testing.assert_array_equal(rows_of(source, 99, RestartPosition(0, 31))[1], (np.arange(57) % 3)[31:])


def test_columns_are_chosen_and_renamed(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, y=np.arange(57.0))
    config = ConvertConfig(columns=["x4", "x0"], rename={"x0": "first", "y": "out"})
    source = open_source(tmp_path / "d.npz", config)
    assert [column.name for column in source.columns] == ["x4", "first"]
    assert source.target.names == ("out",)
    np.testing.assert_array_equal(rows_of(source)[0], X.reshape(57, 6)[:, [4, 0]])


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no member": (lambda d: (np.savez(d / "x.npz", a=X), d / "x.npz")[1], "has no array 'x'; name one of a"),
    "no dataset": (lambda d: save_hdf5(d / "x.h5", X) and Path(f"{d}/x.h5:/other"), "has no array '/other'"),
    "no such file": (lambda d: d / "x.npy", "no such file"),
    "another format": (lambda d: (d / "x.mat").write_bytes(b"x") and d / "x.mat", "is no .npy"),
    "no idx": (lambda d: (d / "x-idx1-ubyte").write_bytes(b"hello") and d / "x-idx1-ubyte", "is no idx file"),
    "objects": (
        lambda d: (np.save(d / "x.npy", np.array([None]), allow_pickle=True), d / "x.npy")[1],
        "holds object, not numbers",
    ),
    "text": (lambda d: (np.save(d / "x.npy", np.array(["a"])), d / "x.npy")[1], "holds <U1, not numbers"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_what_is_no_array_is_refused_by_name(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(SourceError, match=message) as caught:
        open_row_array(path, "x")
    assert "x" in str(caught.value)


def test_rows_of_hdf5_that_were_never_written_are_no_zeros(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        written = file.create_dataset("x", (30, 2), "f4", chunks=(10, 2))
        written[:20] = 1
    with pytest.raises(SourceError, match="/x: it lacks 1 of its 3 chunks, the first at row 21"):
        open_row_array(tmp_path / "x.h5", "x")


def npz_of(path: Path, members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in members:
            archive.writestr(name, content)


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version)
    return stream.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_flipped_byte_of_any_npz_is_never_data(
    tmp_path: Path, save: Callable[..., Any], order: str
) -> None:
    x = X.reshape(57, 6).round(1).copy(order=order)
    save(tmp_path / "x.npz", x=x)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    for place in range(0, len(data), 7):
        data[place] ^= 0x10
        (tmp_path / "x.npz").write_bytes(data)
        try:
            rows = np.concatenate(
                [block for block, _ in open_row_array(tmp_path / "x.npz", "x").blocks(9, 0)]
            )
        except SourceError:
            pass
        else:
            np.testing.assert_array_equal(rows, x)
        data[place] ^= 0x10


NPZ: dict[str, tuple[list[tuple[str, bytes]], str | None]] = {
    "in a folder": ([("train/x.npy", npy(X))], None),
    "beside a folder": ([("train/", b""), ("train/x.npy", npy(X))], None),
    "another member of the name": ([("x.npy", npy(X)), ("train/x.npy", npy(X))], None),
    "version 2 of the header": ([("train/x.npy", npy(X, (2, 0)))], None),
    "version 3 of the header": ([("train/x.npy", npy(X, (3, 0)))], None),
    "big-endian": ([("train/x.npy", npy(X.astype(">f4")))], None),
    "twice": ([("train/x.npy", npy(X)), ("train/x.npy", npy(X + 1))], "has 2 arrays called 'train/x'"),
    "with a suffix and without": ([("train/x.npy", npy(X)), ("train/x", npy(X + 1))], "has 2 arrays called"),
    "longer than its header": ([("train/x.npy", npy(X) + b"more")], "holds more than its header says"),
    "shorter than its header": ([("train/x.npy", npy(X)[:-4])], "truncated|early"),
    "no array": ([("train/x.npy", b"hello, world")], "cannot be read"),
    "records": ([("train/x.npy", npy(np.zeros(5, [("a", "f4"), ("b", "i4")])))], "holds records of a, b, not numbers"),
    "dates": ([("train/x.npy", npy(np.zeros(5, "M8[s]")))], r"holds datetime64\[s\], not numbers"),
    "complex": ([("train/x.npy", npy(np.zeros(5, "c8")))], "holds complex64"),
    "void": ([("train/x.npy", npy(np.zeros(5, "V3")))], r"holds \|V3"),
}  # fmt: skip


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@pytest.mark.parametrize(("members", "message"), NPZ.values(), ids=NPZ)
def test_npz_members_are_read_or_refused_in_one_line(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str | None, compression: int
) -> None:
    npz_of(tmp_path / "x.npz", members, compression)
    path = Path(f"{tmp_path}/x.npz:train/x")
    if message is None:
        rows = np.concatenate([block for block, _ in open_row_array(path, "x").blocks(9, 0)])
        np.testing.assert_array_equal(rows, X)
    else:
        with pytest.raises(SourceError, match=message):
            list(open_row_array(path, "x").blocks(9, 0))


def test_packed_columns_that_the_temporary_disk_cannot_take_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=np.asfortranarray(X))
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("ep3stream.formats.arrays.shutil.disk_usage", lambda path: usage)
    with pytest.raises(SourceError, match=r"takes 1368 bytes unpacked, but .* has 100 free; set TMPDIR"):
        list(open_row_array(tmp_path / "x.npz", "x").blocks(9, 0))


def test_packed_columns_leave_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    np.savez_compressed(tmp_path / "x.npz", x=np.asfortranarray(X))
    blocks = open_row_array(tmp_path / "x.npz", "x").blocks(9, 0)
    next(blocks)
    assert not list((tmp_path / "tmp").iterdir())
    np.testing.assert_array_equal(np.concatenate([block for block, _ in blocks]), X[9:])


def test_an_encrypted_npz_is_told_as_such(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(SourceError, match="is encrypted; save it without a password"):
        open_row_array(tmp_path / "x.npz", "x")


@pytest.mark.parametrize("name", ["x.npy", "x-idx3-ubyte"])
def test_bytes_behind_an_array_are_refused(tmp_path: Path, name: str) -> None:
    path = SAVERS[name](tmp_path / name, X)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(SourceError, match="has 4 bytes more than the"):
        open_row_array(path, "x")
