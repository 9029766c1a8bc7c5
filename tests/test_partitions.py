"""Columns that folders name: typed over all folders together, for every format, and never by surprise."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

import ep3stream
from ep3stream import ConvertConfig, SourceError

NULL = "__HIVE_DEFAULT_PARTITION__"


def write(path: Path, **more: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"n": [0.5, 1.5, 2.5], "y": [1.0, 2.0, 3.0], **more})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        feather.write_feather(table, path)
    else:
        rows = zip(*table.to_pydict().values(), strict=True)
        path.write_text(
            "\n".join([",".join(table.column_names), *(",".join(map(str, row)) for row in rows)]) + "\n"
        )
    return path


def parts(folder: Path, folders: list[str], suffix: str = ".parquet") -> Path:
    for name in folders:
        write(folder / name / f"part-0{suffix}")
    return folder


def convert(source: Any, store: Path, **settings: Any) -> tuple[list[str], np.ndarray]:
    settings = {"target": None if "like" in settings else "y", "shuffle": False, "missing": "mean"} | settings
    if "like" in settings:
        settings.pop("missing")
    else:
        settings = {"categories": "onehot"} | settings
    manifest = ep3stream.convert(source, store, ConvertConfig(**settings))
    with ep3stream.open_store(store) as opened:
        reader = opened.split("train")
        x = np.asarray(reader.read_rows(np.arange(reader.info.n_rows))[0], np.float64) + manifest.offsets.x
    return list(manifest.feature_names), x


# The folders, the settings, and the features that they become.
TYPED: dict[str, tuple[list[str], dict[str, Any], list[str]]] = {
    "whole numbers": (["k=1", "k=2", "k=-3"], {}, ["k"]),
    "numbers": (["k=0.1", "k=0.5", "k=1"], {}, ["k"]),
    "numbers of Spark": (["k=1.0E10", "k=2.5"], {}, ["k"]),
    "whole numbers and a gap": (["k=1", "k=2", f"k={NULL}"], {}, ["k", "k (missing)"]),
    "whole numbers and an empty text": (["k=1", "k=2", "k="], {}, ["k", "k (missing)"]),
    "texts and a gap": (["k=a", "k=b", f"k={NULL}"], {}, ["k=a", "k=b", "k=(missing)"]),
    "dates": (["k=2026-03-01", "k=2026-03-02"], {"dates": ["days"]}, ["k.days"]),
    "times": (["k=2026-03-01 00%3A00%3A00", "k=2026-03-02 07%3A30%3A00"], {"dates": ["hour"]}, ["k.hour"]),
    "no dates": (["k=2026-13-01", "k=2026-03-02"], {}, ["k=2026-03-02", "k=2026-13-01"]),
    "leading zeros": (["k=007", "k=7", "k=12"], {}, ["k=007", "k=12", "k=7"]),
    "leading zeros beside a text": (["k=007", "k=A1"], {}, ["k=007", "k=A1"]),
    "plus signs": (["k=+1", "k=1"], {}, ["k=+1", "k=1"]),
    "twenty digits": (["k=12345678901234567890", "k=12345678901234567891"], {}, None),
    "versions": (["k=1.1", "k=1.10"], {"category": ["k"]}, ["k=1.1", "k=1.10"]),
    "zip codes": (["k=01234", "k=1234"], {"category": ["k"]}, ["k=01234", "k=1234"]),
    "quoted letters": (["k=New%20York", "k=a%2Fb"], {}, ["k=New York", "k=a/b"]),
    "versions, not stated": (["k=1.1", "k=1.10"], {}, ["k=1.1", "k=1.10"]),
    "exponents": (["k=1e5", "k=100000"], {}, ["k=100000", "k=1e5"]),
    "a number and its whole": (["k=1", "k=1.0"], {}, ["k=1", "k=1.0"]),
    "truth": (["k=true", "k=false"], {}, ["k=false", "k=true"]),
    "two keys": (["k=1/m=x", "k=1/m=y", "k=2/m=x"], {}, ["k", "m=x", "m=y"]),
    "folders of other names between": (["k=1/inner", "k=2/other"], {}, ["k"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "suffix"), [*itertools.product(TYPED, [".parquet", ".csv"]), ("texts and a gap", ".arrow")]
)
def test_the_values_of_a_key_are_typed_together(case, suffix, tmp_path):
    folders, settings, expected = TYPED[case]
    names, x = convert(parts(tmp_path / "d", folders, suffix), tmp_path / "s.zarr", **settings)
    wanted = expected or sorted(folders)
    assert sorted(names) == sorted(["n", *wanted])
    assert len(x) == 3 * len(folders)
    again = convert(tmp_path / "d", tmp_path / "again.zarr", like=tmp_path / "s.zarr")
    assert again[0] == names
    np.testing.assert_array_equal(again[1], x)


def test_what_looks_like_numbers_and_stays_text_is_told(tmp_path, caplog):
    convert(parts(tmp_path / "d", ["k=007", "k=12"]), tmp_path / "s.zarr")
    assert "folders k=...: values such as 007 are taken as texts, not as numbers" in caplog.text
    convert(parts(tmp_path / "v", ["k=1.1", "k=1.10"]), tmp_path / "v.zarr")
    assert "folders k=...: values such as 1.1 and 1.10 are taken as texts, not as numbers" in caplog.text


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_named_files_and_patterns_gain_no_columns_unless_asked(suffix, tmp_path, caplog):
    folder = parts(tmp_path / "year=2020" / "d", ["k=1", "k=2"], suffix)
    files = sorted(folder.rglob(f"*{suffix}"))
    for number, source in enumerate(
        (files[0], files, folder / f"*/*{suffix}", folder / "k=*", folder / "k=1")
    ):
        caplog.clear()
        names, _ = convert(source, tmp_path / f"{number}.zarr")
        assert names == ["n"]
        assert (
            "the folders above it say k=1, which are no columns unless --partitions is given" in caplog.text
        )
        names, x = convert(source, tmp_path / f"{number}p.zarr", partitions=True)
        assert names == ["n", "k"]
        assert x[0].tolist() == [0.5, 1]
    assert convert(folder, tmp_path / "below.zarr")[0] == ["n", "k"]
    folder = parts(tmp_path / "year=2020" / "month=3", ["k=1"], suffix)
    assert convert(folder, tmp_path / "above.zarr", partitions=True)[0] == ["n", "year", "month", "k"]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ["k=1", "k=1/m=2"],
            "lies in folders of k, but .* in those of k, m; put all parts at the same depth",
        ),
        (["k=1", "m=2"], "lies in folders of m, but .* in those of k"),
        (["", "k=1"], "lies in folders of none, but .* in those of k;"),
        (["k=1/k=2"], "lies in two folders of 'k'; rename one"),
    ],
)
def test_parts_in_folders_of_other_keys_are_refused(folders, message, tmp_path):
    with pytest.raises(SourceError, match=message):
        convert(parts(tmp_path / "d", folders), tmp_path / "s.zarr")


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".arrow"])
@pytest.mark.parametrize(
    ("text", "values"),
    [("1", [1, 1, 1]), ("a", ["a", "a", "a"]), ("1", [1.0, 1.0, 1.0]), ("2026-03-01", ["2026-03-01"] * 3)],
)
def test_a_column_of_the_file_that_says_what_the_folder_says_is_taken(text, values, suffix, tmp_path):
    write(tmp_path / "d" / f"k={text}" / f"a{suffix}", k=values)
    names, x = convert(tmp_path / "d", tmp_path / "s.zarr")
    assert len(x) == 3
    assert any(name.startswith("k") for name in names)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_column_of_the_file_that_says_something_else_is_refused(suffix, tmp_path):
    path = write(tmp_path / "d" / "k=1" / f"a{suffix}", k=[1, 2, 1])
    with pytest.raises(
        SourceError, match=r"holds 2(\.0)? in its column 'k', but lies in the folder k=1; move it, or name"
    ):
        convert(tmp_path / "d", tmp_path / "s.zarr")
    names, x = convert(path, tmp_path / "s.zarr")
    assert (names, x[:, 1].tolist()) == (["n", "k"], [1, 2, 1])
    assert convert(tmp_path / "d", tmp_path / "t.zarr", drop=["k"])[0] == ["n"]


def test_folders_alone_may_be_the_features_or_the_target(tmp_path):
    folder = parts(tmp_path / "d", ["k=1", "k=2"], ".csv")
    names, x = convert(folder, tmp_path / "s.zarr", columns=["k"])
    assert (names, x[:, 0].tolist()) == (["k"], [1, 1, 1, 2, 2, 2])
    names, x = convert(folder, tmp_path / "t.zarr", target="k", columns=["n"])
    assert (names, len(x)) == (["n"], 6)


def test_a_later_directory_has_the_types_of_the_store(tmp_path):
    convert(parts(tmp_path / "1", ["k=0.5", "k=1.5"]), tmp_path / "s.zarr")
    names, x = convert(parts(tmp_path / "2", ["k=2", "k=3"]), tmp_path / "t.zarr", like=tmp_path / "s.zarr")
    assert x[:, names.index("k")].tolist() == [2, 2, 2, 3, 3, 3]
    convert(parts(tmp_path / "3", ["k=a", "k=1"]), tmp_path / "u.zarr")
    names, x = convert(parts(tmp_path / "4", ["k=1"]), tmp_path / "v.zarr", like=tmp_path / "u.zarr")
    assert x[:, names.index("k=1")].tolist() == [1, 1, 1]
    with pytest.raises(SourceError, match="folder k=a does not say a value of double"):
        convert(tmp_path / "3", tmp_path / "w.zarr", like=tmp_path / "s.zarr")
    file = tmp_path / "4" / "k=1" / "part-0.parquet"
    with pytest.raises(SourceError, match="has no column 'k'"):
        convert(file, tmp_path / "w.zarr", like=tmp_path / "s.zarr")
    assert len(convert(file, tmp_path / "w.zarr", like=tmp_path / "s.zarr", partitions=True)[1]) == 3
