"""The benchmark on flights, on a small table in their place."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import ep3stream

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The tool with a store of 1500 rows, a numeric column and two of categories; few centers; no LightGBM."""
    monkeypatch.syspath_prepend(TOOLS)
    import bench_flights

    rows = [
        f"{i % 24 + i / 1500:.4f},{'ABC'[i % 3]},{'XY'[i % 2]},{(i % 24) ** 2 + 100 * (i % 3)}"
        for i in range(1500)
    ]
    table, store = tmp_path / "flights.csv", tmp_path / "flights.zarr"
    table.write_text("\n".join(["hour,origin,carrier,arr_delay", *rows, ""]))
    ep3stream.convert(
        [table],
        store,
        ep3stream.ConvertConfig(target="arr_delay", splits=bench_flights.SPLITS, categories="onehot"),
    )
    monkeypatch.setattr(bench_flights, "flights_store", lambda *_, **__: store)
    monkeypatch.setattr(bench_flights, "DEMO", {"centers": 60})
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    yield bench_flights, store
    sys.modules.pop("bench_flights", None)


def test_every_method_has_a_line_and_a_missing_library_says_so(bench, monkeypatch, tmp_path, capsys):
    tool, _ = bench
    monkeypatch.setattr(sys, "argv", ["bench", "--threads", "1", "--directory", str(tmp_path)])
    assert tool.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0].split("  ")[0] for line in lines[2:]] == [
        "ridge regression",
        "ep3stream",
        "ep3stream",
        "ep3stream",
        "LightGBM",
    ]
    ridge, defaults = (float(line[34:].split()[0]) for line in lines[2:4])
    assert 0.5 < ridge < defaults
    assert "skipped: not installed" in lines[-1]


def test_one_hot_features_become_the_codes_that_they_came_from(bench):
    tool, store = bench
    rows = tool.Rows.of(store)
    assert len(rows.names) == 6
    x, n_categorical = tool.with_codes(rows.x["test"], rows.names)
    assert (x.shape[1], n_categorical) == (3, 2)
    origin = [place for place, name in enumerate(rows.names) if name.startswith("origin=")]
    assert np.array_equal(
        rows.x["test"][np.arange(len(x)), np.array(origin)[x[:, 0].astype(int)]], np.ones(len(x))
    )
