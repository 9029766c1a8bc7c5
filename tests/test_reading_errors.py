"""An error of a reader is told as damage of the file; an error of this package's own code is not taken for one."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ep3stream
from ep3stream import ConvertConfig
from ep3stream.conversion import encode
from ep3stream.conversion.offsets import ColumnOffsets
from ep3stream.errors import SourceError
from ep3stream.formats.source import reading
from ep3stream.formats.svmlight import parse_svmlight

FILE = Path("rows.bin")


def of_ours(error: Exception) -> None:
    """As if a function of the package raised the error."""
    names: dict[str, Any] = {"__name__": "ep3stream.formats.any", "error": error}
    exec("def fail():\n    raise error", names)
    names["fail"]()  # The last frame is the package's.


def of_numpy_for_us() -> None:
    """A function of NumPy, in C, that the package's code calls wrongly."""
    names: dict[str, Any] = {"__name__": "ep3stream.formats.any", "np": np}
    exec("def fail():\n    np.fmin.reduceat(np.ones(3), [7])", names)
    names["fail"]()


OURS = (
    IndexError(3),
    KeyError("a"),
    TypeError("no"),
    AttributeError("x"),
    ValueError("shape"),
    RuntimeError("no"),
)


@pytest.mark.parametrize("error", OURS, ids=lambda error: type(error).__name__)
def test_an_error_of_our_own_is_no_damage(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, reading(FILE):
        of_ours(error)
    assert caught.value is error


def test_a_wrong_call_of_numpy_is_no_damage() -> None:
    with pytest.raises(IndexError), reading(FILE):
        of_numpy_for_us()


DAMAGE = (
    OSError(5, "I/O"),
    EOFError("ends"),
    zlib.error("crc"),
    BadZipFile("no zip"),
    struct.error("short"),
    pa.ArrowInvalid("no"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    MemoryError("a header asks for 8 EiB"),
)


@pytest.mark.parametrize("error", DAMAGE, ids=lambda error: type(error).__name__)
def test_what_a_file_alone_is_the_cause_of_is_damage_wherever_it_is_raised(error: Exception) -> None:
    with pytest.raises(SourceError, match=r"^rows\.bin: cannot be read .*damaged"), reading(FILE):
        of_ours(error)


READERS: dict[str, Callable[[Path], object]] = {
    "json": lambda file: json.loads("{"),
    "npy": lambda file: np.load(file),
    "hdf5": lambda file: h5py.File(file)["nothing"],
    "parquet": lambda file: pq.read_table(file),
    "pandas": lambda file: pd.read_csv(file, usecols=["nothing"]),
}


@pytest.mark.parametrize("name", READERS)
def test_any_error_within_a_reader_is_damage(tmp_path: Path, name: str) -> None:
    file = tmp_path / "rows.bin"
    file.write_bytes(b"\x93NUMPY\x01\x00\x04\x00{{{}")
    if name == "hdf5":
        h5py.File(file, "w").close()
    with pytest.raises(SourceError, match="damaged"), reading(file):
        READERS[name](file)


def test_an_error_of_an_iterator_of_the_users_names_the_object(tmp_path: Path) -> None:
    def batches() -> Iterator[Any]:
        yield np.ones((3, 2)), np.ones(3)
        raise KeyError("theirs")

    with pytest.raises(SourceError, match=r"batches: cannot be read .KeyError: .theirs.*correct it"):
        ep3stream.convert(batches, tmp_path / "s.zarr")


def broken(*_: object) -> None:
    of_ours(IndexError("index 27 out-of-bounds in fmin.reduceat [0, 27)"))


@pytest.mark.parametrize(
    ("owner", "name"), [(ColumnOffsets, "check"), (encode, "missing_cells"), (encode.DistinctValues, "only")]
)
def test_an_error_of_the_encoder_is_raised_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    rows = "\n".join(
        f"{row},{'' if row == 3 else row},t{row % 3},{'' if row == 5 else row}" for row in range(20)
    )
    (tmp_path / "t.csv").write_text("a,b,c,y\n" + rows)
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(IndexError, match="out-of-bounds"):
        ep3stream.convert(tmp_path / "t.csv", tmp_path / "s.zarr", ConvertConfig(target="y"))


def test_an_error_of_the_parser_of_a_table_is_raised_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.svm").write_text("1 1:2 3:4\n2 1:5\n")
    monkeypatch.setattr(f"{parse_svmlight.__module__}._Block", broken)
    with pytest.raises(IndexError, match="out-of-bounds"):
        ep3stream.convert(tmp_path / "t.svm", tmp_path / "s.zarr", ConvertConfig())


def test_a_text_that_is_no_utf8_is_damage_that_names_the_file(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(struct.pack("3i", 0, 1, 2)), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"c": bad, "y": [1.0, 2.0]}), tmp_path / "t.parquet")
    with pytest.raises(SourceError, match=r"t\.parquet: .*(utf-8|UTF)"):
        ep3stream.convert(tmp_path / "t.parquet", tmp_path / "s.zarr", ConvertConfig(target="y"))
    assert not list(tmp_path.glob(".*"))
