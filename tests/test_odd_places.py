"""Stores and sources at places where they cannot be, or which nobody thought of: one line, and nothing is left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr

import ep3stream
from ep3stream import ConvertConfig
from ep3stream.cli import main
from ep3stream.errors import ConfigError, InputError, SourceError

ROWS = "a,c,y\n1,u,1\n2,v,2\n3,u,3\n"
TARGET = ConvertConfig(target="y")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/t.csv").write_text(ROWS)
    return tmp_path / "in/t.csv"


def refused(
    source: Any, store: Any, error: type[InputError], words: str, config: ConvertConfig = TARGET
) -> None:
    with pytest.raises(error, match=words) as caught:
        ep3stream.convert(source, store, config)
    assert "\n" not in str(caught.value)


STORES = {
    "a name that is too long": ("x" * 255, "File name too long"),
    "a NUL byte": ("o\0.zarr", "null byte"),
    "the root": ("/", "has an empty name|exists"),
    "above": ("..", "exists"),
    "below a file": ("in/t.csv/o.zarr", "Not a directory"),
    "the source": ("in/t.csv", "exists"),
    "the directory of the source": ("in", "exists"),
    "a link to nothing": ("link", "exists"),
    "a device": ("/dev/null", "exists"),
    "no disk": ("/proc/o.zarr", "cannot be made"),
}


@pytest.mark.parametrize(("name", "words"), STORES.values(), ids=STORES)
@pytest.mark.parametrize("restart", [False, True])
def test_a_store_that_cannot_be_there_is_refused_in_one_line(tmp_path, table, name, words, restart):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words):
        ep3stream.convert(table, tmp_path / name, TARGET, restart=restart)
    assert sorted(tmp_path.rglob("*")) == before
    assert table.read_text() == ROWS


@pytest.mark.parametrize(
    "name", ["x" * 245, "ü\u200b.zarr", " .zarr", "new\nline.zarr", "-o.zarr", "[a]*.zarr"]
)
def test_a_store_may_have_any_name_that_the_disk_takes(tmp_path, table, name):
    ep3stream.convert(table, tmp_path / name, TARGET)
    with ep3stream.open_store(tmp_path / name) as store:
        assert store.manifest.splits["train"].n_rows == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_a_store_below_the_directory_of_its_source_is_no_source_the_next_time(tmp_path, table, caplog):
    ep3stream.convert(table.parent, table.parent / "o.zarr", TARGET)
    ep3stream.convert(table.parent, table.parent / "p.zarr", TARGET)
    assert "1 file(s) are passed over: o.zarr" in caplog.text
    with ep3stream.open_store(table.parent / "p.zarr") as store:
        assert store.manifest.splits["train"].n_rows == 3


SOURCES = {
    "the text of a table": (ROWS * 100, "File name too long"),
    "a path that is too long": ("/" + "q" * 300 + ".csv", "File name too long"),
    "a NUL byte": ("a\0.csv", "no such file"),
    "an empty path": ("", "a path is empty"),
    "an empty path among others": (["t.csv", ""], "a path is empty"),
    "a frame without columns": (pd.DataFrame(), "there is no column 'y' for --target; no column has a name"),
}


@pytest.mark.parametrize(("source", "words"), SOURCES.values(), ids=SOURCES)
def test_what_no_source_can_be_is_refused_in_one_line(tmp_path, source, words):
    refused(source, tmp_path / "s", SourceError, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["new\nline.csv", "ü.csv", "[a].csv", "a*b.csv", "q?.csv", " .csv", "-x.csv", "t.CSV"]
)
def test_a_source_may_have_any_name_that_the_disk_takes(tmp_path, name):
    (tmp_path / name).write_text(ROWS)
    assert ep3stream.convert(tmp_path / name, tmp_path / "s", TARGET).splits["train"].n_rows == 3


def test_a_file_whose_name_is_not_utf_8_is_not_called_damaged(tmp_path):
    (tmp_path / "\udcff.csv").write_text(ROWS)
    refused(tmp_path / "\udcff.csv", tmp_path / "s", SourceError, "has a name that is not UTF-8; rename it")


def test_a_zip_file_that_holds_a_folder_of_zarr_says_how_it_is_named(tmp_path):
    group = zarr.open_group(tmp_path / "deep.zarr", mode="w")
    group.create_array("x", data=np.ones((3, 2)))
    group.create_array("y", data=np.ones(3))
    shutil.make_archive(str(tmp_path / "s.zarr"), "zip", tmp_path, "deep.zarr")
    inside = f"{tmp_path}/s.zarr.zip:deep.zarr"
    refused(tmp_path / "s.zarr.zip", tmp_path / "o", SourceError, f"name one of {inside}", ConvertConfig())
    assert ep3stream.convert(inside, tmp_path / "o").splits["train"].n_rows == 3


SPLIT_FILES: dict[str, tuple[Any, str]] = {
    "a frame": (pd.DataFrame({"a": [1]}), "is a DataFrame; name files"),
    "arrays": ((np.ones((2, 2)), np.ones(2)), "is a tuple; name files"),
    "None": (None, "is a NoneType; name files"),
    "a number": (5, "is a int; name files"),
    "no file": ([], "has no file for 'test'"),
    "an empty name": ("", "has no file for 'test'"),
    "a list of an empty name": ([""], "has no file for 'test'"),
}


@pytest.mark.parametrize(("files", "words"), SPLIT_FILES.values(), ids=SPLIT_FILES)
def test_split_files_are_files(files, words):
    with pytest.raises(ConfigError, match=words):
        ConvertConfig(target="y", split_files={"test": files})


@pytest.mark.parametrize("arguments", [["", "o.zarr"], ["--x", "", "--y", "y.npy", "o.zarr"]])
def test_an_empty_path_is_not_the_current_directory(tmp_path, table, monkeypatch, capsys, arguments):
    monkeypatch.chdir(table.parent)
    assert main(["convert", *arguments, "--target", "y"]) == 2
    assert "a path is empty; name a file" in capsys.readouterr().err
    assert [file.name for file in table.parent.iterdir()] == ["t.csv"]


def test_a_policy_for_a_column_without_a_name_is_not_one_for_all(table, capsys):
    assert main(["convert", str(table), str(table) + ".zarr", "--target", "y", "--missing", "=drop"]) == 2
    assert "names no column; write it like age=drop" in capsys.readouterr().err
