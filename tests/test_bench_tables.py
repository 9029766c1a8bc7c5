"""The benchmark on real tables, on small tables in their place: no package is downloaded."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ep3stream import cli

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def tools(monkeypatch):
    """The three modules, with two small tables in place of the real ones, and no libraries of trees."""
    monkeypatch.syspath_prepend(TOOLS)
    import bench_tables
    import table_data
    import table_peers

    for name in ("lightgbm", "xgboost"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(table_data, "TABLES", TABLES := small_tables(table_data))
    monkeypatch.setattr(bench_tables, "TABLES", TABLES)
    yield bench_tables, table_data, table_peers
    for name in ("bench_tables", "table_data", "table_peers"):
        sys.modules.pop(name, None)


def small_tables(table_data):
    def numbers(packages):
        values = np.random.default_rng(0)
        frame = pd.DataFrame({"a": values.normal(size=900), "kind": values.choice(["x", "y", "z"], 900)})
        frame["y"] = 2 * frame["a"] + 5 * (frame["kind"] == "x")
        frame.loc[::10, "a"] = np.nan
        return table_data.Made(
            table_data.with_categories(frame, ["kind"]), table_data.group_folds(np.arange(900) // 3)
        )

    def quadrants(packages):
        frame = pd.DataFrame(np.random.default_rng(1).normal(size=(900, 2)), columns=["u", "v"])
        frame["where"] = np.where(frame["u"] > 0, "east", "west") + np.where(frame["v"] > 0, "n", "s")
        return table_data.Made(table_data.with_categories(frame, ["where"]), table_data.random_folds(900))

    return {
        "numbers": table_data.Table("y", "regression", numbers),
        "quadrants": table_data.Table("where", "classification", quadrants),
    }


def run(bench_tables, monkeypatch, tmp_path, *words):
    directory = ["--directory", str(tmp_path / "tables"), "--json", str(tmp_path / "results.json")]
    monkeypatch.setattr(sys, "argv", ["bench_tables", "--threads", "1", *directory, *words])
    assert bench_tables.main() == 0
    return json.loads((tmp_path / "results.json").read_text())


def in_this_process(threads, *words):
    """What the command prints, without another process that loads torch."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = cli.main([str(word) for word in words])
    return subprocess.CompletedProcess(words, code, said.getvalue(), "")


@pytest.mark.usefixtures("quick_columns")
def test_each_table_is_fitted_scored_and_written_into_the_page(tools, monkeypatch, tmp_path):
    bench_tables, _, _ = tools
    monkeypatch.setattr(bench_tables, "command", in_this_process)
    page = tmp_path / "tables.md"
    page.write_text(f"before\n{bench_tables.BEGIN}\nold\n{bench_tables.END}\nafter\n")
    words = ["--minutes", "0", "--fit-options", "--centers 100 --epochs 2", "--docs", str(page), "--tables"]
    run(bench_tables, monkeypatch, tmp_path, *words, "quadrants", "--only", "peers")
    results = run(bench_tables, monkeypatch, tmp_path, *words, "numbers")
    methods = {name: entry["methods"] for name, entry in results.items()}
    assert set(methods["numbers"]) == {"convert", "ep3stream", "estimator", "ridge"}
    assert set(methods["quadrants"]) == {"ridge", "5 neighbours", "forest"}
    assert all(methods["numbers"][name]["score"] > 0.5 for name in ("ep3stream", "estimator", "ridge"))
    assert all(methods["quadrants"][name]["score"] > 0.85 for name in ("5 neighbours", "forest"))
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert [line.split(" | ")[0] for line in lines[4:6]] == ["| numbers", "| quadrants"]
    assert "720 + 90 + 90" in lines[5]
    assert "old" not in lines


def test_a_command_that_fails_is_a_line_with_its_reason(tools, monkeypatch, tmp_path):
    bench_tables, _, _ = tools
    words = ["--tables", "quadrants", "--only", "fits", "--minutes", "0", "--fit-options=--no-such-option"]
    methods = run(bench_tables, monkeypatch, tmp_path, *words)["quadrants"]["methods"]
    assert methods["convert"]["note"].endswith(" MB")
    failed = methods["ep3stream"]
    assert failed["score"] is None
    assert "--no-such-option" in failed["note"]


def test_the_rows_of_a_table_are_split_once_and_a_group_is_in_one_split_only(tools, tmp_path):
    _, table_data, _ = tools
    made = table_data.TABLES["numbers"].make(None)
    made.frame["row"] = np.arange(900)
    parts = table_data.split(made)
    rows = {name: part["row"].to_numpy() for name, part in parts.items()}
    assert sorted(np.concatenate(list(rows.values()))) == list(range(900))
    groups = [set(places // 3) for places in rows.values()]
    assert all(len(a & b) == 0 for i, a in enumerate(groups) for b in groups[:i])


def test_a_pickled_frame_is_read_and_a_pickle_of_anything_else_is_refused(tools):
    _, table_data, _ = tools

    class Hostile:
        def __reduce__(self):
            return print, ("run",)

    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print"):
        table_data.FrameUnpickler(io.BytesIO(pickle.dumps(Hostile()))).load()
    array = np.arange(6.0).reshape(2, 3)
    data = pickle.dumps(array, protocol=3).replace(b"numpy._core", b"numpy.core")
    assert np.array_equal(table_data.FrameUnpickler(io.BytesIO(data)).load(), array)


def test_gaps_and_categories_become_columns_of_0_and_1(tools):
    _, _, table_peers = tools
    frame = pd.DataFrame(
        {"a": [1.0, 3.0, np.nan], "kind": pd.Categorical(["x", "y", None], categories=["x", "y"])}
    )
    features = table_peers.Standardised.of(frame)(frame)
    assert np.allclose(features[:, 0], [-(0.5**0.5), 0.5**0.5, 0])
    assert features[:, 1:].tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
