"""What a fit costs, against sums done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ep3stream.planning.costs import (
    Rates,
    Sizes,
    compute_seconds_of_step,
    evaluations_of_step,
    flops_of_setup,
    flops_of_step,
    handed_bytes_of_step,
    link_seconds_of_step,
    projection_flops,
    reduced_bytes_of_step,
    seconds_of_step,
)

SIZES = Sizes(
    n_rows=10_000,
    n_features=8,
    n_outputs=2,
    n_centers=1000,
    batch_size=300,
    data_rank=20,
    model_rank=50,
    nystrom_samples=400,
    n_landmarks=500,
    row_bytes=40,
)
RATES = Rates(evaluation_s=1e-9, flop_s=1e-10, overhead_s=1e-4, read_bytes_per_s=1e9)


def test_a_step_of_each_projection_is_counted_by_its_formula():
    assert SIZES.steps_per_epoch == 34
    assert evaluations_of_step(SIZES) == 300_000
    assert projection_flops(SIZES) == 4 * 1000 * 50 * 2 + 4 * 2500 * 2
    assert flops_of_step(SIZES) == 20 * 300_000 + 4 * 300_000 * 2 + projection_flops(SIZES)
    exact = replace(SIZES, projection="exact")
    assert evaluations_of_step(exact) == 300_000
    assert projection_flops(exact) == 4 * 10**6 * 2 + 4 * 1000 * 20 * 2
    published = replace(SIZES, projection="eigenpro", passes=2)
    assert evaluations_of_step(published) == 300_000 + 300 * 400 + 2 * 10**6


def test_a_step_takes_the_longer_of_computing_and_reading():
    computed = 1e-4 + 300_000e-9 + projection_flops(SIZES) * 1e-10
    assert compute_seconds_of_step(SIZES, RATES) == pytest.approx(computed)
    assert seconds_of_step(SIZES, RATES) == pytest.approx(computed)
    assert seconds_of_step(SIZES, replace(RATES, read_bytes_per_s=1e6)) == pytest.approx(300 * 40 / 1e6)


def test_devices_share_the_arithmetic_and_pay_for_their_links():
    eight, linked = replace(SIZES, devices=8), replace(RATES, link_bytes_per_s=1e9, link_latency_s=1e-5)
    assert reduced_bytes_of_step(SIZES) == link_seconds_of_step(SIZES, linked) == 0
    assert reduced_bytes_of_step(eight) == 4 * 2 * (300 + 50 + 2 * 50)
    assert reduced_bytes_of_step(eight, n_leading=7) == 4 * 2 * (300 + 50 + 2 * 7)
    handed = 300 * 40  # 8 features and 2 targets a row.
    assert handed_bytes_of_step(eight) == handed
    assert handed_bytes_of_step(SIZES) == 0
    assert link_seconds_of_step(eight, linked) == pytest.approx((7 / 4 * 3600 + handed) / 1e9 + 3e-5)
    near = replace(linked, node_link_bytes_per_s=1e10)
    assert link_seconds_of_step(eight, near) == pytest.approx((7 / 4 * 3600 + handed / 10) / 1e9 + 3e-5)
    assert (
        handed_bytes_of_step(replace(eight, row_bytes=20)) == 300 * 36
    )  # Stored in float16, handed in float32.
    assert link_seconds_of_step(eight, RATES) == 0
    alone, shared = (compute_seconds_of_step(sizes, RATES) - RATES.overhead_s for sizes in (SIZES, eight))
    assert shared == pytest.approx(alone / 8)


@pytest.mark.parametrize("projection", ["nystrom", "exact", "eigenpro"])
def test_a_set_up_grows_with_the_centers_and_shrinks_with_the_devices(projection):
    sizes = replace(SIZES, projection=projection)
    assert flops_of_setup(replace(sizes, n_centers=100_000)) > 30 * flops_of_setup(sizes)
    if projection != "exact":
        assert flops_of_setup(replace(sizes, devices=4)) < flops_of_setup(sizes)
