"""How far apart neighbours end up, against brute force and against what a perfect shuffle gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_stores import make_store

from ep3stream import cli
from ep3stream.stream.order import SHARES, RowOrder, order_quality

NONE = np.empty(0, np.int64)
ORDER = RowOrder(5, 1000, segment_rows=60, window_segments=3, batch_size=100, excluded=NONE)


def places(order: RowOrder) -> dict[int, int]:
    """Row of the split -> place in the first epoch."""
    rows: list[int] = []
    for visit in order.visits(0, order.steps_per_epoch):
        place, row = np.divmod(order.window_rows(0, visit.index, visit.segments), order.segment_rows)
        rows += (visit.segments[place] * order.segment_rows + row).tolist()
    return {row: place for place, row in enumerate(rows)}


@pytest.mark.parametrize(
    "order",
    [
        ORDER,
        replace(ORDER, excluded=np.arange(3, 1000, 7)),
        replace(ORDER, window_segments=1),
        replace(ORDER, n_rows=50),
    ],
    ids=["as it is", "with centers", "one segment a window", "one segment"],
)
def test_distances_are_those_of_rows_that_follow_one_another_in_a_segment(order: RowOrder) -> None:
    at, segment = places(order), order.segment_rows
    pairs = [(row, row + 1) for row in at if row + 1 in at and row // segment == (row + 1) // segment]
    apart = np.abs([at[a] - at[b] for a, b in pairs])
    bounds = [order.batch_bounds(step)[1] for step in range(order.steps_per_epoch)]
    together = [
        np.searchsorted(bounds, at[a], "right") == np.searchsorted(bounds, at[b], "right") for a, b in pairs
    ]
    quality = order_quality(order)
    assert quality.n_pairs == len(pairs)
    assert quality.distances == pytest.approx(np.quantile(apart, SHARES).tolist())
    assert quality.same_batch == pytest.approx(np.mean(together))


def test_one_window_of_all_rows_is_a_perfect_shuffle() -> None:
    quality = order_quality(RowOrder(0, 40_000, 1000, 40, 100, NONE))
    assert quality.distances == pytest.approx(quality.perfect, rel=0.05)
    assert 0.97 < quality.relative < 1.03
    assert quality.same_batch == pytest.approx(quality.perfect_same_batch, rel=0.3)
    drawn = np.abs(np.diff(np.random.default_rng(0).permutation(40_000)))
    assert quality.perfect == pytest.approx(np.quantile(drawn, SHARES).tolist(), rel=0.05)


def test_smaller_windows_mix_less() -> None:
    wide, narrow = (order_quality(RowOrder(0, 40_000, 1000, window, 100, NONE)) for window in (20, 2))
    assert 0.4 < wide.relative < 0.6
    assert 0.04 < narrow.relative < 0.06
    assert narrow.same_batch > wide.same_batch


def test_of_many_windows_some_are_looked_at() -> None:
    quality = order_quality(RowOrder(0, 10_000_000, 1000, 1, 100, NONE))
    assert 0 < quality.n_pairs <= 32 * 999
    assert quality.relative == pytest.approx(0.0001, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "memory", "words"),
    [
        ({}, "1MiB", "has shuffled all rows"),
        ({"shuffle": False}, "2GiB", "all of it is mixed in memory: nothing is lost"),
        ({"shuffle": False}, "60KiB", "give the fit more --memory"),
    ],
)
def test_the_command_tells_what_it_means(
    tmp_path: Path, capsys: Any, monkeypatch: Any, settings: Any, memory: str, words: str
) -> None:
    monkeypatch.setattr("ep3stream.training.plan._STREAM_BYTES", 1 << 14)
    store = make_store(tmp_path / "s.zarr", split="train=1", **settings)
    capsys.readouterr()
    assert cli.main(["inspect", "--order", str(store), "--memory", memory]) == 0
    said = capsys.readouterr().out
    assert "split train: 1,500 rows, of which" in said
    assert words in said
    assert cli.main(["inspect", "--order", "--json", str(store)]) == 0
    assert json.loads(capsys.readouterr().out)["order"]["train"]["n_rows"] == 1500
