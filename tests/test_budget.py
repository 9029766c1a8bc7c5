"""Centers and epochs from a budget of time: a pure function."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep3stream.solver.kernels import RadialKernel
from ep3stream.training.budget import (
    FitSizes,
    SizeLimits,
    Speed,
    measured_speed,
    most_distinct,
    on_grid,
    sizes_for,
)

FLIGHTS = SizeLimits(n_rows=300_000, most_in_memory=200_000, n_validated=20_000)


def used(sizes: FitSizes, limits: SizeLimits) -> float:
    return sizes.n_centers * limits.rows_per_center(sizes.epochs)


def test_two_epochs_with_as_many_centers_as_there_is_time_for():
    sizes = sizes_for(FLIGHTS, 1e10)
    assert sizes == FitSizes(12_500, 2, "time")
    assert used(sizes, FLIGHTS) <= 1e10 < used(replace_centers(sizes, 16_000), FLIGHTS)


def replace_centers(sizes: FitSizes, n_centers: int) -> FitSizes:
    return replace(sizes, n_centers=n_centers)


def test_small_tables_have_a_center_for_four_rows_and_more_epochs_up_to_ten():
    small = SizeLimits(n_rows=10_000, most_in_memory=200_000)
    assert sizes_for(small, 1e12) == FitSizes(2500, 10, "rows")
    assert sizes_for(small, 2500 * (4.5 * 10_000 + small.rows_per_center(0))) == FitSizes(2500, 4, "time")


def test_memory_bounds_the_centers_and_is_named():
    tight = replace(FLIGHTS, most_in_memory=6000)
    assert sizes_for(tight, 1e12) == FitSizes(5000, 10, "memory")


def test_of_huge_data_2000_centers_see_a_part_of_an_epoch():
    huge = SizeLimits(n_rows=10**9, most_in_memory=10**6, n_validated=20_000)
    sizes = sizes_for(huge, 1e11)
    assert (sizes.n_centers, sizes.limit) == (2000, "time")
    assert 0.03 < sizes.epochs < 0.05
    assert sizes_for(huge, 1.0).epochs == 0.01


def test_between_one_epoch_and_two_of_2000_centers_there_is_one():
    large = SizeLimits(n_rows=10**7, most_in_memory=10**6)
    assert sizes_for(large, 2000 * 1.6e7) == FitSizes(2000, 1, "time")


def test_given_epochs_are_kept_and_the_centers_chosen():
    given_epochs = replace(FLIGHTS, epochs=5.0)
    sizes = sizes_for(given_epochs, 1e10)
    assert (sizes.n_centers, sizes.epochs) == (6300, 5.0)
    assert sizes_for(given_epochs, 1e3) == FitSizes(2000, 5.0, "time")
    assert sizes_for(given_epochs, 1e14).n_centers == 32_000


def test_given_centers_are_kept_off_the_grid_and_the_epochs_chosen():
    given_centers = replace(FLIGHTS, centers=3333)
    sizes = sizes_for(given_centers, 1e10)
    assert (sizes.n_centers, sizes.epochs) == (3333, 9)
    assert sizes_for(given_centers, 1e8).epochs < 1


@pytest.mark.parametrize(
    ("number", "found"),
    [
        (0, 1), (7, 7), (99, 99), (100, 100), (124, 100), (126, 125), (999, 800), (1000, 1000), (6299, 5000),
        (6300, 6300), (12_499, 10_000), (12_500, 12_500), (1_999_999, 1_600_000),
    ],
)  # fmt: skip
def test_the_grid_has_ten_steps_to_a_tenfold(number, found):
    assert on_grid(number) == found


@given(
    st.integers(1, 10**9),
    st.integers(0, 10**7),
    st.integers(0, 50_000),
    st.floats(0, 1e16),
    st.one_of(st.none(), st.integers(1, 10**6)),
    st.one_of(st.none(), st.floats(0.01, 50)),
)
def test_more_time_never_means_a_smaller_fit_and_time_is_kept_where_it_can_be(
    n_rows, most_in_memory, n_validated, evaluations, centers, epochs
):
    limits = SizeLimits(n_rows, most_in_memory, n_validated, centers, epochs)
    sizes, more = sizes_for(limits, evaluations), sizes_for(limits, 2 * evaluations)
    assert sizes.n_centers >= 1
    assert 0 < sizes.epochs < math.inf
    assert more.n_centers >= sizes.n_centers
    assert more.epochs * more.n_centers >= sizes.epochs * sizes.n_centers * 0.999
    if centers is None:
        assert sizes.n_centers <= max(1, min(n_rows // 4, most_in_memory))
    else:
        assert sizes.n_centers == centers
    assert epochs is None or sizes.epochs == epochs
    is_least = sizes.n_centers <= 2000 or centers is not None
    assert used(sizes, limits) <= evaluations * 1.001 or (
        is_least and (sizes.epochs <= 1 or epochs is not None)
    )


def test_a_slow_set_up_leaves_less_to_the_steps():
    slow = FLIGHTS.at(Speed(1e-9, 1e-3))
    assert slow.setup_rows == pytest.approx(1_005_000)
    assert sizes_for(slow, 1e10).n_centers < sizes_for(FLIGHTS, 1e10).n_centers


def test_the_speed_is_the_lower_quartile_of_steps_by_the_clock_it_is_given(monkeypatch):
    monkeypatch.setattr("ep3stream.training.budget._ROUNDS", 25)
    seconds = [3.0] * 10 + [1.0] * 3 + [50.0] * 12  # Of 25 steps: half of them were disturbed.
    ticks = [tick for step, took in enumerate(seconds) for tick in (100.0 * step, 100.0 * step + took)]
    clock = iter([*ticks, *(10 * tick for tick in ticks)]).__next__
    kernel = RadialKernel("laplacian", 1.0, centre=torch.zeros(3))
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    assert measured_speed(kernel, x, 2, clock) == Speed(3.0 / (512 * 4096), 7 * 30.0 / 512)


@pytest.mark.parametrize(
    ("n_rows", "n_centers"), [(1000, 250), (20_000, 5000), (39_000, 5000), (80_000, 10_000), (10**6, 125_000)]
)
def test_most_centers_are_an_eighth_of_the_rows_and_a_quarter_of_few(n_rows, n_centers):
    assert SizeLimits(n_rows=n_rows, most_in_memory=10**9).most_for_rows == n_centers


def test_rows_that_are_often_the_same_have_few_centers() -> None:
    generator = np.random.default_rng(0)
    few = generator.integers(0, 3, (4000, 4)).astype(np.float32)
    assert most_distinct(few) == 16 * 81
    assert most_distinct(generator.standard_normal((4000, 4))) is None
    assert SizeLimits(n_rows=600_000, most_in_memory=10**6, most_distinct=16 * 81).most_centers == 1250
    assert SizeLimits(n_rows=2000, most_in_memory=10**6, most_distinct=16 * 81).most_centers == 500
