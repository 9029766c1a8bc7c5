"""The local tail against its formula, written out densely in float64, and the order of the centers that it needs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_problem import Problem, generator, k, laplacian, points
from torch import Tensor

from ep3stream import KernelModel
from ep3stream.config import SolverConfig
from ep3stream.errors import ConfigError
from ep3stream.solver import tail as tail_module
from ep3stream.solver.columns import ColumnKernel
from ep3stream.solver.kernels import CallableKernel, Kernel, RadialKernel
from ep3stream.solver.tail import KNOWN_SHARE, RIDGE_SHARE
from ep3stream.solver.tail import neighbour_order as order_of_scaled
from ep3stream.training.plan import ProblemSize, SizePlan

P, D, B = 61, 3, 16
MB = 10**6


def neighbour_order(kernel: Kernel, z: Tensor, group_size: int) -> Tensor:
    """Of centers that are scaled."""
    return order_of_scaled(kernel, z, lambda some: some, group_size)


def problem(dtype: torch.dtype = torch.float64, **changes: object) -> Problem:
    kernel, z = laplacian(D, 0.8), points(P, D, 0, dtype)
    whole = Problem(kernel, z[neighbour_order(kernel, z, B)], points(60, D, 1, dtype), group_size=B)
    return replace(whole, **changes)  # type: ignore[arg-type]


def features_and_blocks(case: Problem) -> tuple[Tensor, Tensor]:
    """Phi, (p, r), and D, (p, p), by their formulas."""
    landmarks = case.z[: case.n_landmarks]
    values, vectors = torch.linalg.eigh(k(case.kernel, landmarks, landmarks))
    leading = slice(-case.model_rank, None)
    phi = k(case.kernel, case.z, landmarks) @ (vectors[:, leading] / values[leading].sqrt())
    rest = k(case.kernel, case.z, case.z) - phi @ phi.T
    blocks = torch.zeros_like(rest)
    for start in range(0, len(rest), case.group_size):
        group = slice(start, min(start + case.group_size, len(rest)))
        blocks[group, group] = rest[group, group]
    unexplained = rest.diagonal().clamp_min(0)
    known = unexplained.sort()[0][int(KNOWN_SHARE * len(rest)) - 1]
    damping = (unexplained.square() / known - unexplained).clamp_min(0)
    blocks.diagonal().add_(damping + RIDGE_SHARE * unexplained.mean())
    return phi, blocks


def dense_q(case: Problem) -> Tensor:
    """M^(1/2) (I - W D W') M^(1/2) with M = (Phi Phi' + D)^(-1) and W in the span of M^(1/2) Phi."""
    phi, blocks = features_and_blocks(case)
    values, vectors = torch.linalg.eigh(phi @ phi.T + blocks)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    span = torch.linalg.qr(root @ phi)[0]
    inside = span @ span.T
    k_zs = k(case.kernel, case.z, case.x[: case.n_samples])
    tau, w = (part.flip(-1) for part in torch.linalg.eigh(inside @ root @ k_zs @ k_zs.T @ root @ inside))
    q = case.data_rank
    d = 1 - tau[q] / tau[:q]
    return root @ (torch.eye(len(root), dtype=root.dtype) - (w[:, :q] * d) @ w[:, :q].T) @ root


def q_matrix(case: Problem) -> Tensor:
    """Q, (p, p), column by column."""
    return case.projection()[0].direction(torch.eye(len(case.z), dtype=case.z.dtype)).T


@pytest.mark.parametrize("data_rank", [0, 1, 4])
@pytest.mark.parametrize("model_rank", [5, 12])
@pytest.mark.parametrize("group_size", [B, 7, P, 1])
def test_direction_is_the_formula(data_rank: int, model_rank: int, group_size: int) -> None:
    case = problem(data_rank=data_rank, model_rank=model_rank, group_size=group_size)
    expected = dense_q(case)
    assert (q_matrix(case) - expected).norm() < 1e-8 * expected.norm()


def test_direction_is_the_formula_for_a_kernel_on_columns() -> None:
    metric = torch.tensor([[1.0, 0.7, 1.5], [0, 0, 1], [1, 1, 1]])
    kernel = ColumnKernel.of("product", metric)
    z, x = (points(n, D, seed, torch.float32) for n, seed in ((P, 0), (60, 1)))
    z[:, 2], x[:, 2] = z[:, 2].sign(), x[:, 2].sign()
    z = z[neighbour_order(kernel, z, B)]
    found = q_matrix(Problem(kernel, z, x, group_size=B))
    expected = dense_q(Problem(kernel, z.double(), x.double(), group_size=B))
    assert (found.double() - expected).norm() < 1e-3 * expected.norm()


def test_direction_in_float32_is_near_the_formula() -> None:
    case = problem(torch.float32)
    expected = dense_q(replace(case, z=case.z.double(), x=case.x.double()))
    assert (q_matrix(case).double() - expected).norm() < 1e-3 * expected.norm()


def test_q_is_symmetric_and_positive_semidefinite_in_float32() -> None:
    q = q_matrix(problem(torch.float32)).double()
    largest = torch.linalg.matrix_norm(q, 2)
    assert (q - q.T).norm() < 1e-4 * largest
    assert torch.linalg.eigvalsh((q + q.T) / 2).min() > 0


def test_leverage_is_the_diagonal_of_the_operator() -> None:
    case = problem()
    k_zb = k(case.kernel, case.z, case.x[:20])
    before = k_zb.clone()
    leverage = case.projection()[0].leverage(k_zb, case.x[:20])
    torch.testing.assert_close(leverage, (k_zb.T @ dense_q(case) @ k_zb).diagonal(), rtol=1e-8, atol=0)
    assert torch.equal(k_zb, before)


def test_the_model_of_the_kernel_matrix_is_at_most_what_q_inverts() -> None:
    """So that a ridge adds at most m lambda to the largest eigenvalue of a step."""
    case = problem(data_rank=0)
    projection = case.projection()[0]
    eye = torch.eye(P, dtype=torch.float64)
    gram = torch.linalg.solve(dense_q(case), projection.direction(0 * eye, eye).T)
    torch.testing.assert_close(gram, gram.T, rtol=1e-8, atol=1e-10)
    values = torch.linalg.eigvals(dense_q(case) @ gram)
    assert float(values.imag.abs().max()) < 1e-8
    assert 0 < float(values.real.min()) <= float(values.real.max()) < 1 + 1e-8
    phi, blocks = features_and_blocks(case)
    outside = torch.linalg.qr(phi, mode="complete")[0][:, phi.shape[1] :]
    torch.testing.assert_close(gram @ outside, blocks @ outside, rtol=1e-6, atol=1e-9)


def test_groups_multiplied_at_once_or_one_by_one_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = q_matrix(problem())
    monkeypatch.setattr(tail_module, "_ROWS_AT_ONCE", 1)
    tail = problem().projection()[0].tail
    assert tail is not None
    assert len(list(tail._pieces(tail._layout, n_columns=3))) == -(-P // B)
    torch.testing.assert_close(q_matrix(problem()), whole, rtol=1e-12, atol=1e-14)


def test_centers_that_coincide_get_a_usable_tail() -> None:
    z = torch.cat([points(12, D, 0, torch.float32)] * 5)
    case = Problem(laplacian(D, 0.8), z[neighbour_order(laplacian(D), z, B)], points(60, D, 1, torch.float32))
    case = replace(case, group_size=B, model_rank=6, n_landmarks=40)
    assert case.projection()[0].tail is not None
    assert torch.isfinite(q_matrix(case)).all()


def test_there_is_no_tail_where_the_pairs_leave_nothing() -> None:
    z, x = points(200, D, 0, torch.float32), points(60, D, 1, torch.float32)
    linear = Problem(CallableKernel(lambda a, b: a @ b.T), z, x, group_size=B)
    assert linear.projection()[0].tail is None
    smooth = Problem(RadialKernel("gaussian", 8.0, torch.zeros(D)), z, x, 60, 4, 150, group_size=B)
    assert smooth.projection()[0].tail is None
    fast = Problem(
        RadialKernel("gaussian", 2.0, torch.zeros(D)), z, x, 20, 4, 150, widest_rank=60, group_size=B
    )
    assert fast.projection()[0].basis.shape[1] == 60
    assert fast.projection()[0].tail is None


def test_no_center_far_from_all_others_pushes_itself_further_than_most() -> None:
    z = points(400, D, 0, torch.float32)
    z[:3] += torch.tensor([[30.0, 0, 0], [0, 40, 0], [0, 0, 50]])
    kernel = laplacian(D, 3.0)
    z = z[neighbour_order(kernel, z, 64)]
    # No landmark is a far one.
    order = z.norm(dim=1).argsort()
    near = torch.cat([z[order[:200]], z])
    case = Problem(kernel, z, near[:50], 30, 10, 100, 50, group_size=64)
    projection = case.projection()[0]
    far = z[order[-3:]]
    leverage = projection.leverage(k(kernel, z, far), far)
    others = projection.leverage(k(kernel, z, z), z).sort()[0]
    assert float(leverage.max()) < 2 * float(others[int(0.95 * len(others))])


@pytest.mark.parametrize(
    ("p", "d", "b"), [(1000, 2, 64), (1000, 40, 64), (100, 2, 128), (1, 3, 16), (130, 1, 64)]
)
def test_the_order_has_every_center_once_and_groups_of_neighbours(p: int, d: int, b: int) -> None:
    z = points(p, d, 0, torch.float32)
    z[:, 0] *= 3
    order = neighbour_order(laplacian(d), z, b)
    assert order.sort()[0].tolist() == list(range(p))
    if p > 4 * b:
        within, among = (
            torch.cat([torch.pdist(part) for part in z[some].split(b)]).mean() for some in (order, range(p))
        )
        assert float(within) < (0.4 if d == 2 else 0.95) * float(among)


def test_columns_are_cut_where_their_kernel_falls_and_categories_by_their_codes() -> None:
    random = np.random.default_rng(0)
    n = 1024
    columns = [random.normal(size=n), random.integers(0, 4, n), random.normal(size=n)]
    z = torch.from_numpy(np.stack(columns, 1)).float()
    weights = torch.tensor([1.0, 50.0, 0.01])
    kernel = ColumnKernel("product", weights, torch.tensor([False, True, False]), torch.ones(3))
    groups = z[neighbour_order(kernel, z, 64)].split(64)
    # The heavy category parts the centers first, then the first number; the last one has no say.
    assert sum(len(group[:, 1].unique()) > 1 for group in groups) <= 3
    assert float(torch.stack([group[:, 0].std() for group in groups]).median()) < 0.5
    assert float(torch.stack([group[:, 2].std() for group in groups]).median()) > 0.8


def regions(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Land or sea by two coordinates, with borders of many scales."""
    random = generator(7)
    x = torch.rand(n, 2, generator=generator(seed)) * 3.4 - 1.7
    height = torch.zeros(n)
    for octave in range(6):
        waves = torch.randn(2, 24, generator=random) * 2 * 1.9**octave
        height += torch.cos(x @ waves + 6.28 * torch.rand(24, generator=random)).sum(1) * 1.9 ** (
            -0.85 * octave
        )
    return x, (height > 0).long()


def test_on_a_map_the_tail_closes_most_of_the_gap_to_the_exact_projection() -> None:
    x, y = regions(15_000, 1)
    x_test, y_test = regions(4000, 2)
    scores = {}
    for name, given in {"none": "none", "auto": "auto", "exact": None}.items():
        settings = {"projection": "exact"} if given is None else {"tail": given, "model_rank": 100}
        model = KernelModel(
            x[:1200], "laplacian", 2, bandwidth=0.3, task="classification", nystrom_samples=600, **settings
        )
        model.fit((x[1200:], y[1200:]), 2)
        scores[name] = model.score(x_test, y_test)["mse"]
    assert scores["none"] > 1.03 * scores["exact"]
    assert scores["auto"] - scores["exact"] < 0.3 * (scores["none"] - scores["exact"])


def test_the_model_predicts_the_same_from_centers_in_another_order() -> None:
    x, y = regions(3000, 1)
    model = KernelModel(x[:300], "laplacian", 2, bandwidth=0.3, task="classification", tail=32)
    given = x[:300].clone()
    model.fit((x[300:], y[300:]))
    predictor = model.predictor()
    assert not torch.equal(predictor.centers, given)
    assert torch.equal(predictor.centers.sort(0)[0], given.sort(0)[0])
    again = KernelModel(given, "laplacian", 2, bandwidth=0.3, task="classification", tail=32)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.outputs(x), model.outputs(x))


SHAPE = ProblemSize(1_000_000, 20, 1, 4096, 84, True)


def test_the_groups_shrink_where_memory_is_short_and_are_in_the_plan() -> None:
    sizes = [SizePlan.of(SHAPE, SolverConfig(), 100_000, memory * MB) for memory in (4000, 700, 450)]
    assert [plan.group_size for plan in sizes] == [256, 128, 0]
    assert sizes[0].memory["local tail"] >= 4 * 100_000 * 256
    assert "local tail" not in sizes[2].memory
    assert SizePlan.of(SHAPE, SolverConfig(tail=512), 100_000, 4000 * MB).group_size == 512
    assert SizePlan.of(SHAPE, SolverConfig(tail=512), 100, 4000 * MB).group_size == 100
    assert SizePlan.of(SHAPE, SolverConfig(tail="none"), 100_000, 4000 * MB).group_size == 0
    with pytest.raises(ConfigError, match=r"local tail 2\d\d\.\d MB"):
        SizePlan.of(SHAPE, SolverConfig(tail=512), 100_000, 500 * MB)


def test_a_tail_is_for_nystrom_alone() -> None:
    with pytest.raises(
        ConfigError, match="tail is 64, but projection is 'exact', which has none; leave it out"
    ):
        SolverConfig(projection="exact", tail=64)
    assert SizePlan.of(SHAPE, SolverConfig(projection="exact"), 1000, 4000 * MB).group_size == 0
    with pytest.raises(ConfigError, match="tail is 1; use auto, none, or the size of a group, at least 2"):
        SolverConfig(tail=1)
