"""Ridge and weights against the dense float64 solution of the weighted, penalised least squares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_problem import ONE_RANK, Problem, generator, k, laplacian, points, unit_targets
from torch import Tensor

from ep3stream.solver.exact import build_exact
from ep3stream.solver.projection import Projection
from ep3stream.solver.step import Solver
from ep3stream.solver.step_size import Penalty, Stability, measure_stability
from ep3stream.solver.targets import TargetCode

D, P, N, M = 3, 20, 200, 100


def problem(model_rank: int = P) -> Problem:
    z, x = points(P, D, 0), points(N, D, 1)
    return Problem(laplacian(D), z, x, model_rank=model_rank, n_landmarks=P)


def projection(case: Problem, name: str) -> Projection:
    if name == "exact":
        return build_exact(case.kernel, case.z, case.x[:50], 4, ONE_RANK, generator(5))[0]
    return case.projection()[0]


def noisy_targets(c: int) -> Tensor:
    """(n, c): what the kernel can fit, and as much noise, so that a ridge matters."""
    case = problem()
    return k(case.kernel, case.x, case.z) @ points(P, c, 2) + 3 * points(N, c, 3)


def gram_matrix(used: Projection) -> Tensor:
    """K^, from Q and Q K^."""
    eye = torch.eye(P, dtype=torch.float64)
    return torch.linalg.solve(used.direction(eye), used.direction(0 * eye, eye).T)


def stability(case: Problem, solver: Solver, penalty: Penalty, m: int = M) -> Stability:
    batches = case.x.split(m)
    return measure_stability(solver.block, batches, solver.projection, ONE_RANK, generator(6), penalty)


def fitted(case: Problem, name: str, targets: TargetCode, y: Tensor, ridge: float) -> tuple[Tensor, Solver]:
    """Weights, (c, p), after many steps of the size measured, and their solver."""
    solver = replace(case.solver(targets), projection=projection(case, name), ridge=ridge)
    by_row = None if targets.weights is None else targets.row_weights(y)
    heaviest = 1.0 if by_row is None else float(by_row.max())
    penalty = Penalty(float(targets.ridges(ridge).max()), None if by_row is None else [by_row], heaviest)
    eta = stability(case, solver, penalty, N).step_size(0.9)
    state = solver.initial_state()
    for _ in range(500):  # On all rows at once: what is not fitted is no noise then, and the limit is exact.
        solver.step(state, case.x, y, eta)
    return state.weights, solver


def dense(case: Problem, gram: Tensor, y: Tensor, ridge: float, weights: Tensor | None = None) -> Tensor:
    """argmin 1/(2n) sum_i w_i |f(x_i) - y_i|^2 + lambda/2 alpha' gram alpha, (c, p)."""
    k_xz = k(case.kernel, case.x, case.z)
    weighted = k_xz if weights is None else k_xz * weights[:, None]
    return torch.linalg.solve(weighted.T @ k_xz + N * ridge * gram, weighted.T @ y).T


@pytest.mark.parametrize("name", ["nystrom", "exact"])
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_a_fit_with_all_eigenpairs_converges_to_the_dense_ridge_solution(name: str, ridge: float) -> None:
    case, y = problem(), noisy_targets(2)
    expected = dense(case, k(case.kernel, case.z, case.z), y, ridge)
    found, _ = fitted(case, name, unit_targets(2), y, ridge)
    assert (found - expected).norm() < 2e-3 * expected.norm()
    assert (dense(case, 0 * expected.T @ expected, y, 0) - expected).norm() > 1e-2 * expected.norm()


def test_with_fewer_eigenpairs_the_penalty_is_that_of_the_approximated_kernel() -> None:
    case, y = problem(model_rank=8), noisy_targets(2)
    found, solver = fitted(case, "nystrom", unit_targets(2), y, 0.1)
    expected = dense(case, gram_matrix(solver.projection), y, 0.1)
    assert (found - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("name", ["nystrom", "exact"])
def test_the_penalty_of_all_eigenpairs_is_the_squared_norm_of_the_function(name: str) -> None:
    case = problem()
    torch.testing.assert_close(
        gram_matrix(projection(case, name)), k(case.kernel, case.z, case.z), atol=1e-5, rtol=1e-5
    )


def test_what_the_eigenpairs_leave_out_counts_the_damping() -> None:
    used, spectra = problem(model_rank=8).projection()
    inside = used.basis @ used.basis.T
    expected = used.basis @ torch.diag(torch.tensor(spectra.model).double()) @ used.basis.T
    expected += used.damping * (torch.eye(P) - inside)
    torch.testing.assert_close(gram_matrix(used), expected)


@pytest.mark.parametrize("name", ["nystrom", "exact"])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("model_rank", [P, 8])
def test_the_measured_step_bounds_the_penalised_weighted_operator(
    name: str, ridge: float, model_rank: int
) -> None:
    case = problem(model_rank)
    solver = replace(case.solver(unit_targets(1)), projection=projection(case, name))
    weights = points(N, 1, 4)[:, 0].exp()
    largest = 0.0
    for x, w in zip(case.x.split(M), weights.split(M), strict=True):
        k_zb = k(case.kernel, case.z, x)
        whole = k_zb * w @ k_zb.T + M * ridge * gram_matrix(solver.projection)
        largest = max(largest, float(torch.linalg.eigvals(solver.projection.direction(whole)).abs().max()))
    found = stability(case, solver, Penalty(ridge, weights.split(M), float(weights.max())))
    assert 0.9 * largest < found.lambda_max < 2.1 * largest
    plain = stability(case, solver, Penalty())
    assert found.kappa_max == pytest.approx(plain.kappa_max * float(weights.max()))


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_class_weights_give_the_weighted_least_squares_solution(ridge: float) -> None:
    case = problem()
    y = (case.x[:, 0] > 1).long() + (case.x[:, 1] > 0)
    weights, offset = torch.tensor([0.5, 1.0, 4.0]).double(), torch.tensor([0.6, 0.3, 0.1]).double()
    targets = TargetCode(True, offset, torch.ones(3).double(), weights)
    coded = torch.nn.functional.one_hot(y, 3).double() - offset
    gram = k(case.kernel, case.z, case.z)
    expected = dense(case, gram, coded, ridge, weights[y])
    found, _ = fitted(case, "exact", targets, y, ridge)
    assert (found - expected).norm() < 1e-2 * expected.norm()
    assert (dense(case, gram, coded, ridge) - expected).norm() > 0.1 * expected.norm()


def test_output_weights_give_the_weighted_ridge_solution_of_each_output() -> None:
    case, y = problem(), noisy_targets(2)
    weights = torch.tensor([5.0, 0.2]).double()
    found, _ = fitted(case, "exact", replace(unit_targets(2), weights=weights), y, 0.1)
    gram = k(case.kernel, case.z, case.z)
    for output, weight in enumerate(weights):
        rows = torch.full((N,), float(weight)).double()
        expected = dense(case, gram, y[:, output : output + 1], 0.1, rows)[0]
        assert (found[output] - expected).norm() < 2e-3 * expected.norm()


def test_losses_leave_ridge_and_weights_out() -> None:
    case = problem()
    y = (case.x[:, 0] > 0).long()
    plain = TargetCode(True, torch.tensor([0.5, 0.5]).double(), torch.ones(2).double())
    heavy = replace(plain, weights=torch.tensor([1.0, 9.0]).double())
    losses = []
    for targets, ridge in ((plain, 0.0), (heavy, 1.0)):
        solver = replace(case.solver(targets), ridge=ridge)
        errors = solver.step(solver.initial_state(), case.x, y, 0.1, score=True)
        losses.append((float(errors.loss), float(errors.average_loss)))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_weighted_squares_are_those_that_the_steps_make_small(scale: float) -> None:
    weights = torch.tensor([0.5, 4.0]).double()
    outputs, y = points(30, 2, 0), points(30, 2, 1)
    numbers = TargetCode(False, points(1, 2, 2)[0], torch.tensor([scale, 2.0]).double(), weights)
    expected = (weights * ((outputs - y) / numbers.scale).square()).sum()
    torch.testing.assert_close(numbers.weighted_squares(outputs, y), expected)
    ids = (y[:, 0] > 0).long()
    classes = TargetCode(True, torch.tensor([0.3, 0.7]).double(), torch.ones(2).double(), weights)
    one_hot = torch.nn.functional.one_hot(ids, 2)
    expected = (weights[ids][:, None] * (outputs - one_hot).square()).sum()
    torch.testing.assert_close(classes.weighted_squares(outputs, ids), expected)
