"""The Nystrom projection against its formula, written out densely in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_problem import Problem, generator, k, laplacian, points
from torch import Tensor

from ep3stream.errors import ConfigError
from ep3stream.solver import projection as projection_module
from ep3stream.solver.kernels import CallableKernel, RadialKernel
from ep3stream.solver.projection import NystromProjection, unexplained_diagonal

P, D = 40, 3


def problem(dtype: torch.dtype = torch.float64, **changes: object) -> Problem:
    whole = Problem(laplacian(D), points(P, D, 0, dtype), points(60, D, 1, dtype))
    return replace(whole, n_landmarks=P, **changes)  # type: ignore[arg-type]


def q_matrix(problem: Problem) -> Tensor:
    """Q, (p, p), column by column."""
    return problem.projection()[0].direction(torch.eye(len(problem.z), dtype=problem.z.dtype)).T


def dense_q(problem: Problem) -> Tensor:
    """M^(1/2) (I - W D W') M^(1/2), with K(Z, Z) ~ U l U' + mu I from its exact eigenpairs."""
    k_zz = k(problem.kernel, problem.z, problem.z).double()
    k_zs = k(problem.kernel, problem.z, problem.x[: problem.n_samples]).double()
    p, r, q = len(k_zz), problem.model_rank, problem.data_rank
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(k_zz))
    l_r, u = values[:r], vectors[:, :r]
    if r < p:
        mu = max(float(values[r]), float((k_zz.diagonal() - u.square() @ l_r).mean()))
    else:
        mu = 4 * torch.finfo(problem.z.dtype).eps * float(values[0])
    inside, eye = u @ u.T, torch.eye(p, dtype=torch.float64)
    root = u @ torch.diag((l_r + mu).rsqrt()) @ u.T + (eye - inside) / mu**0.5
    tau, w = (part.flip(-1) for part in torch.linalg.eigh(inside @ root @ k_zs @ k_zs.T @ root @ inside))
    d = 1 - tau[q] / tau[:q]
    return root @ (eye - (w[:, :q] * d) @ w[:, :q].T) @ root


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-3)])
@pytest.mark.parametrize("model_rank", [P, 12, 5])
@pytest.mark.parametrize("data_rank", [0, 1, 4])
def test_direction_is_the_formula_with_exact_landmarks(
    dtype: torch.dtype, tolerance: float, model_rank: int, data_rank: int
) -> None:
    case = problem(dtype, model_rank=model_rank, data_rank=data_rank)
    gradient = points(2, P, 2, dtype)
    theta = case.projection()[0].direction(gradient.clone())
    expected = (dense_q(case) @ gradient.double().T).T
    assert (theta - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("model_rank", [P, 12, 1])
def test_q_is_symmetric_and_positive_semidefinite(model_rank: int) -> None:
    q = q_matrix(problem(torch.float32, model_rank=model_rank)).double()
    largest = torch.linalg.matrix_norm(q, 2)
    assert (q - q.T).norm() < 1e-4 * largest
    assert torch.linalg.eigvalsh((q + q.T) / 2).min() > -1e-5 * largest


@pytest.mark.parametrize("model_rank", [P, 12, 1])
def test_leverage_is_the_diagonal_of_the_operator(model_rank: int) -> None:
    case = problem(model_rank=model_rank)
    k_zb = k(case.kernel, case.z, case.x[:20])
    leverage = case.projection()[0].leverage(k_zb, case.x[:20])
    torch.testing.assert_close(leverage, (k_zb.T @ q_matrix(case) @ k_zb).diagonal(), rtol=1e-8, atol=0)


def damped(case: Problem, leverage: float) -> tuple[NystromProjection, torch.Tensor]:
    projection, _ = case.projection()
    unexplained = unexplained_diagonal(case.kernel.diagonal(case.z), projection.basis, projection.eigenvalues)
    return projection.with_center_damping(unexplained, leverage), unexplained


def test_a_damped_q_is_that_of_its_formula_and_knows_its_own_leverage() -> None:
    case = problem(model_rank=12)
    projection, unexplained = damped(case, 0.02)
    u, mu = projection.basis, projection.damping
    weights = (0.02 * mu / unexplained.square()).clamp(max=1)
    assert int((weights < 1).sum()) > 0
    outside = torch.eye(len(u), dtype=u.dtype) - u @ u.T
    core = (projection.half * projection.eigenvalue_scale) @ projection.half.T
    dense = u @ core @ u.T + outside @ torch.diag(weights) @ outside / mu
    q = projection.direction(torch.eye(len(u), dtype=u.dtype))
    torch.testing.assert_close(q, dense, rtol=1e-8, atol=1e-10)
    k_zb = k(case.kernel, case.z, case.x[:20])
    leverage = projection.leverage(k_zb, case.x[:20])
    torch.testing.assert_close(leverage, (k_zb.T @ dense @ k_zb).diagonal(), rtol=1e-8, atol=0)


def test_no_center_pushes_itself_further_than_it_is_damped_to() -> None:
    case = problem(model_rank=12)
    projection, unexplained = damped(case, 0.02)
    assert projection.center_damping is not None
    assert float((unexplained.square() * projection.center_damping / projection.damping).max()) <= 0.02 * (
        1 + 1e-9
    )
    assert damped(case, 1e6)[0].center_damping is None


@pytest.mark.parametrize("kernel_width", [1.0, 3.0, 100.0])
@pytest.mark.parametrize("n_landmarks", [150, 700])
def test_the_basis_is_orthonormal_in_float32(kernel_width: float, n_landmarks: int) -> None:
    z, x = points(700, D, 0, torch.float32), points(80, D, 1, torch.float32)
    case = Problem(laplacian(D, kernel_width), z, x, model_rank=100, n_landmarks=n_landmarks)
    projection, spectra = case.projection()
    gram = projection.basis.double().T @ projection.basis.double()
    assert (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() < 1e-4
    assert list(spectra.model) == sorted(spectra.model, reverse=True)
    assert spectra.damping > 0


def test_a_basis_cut_to_fewer_columns_in_place_has_the_rows_of_the_whole_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    z = points(1300, D, 0, torch.float32)
    case = Problem(laplacian(D), z, points(80, D, 1, torch.float32), model_rank=50, n_landmarks=200)
    whole = case.projection()[0].basis
    ranks = iter([50, 20])
    monkeypatch.setattr(projection_module, "_numerical_rank", lambda *_: next(ranks))
    cut = case.projection()[0].basis
    assert cut.T.is_contiguous()
    torch.testing.assert_close(cut, whole[:, :20], atol=1e-6, rtol=0)


def degenerate_cases() -> dict[str, Problem]:
    z, x = points(P, D, 0, torch.float32), points(60, D, 1, torch.float32)
    return {
        "one center": Problem(laplacian(D), z[:1], x),
        "one sample": Problem(laplacian(D), z, x, n_samples=1),
        "duplicate centers": Problem(laplacian(D), torch.cat([z[:8]] * 5), x),
        "all centers equal": Problem(laplacian(D), z[:1].expand(P, D).contiguous(), x),
        "rank above landmarks": Problem(laplacian(D), z, x, model_rank=35, n_landmarks=6),
        "rank above centers": Problem(laplacian(D), z, x, model_rank=500, data_rank=500),
        "constant kernel": Problem(CallableKernel(lambda a, b: torch.ones(len(a), len(b))), z, x),
        "finite rank": Problem(CallableKernel(lambda a, b: a @ b.T), z, x),
        "data where the kernel is zero": Problem(laplacian(D, 1e-3), z, x + 100),
        "rows are the centers": Problem(laplacian(D), z, z),
    }


@pytest.mark.parametrize("name", degenerate_cases())
def test_a_degenerate_problem_gives_a_usable_projection(name: str) -> None:
    case = degenerate_cases()[name]
    projection, spectra = case.projection()
    k_zb = k(case.kernel, case.z, case.x[:16])
    descent = projection.direction(k_zb.sum(1)[None])
    assert torch.isfinite(descent).all()
    assert float((descent @ k_zb.sum(1)).sum()) >= 0
    assert torch.isfinite(projection.leverage(k_zb, case.x[:16])).all()
    assert projection.basis.shape[1] == len(spectra.model) <= min(case.model_rank, len(case.z))


def test_the_rank_is_cut_where_the_kernel_matrix_has_no_more() -> None:
    cases = degenerate_cases()
    ranks = {name: case.projection()[0].basis.shape[1] for name, case in cases.items()}
    assert ranks["all centers equal"] == ranks["constant kernel"] == ranks["one center"] == 1
    assert ranks["finite rank"] == D
    assert ranks["duplicate centers"] == 8
    assert ranks["rank above landmarks"] == 6


def test_one_center_is_solved_by_dividing_by_its_kernel_value() -> None:
    case = Problem(
        CallableKernel(lambda a, b: 4 * (a @ b.T)), torch.ones(1, 1), points(9, 1, 1, torch.float32)
    )
    theta = case.projection()[0].direction(torch.tensor([[8.0]]))
    torch.testing.assert_close(theta, torch.tensor([[2.0]]))


def test_a_kernel_without_a_positive_eigenvalue_is_refused() -> None:
    z = points(P, D, 0, torch.float32)
    case = Problem(CallableKernel(lambda a, b: torch.zeros(len(a), len(b))), z, z)
    with pytest.raises(ConfigError, match="no positive eigenvalue"):
        case.projection()


def gaussian(bandwidth: float) -> RadialKernel:
    return RadialKernel("gaussian", bandwidth, torch.zeros(D))


def test_the_operator_stays_symmetric_in_float32_where_the_leading_directions_shrink_most() -> None:
    """Eigenvalues of K(Z, Z) over six decades, all flattened: rounding must not pass from the first to the last."""
    unit = [torch.rand(n, 8, generator=generator(seed)) for seed, n in enumerate((800, 2000))]
    kernel = RadialKernel("gaussian", 1.0, torch.full((8,), 0.5))
    case = Problem(kernel, *unit, model_rank=600, n_landmarks=800, n_samples=2000)
    projection = case.projection()[0]
    assert projection.flattening is not None
    flat = projection.flattened(float(projection.flattening.eigenvalues[-1]))
    assert float(flat.eigenvalue_scale[0]) < 1e-6
    k_zb = k(kernel, case.z, case.x[:1000])
    operator = k_zb.T.double() @ flat.direction(k_zb.T.contiguous()).T.double()
    assert (operator - operator.T).norm() < 0.05 * operator.norm()
    assert torch.linalg.eigvalsh((operator + operator.T) / 2)[0] > -0.02 * torch.linalg.matrix_norm(
        operator, 2
    )


@pytest.mark.parametrize(
    ("kernel", "rank"), [(gaussian(2.0), 60), (laplacian(D), 20)], ids=["gaussian", "laplacian"]
)
def test_the_rank_is_raised_where_the_eigenvalues_fall_fast(kernel: RadialKernel, rank: int) -> None:
    z, x = points(300, D, 0, torch.float32), points(80, D, 1, torch.float32)
    case = Problem(kernel, z, x, model_rank=20, n_landmarks=240, widest_rank=60)
    projection, spectra = case.projection()
    assert projection.basis.shape == (300, rank)
    assert len(spectra.model) == len(projection.half) == len(projection.eigenvalue_scale) == rank
    assert replace(case, widest_rank=0).projection()[0].basis.shape == (300, 20)


@pytest.mark.parametrize("n_landmarks", [240, 300])
def test_a_raised_rank_gives_the_formula(n_landmarks: int) -> None:
    case = Problem(gaussian(2.0), points(300, D, 0), points(60, D, 1), 20, 4, n_landmarks, widest_rank=60)
    same = replace(case, model_rank=60, n_landmarks=80, widest_rank=0)
    gradient = points(2, 300, 2)
    found, expected = (each.projection()[0].direction(gradient.clone()) for each in (case, same))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
