"""Files that are splits by themselves: one store, with the columns, categories and means of the first file."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather as pa_feather
import pyarrow.parquet as pq
import pytest

from ep3stream import cli
from ep3stream.config import ConvertConfig
from ep3stream.conversion import convert as convert_module
from ep3stream.conversion.convert import convert
from ep3stream.errors import ConfigError, InputError, SourceError
from ep3stream.store.reader import open_store

Rows = tuple[list[str], np.ndarray, np.ndarray]


def rows_of(store: Path, split: str) -> Rows:
    with open_store(store) as opened:
        reader = opened.split(split)
        x, y = reader.read_rows(np.arange(reader.info.n_rows))
        return list(opened.manifest.feature_names), x, y.reshape(-1)


def numbers(first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    n = np.arange(first, first + count, dtype=float)
    return np.column_stack([n, n * 0.5]), n


def columns(first: int, count: int, words: str) -> dict[str, list[Any]]:
    return {
        "n": [float(i) for i in range(first, first + count)],
        "c": [words[i % len(words)] for i in range(count)],
        "y": [i * 2.0 for i in range(first, first + count)],
    }


def as_csv(path: Path, rows: dict[str, list[Any]], between: str = ",") -> Path:
    lines = [between.join(rows), *(between.join(map(str, row)) for row in zip(*rows.values(), strict=True))]
    path.write_text("\n".join([*lines, ""]))
    return path


def csv_gz(folder: Path, name: str, rows: dict[str, list[Any]]) -> Path:
    plain = as_csv(folder / f"{name}.txt", rows)
    packed = folder / f"{name}.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    return packed


def parquet(folder: Path, name: str, rows: dict[str, list[Any]]) -> Path:
    pq.write_table(pa.table(rows), folder / f"{name}.parquet")
    return folder / f"{name}.parquet"


def feather(folder: Path, name: str, rows: dict[str, list[Any]]) -> Path:
    pa_feather.write_feather(pa.table(rows), folder / f"{name}.feather")
    return folder / f"{name}.feather"


def directory(folder: Path, name: str, rows: dict[str, list[Any]]) -> Path:
    (folder / name).mkdir()
    half = len(rows["n"]) // 2
    as_csv(folder / name / "1.csv", {key: values[:half] for key, values in rows.items()})
    as_csv(folder / name / "2.csv", {key: values[half:] for key, values in rows.items()})
    return folder / name


def pattern(folder: Path, name: str, rows: dict[str, list[Any]]) -> Path:
    directory(folder, name, rows)
    return folder / name / "*.csv"


TABLES: dict[str, Callable[[Path, str, dict[str, list[Any]]], Path]] = {
    "csv": lambda folder, name, rows: as_csv(folder / f"{name}.csv", rows),
    "tsv": lambda folder, name, rows: as_csv(folder / f"{name}.tsv", rows, "\t"),
    "semicolons": lambda folder, name, rows: as_csv(folder / f"{name}.csv", rows, ";"),
    "csv.gz": csv_gz,
    "parquet": parquet,
    "feather": feather,
    "a directory": directory,
    "a pattern": pattern,
}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("later", TABLES)
@pytest.mark.parametrize("first", ["csv", "parquet"])
def test_every_kind_of_table_can_be_a_split(tmp_path: Path, first: str, later: str, shuffle: bool) -> None:
    train = TABLES[first](tmp_path, "train", columns(0, 40, "ab"))
    test = TABLES[later](tmp_path, "test", columns(100, 10, "bzaz"))
    config = ConvertConfig(target="y", shuffle=shuffle, split_files={"test": test}, categories="onehot")
    manifest = convert(train, tmp_path / "store", config)
    assert {name: info.n_rows for name, info in manifest.splits.items()} == {"train": 40, "test": 10}
    names, x, y = rows_of(tmp_path / "store", "test")
    assert names == ["n", "c=a", "c=b"]
    order = np.argsort(y, kind="stable")
    assert shuffle or (order == np.arange(10)).all()
    assert x[order, 0].tolist() == list(range(100, 110))
    assert x[order, 1].tolist() == [0, 0, 1, 0] * 2 + [0, 0]
    assert x[order, 2].tolist() == [1, 0, 0, 0] * 2 + [1, 0]
    assert y[order].tolist() == [2.0 * i for i in range(100, 110)]
    assert manifest.conversion["unknown_by_split"] == {"test": {"c": {"z": 5}}}
    assert [entry.get("split") for entry in manifest.source][:2] == [None, "test"]
    assert all("digest" in entry for entry in manifest.source)


def npz(folder: Path, name: str, x: np.ndarray, y: np.ndarray) -> Path:
    np.savez(folder / f"{name}.npz", x=x, y=y)
    return folder / f"{name}.npz"


def npz_packed(folder: Path, name: str, x: np.ndarray, y: np.ndarray) -> Path:
    np.savez_compressed(folder / f"{name}.npz", x=x.astype(np.float32), y=y)
    return folder / f"{name}.npz"


def hdf5(folder: Path, name: str, x: np.ndarray, y: np.ndarray) -> Path:
    with h5py.File(folder / "all.h5", "a") as file:
        file[f"{name}/x"], file[f"{name}/y"] = x, y
    return Path(f"{folder / 'all.h5'}:/{name}")


def svmlight(folder: Path, name: str, x: np.ndarray, y: np.ndarray) -> Path:
    lines = [f"{label + 0.25} 1:{a}" + (f" 2:{b}" if b else "") for (a, b), label in zip(x, y, strict=True)]
    (folder / f"{name}.svm").write_text("\n".join([*lines, ""]))
    return folder / f"{name}.svm"


ARRAYS = {"npz": npz, "packed npz": npz_packed, "hdf5 groups of one file": hdf5, "svmlight": svmlight}


@pytest.mark.parametrize("later", ARRAYS)
@pytest.mark.parametrize("first", ARRAYS)
def test_every_kind_of_array_can_be_a_split(
    tmp_path: Path, first: str, later: str, caplog: pytest.LogCaptureFixture
) -> None:
    train = ARRAYS[first](tmp_path, "train", *numbers(0, 30))
    test = ARRAYS[later](tmp_path, "test", *numbers(0, 7))
    config = ConvertConfig(task="regression", shuffle=False, split_files={"test": test})
    with caplog.at_level(logging.WARNING):
        convert(train, tmp_path / "store", config)
    for split, count in (("train", 30), ("test", 7)):
        names, x, y = rows_of(tmp_path / "store", split)
        assert names == ["x0", "x1"]
        np.testing.assert_array_equal(x, numbers(0, count)[0])
        np.testing.assert_array_equal(np.floor(y), numbers(0, count)[1])
    assert caplog.text == ""


def test_features_of_svmlight_that_only_the_first_file_states_are_0_in_the_later_one(tmp_path: Path) -> None:
    (tmp_path / "train.svm").write_text("1 1:1 4:4\n2 2:2\n")
    (tmp_path / "test.svm").write_text("2 1:7\n1 3:5\n")
    config = ConvertConfig(shuffle=False, split_files={"test": tmp_path / "test.svm"})
    convert(tmp_path / "train.svm", tmp_path / "store", config)
    assert rows_of(tmp_path / "store", "test")[1].tolist() == [[7, 0, 0, 0], [0, 0, 5, 0]]


def test_chosen_columns_of_arrays_are_the_same_in_each_split(tmp_path: Path) -> None:
    train, test = (npz(tmp_path, name, *numbers(i, 5)) for name, i in (("train", 0), ("test", 50)))
    config = ConvertConfig(
        columns=["x1"], rename={"x1": "half"}, task="regression", shuffle=False, split_files={"test": test}
    )
    convert(train, tmp_path / "store", config)
    names, x, _ = rows_of(tmp_path / "store", "test")
    assert (names, x[:, 0].tolist()) == (["half"], [25, 25.5, 26, 26.5, 27])


@pytest.mark.parametrize(
    "source",
    ["a pair of arrays", "a data frame", "a function that makes batches"],
)
def test_what_comes_from_python_may_have_files_as_further_splits(tmp_path: Path, source: str) -> None:
    import pandas as pd

    x, y = numbers(0, 20)
    if source == "a data frame":
        first: Any = pd.DataFrame(columns(0, 20, "ab"))
        later = as_csv(tmp_path / "test.csv", columns(50, 4, "ba"))
        config = ConvertConfig(target="y", split_files={"test": str(later)})
    else:
        first = (x, y) if source == "a pair of arrays" else lambda: iter([(x, y)])
        later = npz(tmp_path, "test", *numbers(50, 4))
        config = ConvertConfig(task="regression", split_files={"test": [later]})
    manifest = convert(first, tmp_path / "store", config)
    assert manifest.splits["test"].n_rows == 4
    assert sorted(rows_of(tmp_path / "store", "test")[1][:, 0].tolist()) == [50, 51, 52, 53]
    assert manifest.source[-1]["split"] == "test"
    assert "digest" in manifest.source[-1]


def test_the_first_file_alone_decides_means_categories_labels_and_indicators(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, val = tmp_path / "train.csv", tmp_path / "val.csv"
    train.write_text("a,b,c,y\n1,1,u,no\n,2,v,yes\n4,6,u,no\n")
    val.write_text("y,c,b,a\nyes,,,100\nno,u,9,\n,v,9,9\n")
    config = ConvertConfig(target="y", shuffle=False, split_files={"val": val}, categories="onehot")
    with caplog.at_level(logging.WARNING):
        manifest = convert(train, tmp_path / "store", config)
    names, x, y = rows_of(tmp_path / "store", "val")
    assert names == ["a", "a (missing)", "b", "c=u", "c=v"]
    assert x.tolist() == [[100, 0, 3, 0, 0], [2.5, 1, 9, 1, 0]]
    assert (y.tolist(), manifest.class_names) == ([1, 0], ("no", "yes"))
    assert "split val: values that " in caplog.text
    assert "'c' in 1 rows ('(missing)' 1); they count as none of the known ones" in caplog.text
    assert "column 'b': 1 of 5 values are missing; they become the mean 3\n" in caplog.text
    assert "target 'y': 1 rows without a value are left out" in caplog.text


def test_unknown_categories_and_classes_follow_the_option(tmp_path: Path) -> None:
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("n,c,y\n1,u,no\n2,v,yes\n")
    test.write_text("n,c,y\n1,w,no\n2,u,perhaps\n3,v,yes\n")

    def made(name: str, **settings: Any) -> Rows:
        settings = {"categories": "onehot"} | settings
        config = ConvertConfig(target="y", shuffle=False, split_files={"test": test}, **settings)
        convert(train, tmp_path / name, config)
        return rows_of(tmp_path / name, "test")

    assert made("drop", unknown="drop")[1].tolist() == [[3, 0, 1]]
    for unknown in ({}, {"unknown": "ignore"}):
        with pytest.raises(SourceError, match=r"test\.csv: column 'y', row 2: 'perhaps' .* --unknown drop"):
            made("class", **unknown)
    with pytest.raises(
        SourceError, match=r"test\.csv: column 'c', row 1: 'w' is not among the 2 values of .*train"
    ):
        made("error", unknown="error")
    test.write_text("n,c,y\n1,w,no\n3,v,yes\n")
    assert made("ignored")[1].tolist() == [[1, 0, 0], [3, 0, 1]]
    assert made("codes", categories="codes")[1].tolist() == [[1, -1], [3, 1]]
    test.write_text("n,c,y\n1,w,no\n")
    with pytest.raises(SourceError, match="every row of split test is left out"):
        made("empty", unknown="drop")


def test_the_source_may_be_dealt_to_splits_of_its_own_too(tmp_path: Path) -> None:
    train = as_csv(tmp_path / "train.csv", columns(0, 200, "ab"))
    test = as_csv(tmp_path / "test.csv", columns(0, 30, "ab"))
    splits = {"train": 0.8, "dev": 0.2}
    both = convert(
        train, tmp_path / "both", ConvertConfig(target="y", splits=splits, split_files={"test": test})
    )
    alone = convert(train, tmp_path / "alone", ConvertConfig(target="y", splits=splits))
    assert list(both.splits) == ["train", "dev", "test"] or set(both.splits) == {"train", "dev", "test"}
    assert both.splits["test"].n_rows == 30
    for split in splits:
        assert both.splits[split] == alone.splits[split]


def test_a_store_of_split_files_is_followed_by_like_and_follows_another(tmp_path: Path) -> None:
    train = as_csv(tmp_path / "train.csv", columns(0, 40, "ab"))
    test = as_csv(tmp_path / "test.csv", columns(40, 10, "ab"))
    first = ConvertConfig(target="y", split_files={"test": test}, categories="onehot")
    convert(train, tmp_path / "first", first)
    config = ConvertConfig(like=tmp_path / "first", split_files={"test": train}, shuffle=False)
    later = as_csv(tmp_path / "later.csv", columns(0, 5, "ba"))
    made = convert(later, tmp_path / "second", config)
    assert made.feature_names == ("n", "c=a", "c=b")
    assert {name: info.n_rows for name, info in made.splits.items()} == {"train": 5, "test": 40}
    unknown = as_csv(tmp_path / "unknown.csv", columns(0, 4, "aq"))
    config = ConvertConfig(like=tmp_path / "first", split_files={"test": unknown})
    assert convert(later, tmp_path / "third", config).conversion["unknown_by_split"] == {
        "test": {"c": {"q": 2}}
    }


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("n,y\n1,2\n", r"test\.csv: has no column 'c', which .*train\.csv has"),
        ("n,c\n1,a\n", r"test\.csv: has no column 'y', which .*train\.csv has; a store needs its target"),
        ("n,c,y\nx,a,1\n", r"test\.csv: column 'n', row 1"),
        ("n,c,y\ninf,a,1\n", r"test\.csv: column 'n', row 1: the value is not finite"),
        ("n,c,y\n", r"test\.csv: has a header but no rows"),
        ("", r"test\.csv: is empty"),
        (None, r"test\.csv: there is no such file"),
    ],
)
def test_a_split_that_does_not_fit_is_refused_by_its_file_and_leaves_nothing(
    tmp_path: Path, test: str | None, message: str
) -> None:
    train = as_csv(tmp_path / "train.csv", columns(0, 40, "ab"))
    if test is not None:
        (tmp_path / "test.csv").write_text(test)
    config = ConvertConfig(target="y", split_files={"test": tmp_path / "test.csv"})
    with pytest.raises(SourceError, match=message) as caught:
        convert(train, tmp_path / "store", config)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if "store" in path.name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"split_files": {"train": "t.csv"}},
            "split_files has 'train', but that is a split of the source itself",
        ),
        ({"split_files": {"a/b": "t.csv"}}, "split name 'a/b' is not allowed"),
        ({"split_files": {"test": []}}, "split_files has no file for 'test'"),
        ({"unknown": "ignore"}, "unknown is ignore, but without like"),
    ],
)
def test_split_files_that_cannot_be_are_refused_before_any_file_is_read(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ConvertConfig(target="y", **settings)


def test_a_file_that_is_in_two_splits_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = as_csv(tmp_path / "train.csv", columns(0, 20, "ab"))
    copy = as_csv(tmp_path / "copy.csv", columns(0, 20, "ab"))
    (tmp_path / "link.csv").symlink_to(train)
    for other, words in (
        (train, "train.csv is in split train and in split test: both have its rows"),
        (tmp_path / "link.csv", "train.csv is in split train and in split test"),
        (copy, "copy.csv of split test has the same bytes as"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            config = ConvertConfig(target="y", split_files={"test": other})
            convert(train, tmp_path / f"store {other.stem}", config)
        assert words in caplog.text
    arrays = npz(tmp_path, "arrays", *numbers(0, 9))
    with caplog.at_level(logging.WARNING):
        convert(arrays, tmp_path / "twice", ConvertConfig(split_files={"test": arrays}))
    assert "is in split train and in split test" in caplog.text


def test_a_column_that_was_left_out_of_the_first_file_is_left_out_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, test = (as_csv(tmp_path / f"{name}.csv", columns(0, 20 + i, "ab")) for i, name in enumerate("ab"))
    with caplog.at_level(logging.WARNING):
        convert(train, tmp_path / "s", ConvertConfig(target="y", drop=["c"], split_files={"test": test}))
    assert caplog.text == ""


def test_the_option_may_be_given_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = as_csv(tmp_path / "train.csv", columns(0, 40, "ab"))
    for i in range(3):
        as_csv(tmp_path / f"{i}.csv", columns(100 * i, 10, "ab"))
    given = [
        f"--split-file={name}={tmp_path / file}"
        for name, file in (("v", "0.csv"), ("t", "1.csv"), ("t", "2.csv"))
    ]
    assert cli.main(["convert", str(train), str(tmp_path / "s.zarr"), "--target", "y", *given]) == 0
    with open_store(tmp_path / "s.zarr") as store:
        counts = {name: info.n_rows for name, info in store.manifest.splits.items()}
    assert counts == {"train": 40, "v": 10, "t": 20}
    assert cli.main(["inspect", str(tmp_path / "s.zarr")]) == 0
    assert "split t" in capsys.readouterr().out
    assert cli.main(["convert", str(train), str(tmp_path / "s2"), "--target", "y", "--split-file", "x"]) == 2


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, ConvertConfig]:
    """Three files with gaps, of which the later ones have categories of their own; little memory."""

    def rows(first: int, count: int, words: str) -> dict[str, list[Any]]:
        table = columns(first, count, words)
        table["n"] = ["" if i % 9 == 0 else value for i, value in enumerate(table["n"])]
        return table

    train = as_csv(tmp_path / "train.csv", rows(0, 800, "abc"))
    val = as_csv(tmp_path / "val.csv", rows(2000, 300, "az"))
    test = as_csv(tmp_path / "test.csv", rows(3000, 400, "bq"))
    config = ConvertConfig(
        target="y", split_files={"val": val, "test": test}, segment_bytes=4096, memory_bytes=4 * 4096
    )
    return train, config


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("format", ["zarr", "hdf5"])
@pytest.mark.parametrize("stops", [(0, 6), (11, 2), (14, 2, 4), (30,)])
def test_a_conversion_stopped_anywhere_ends_with_the_same_bytes(
    tmp_path: Path, three: Any, shuffle: bool, format: Any, stops: tuple[int, ...], monkeypatch: Any
) -> None:
    from dataclasses import replace

    monkeypatch.setattr(convert_module, "_PROGRESS_EVERY_S", 0.0)
    train, config = three
    config = replace(config, shuffle=shuffle, format=format)
    convert(train, tmp_path / "whole", replace(config, memory_bytes=1 << 24))
    for calls in stops:
        left = [calls]

        def stop(_: object, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            convert(train, tmp_path / "stopped", config, progress=stop)
            break
    else:
        convert(train, tmp_path / "stopped", config)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    if whole.is_file():
        assert whole.read_bytes() == stopped.read_bytes()
        return
    files = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    assert files == {path.relative_to(stopped) for path in stopped.rglob("*") if path.is_file()}
    for file in files:
        assert (whole / file).read_bytes() == (stopped / file).read_bytes(), file


def test_a_split_file_changed_or_named_otherwise_between_two_processes_is_refused(
    tmp_path: Path, three: Any
) -> None:
    from dataclasses import replace

    train, config = three

    def stop(progress: Any) -> None:
        if progress.rows > 1100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(train, tmp_path / "store", config, progress=stop)
    swapped = dict(zip(("test", "val"), config.split_files.values(), strict=True))
    with pytest.raises(InputError, match="an unfinished conversion had"):
        convert(train, tmp_path / "store", replace(config, split_files=swapped))
    val = tmp_path / "val.csv"
    val.write_text(val.read_text().replace("4002.0", "4002.5"))
    with pytest.raises(InputError, match=r"val\.csv"):
        convert(train, tmp_path / "store", config)
