"""What a conversion cannot take, told in one line with the file, the row or column, and what to do; nothing is left."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as pa_feather
import pyarrow.parquet as pq
import pytest

from ep3stream import cli
from ep3stream.store.reader import open_store

Run = Callable[..., tuple[int, str]]
Table = str | bytes | dict[str, Any]
Y = ["--target", "y"]
SMALL = ["--memory", "16KiB", "--segment-bytes", "4KiB"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command; returns its exit code and what it said."""

    def run(*arguments: object) -> tuple[int, str]:
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    return run


def write(directory: Path, name: str, content: Table) -> Path:
    """Text, bytes, the columns of a Parquet or Feather file, or the arrays of a .npz."""
    path = directory / name
    if not isinstance(content, dict):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    else:
        table = pa.table(content)
        (pq.write_table if path.suffix == ".parquet" else pa_feather.write_feather)(table, path)
    return path


def require_refusal(run: Run, inputs: list[Path], arguments: list[object], *words: str) -> None:
    """Exit code 2, one line with these words, and no file but the inputs."""
    (directory,) = {path.parent for path in inputs}
    code, said = run("convert", *SMALL, *arguments, directory / "store.zarr")
    assert code == 2
    assert said.startswith("ep3stream: ")
    assert said.count("\n") == 1
    for word in words:
        assert word in said
    assert sorted(path.name for path in directory.iterdir()) == sorted(path.name for path in inputs)


def rows(n_rows: int, last: str = "", first: str = "a,y", zeros: str = "") -> str:
    """A table whose last row is this one, behind enough rows to be spilled."""
    return "\n".join([first, *(f"{i}{zeros},{i % 7}" for i in range(n_rows)), last])


def packed(text: str, codec: str) -> bytes:
    return gzip.compress(text.encode()) if codec == "gz" else pa.compress(text.encode(), "zstd", asbytes=True)


def arrow_bytes(save: Callable[[pa.Table, Any], Any]) -> bytes:
    file = io.BytesIO()
    save(pa.table({"a": np.arange(3000.0), "y": np.arange(3000.0)}), file)
    return file.getvalue()


def npz_bytes() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x=np.random.default_rng(0).normal(size=(500, 2)), y=np.arange(500.0))
    return file.getvalue()


MANY = 4000
STOP = ["--missing", "error"]
TABLES: dict[str, tuple[str, Table, list[str], tuple[str, ...]]] = {
    "empty file": ("t.csv", "", Y, ("t.csv: is empty", "give a file with data")),
    "header only": ("t.csv", "a,y\n", Y, ("t.csv: has a header but no rows", "give a file with data")),
    "ragged row": ("t.csv", rows(MANY, "5\n"), Y, ("t.csv: row 4001 has 1 fields but the header 2", "correct")),
    "text": (
        "t.csv", rows(MANY, "n/a?,1\n"), Y,
        ("t.csv: column 'a', row 4001", "'n/a?' is no number", "--invalid drop", "--category a"),
    ),
    # Behind the first block that is read for the types of the columns, of 4 MiB.
    "late text": (
        "t.csv", rows(25_000, "n/a?,1\n", zeros="." + 180 * "0"), [*Y, "--memory", "1MiB"],
        ("t.csv: column 'a', row 25001", "'n/a?'", "correct"),
    ),
    "NaN": ("t.csv", rows(MANY, "nan,1\n"), [*Y, *STOP], ("t.csv: column 'a', row 4001", "missing", "--missing")),
    "infinite": ("t.csv", rows(MANY, "inf,1\n"), Y, ("column 'a', row 4001", "not finite (inf)", "correct it")),
    "NaN target": ("t.csv", rows(MANY, "1,\n"), [*Y, *STOP], ("column 'y', row 4001", "missing")),
    "unknown target": ("t.csv", "a,y\n1,2\n", ["--target", "z"], ("t.csv: there is no column 'z'", "did you mean")),
    "no target": ("t.csv", "a,y\n1,2\n", [], ("t.csv: no target column was chosen", "--target NAME")),
    "one class": ("t.csv", "a,y\n1,x\n2,x\n", Y, ("t.csv: every row has the label 'x' in 'y'", "two classes")),
    "too many classes": (
        "t.csv", "a,y\n" + "".join(f"1,{i}\n" for i in range(10_001)), [*Y, "--task", "classification"],
        ("'y' has more than 10000", "--task regression"),
    ),
    "no rows after drop": (
        "t.csv", "a,y\n,1\n2,\n", [*Y, "--missing", "drop"], ("t.csv: every row has a missing value", "--missing auto"),
    ),
    "garbage": ("t.csv", bytes(range(256)) * 50, Y, ("t.csv: the header cannot be read (holds a NUL", "CSV file")),
    "other garbage": ("t.csv", np.random.default_rng(0).bytes(9000), Y, ("t.csv: the header", "is not UTF-8")),
    "twice a column": ("t.csv", "a,a,y\n1,2,3\n", Y, ("t.csv: has 'a' twice among its columns", "rename one")),
    "too large for float16": (
        "t.csv", rows(MANY, "70000,1\n"), [*Y, "--dtype", "float16"], ("row 4001", "65504", "--dtype float32"),
    ),
    "truncated gz": ("t.csv.gz", packed(rows(MANY), "gz")[:-40], Y, ("t.csv.gz: cannot be read", "damaged")),
    "truncated zst": ("t.csv.zst", packed(rows(MANY), "zst")[:-40], Y, ("t.csv.zst: cannot be read", "damaged")),
    "truncated parquet": ("t.parquet", arrow_bytes(pq.write_table)[:-99], Y, ("t.parquet: cannot be read", "damaged")),
    "truncated feather": ("t.feather", arrow_bytes(pa_feather.write_feather)[:-99], Y, ("t.feather: cannot be read",)),
    "truncated npz": ("t.npz", npz_bytes()[:-99], [], ("t.npz: cannot be read", "damaged")),
    "infinite in parquet": ("t.parquet", {"a": [1.0, np.inf], "y": [1, 2]}, Y, ("t.parquet: column 'a', row 2",)),
    "text in an array": ("t.npz", {"x": np.array([["a"]]), "y": [1]}, [], ("t.npz:x: holds <U1, not numbers",)),
    "different lengths": (
        "t.npz", {"x": np.zeros((3, 1)), "y": np.zeros(4)}, [], ("x has 3 rows", "y has 4", "matching pair"),
    ),
    "spaces and unicode": ("Übung 1 ☃.csv", "a,y\n1,x\n2,\n", [*Y, *STOP], ("Übung 1 ☃.csv: column 'y', row 2",)),
    "another kind": ("t.xlsx", "PK", Y, ("t.xlsx: is none of .csv", "convert it first")),
}  # fmt: skip


@pytest.mark.parametrize("order", ["--shuffle", "--no-shuffle"])
@pytest.mark.parametrize("name", TABLES)
def test_bad_input_is_one_line_with_its_place_and_remedy_and_leaves_nothing(
    tmp_path: Path, run: Run, name: str, order: str
) -> None:
    file, content, arguments, words = TABLES[name]
    path = write(tmp_path, file, content)
    require_refusal(run, [path], [path, *arguments, order], *words)


def test_a_missing_or_unreadable_file_is_named(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "t.csv", "a,y\n1,2\n")
    require_refusal(run, [path], [tmp_path / "u.csv", *Y], "u.csv: there is no such file", "check the name")
    require_refusal(run, [path], [tmp_path / "u*.csv", *Y], "u*.csv: matches no file", "check the pattern")

    opened = Path.open

    def refuse(file: Path, *arguments: Any, **options: Any) -> Any:
        if file == path:
            raise PermissionError(13, "Permission denied")
        return opened(file, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    require_refusal(run, [path], [path, *Y], "t.csv: may not be read", "permissions")


def test_a_directory_without_tables_is_named(tmp_path: Path, run: Run) -> None:
    (tmp_path / "in").mkdir()
    require_refusal(run, [tmp_path / "in"], [tmp_path / "in", *Y], "in: holds no table", "another directory")


@pytest.mark.parametrize("is_store", [True, False])
def test_a_destination_that_exists_is_refused_and_kept(tmp_path: Path, run: Run, is_store: bool) -> None:
    path, store = write(tmp_path, "t.csv", "a,y\n1,2\n3,4\n"), tmp_path / "store.zarr"
    if is_store:
        assert run("convert", path, store, *Y)[0] == 0
    else:
        store.write_text("mine")
    require_refusal(run, [path, store], [path, *Y], "store.zarr exists", "remove it or choose another name")
    assert is_store or store.read_text() == "mine"


def test_a_destination_that_may_not_be_written_is_named(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    path = write(tmp_path, "t.csv", "a,y\n1,2\n")
    monkeypatch.setattr(Path, "mkdir", refuse)
    require_refusal(run, [path], [path, *Y], "store.zarr cannot be made (Read-only", "choose another place")


@pytest.mark.parametrize("order", ["--shuffle", "--no-shuffle"])
@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_a_full_disk_says_how_to_go_on_and_the_same_command_then_does(
    tmp_path: Path, run: Run, suffix: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    path, store = write(tmp_path, "t.csv", rows(MANY)), tmp_path / f"store.{suffix}"
    command = ["convert", path, store, *Y, *SMALL, order]
    with monkeypatch.context() as patch:
        patch.setattr("ep3stream.conversion.spill._write_section", refuse)
        patch.setattr("ep3stream.store.zarr_store.ZarrWriter.write", refuse)
        code, said = run(*command)
    assert code == 2
    assert said.count("\n") == 1
    assert "No space left" in said
    assert "free space" in said
    assert "run the same command to go on" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{store.name}.convert", "t.csv"]
    assert run(*command)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [store.name, "t.csv"]


def test_class_ids_beyond_32_bits_are_classes_like_any_other(tmp_path: Path, run: Run) -> None:
    labels = np.array([2**31, 2**40 + 1, -(2**62), 2**31], np.int64)
    path = write(tmp_path, "t.npz", {"x": np.arange(4.0)[:, None], "y": labels})
    assert run("convert", path, tmp_path / "store", "--no-shuffle")[0] == 0
    with open_store(tmp_path / "store") as store:
        assert store.manifest.class_names == (str(-(2**62)), str(2**31), str(2**40 + 1))
        assert store.split("train").read_segment(0)[1].tolist() == [1, 2, 0, 1]


LIKE = {
    "missing column": ("a,y\n1,no\n", ("other.csv", "'color'")),
    "new category": ("a,color,y\n1,pink,no\n", ("other.csv: column 'color', row 1", "'pink'")),
    "new class": ("a,color,y\n1,red,maybe\n", ("other.csv: column 'y', row 1", "'maybe'")),
    "text for numbers": ("a,color,y\nx,red,no\n", ("other.csv: column 'a', row 1", "'x'")),
}


@pytest.mark.parametrize("name", LIKE)
def test_a_table_unlike_the_store_it_shall_match_is_refused(tmp_path: Path, run: Run, name: str) -> None:
    (tmp_path / "first").mkdir()
    first = write(tmp_path / "first", "t.csv", "a,color,y\n1,red,no\n2,blue,yes\n")
    like = tmp_path / "first" / "like.zarr"
    assert run("convert", first, like, *Y)[0] == 0
    other = write(tmp_path, "other.csv", LIKE[name][0])
    require_refusal(run, [tmp_path / "first", other], [other, "--like", like], *LIKE[name][1])
