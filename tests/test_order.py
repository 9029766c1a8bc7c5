"""Every row once an epoch, in an order that is a pure function of (seed, epoch)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep3stream.errors import InputError
from ep3stream.stream.order import RowOrder

NONE = np.empty(0, np.int64)
ORDER = RowOrder(seed=3, n_rows=103, segment_rows=10, window_segments=3, batch_size=16, excluded=NONE)


@st.composite
def orders(draw: st.DrawFn) -> RowOrder:
    """Any sizes: one segment, a ragged last one, excluded rows that empty segments or windows, huge batches."""
    n_rows = draw(st.integers(1, 120))
    segment_rows = draw(st.integers(1, 40))
    excluded = draw(st.sets(st.integers(0, n_rows - 1)))
    for segment in draw(st.sets(st.integers(0, (n_rows - 1) // segment_rows))):
        excluded |= set(range(segment * segment_rows, min((segment + 1) * segment_rows, n_rows)))
    if len(excluded) == n_rows:
        excluded.remove(draw(st.sampled_from(sorted(excluded))))
    return RowOrder(
        seed=draw(st.integers(0, 2**63 - 1)),
        n_rows=n_rows,
        segment_rows=segment_rows,
        window_segments=draw(st.integers(1, 8)),
        batch_size=draw(st.integers(1, 150)),
        excluded=np.array(sorted(excluded), np.int64),
    )


def _split_rows(order: RowOrder, epoch: int, index: int, segments: np.ndarray) -> np.ndarray:
    """The window's rows, numbered within the split."""
    place, row = np.divmod(order.window_rows(epoch, index, segments), order.segment_rows)
    return segments[place] * order.segment_rows + row


def _rows(order: RowOrder, start: int, stop: int) -> np.ndarray:
    visits = list(order.visits(start, stop))
    return np.concatenate(
        [_split_rows(order, visit.epoch, visit.index, visit.segments)[visit.used :] for visit in visits]
    )


def _epoch(order: RowOrder, epoch: int) -> np.ndarray:
    return _rows(order, epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)


@given(orders(), st.integers(0, 10**6))
def test_every_row_that_is_not_excluded_appears_once_an_epoch(order: RowOrder, epoch: int) -> None:
    expected = np.setdiff1d(np.arange(order.n_rows), order.excluded)
    np.testing.assert_array_equal(np.sort(_epoch(order, epoch)), expected)


@given(orders())
def test_batches_cover_the_epoch_without_gaps_and_differ_by_one_row_at_most(order: RowOrder) -> None:
    bounds = [order.batch_bounds(step) for step in range(order.steps_per_epoch)]
    sizes = [stop - first for first, stop in bounds]
    assert (bounds[0][0], bounds[-1][1]) == (0, order.epoch_rows)
    assert all(bounds[i][1] == bounds[i + 1][0] for i in range(len(bounds) - 1))
    assert 1 <= min(sizes) <= max(sizes) <= min(min(sizes) + 1, order.batch_size)


@given(orders(), st.data())
def test_visits_from_any_step_hold_the_rows_of_the_visits_from_step_0(order: RowOrder, data: Any) -> None:
    steps = order.steps_per_epoch
    stop = data.draw(st.integers(1, 3 * steps))
    start = data.draw(st.integers(0, stop - 1))
    epoch, step = divmod(start, steps)
    skipped = epoch * order.epoch_rows + order.batch_bounds(step)[0]
    epoch, step = divmod(stop - 1, steps)
    needed = epoch * order.epoch_rows + order.batch_bounds(step)[1]
    everything, rest = _rows(order, 0, 3 * steps), _rows(order, start, stop)
    np.testing.assert_array_equal(rest[: needed - skipped], everything[skipped:needed])


@given(orders(), st.data())
def test_visits_name_no_window_whose_rows_are_not_needed(order: RowOrder, data: Any) -> None:
    stop = data.draw(st.integers(1, 3 * order.steps_per_epoch))
    start = data.draw(st.integers(0, stop - 1))
    visits = list(order.visits(start, stop))
    sizes = [len(order.window_rows(visit.epoch, visit.index, visit.segments)) for visit in visits]
    assert all(visit.used < size for visit, size in zip(visits, sizes, strict=True))
    epochs = (stop - 1) // order.steps_per_epoch - start // order.steps_per_epoch
    last = order.batch_bounds((stop - 1) % order.steps_per_epoch)[1]
    before_last = epochs * order.epoch_rows + last
    skipped = order.batch_bounds(start % order.steps_per_epoch)[0]
    assert sum(sizes[:-1]) - visits[0].used * (len(visits) > 1) < before_last - skipped


def test_no_steps_need_no_rows() -> None:
    assert [list(ORDER.visits(step, step)) for step in (0, 7, 14)] == [[], [], []]


@given(orders(), st.integers(0, 1000))
def test_the_order_does_not_depend_on_what_was_asked_before(order: RowOrder, epoch: int) -> None:
    first = _epoch(order, epoch)
    _epoch(order, epoch + 1)
    order.window_rows(5, 0, order.window(order.segments(5), 0))
    np.testing.assert_array_equal(_epoch(order, epoch), first)
    np.testing.assert_array_equal(_epoch(replace(order), epoch), first)


@given(orders(), st.integers(0, 1000))
def test_rows_stay_inside_their_window(order: RowOrder, epoch: int) -> None:
    segments, rows = order.segments(epoch), _epoch(order, epoch)
    ends = order.window_ends(segments).tolist()
    assert len(ends) == order.n_windows
    for index, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
        assert set(rows[first:end] // order.segment_rows) <= set(order.window(segments, index))


def test_windows_visit_the_segments_in_the_epochs_own_order() -> None:
    visited = [np.concatenate([v.segments for v in ORDER.visits(7 * e, 7 * e + 7)]) for e in (0, 1)]
    np.testing.assert_array_equal(visited[0], ORDER.segments(0))
    assert not np.array_equal(*visited)


@pytest.mark.parametrize("other", [replace(ORDER, seed=4), replace(ORDER, seed=2**63 - 1)])
def test_epochs_and_seeds_give_different_orders(other: RowOrder) -> None:
    orders = [tuple(_epoch(order, epoch)) for order in (ORDER, other) for epoch in (0, 1, 2, 10**9)]
    assert len(set(orders)) == 8


def test_windows_of_one_epoch_are_mixed_differently() -> None:
    order = replace(ORDER, n_rows=60, window_segments=1)
    mixed = {tuple(order.window_rows(0, index, np.array([0]))) for index in range(6)}
    assert len(mixed) == 6


def test_the_rows_of_a_window_are_mixed_evenly() -> None:
    order = replace(ORDER, n_rows=4, segment_rows=2, window_segments=2)
    counts = np.zeros((4, 4))
    for epoch in range(4000):
        counts[np.arange(4), _epoch(order, epoch)] += 1
    # Binomial(4000, 1/4): six standard deviations are 164.
    assert np.abs(counts - 1000).max() < 164


def test_this_order_never_changes_between_versions() -> None:
    order = RowOrder(42, 23, segment_rows=5, window_segments=2, batch_size=6, excluded=np.array([3, 10, 22]))
    assert order.segments(1).tolist() == [0, 4, 3, 1, 2]
    assert _epoch(order, 1).tolist() == [
        20,
        2,
        21,
        1,
        0,
        4,
        17,
        6,
        18,
        19,
        5,
        9,
        7,
        15,
        16,
        8,
        12,
        13,
        11,
        14,
    ]
    assert [order.batch_bounds(step) for step in range(4)] == [(0, 5), (5, 10), (10, 15), (15, 20)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"window_segments": 0}, "window_segments is 0"),
        ({"segment_rows": -1}, "segment_rows is -1"),
        ({"n_rows": 0}, "n_rows is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"excluded": np.array([4, 2])}, "not sorted"),
        ({"excluded": np.array([2, 2])}, "repeat"),
        ({"excluded": np.array([103])}, "use each of 0 to 102"),
        ({"excluded": np.array([-1])}, "use each of 0 to 102"),
        ({"excluded": np.arange(103)}, "all 103 rows"),
    ],
)
def test_sizes_and_excluded_rows_that_make_no_order_are_refused(change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(ORDER, **change)
