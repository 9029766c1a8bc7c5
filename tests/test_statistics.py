from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep3stream.conversion.numbers import Moments


def _assert_statistics_of(moments: Moments, rows: np.ndarray) -> None:
    found, rows = moments.statistics(np.zeros(rows.shape[1], np.int64)), rows.astype(np.float64)
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(found.std, rows.std(0), rtol=1e-9, atol=1e-14)
    np.testing.assert_array_equal(found.minimum, rows.min(0))
    np.testing.assert_array_equal(found.maximum, rows.max(0))
    assert found.missing == (0,) * rows.shape[1]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1), (100_003, 1), (20_011, 9), (611, 784)])
def test_statistics_equal_those_of_numpy_in_float64(dtype: str, shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).normal(3, 2, shape).astype(dtype)
    _assert_statistics_of(Moments.of(rows), rows)


def test_a_mean_of_1e8_leaves_the_deviation_of_1_intact() -> None:
    rows = np.random.default_rng(1).normal(1e8, 1, (300_000, 2))
    _assert_statistics_of(Moments.of(rows), rows)


def test_an_outlying_first_row_costs_no_digits() -> None:
    rows = np.random.default_rng(2).normal(0, 1, (300_000, 2))
    rows[0] = 1e8
    _assert_statistics_of(Moments.of(rows), rows)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_any_cut_of_the_rows_merges_to_the_same_statistics(sizes: list[int], seed: int) -> None:
    rows = np.random.default_rng(seed).normal(1e6, 1, (sum(sizes) + 1, 3))
    merged = Moments.empty(3)
    for part in np.split(rows, np.cumsum(sizes)):
        merged = merged.merge(Moments.of(part))
    _assert_statistics_of(merged, rows)


@pytest.mark.parametrize("shape", [(1, 300), (7, 3), (9_999, 5), (131_073, 1)])
def test_moments_survive_being_written_as_json_to_the_last_bit(shape: tuple[int, int]) -> None:
    moments = Moments.of(np.random.default_rng(3).normal(1e3, 1, shape).astype(np.float32))
    back = Moments.from_state(json.loads(json.dumps(moments.state())))
    assert back.count == moments.count
    for name in ("mean", "squares", "minimum", "maximum"):
        assert getattr(back, name).tobytes() == getattr(moments, name).tobytes()


def test_huge_values_do_not_overflow() -> None:
    rows = np.full((1000, 1), 3e38, np.float32)
    rows[::2] = -3e38
    _assert_statistics_of(Moments.of(rows), rows)
