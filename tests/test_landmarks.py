"""When a basis is wider than asked for: where the eigenvalues fall fast, and where the rank would cut a level."""

from __future__ import annotations

import pytest
import torch
from kernel_problem import ONE_RANK, generator, k, laplacian, levels, sphere

from ep3stream import KernelModel
from ep3stream.solver.kernels import CallableKernel, Kernel, RadialKernel
from ep3stream.solver.spectrum import LandmarkPairs, cuts_a_level, falls_fast

D, P = 12, 240
LEVEL = (
    D * (D + 1) // 2
)  # Polynomials of degree 2 on the sphere, those of degree 0 among them; D more of degree 1.


def told(kernel: Kernel, rank: int) -> tuple[bool, bool]:
    """Whether the eigenvalues beyond the rank fall fast, and whether it cuts a level."""
    z, x = sphere(P, D, 0), sphere(128, D, 1)
    k_zz = k(kernel, z, z).double()
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(k_zz))
    values, vectors = values[: rank + 1], vectors[:, : rank + 1]
    left_over = float(k_zz.trace() - values.sum())
    k_zx = k(kernel, z, x).double()
    return falls_fast(values, left_over, P), cuts_a_level(values, vectors, left_over, k_zx)


@pytest.mark.parametrize("rank", [20, 30, 45])
def test_a_rank_in_the_midst_of_a_level_cuts_it(rank: int) -> None:
    assert told(CallableKernel(levels), rank) == (False, True)


@pytest.mark.parametrize("rank", [D, D + LEVEL])
def test_a_rank_where_a_level_ends_cuts_none(rank: int) -> None:
    assert not told(CallableKernel(levels), rank)[1]


@pytest.mark.parametrize("rank", [30, 60])
def test_eigenvalues_that_fall_with_the_data_s_share_of_them_are_no_level(rank: int) -> None:
    low = torch.eye(D)[:, :2]
    kernel = CallableKernel(lambda z, x: k(laplacian(2, 1.0), z @ low, x @ low))
    assert told(kernel, rank) == (False, False)


def test_the_wider_rank_is_taken_where_the_first_cuts_a_level_and_only_there() -> None:
    z, x = sphere(P, D, 0), sphere(300, D, 1)
    for kernel, rank in ((CallableKernel(levels), 180), (laplacian(D, 10.0), 45)):
        pairs = LandmarkPairs.of(kernel, z, x, (45, 180), ONE_RANK, generator(5))
        assert pairs.rank == rank
        assert pairs.completes_a_level == (rank == 180)
        assert pairs.vectors.shape == (P, max(rank, pairs.judged) + 1)


@pytest.mark.parametrize(("name", "rank", "n_points"), [("gaussian", 60, 80), ("laplacian", 30, 2100)])
def test_more_landmarks_than_the_judged_ones_serve_where_the_rank_stays(
    name: str, rank: int, n_points: int
) -> None:
    """The Gaussian's eigenvalues fall fast, and 4/3 of the raised rank are its landmarks."""
    x = torch.randn(2100, 8, generator=generator(7))
    kernel = RadialKernel(name, 3.0, torch.zeros(8))
    pairs = LandmarkPairs.of(kernel, x, x[:200], (30, 60), ONE_RANK, generator(5))
    assert (pairs.rank, len(pairs.points), len(pairs.vectors)) == (rank, n_points, n_points)
    k_ll = k(kernel, pairs.points, pairs.points).double()
    expected = torch.linalg.eigvalsh(k_ll).flip(0)[:8]
    assert torch.allclose(pairs.values[:8], expected, rtol=1e-2)


def test_a_fit_whose_rank_would_cut_a_level_is_as_good_as_with_the_exact_projection() -> None:
    """Excess errors over the least squares solution: with a rank of 30 they were 40 to 500 times exact's."""
    z, x, x_test = sphere(120, D, 2), sphere(3000, D, 3), sphere(1000, D, 4)
    form = torch.randn(D, D, generator=generator(6))
    y, y_test = ((rows @ form * rows).sum(1, keepdim=True) for rows in (x, x_test))
    weights = torch.linalg.lstsq(levels(x, z).double(), y.double()).solution
    least = float((levels(x_test, z).double() @ weights - y_test).square().mean())
    excess: dict[str, list[float]] = {"exact": [], "nystrom": []}
    for projection, found in excess.items():
        model = KernelModel(z, levels, 1, projection=projection, nystrom_samples=1000)  # type: ignore[arg-type]
        for _ in range(3):
            for batch in zip(x.split(64), y.split(64), strict=True):
                model.fit_batch(*batch)
            found.append(float(model.score(x_test, y_test)["mse"]) - least)
    assert all(ours < 1.5 * exact for ours, exact in zip(excess["nystrom"], excess["exact"], strict=True))
