"""Blocks of the step probe: formed once where they fit, and the same where they do not."""

from __future__ import annotations

import pytest
import torch
from kernel_problem import ONE_RANK, Problem, generator, k, laplacian, points

from ep3stream.solver.step_size import Penalty, StepProbe, largest_eigenvalue, limiting_leverage

D, M, N_BATCHES = 3, 20, 3
CASE = Problem(laplacian(D), points(70, D, 0), points(N_BATCHES * M, D, 1), n_samples=40)


def step_probe(n_kept: int, penalty: Penalty | None = None) -> StepProbe:
    shard = CASE.kernel.left(CASE.z)
    batches = CASE.x.split(M)
    return StepProbe(CASE.kernel, shard, batches, penalty or Penalty(), ONE_RANK, generator(2), n_kept)


@pytest.mark.parametrize("n_kept", [1, 2, 3, 9])
def test_every_block_is_that_of_its_batch_however_few_are_kept(n_kept: int):
    found = step_probe(n_kept)
    for number in (2, 0, 1, 0, 2, 1):
        expected = k(CASE.kernel, CASE.z, found.batches[number])
        torch.testing.assert_close(found.block(number).whole(), expected)


def test_a_block_that_is_kept_is_not_formed_again_and_the_others_share_memory():
    found = step_probe(2)
    first, second = found.block(0), found.block(1)
    assert found.block(0) is first
    assert found.block(2).whole().data_ptr() == second.whole().data_ptr()
    assert found.block(0) is first
    assert found.block(1) is not second


@pytest.mark.parametrize("n_kept", [1, 3])
def test_the_profile_is_that_of_every_row(n_kept: int):
    projection = CASE.projection()[0]
    found = step_probe(n_kept).leverage_profile(projection)
    expected = projection.leverage(k(CASE.kernel, CASE.z, CASE.x), CASE.x)
    assert float(found.at(projection.eigenvalue_scale).max()) == pytest.approx(
        float(expected.max()), rel=1e-6
    )
    assert found.along.shape[1] == len(CASE.x)


def test_the_leverage_outside_the_basis_is_that_of_what_is_left_of_each_column():
    projection = CASE.projection()[0]
    columns = k(CASE.kernel, CASE.z, CASE.x)
    outside = columns - projection.basis @ (projection.basis.T @ columns)
    expected = outside.square().sum(0) / projection.damping
    torch.testing.assert_close(projection.leverage_profile(columns, CASE.x).beyond, expected)


def test_one_batch_decides_where_the_leverage_limits_the_step_by_far():
    found, projection = step_probe(3), CASE.projection()[0]
    each = [
        largest_eigenvalue(found.block(number), x, None, projection, ONE_RANK, generator(3))
        for number, x in enumerate(found.batches)
    ]
    assert found.leading_eigenvalue(projection, 100 * each[0]) == pytest.approx(1.25 * each[0], rel=0.02)
    assert found.leading_eigenvalue(projection, each[0]) == pytest.approx(max(each), rel=0.02)


def test_rows_of_a_batch_have_its_own_weights():
    weights = torch.linspace(0.5, 2, N_BATCHES * M, dtype=torch.float64)
    weighted, projection = step_probe(3, Penalty(0.0, weights.split(M), 2.0)), CASE.projection()[0]
    each = [
        largest_eigenvalue(
            weighted.block(number), x, weights.split(M)[number], projection, ONE_RANK, generator(3)
        )
        for number, x in enumerate(weighted.batches)
    ]
    assert weighted.leading_eigenvalue(projection, 0) == pytest.approx(max(each), rel=0.02)


def test_one_row_of_large_leverage_does_not_make_the_step_of_all_others():
    leverages = torch.linspace(0.5, 1, 1000, dtype=torch.float64)
    alike = limiting_leverage(leverages)
    assert alike == pytest.approx(0.9)
    assert limiting_leverage(torch.cat([leverages, torch.tensor([1.5])])) == pytest.approx(
        1.1 * 0.995, rel=1e-3
    )
    # No row is at twice the leverage that limits the step, at which it diverges.
    for outlying in (3.0, 300.0):
        far = limiting_leverage(torch.cat([leverages, torch.tensor([outlying])]))
        assert outlying / 2 < far < outlying
