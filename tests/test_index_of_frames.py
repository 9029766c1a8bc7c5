"""The index of a DataFrame in files of pandas and Dask: no feature unless it has a name or is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather
import pytest

import ep3stream
from ep3stream import ConvertConfig

FRAME = pd.DataFrame({"a": [1.0, 2.0, 3.0, 4.0], "y": [1.0, 2.0, 3.0, 4.0]})
KEPT = FRAME[FRAME.a != 2]
LEVELS = FRAME.set_axis(pd.MultiIndex.from_arrays([[1, 1, 2, 2], list("uvuv")]))


def parquet(frame: pd.DataFrame) -> Callable[[Path], Any]:
    return lambda folder: frame.to_parquet(folder / "t.parquet") or folder / "t.parquet"


def arrow(folder: Path) -> Path:
    feather.write_feather(pa.Table.from_pandas(KEPT), str(folder / "t.feather"))
    return folder / "t.feather"


def of_dask(folder: Path) -> Path:
    (folder / "parts").mkdir()
    for number, part in enumerate((FRAME[:2], FRAME[2:])):  # as to_parquet of Dask names it
        part.rename_axis("__null_dask_index__").reset_index().to_parquet(folder / f"parts/{number}.parquet")
    return folder / "parts"


def parts(frames: list[pd.DataFrame]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "parts").mkdir()
        for number, frame in enumerate(frames):
            frame.to_parquet(folder / f"parts/{number}.parquet")
        return folder / "parts"

    return write


SOURCES: dict[str, Callable[[Path], Any]] = {
    "Parquet of some rows": parquet(KEPT),
    "Parquet of two levels": parquet(LEVELS),
    "Feather": arrow,
    "Dask": of_dask,
    "arrow table": lambda _: pa.Table.from_pandas(KEPT),
    "parts of which the first has none": parts([FRAME, KEPT]),
    "parts of which the second has none": parts([KEPT, FRAME]),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_an_index_without_a_name_is_no_feature_and_told(tmp_path, make, caplog):
    manifest = ep3stream.convert(make(tmp_path), tmp_path / "s", ConvertConfig(target="y"))
    assert list(manifest.feature_names) == ["a"]
    has_it = make is not SOURCES["parts of which the first has none"]
    assert ("is the index of a DataFrame without a name, so it is left out" in caplog.text) == has_it


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"columns": ["a", "__index_level_0__"]}, ["a", "__index_level_0__"]),
        ({"rename": {"__index_level_0__": "row"}}, ["a", "row"]),
        ({"drop": ["__index_level_0__"]}, ["a"]),
        ({"category": ["__index_level_0__"]}, ["a", "__index_level_0__"]),
    ],
)
def test_an_index_that_is_asked_for_is_taken(tmp_path, settings, names, caplog):
    config = ConvertConfig(target="y", **settings)
    manifest = ep3stream.convert(parquet(KEPT)(tmp_path), tmp_path / "s", config)
    assert list(manifest.feature_names) == names
    assert "is left out" not in caplog.text


def test_an_index_with_a_name_is_a_column_of_the_file(tmp_path):
    named = FRAME.set_index(pd.Index([5, 3, 8, 1], name="id"))
    manifest = ep3stream.convert(parquet(named)(tmp_path), tmp_path / "s", ConvertConfig(target="y"))
    assert list(manifest.feature_names) == ["a", "id"]


def test_a_store_that_has_the_index_is_followed(tmp_path):
    config = ConvertConfig(target="y", columns=["a", "__index_level_0__"])
    ep3stream.convert(parquet(KEPT)(tmp_path), tmp_path / "s", config)
    later = ep3stream.convert(tmp_path / "t.parquet", tmp_path / "l", ConvertConfig(like=tmp_path / "s"))
    assert list(later.feature_names) == ["a", "__index_level_0__"]
