"""The stages of a fit: thresholds that fall as rows are seen, each with its own safe step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_problem import ONE_RANK, Problem, generator, k, laplacian, points

from ep3stream.config import SolverConfig
from ep3stream.solver.exact import build_exact
from ep3stream.solver.input_scaling import InputScaling
from ep3stream.solver.set_up import Settled, SolverBuilder
from ep3stream.solver.spectrum import FOLDINGS, Flattening, LeverageProfile
from ep3stream.training.plan import ProblemSize, SizePlan

D = 4
TAU = torch.logspace(0, -5, 1500, dtype=torch.float64)
PROBED = points(3000, D, 1, torch.float32)


def problem(p: int, n: int) -> Problem:
    return Problem(laplacian(D), points(p, D, 0), points(n, D, 1))


def profile(n_rows: int = 50) -> LeverageProfile:
    draws = torch.randn(1500, n_rows, generator=generator(), dtype=torch.float64).square()
    return LeverageProfile(0.8 * TAU[:, None] * draws, torch.full((n_rows,), 1e-4, dtype=torch.float64))


def test_a_threshold_is_the_lowest_that_leaves_its_rows_enough_foldings():
    flattening, rows = Flattening(TAU, 1e-9), profile()
    stages = flattening.falling(rows, 10**9)
    assert [first_row for first_row, _ in stages] == [0, 2048, 4096, 8192, 16384]
    for first_row, threshold in stages[:-1]:
        n_rows = max(first_row, 1024)
        foldings = n_rows * threshold / float(rows.at(flattening.eigenvalue_scale(threshold)).max())
        assert foldings == pytest.approx(FOLDINGS, rel=1e-6)
    assert stages[-1][1] == pytest.approx(
        1e-5
    )  # The least eigenvalue: there is nothing below it to wait for.


def test_no_stage_begins_after_the_last_row():
    stages = Flattening(TAU, 1e-9).falling(profile(), 5000)
    assert [first_row for first_row, _ in stages] == [0, 2048, 4096]
    assert len(Flattening(TAU, 1e-9).falling(profile(), 10)) == 1


def test_no_threshold_is_below_the_least():
    stages = Flattening(TAU, 1e-2).falling(profile(), 10**9)
    assert min(threshold for _, threshold in stages) >= 1e-2


def test_a_sample_of_one_row_leaves_no_direction_and_one_stage():
    none = Flattening(torch.empty(0, dtype=torch.float64), 0.2)
    one = LeverageProfile(
        torch.empty(0, 2, dtype=torch.float64), torch.tensor([0.1, 0.3], dtype=torch.float64)
    )
    assert none.falling(one, 10**9) == [(0, 0.2)]
    assert none.fixed(1) == 0.2


def test_a_fixed_rank_shrinks_so_many_directions_to_the_next():
    flattening = Flattening(TAU, 1e-9)
    assert flattening.fixed(7) == float(TAU[7])
    assert int((flattening.eigenvalue_scale(flattening.fixed(7)) < 1).sum()) == 7
    assert torch.equal(flattening.eigenvalue_scale(float(TAU[7]))[7:], torch.ones(1493, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["nystrom", "exact"])
def test_a_profile_gives_the_leverage_at_any_threshold(kind: str):
    case = problem(70, 200)
    if kind == "nystrom":
        projection = case.projection()[0]
    else:
        projection = build_exact(case.kernel, case.z, case.x[:50], 9, ONE_RANK, generator(5))[0]
    assert projection.flattening is not None
    flattening = projection.flattening
    k_zb = k(case.kernel, case.z, case.x[:20])
    found = projection.leverage_profile(k_zb, case.x[:20])
    for threshold in (float(flattening.eigenvalues[0]) * share for share in (1.0, 0.3, 0.02)):
        flat = projection.flattened(threshold)
        expected = flat.leverage(k_zb, case.x[:20]).double()
        shrunk = flattening.eigenvalue_scale(threshold) @ found.along + found.beyond
        torch.testing.assert_close(shrunk, expected, rtol=1e-4, atol=1e-9)


def settled(**settings: Any) -> tuple[Settled, SolverBuilder]:
    case = Problem(laplacian(D), points(80, D, 0, torch.float32), PROBED)
    config = SolverConfig(**settings)
    sizes = SizePlan.of(ProblemSize(10**6, case.x.shape[1], 1, 1000, 12, True), config, 80, 1 << 30)
    builder = SolverBuilder(case.kernel, case.z, case.x[:300], sizes, config, ONE_RANK, generator())
    return builder.settled(*builder.projection(), case.x[300:], 10**6), builder


def test_every_stage_has_a_step_that_is_safe_for_it_and_none_is_shorter_than_the_one_before():
    found, builder = settled()
    assert len(found.stages) > 1
    scales = [stage.step_scale for stage in found.stages]
    assert scales[0] == 1
    assert scales == sorted(scales)
    for stage in found.stages:
        measured = builder.stability(stage.projection, PROBED[300:], found.batch_size)
        step = stage.step_scale * found.step_size
        assert step * measured.lambda_max < 1.3
        assert step * measured.kappa_max < 1.3 * (1 - 0.9)


@pytest.mark.parametrize("kind", ["nystrom", "exact", "eigenpro"])
def test_centers_scaled_where_they_are_needed_give_the_set_up_of_scaled_ones(kind: Any):
    inputs = InputScaling(torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([2.0, 0.5, 4.0, 1.0]))
    _, given = settled(projection=kind, epochs=1.0)
    unscaled = given.centers / inputs.scale + inputs.shift
    found = []
    for builder in (
        replace(given, centers=inputs(unscaled), generator=generator()),
        replace(given, centers=unscaled, inputs=inputs, generator=generator()),
    ):
        projection = builder.projection()
        found.append(builder.settled(*projection, PROBED[300:], 10**6))
    assert found[0].limits == found[1].limits
    both = zip(found[0].projection.tensors().values(), found[1].projection.tensors().values(), strict=True)
    assert all(torch.equal(*pair) for pair in both)


def test_a_data_rank_that_is_given_holds_for_the_whole_fit():
    found, builder = settled(data_rank=7)
    assert len(found.stages) == 1
    assert found.step_size == found.limits.step_size
    assert builder.sizes.data_rank == 7
