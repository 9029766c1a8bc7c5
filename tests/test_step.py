"""The step and its measured size against their formulas, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_problem import ONE_RANK, Problem, generator, k, laplacian, points, unit_targets
from torch import Tensor

from ep3stream.config import SolverConfig
from ep3stream.solver import tiles
from ep3stream.solver.kernels import CallableKernel, Kernel, RadialKernel
from ep3stream.solver.set_up import SolverBuilder
from ep3stream.solver.step import Solver, SolverState
from ep3stream.solver.step_size import Stability, _largest_ritz_value, limiting_leverage
from ep3stream.solver.targets import TargetCode
from ep3stream.training.plan import ProblemSize, SizePlan

D = 3


def problem(p: int = 40, n: int = 90, **changes: int) -> Problem:
    return Problem(laplacian(D), points(p, D, 0), points(n, D, 1), **changes)


def some_state(solver: Solver) -> SolverState:
    c, p = solver.targets.n_outputs, len(solver.centers)
    return SolverState(*(points(c, p, seed) for seed in (2, 3, 4)), averaged=7)


@pytest.mark.parametrize(("m", "c"), [(30, 2), (1, 1), (30, 1), (1, 3)])
@pytest.mark.parametrize("keep_block", [True, False])
def test_one_step_is_the_formula(m: int, c: int, keep_block: bool) -> None:
    case = problem()
    targets = TargetCode(False, points(1, c, 5)[0], points(1, c, 6)[0].exp())
    memory = torch.empty(40, 90, dtype=torch.float64) if keep_block else None
    whole = case.solver(targets)
    solver = Solver(whole.kernel, whole.centers, whole.projection, targets, 0.9, 3.0, whole.mesh, memory)
    x, y, eta = case.x[:m], points(m, c, 7), 0.3
    alpha, v, average = (tensor.clone() for tensor in some_state(solver).tensors().values())

    g = (alpha + 0.9 * v) @ k(case.kernel, case.z, x) - ((y - targets.offset) / targets.scale).T
    theta = solver.projection.direction(g @ k(case.kernel, x, case.z))
    v = 0.9 * v - eta * theta
    alpha = alpha + v
    average = average + 3 / (7 + 3) * (alpha - average)

    state = some_state(solver)
    loss = solver.step(state, x, y, eta).loss
    torch.testing.assert_close(state.weights, alpha)
    torch.testing.assert_close(state.velocity, v)
    torch.testing.assert_close(state.average, average)
    torch.testing.assert_close(loss, (g * targets.scale[:, None]).square().mean())
    assert state.averaged == 8


def test_the_loss_is_the_error_of_the_look_ahead_point_in_units_of_the_targets() -> None:
    case = problem()
    targets = TargetCode(False, torch.tensor([100.0]).double(), torch.tensor([50.0]).double())
    solver = case.solver(targets)
    state, y = some_state(solver), 100 + 50 * points(90, 1, 8)
    ahead = state.weights + 0.9 * state.velocity
    predicted = targets.decode(ahead @ k(case.kernel, case.z, case.x))
    expected = (predicted - y).square().mean()
    torch.testing.assert_close(solver.step(state, case.x, y, 0.1)[0], expected)


def test_a_classification_residual_is_that_of_explicit_one_hot_rows() -> None:
    frequencies = torch.tensor([0.5, 0.3, 0.2]).double()
    targets = TargetCode(True, frequencies, torch.ones(3).double())
    y, prediction = torch.tensor([2, 0, 0, 1, 2], dtype=torch.int32), points(3, 5, 0)
    one_hot = torch.nn.functional.one_hot(y.long(), 3).double()
    residual = prediction.clone()
    targets.subtract_(residual, y)
    torch.testing.assert_close(residual, prediction - (one_hot - frequencies).T)
    torch.testing.assert_close(targets.decode(residual) + one_hot, targets.decode(prediction) + frequencies)


@pytest.mark.parametrize("averaging", [0.0, 1.0, 3.0])
def test_the_average_follows_its_weights(averaging: float) -> None:
    case = problem()
    solver = case.solver(unit_targets(1), averaging=averaging)
    state, y = solver.initial_state(), points(90, 1, 2)
    expected = state.weights.clone()
    for t in range(6):
        solver.step(state, case.x, y, 0.1)
        share = min(1.0, averaging / (t + averaging)) if averaging else 1.0
        expected = expected + share * (state.weights - expected)
    torch.testing.assert_close(state.average, expected)
    assert torch.equal(state.average, state.weights) == (averaging == 0)


def test_plain_averaging_is_the_mean_of_all_weights() -> None:
    case = problem()
    solver = case.solver(unit_targets(1), averaging=1.0)
    state, y, seen = solver.initial_state(), points(90, 1, 2), []
    for _ in range(5):
        solver.step(state, case.x, y, 0.1)
        seen.append(state.weights.clone())
    torch.testing.assert_close(state.average, torch.stack(seen).mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("momentum", "tolerance"), [(0.0, 2e-2), (0.9, 1e-3)])
def test_weights_converge_to_the_least_squares_solution(
    dtype: torch.dtype, momentum: float, tolerance: float
) -> None:
    z, x = points(20, D, 0, dtype), points(200, D, 1, dtype)
    case = Problem(laplacian(D), z, x)
    k_xz = k(case.kernel, x, z)
    y = k_xz @ points(20, 2, 2, dtype)
    expected = torch.linalg.lstsq(k_xz.double(), y.double()).solution.T
    solver = case.solver(unit_targets(2, dtype), momentum=momentum)
    eta = case.stability(solver, 100).step_size(momentum)
    state = solver.initial_state()
    for _ in range(500):
        for rows in torch.arange(200).split(100):
            solver.step(state, x[rows], y[rows], eta)
    assert (state.weights - expected).norm() < tolerance * expected.norm()


def operator(case: Problem, solver: Solver, x: Tensor) -> Tensor:
    """K(X, Z) Q K(Z, X)."""
    k_zb = k(case.kernel, case.z, x)
    return k_zb.T @ solver.projection.direction(k_zb.T.contiguous()).T


@pytest.mark.parametrize("m", [1, 30, 90])
@pytest.mark.parametrize("data_rank", [0, 4])
def test_measured_lambda_and_kappa_are_those_of_the_dense_operator(m: int, data_rank: int) -> None:
    case = problem(data_rank=data_rank)
    solver = case.solver(unit_targets(1))
    measured = case.stability(solver, m)
    dense = [operator(case, solver, x) for x in case.x.split(m)]
    lambda_max = max(float(torch.linalg.eigvalsh((b + b.T) / 2).max()) for b in dense)
    assert measured.lambda_max == pytest.approx(lambda_max, rel=0.1)
    leverages = torch.cat([b.diagonal() for b in dense])
    assert measured.kappa_max == pytest.approx(limiting_leverage(leverages), rel=1e-6)
    assert measured.batch_size == m


@pytest.mark.parametrize("values", [[1.0, 0.97] + [0.9] * 300, [2.0], [0.0, 0.0, 0.0], [1.0, 1e-9, 1e-9]])
def test_a_leading_eigenvalue_is_found_even_next_to_others(values: list[float]) -> None:
    n = len(values)
    turn = torch.linalg.qr(points(n, n, 3))[0]
    matrix = (turn * torch.tensor(values)) @ turn.T
    start = torch.nn.functional.normalize(points(n, 1, 4)[:, 0], dim=0)
    found = _largest_ritz_value(lambda vector: matrix @ vector, start, min(10, n))
    assert found == pytest.approx(max(values), rel=5e-3, abs=1e-6)


def test_a_step_is_not_measured_on_an_operator_that_is_not_finite() -> None:
    found = _largest_ritz_value(lambda vector: vector * torch.nan, points(9, 1, 0)[:, 0], 5)
    assert math.isnan(found)


def test_the_step_size_is_the_smaller_of_its_two_limits() -> None:
    assert Stability(100, 4.0, 0.1).step_size(0.9) == pytest.approx(0.25)
    assert Stability(100, 4.0, 8.0).step_size(0.9) == pytest.approx(0.1 / 8.0)
    assert Stability(100, 4.0, 8.0).step_size(0.9, safety=0.5) == pytest.approx(0.05 / 8.0)


@pytest.mark.parametrize(("lambda_max", "measured"), [(0.5, [512]), (2.0, [512]), (0.01, [512, 2048])])
def test_a_larger_batch_than_the_least_is_measured_again(
    lambda_max: float, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def stability(
        self: SolverBuilder, projection: object, probes: Tensor, m: int, y: Tensor | None
    ) -> Stability:
        asked.append(m)
        return Stability(m, lambda_max, 0.1)

    monkeypatch.setattr(SolverBuilder, "stability", stability)
    small = problem(20, 30)
    sizes = SizePlan.of(ProblemSize(10**6, 2, 1, 1000, 12, True), SolverConfig(), 20, 1 << 30)
    sizes = replace(sizes, max_batch_size=2048)
    builder = SolverBuilder(small.kernel, small.z, small.x, sizes, SolverConfig(), ONE_RANK, generator())
    projection, spectra = small.projection()
    fixed = replace(builder, settings=SolverConfig(data_rank=4))
    limits = fixed.settled(projection, spectra, small.x, 10**6)
    assert asked == measured
    assert limits.batch_size == measured[-1]
    assert limits.step_size == pytest.approx(min(1 / lambda_max, 1.0))


@pytest.mark.parametrize(
    ("epoch_rows", "epochs", "lambda_max", "d", "batch_size"),
    [
        (10**7, 1, 0.2, 2, 4096),
        (10**7, 0.3, 0.2, 2, 2048),  # More rows would leave fewer than 1000 steps.
        (10**7, 1, 1.0, 2, 1024),  # The critical batch has 512 rows.
        (10**7, 1, 0.2, 40, 1024),  # A row takes longer, so that the rest of a step matters less.
        (10**6, 1, 0.2, 2, 512),
    ],
)
def test_batches_grow_where_a_fit_has_many_steps_and_the_kernel_is_cheap(
    epoch_rows: int,
    epochs: float,
    lambda_max: float,
    d: int,
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stability(
        self: SolverBuilder, projection: object, probes: Tensor, m: int, y: Tensor | None
    ) -> Stability:
        return Stability(m, lambda_max * m / 512, 0.1)

    monkeypatch.setattr(SolverBuilder, "stability", stability)
    small, config = problem(20, 30), SolverConfig(data_rank=4, epochs=epochs)
    sizes = SizePlan.of(ProblemSize(epoch_rows, 2, 1, 1000, 12, True), config, 20, 1 << 30)
    sizes = replace(sizes, max_batch_size=8192, model_rank=250, group_size=256)
    kernel = replace(small.kernel, centre=torch.zeros(d))
    builder = SolverBuilder(kernel, small.z, small.x, sizes, config, ONE_RANK, generator())
    assert builder.settled(*small.projection(), small.x, epoch_rows).batch_size == batch_size


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_two_limits_meet_at_the_critical_batch_size(momentum: float) -> None:
    measured = Stability(100, 4.0, 8.0)
    m = measured.critical_batch_size(momentum)
    at_critical = Stability(round(m), 4.0 * m / 100, 8.0)
    assert 1 / at_critical.lambda_max == pytest.approx((1 - momentum) / at_critical.kappa_max)


def kernels(d: int) -> dict[str, Kernel]:
    origin = torch.zeros(d)
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "linear": lambda a, b: a @ b.T,
        "quadratic": lambda a, b: (a @ b.T / d + 1) ** 2,
    }
    return {
        "wide laplacian": RadialKernel("laplacian", 10.0, origin),
        "narrow laplacian": RadialKernel("laplacian", 0.5, origin),
        "gaussian": RadialKernel("gaussian", 2.0, origin),
        **{name: CallableKernel(function, name) for name, function in functions.items()},
    }


def losses_of(case: Problem, m: int, momentum: float, times: float) -> list[float]:
    """Losses of 80 steps on noisy targets with `times` the measured step size."""
    solver = case.solver(unit_targets(1, case.x.dtype), momentum=momentum)
    eta = times * case.stability(solver, m).step_size(momentum)
    n = len(case.x)
    y = case.x.sum(1, keepdim=True).sin() + 0.3 * points(n, 1, 9, case.x.dtype)
    state, losses = solver.initial_state(), []
    for step in range(80):
        rows = torch.randperm(n, generator=torch.Generator().manual_seed(step))[:m]
        losses.append(float(solver.step(state, case.x[rows], y[rows], eta)[0]))
    return losses


@settings(max_examples=20, derandomize=True)
@given(
    name=st.sampled_from(sorted(kernels(1))),
    d=st.integers(1, 10),
    p=st.integers(1, 60),
    m=st.integers(1, 50),
    model_rank=st.integers(1, 30),
    data_rank=st.integers(0, 10),
    momentum=st.sampled_from([0.0, 0.9]),
)
def test_the_measured_step_never_diverges(
    name: str, d: int, p: int, m: int, model_rank: int, data_rank: int, momentum: float
) -> None:
    x = points(150, d, 1, torch.float32)
    case = Problem(kernels(d)[name], points(p, d, 0, torch.float32), x, model_rank, data_rank)
    losses = losses_of(case, m, momentum, 1.0)
    assert max(losses[-20:]) < 20 * max(losses[:10])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_ten_times_the_measured_step_diverges(momentum: float) -> None:
    x = points(150, D, 1, torch.float32)
    case = Problem(laplacian(D), points(60, D, 0, torch.float32), x)
    assert losses_of(case, 50, momentum, 1.0)[-1] < 1
    assert not losses_of(case, 50, momentum, 10.0)[-1] < 1e3


@pytest.mark.parametrize("kernel", ["laplacian", "gaussian"])
def test_neither_tiles_nor_the_order_of_rows_in_a_batch_change_a_step(
    kernel: Literal["laplacian", "gaussian"], monkeypatch: pytest.MonkeyPatch
) -> None:
    z, x = points(300, D, 0), points(200, D, 1)
    case = Problem(RadialKernel(kernel, 2.0, torch.zeros(D)), z, x, 20, 4, 240, 50, widest_rank=60)
    y, order = points(200, 2, 2), torch.randperm(100, generator=generator(3))
    found = []
    for tile_rows, rows in ((512, torch.arange(100)), (7, torch.arange(100)), (64, order)):
        monkeypatch.setattr(tiles, "TILE_ROWS", tile_rows)
        solver = case.solver(unit_targets(2))
        state = solver.initial_state()
        for start in (0, 100):
            solver.step(state, x[start + rows], y[start + rows], 0.01)
        found.append(state.weights)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-9 * float(found[0].abs().max()))
