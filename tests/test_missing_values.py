"""Gaps in every kind of column and source: what they become, what is told of them, and what is recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from encoding import encode, pretend_store, write
from small_stores import plain_config

from ep3stream import cli
from ep3stream.config import ConvertConfig
from ep3stream.conversion import convert as convert_module
from ep3stream.conversion.convert import convert
from ep3stream.errors import ConfigError, SourceError
from ep3stream.prediction.predict import predict_tables
from ep3stream.store.reader import open_store

NAN = float("nan")


class Made(NamedTuple):
    names: tuple[str, ...]
    x: list[list[float]]
    y: list[Any]
    told: str
    manifest: Any


def one_hot(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with 0/1 features of categories unless they say otherwise."""
    return settings if "like" in settings else {"categories": "onehot"} | settings


@pytest.fixture
def make(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., Made]:
    """Converts a source, in order, and gives back the rows of the first split."""

    def convert_and_read(source: Any, **settings: Any) -> Made:
        if isinstance(source, str | dict):
            source = write(tmp_path / f"table{len(list(tmp_path.iterdir()))}", source)
        config = ConvertConfig(**{"target": "y", "shuffle": False, **one_hot(settings)})
        store = tmp_path / f"store{len(list(tmp_path.iterdir()))}.zarr"
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            manifest = convert(source, store, config)
        with open_store(store) as opened:
            reader = opened.split(next(iter(config.splits)))
            x, y = reader.read_rows(np.arange(reader.info.n_rows))
        told = "\n".join(record.getMessage() for record in caplog.records)
        return Made(manifest.feature_names, x.tolist(), y.reshape(-1).tolist(), told, manifest)

    return convert_and_read


DAYS = 20454.0  # 2026-01-01


@pytest.mark.parametrize(
    ("table", "settings", "names", "x", "told"),
    [
        pytest.param(
            "a,y\n1,1\n,2\n4,3\n", {}, ("a", "a (missing)"), [[1, 0], [2.5, 1], [4, 0]],
            "column 'a': 1 of 3 values are missing; they become the mean 2.5, and 'a (missing)' is 1 there",
            id="a number",
        ),
        pytest.param(
            "c,y\nred,1\n,2\nblue,3\n", {}, ("c=blue", "c=red", "c=(missing)"), [[0, 1, 0], [0, 0, 1], [1, 0, 0]],
            "column 'c': 1 of 3 values are missing; they become the category '(missing)'",
            id="a text",
        ),
        pytest.param(
            "c,y\nred,1\n,2\nblue,3\n", {"categories": "codes"}, ("c",), [[1], [2], [0]],
            "column 'c': 1 of 3 values are missing; they become the category '(missing)'",
            id="a text as a code",
        ),
        pytest.param(
            "d,y\n2026-01-01,1\n,2\n2026-01-03,3\n", {"dates": ["days", "weekday"]},
            ("d.days", "d.weekday", "d (missing)"), [[DAYS, 3, 0], [DAYS + 1, 4, 1], [DAYS + 2, 5, 0]],
            "column 'd': 1 of 3 values are missing; each part becomes its mean, and 'd (missing)' is 1 there",
            id="a date has one indicator for its parts",
        ),
        pytest.param(
            {"t": pa.array([3_600_000_000, None], pa.time64("us")), "y": [1.0, 2]}, {}, ("t.hour", "t (missing)"),
            [[1, 0], [1, 1]], "column 't': 1 of 2 values are missing; they become the mean 1",
            id="a time of day",
        ),
        pytest.param(
            {"b": [True, None, False, True], "y": [1.0, 2, 3, 4]}, {}, ("b", "b (missing)"),
            [[1, 0], [2 / 3, 1], [0, 0], [1, 0]], "they become the mean 0.666667",
            id="a boolean",
        ),
        pytest.param(
            {"n": pa.array([2**40, None, 2**40 + 2]), "y": [1.0, 2, 3]}, {}, ("n", "n (missing)"), None,
            "they become the mean 1.09951e+12",
            id="whole numbers with an offset",
        ),
        pytest.param(
            {"n": [1.0, NAN, None, 3.0], "y": [1.0, 2, 3, 4]}, {}, ("n", "n (missing)"),
            [[1, 0], [2, 1], [2, 1], [3, 0]], "2 of 4 values are missing",
            id="null and NaN alike",
        ),
        pytest.param(
            {"z": pa.array([7, None, 9]), "y": [1.0, 2, 3]}, {"category": ["z"]}, ("z=7", "z=9", "z=(missing)"),
            [[1, 0, 0], [0, 0, 1], [0, 1, 0]], "they become the category '(missing)'",
            id="a number taken as a category",
        ),
        pytest.param(
            "a,y\n1,1\n2,\n3,3\n", {}, ("a",), [[1], [3]], "target 'y': 1 rows without a value are left out",
            id="a target",
        ),
        pytest.param(
            "a,y\n1,no\n2,\n3,yes\n", {}, ("a",), [[1], [3]], "target 'y': 1 rows without a value are left out",
            id="a label of text",
        ),
        pytest.param(
            "a,y\n1,7\n2,\n3,8\n", {"task": "classification"}, ("a",), [[1], [3]],
            "target 'y': 1 rows without a value are left out",
            id="a whole label",
        ),
        pytest.param(
            "a,y,z\n1,1,1\n2,,2\n3,3,\n4,4,4\n", {"target": ["y", "z"]}, ("a",), [[1], [4]],
            "target 'y': 1 rows without a value are left out\ntarget 'z': 1 rows without a value are left out",
            id="one of several targets",
        ),
        pytest.param(
            "a,b,y\n1,,1\n,2,\n4,3,3\n", {}, ("a", "b", "b (missing)"), [[1, 3, 1], [4, 3, 0]],
            "column 'b': 1 of 2 values are missing",
            id="a gap in a row without a target has no indicator",
        ),
        pytest.param(
            "n,m,y\n" + "".join(f"{i},{'' if i % 2 else i},{i}.5\n" for i in range(8)), {"missing": "drop"}, ("n", "m"),
            [[0, 0], [2, 2], [4, 4], [6, 6]], "4 of 8 rows are left out for missing values ('m' 4)",
            id="dropped rows",
        ),
        pytest.param(
            "a,b,y\n,1,1\n2,,2\n3,3,\n4,4,4\n", {"missing": {"a": "drop"}}, ("a", "b", "b (missing)"),
            [[2, 4, 1], [4, 4, 0]],
            "column 'b': 1 of 2 values are missing; they become the mean 4, and 'b (missing)' is 1 there\n"
            "target 'y': 1 rows without a value are left out\n"
            "1 of 4 rows are left out for missing values ('a' 1)",
            id="one column drops, the others are filled",
        ),
        pytest.param(
            "age,b1,b2,y\n1,,3,1\n,2,3,2\n3,4,,3\n4,4,3,4\n", {"missing": {"b*": "drop", "b1": "mean"}},
            ("age", "age (missing)", "b1", "b1 (missing)", "b2"), [[1, 0, 3, 1, 3], [2.5, 1, 2, 0, 3], [4, 0, 4, 0, 3]],
            "('b2' 1)",
            id="a name goes before a pattern",
        ),
        pytest.param(
            "a,y\n1,1\n,2\n", {"missing": {"*": "drop", "a": "auto"}}, ("a", "a (missing)"), [[1, 0], [1, 1]],
            "they become the mean 1",
            id="a general policy beside one for a column",
        ),
        pytest.param(
            "a,y\n1,1\n,2\n3,\n", {"missing": "mean"}, ("a", "a (missing)"), [[1, 0], [1, 1]], "'y': 1 rows without",
            id="mean stated: a row without a target is left out all the same",
        ),
        pytest.param(
            "when,y\n2026-01-01,1\n,2\n", {"missing": {"when": "drop"}, "dates": ["days"]}, ("when.days",), [[DAYS]],
            "1 of 2 rows are left out for missing values ('when' 1)",
            id="a date is named without its parts",
        ),
        pytest.param(
            "a,y\n1,1\n,2\n", {"rename": {"a": "b"}, "missing": {"a": "drop"}}, ("b",), [[1]], "('b' 1)",
            id="a policy names the file's column",
        ),
    ],
)  # fmt: skip
def test_a_gap_becomes_what_its_column_says_and_is_told(
    make: Callable[..., Made], table: Any, settings: dict[str, Any], names: tuple[str, ...], x: Any, told: str
) -> None:
    made = make(table, **settings)
    assert made.names == names
    if x is not None:
        np.testing.assert_allclose(made.x, x, rtol=1e-6)
    assert told in made.told
    assert np.isfinite(made.x).all()


def nan_arrays() -> tuple[np.ndarray, np.ndarray]:
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6.0)
    x[1, 0], x[2:4, 1], y[5] = NAN, NAN, NAN
    return x, y


def npz(folder: Path) -> Any:
    x, y = nan_arrays()
    np.savez(folder / "f.npz", x=x, y=y)
    return folder / "f.npz"


def hdf5(folder: Path) -> Any:
    with h5py.File(folder / "f.h5", "w") as file:
        file["x"], file["y"] = nan_arrays()
    return folder / "f.h5"


def svmlight(folder: Path) -> Any:
    x, y = nan_arrays()
    lines = [f"{label} 1:{a} 2:{b}" for (a, b), label in zip(x, y, strict=True)][:5]
    (folder / "f.svm").write_text("\n".join([*lines, ""]))
    return folder / "f.svm"


SOURCES: dict[str, Callable[[Path], Any]] = {
    "arrays": lambda _: nan_arrays(),
    "float32 arrays": lambda _: tuple(map(np.float32, nan_arrays())),
    "npz": npz,
    "hdf5": hdf5,
    "svmlight": svmlight,
    "a list of batches": lambda _: [tuple(part[i : i + 2] for part in nan_arrays()) for i in (0, 2, 4)],
    "a function that makes batches": lambda _: lambda: iter([nan_arrays()]),
    "an iterator, which is read once": lambda _: iter([nan_arrays()]),
}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", SOURCES)
def test_arrays_of_any_source_are_filled_and_marked(
    make: Callable[..., Made], tmp_path: Path, kind: str, shuffle: bool
) -> None:
    made = make(SOURCES[kind](tmp_path), target=None, task="regression", shuffle=shuffle)
    assert made.names == ("x0", "x0 (missing)", "x1", "x1 (missing)")
    assert sorted(made.y) == [0, 1, 2, 3, 4]
    rows = [made.x[made.y.index(i)] for i in range(5)]
    np.testing.assert_allclose(
        rows, [[0, 0, 1, 0], [4.5, 1, 3, 0], [4, 0, 13 / 3, 1], [6, 0, 13 / 3, 1], [8, 0, 9, 0]]
    )


def test_a_data_frame_with_gaps_is_filled_as_its_file_would_be(make: Callable[..., Made]) -> None:
    frame = pd.DataFrame({"a": [1.0, NAN, 4], "c": ["x", None, "z"], "y": [1.0, 2, NAN]})
    made = make(frame)
    assert made.names == ("a", "a (missing)", "c=x", "c=(missing)")
    assert made.x == [[1, 0, 1, 0], [1, 1, 0, 1]]


def test_data_without_gaps_get_no_indicator_no_word_and_keep_their_means_for_later_files(
    make: Callable[..., Made],
) -> None:
    for shuffle in (False, True):
        made = make("a,y\n1,1\n2,2\n6,3\n", shuffle=shuffle)
        assert (made.names, made.told) == (("a",), "")
        assert made.manifest.columns["columns"][0]["fill"] == 3
        assert made.manifest.columns["version"] == 3
        assert "missing" not in made.manifest.conversion


def test_gaps_are_counted_in_the_manifest_and_inspect_shows_them(
    make: Callable[..., Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make("a,c,y\n1,u,1\n,,2\n4,v,\n")
    assert made.manifest.conversion["missing"] == {"a": 1, "c": 1, "y": 1}
    assert made.manifest.conversion["dropped_rows"] == 1
    assert made.manifest.conversion["fills"] == {"a": 1}
    indicator = made.manifest.columns["columns"][1]
    assert indicator == {"name": "a (missing)", "kind": "indicator", "source": "a", "of": "a"}
    (store,) = tmp_path.glob("*.zarr")
    assert cli.main(["inspect", str(store)]) == 0
    shown = capsys.readouterr().out
    assert "a (missing)" in shown
    assert "a 1, c 1, y 1" in shown


def test_of_many_columns_twenty_are_told_and_the_rest_in_one_line(make: Callable[..., Made]) -> None:
    x = np.arange(60.0).reshape(2, 30)
    x[0] = NAN
    told = make((x, np.arange(2.0)), target=None).told.splitlines()
    assert len(told) == 21
    assert told[-1] == "10 more columns miss 10 values; they become means or '(missing)' too"


@pytest.mark.parametrize(
    ("missing", "error", "message"),
    [
        (
            {"a": "error"},
            SourceError,
            "column 'a', row 2: the value is missing; fill it in, or take --missing auto",
        ),
        ({"y": "error"}, SourceError, "column 'y', row 3: the value is missing; .*--missing drop"),
        ({"nope": "drop"}, SourceError, "there is no column 'nope' for --missing; did you mean"),
        ({"q*": "drop"}, SourceError, r"no column matches 'q\*' of --missing"),
        ({"y": "mean"}, ConfigError, "missing of the target 'y' is mean"),
        ({"a": "zero"}, ConfigError, "missing of 'a' is 'zero'; choose one of auto, error, mean, drop"),
    ],
)
def test_policies_that_cannot_be_or_refuse_are_told_in_one_line(
    make: Callable[..., Made], missing: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        make("a,y\n1,1\n,2\n3,\n", missing=missing)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "rows", "names"),
    [
        ("drop", 1, ["a", "b"]),
        ("b=drop", 2, ["a", "a (missing)", "b"]),
        ("drop,a=auto", 2, ["a", "a (missing)", "b"]),
        ("auto", 3, ["a", "a (missing)", "b", "b (missing)"]),
    ],
)
def test_the_option_takes_a_policy_columns_or_both(
    tmp_path: Path, option: str, rows: int, names: list[str]
) -> None:
    table, store = write(tmp_path / "t", "a,b,y\n1,1,1\n,2,2\n3,,3\n"), tmp_path / "s.zarr"
    assert cli.main(["convert", str(table), str(store), "--target", "y", "--missing", option]) == 0
    with open_store(store) as opened:
        assert list(opened.manifest.feature_names) == names
        assert opened.manifest.splits["train"].n_rows == rows


@pytest.mark.parametrize("option", ["a=zero", "zero", "drop,mean", "a=drop,a=mean"])
def test_an_option_that_is_no_policy_ends_with_2(tmp_path: Path, option: str) -> None:
    table = write(tmp_path / "t", "a,y\n1,1\n")
    assert cli.main(["convert", str(table), str(tmp_path / "s"), "--target", "y", "--missing", option]) == 2


@pytest.fixture
def like(make: Callable[..., Made], tmp_path: Path) -> Path:
    make("a,b,c,y\n1,1,u,1\n,2,v,2\n4,6,,3\n")
    (store,) = tmp_path.glob("*.zarr")
    return store


def test_a_later_file_gets_the_recorded_means_indicators_and_policies(
    make: Callable[..., Made], like: Path
) -> None:
    made = make("a,b,c,y\n,,u,5\n7,8,,\n8,,,6\n", target=None, like=like)
    assert made.names == ("a", "a (missing)", "b", "c=u", "c=v", "c=(missing)")
    assert made.x == [[2.5, 1, 3, 1, 0, 0], [8, 0, 3, 0, 0, 1]]
    assert (
        "column 'a': 1 of 2 values are missing; they become the mean 2.5, and 'a (missing)' is 1" in made.told
    )
    assert "column 'b': 2 of 2 values are missing; they become the mean 3\n" in made.told
    assert "target 'y': 1 rows without a value are left out" in made.told
    again = make("a,b,c,y\n7,8,u,5\n", target=None, like=like)
    assert (again.names, again.told) == (made.names, "")


def test_a_policy_stated_beside_like_goes_before_the_recorded_one(
    make: Callable[..., Made], like: Path
) -> None:
    made = make("a,b,c,y\n,1,u,5\n7,,v,6\n", target=None, like=like, missing={"b": "drop"})
    assert made.x == [[2.5, 1, 1, 1, 0, 0]]
    with pytest.raises(SourceError, match="column 'a', row 1: the value is missing"):
        make("a,b,c,y\n,1,u,5\n", target=None, like=like, missing="error")


def test_recorded_drops_and_errors_are_followed_by_column(make: Callable[..., Made], tmp_path: Path) -> None:
    make("a,b,y\n1,1,1\n2,2,2\n", missing={"a": "drop", "b": "error"})
    (store,) = tmp_path.glob("*.zarr")
    made = make("a,b,y\n,1,1\n2,2,2\n", target=None, like=store)
    assert made.x == [[2, 2]]
    assert "1 of 2 rows are left out for missing values ('a' 1)" in made.told
    with pytest.raises(SourceError, match="column 'b', row 2"):
        make("a,b,y\n1,1,1\n2,,2\n", target=None, like=store)
    with pytest.raises(ConfigError, match="records no means of 'a'"):
        make("a,b,y\n1,1,1\n", target=None, like=store, missing="auto")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("missing", [None, "error", "drop", "mean"])
def test_records_of_earlier_versions_are_followed_as_they_were_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, missing: Any
) -> None:
    first = encode(tmp_path / "1", "n,c,y\n1,u,1\n2,v,2\n6,u,3\n")
    columns = [
        {"name": "n", "kind": "numeric", "source": "n", "type": "number"},
        {"name": "c", "kind": "category", "values": ["u", "v", "(missing)"], "source": "c", "type": "text"},
    ]
    if missing == "mean":
        columns[0]["fill"] = 3.0
    record: dict[str, Any] = {"version": version, "target": "y", "columns": columns}
    record |= {} if missing is None else {"missing": missing}
    store = pretend_store(monkeypatch, first, columns=record)
    text = "n,c,y\n,u,1\n2,,2\n5,u,\n7,v,4\n"
    if missing in (None, "error"):
        with pytest.raises(SourceError, match="column 'n', row 1: the value is missing"):
            encode(tmp_path / "2", text, target=None, like=store)
        return
    later = encode(tmp_path / "2", text, target=None, like=store)
    assert later.names == ["n", "c=u", "c=v", "c=(missing)"]
    if missing == "drop":
        assert later.x.tolist() == [[7, 0, 1, 0]]
    else:
        assert later.x.tolist() == [[3, 1, 0, 0], [2, 0, 0, 1], [7, 0, 1, 0]]


def test_a_table_with_gaps_is_predicted_as_its_store_would_be(tmp_path: Path, caplog: Any) -> None:
    import ep3stream

    rng = np.random.default_rng(0)
    cells = [[f"{v:.3f}" for v in row] for row in rng.normal(size=(60, 3))]
    for i in range(0, 60, 7):
        cells[i][0] = ""
    table = write(tmp_path / "t", "a,b,y\n" + "".join(",".join(row) + "\n" for row in cells))
    convert(table, tmp_path / "s.zarr", ConvertConfig(target="y"))
    settings = plain_config(solver={"centers": 20})
    ep3stream.fit(tmp_path / "s.zarr", tmp_path / "run", settings)
    new = write(tmp_path / "new", "b,a\n1,\n,2\n0.5,0.25\n")
    with caplog.at_level(logging.WARNING):
        predict_tables(tmp_path / "run", new, tmp_path / "out.csv")
    with open_store(tmp_path / "s.zarr") as store:
        fills = {c["name"]: c["fill"] for c in store.manifest.columns["columns"] if "fill" in c}
    x = np.array([[fills["a"], 1, 1], [2, 0, fills["b"]], [0.25, 0, 0.5]], np.float32)
    found = [float(line) for line in (tmp_path / "out.csv").read_text().split()[1:]]
    np.testing.assert_allclose(found, ep3stream.load(tmp_path / "run").predict(x), rtol=1e-5)
    assert "column 'a': 1 of 3 values are missing; they become the mean" in caplog.text


def test_a_stream_that_is_read_once_is_filled_in_its_own_order(make: Callable[..., Made]) -> None:
    table = pa.table({"a": [1.0, None, 4.0], "y": [1.0, 2.0, 3.0]})
    assert make(table.to_reader()).x == [[1, 0], [2.5, 1], [4, 0]]


def test_a_table_that_no_store_can_hold_leaves_nothing(make: Callable[..., Made], tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SourceError, match=r"column 'k', row 2: the value is not finite \(inf\)"):
        make(pa.table({"k": [1.5, float("inf")], "y": [1.0, 2.0]}), category=["k"])
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def batches_of(rows: int, gap_at: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, rows, 50):
        x = np.arange(start, start + 50.0)[:, None] * [1, 0.1]
        if start <= gap_at < start + 50:
            x[gap_at - start, 1] = NAN
        yield x, np.arange(start, start + 50.0)


@pytest.mark.parametrize(
    ("gap_at", "stops"), [(0, (0, 3)), (777, (39, 41, 2)), (1999, (0, 3)), (1999, (70, 1, 90))]
)
def test_a_straight_conversion_that_meets_a_gap_begins_again_and_is_resumed_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap_at: int, stops: tuple[int, ...]
) -> None:
    monkeypatch.setattr(convert_module, "_PROGRESS_EVERY_S", 0.0)
    config = ConvertConfig(shuffle=False, segment_bytes=4096, memory_bytes=4 * 4096)
    source = lambda: batches_of(2000, gap_at)  # noqa: E731
    convert(source, tmp_path / "whole", config)
    for calls in stops:
        left = [calls]

        def stop(_: object, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        try:
            convert(source, tmp_path / "stopped", config, progress=stop)
            break
        except KeyboardInterrupt:
            pass
    else:
        convert(source, tmp_path / "stopped", config)
    files = [
        sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")) for n in ("whole", "stopped")
    ]
    assert files[0] == files[1]
    for file in files[0]:
        whole, stopped = tmp_path / "whole" / file, tmp_path / "stopped" / file
        assert whole.is_dir() or whole.read_bytes() == stopped.read_bytes()
    with open_store(tmp_path / "whole") as store:
        x, _ = store.split("train").read_rows(np.arange(2000))
    assert store.manifest.feature_names == ("x0", "x1", "x1 (missing)")
    assert np.flatnonzero(x[:, 2]).tolist() == [gap_at]
    others = np.delete(np.arange(2000) * 0.1, gap_at)
    assert x[gap_at, 1] == pytest.approx(others.mean(), rel=1e-6)
    np.testing.assert_array_equal(x[:, 0], np.arange(2000))


def test_the_memory_does_not_change_the_means(tmp_path: Path) -> None:
    x = np.random.default_rng(3).normal(size=(5000, 3)) * 1e6
    x[::11, 1] = NAN
    for name, memory in (("small", 4 * 4096), ("large", 1 << 26)):
        config = ConvertConfig(segment_bytes=4096, memory_bytes=memory, splits={"train": 0.7, "test": 0.3})
        convert((x, np.arange(5000.0)), tmp_path / name, config)
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("small", "large")]
    assert manifests[0] == manifests[1]
    with open_store(tmp_path / "small") as store:
        fill = store.manifest.conversion["fills"]["x1"]
        rows, _ = store.split("train").read_rows(np.arange(store.manifest.splits["train"].n_rows))
    np.testing.assert_allclose(fill, rows[rows[:, 2] == 0, 1].astype(float).mean(), rtol=1e-9)
    assert set(rows[rows[:, 2] == 1, 1]) == {np.float32(fill)}
