"""Kernels against their formulas in float64; those of the dot product are in test_dot_product.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ep3stream.errors import ConfigError
from ep3stream.solver.kernels import RADIAL_KERNELS, CallableKernel, RadialKernel, column_strips
from ep3stream.solver.named_kernels import median_bandwidth

FORMULAS = {
    "laplacian": lambda t, shape: torch.exp(-t),
    "gaussian": lambda t, shape: torch.exp(-(t**2) / 2),
    "matern32": lambda t, shape: (1 + 3**0.5 * t) * torch.exp(-(3**0.5) * t),
    "matern52": lambda t, shape: (1 + 5**0.5 * t + 5 * t**2 / 3) * torch.exp(-(5**0.5) * t),
    "dispersal": lambda t, shape: torch.exp(-(t**shape)),
    "rational_quadratic": lambda t, shape: (1 + t**2 / (2 * shape)) ** -shape,
}
SHAPE = 1.5
# What rounding t^2 by 1e-6 between almost equal points makes of phi(t) = 1 - t^a + ...: 1e-6 to the power a / 2.
TOLERANCES = {"laplacian": 1e-3, "dispersal": 5e-5}


def points(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def dense(name: str, bandwidth: float, z: Tensor, x: Tensor, shape: float = SHAPE) -> Tensor:
    """The formula on differences, where nothing cancels."""
    distance = (z.double()[:, None] - x.double()[None]).norm(dim=2)
    return FORMULAS[name](distance / bandwidth, shape)


def radial(name: str, bandwidth: float, x: Tensor) -> RadialKernel:
    return RadialKernel(name, bandwidth, x.mean(0), SHAPE)


def block(kernel: RadialKernel | CallableKernel, z: Tensor, x: Tensor) -> Tensor:
    return kernel.block(kernel.left(z), kernel.right(x))


def test_every_radial_kernel_has_a_formula_here() -> None:
    assert set(RADIAL_KERNELS) == set(FORMULAS)


@pytest.mark.parametrize("name", RADIAL_KERNELS)
@pytest.mark.parametrize("d", [1, 7, 300])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_blocks_match_the_formula_even_far_from_the_origin(name: str, d: int, offset: float) -> None:
    z, x = points(37, d) + offset, points(53, d, seed=1) + offset
    bandwidth = math.sqrt(d)
    error = (block(radial(name, bandwidth, x), z, x) - dense(name, bandwidth, z, x)).abs()
    assert error.max() < TOLERANCES.get(name, 1e-5)
    assert error.median() < 1e-6


@pytest.mark.parametrize("name", RADIAL_KERNELS)
@pytest.mark.parametrize("d", [1, 3, 64, 784])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_point_has_the_kernel_value_one_with_itself(name: str, d: int, offset: float) -> None:
    x = points(300, d) + offset
    k_xx = block(radial(name, math.sqrt(d), x), x, x)
    assert (k_xx.diagonal() - 1).abs().max() <= 1e-6
    assert torch.equal(radial(name, 1.0, x).diagonal(x), torch.ones(300))


@pytest.mark.parametrize("name", RADIAL_KERNELS)
def test_an_outlier_in_the_batch_does_not_change_the_other_values(name: str) -> None:
    x = points(40, 5)
    kernel = radial(name, 2.0, x)
    with_outlier = torch.cat([x, torch.full((1, 5), 1e4)])
    torch.testing.assert_close(block(kernel, x, with_outlier)[:, :40], block(kernel, x, x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", RADIAL_KERNELS)
def test_blocks_are_written_into_the_memory_given(name: str) -> None:
    x = points(20, 4)
    kernel = radial(name, 1.0, x)
    out = torch.empty(12, 20)
    returned = kernel.block(kernel.left(x)[slice(3, 15)], kernel.right(x), out=out)
    assert returned is out
    torch.testing.assert_close(out, block(kernel, x[3:15], x), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("dispersal", 0.3), ("dispersal", 1.0), ("dispersal", 2.0)]
    + [("rational_quadratic", shape) for shape in (0.1, 1.0, 30.0, 1e6)],
)
def test_every_shape_matches_the_formula(name: str, shape: float) -> None:
    z, x = points(40, 6), points(60, 6, seed=1)
    kernel = RadialKernel(name, 2.5, x.mean(0), shape)
    assert (block(kernel, z, x) - dense(name, 2.5, z, x, shape)).abs().max() < 2e-6
    assert (block(kernel, x, x).diagonal() - 1).abs().max() <= 1e-6


def test_kernels_meet_where_their_formulas_do() -> None:
    z, x, centre = points(40, 6), points(60, 6, seed=1), torch.zeros(6)
    pairs = [
        (RadialKernel("dispersal", 2.5, centre, 1.0), RadialKernel("laplacian", 2.5, centre)),
        (RadialKernel("dispersal", 2.5, centre, 2.0), RadialKernel("gaussian", 2.5 / 2**0.5, centre)),
        (RadialKernel("rational_quadratic", 2.5, centre, 1e7), RadialKernel("gaussian", 2.5, centre)),
    ]
    for one, other in pairs:
        torch.testing.assert_close(block(one, z, x), block(other, z, x), atol=2e-6, rtol=0)


def test_a_wide_block_is_worked_through_in_strips_without_a_seam() -> None:
    z, x = points(1000, 3), points(700, 3, seed=1)
    assert len(list(column_strips(1000, 700, torch.device("cpu")))) == 3
    for name in ("matern32", "matern52"):
        assert (block(radial(name, 2.0, x), z, x) - dense(name, 2.0, z, x)).abs().max() < 5e-6


@pytest.mark.parametrize("name", RADIAL_KERNELS)
def test_matrices_of_equal_and_zero_points_are_positive_semidefinite(name: str) -> None:
    x = torch.cat([points(60, 3), points(20, 3), torch.zeros(2, 3)]).double()
    eigenvalues = torch.linalg.eigvalsh(block(radial(name, 1.5, x), x, x))
    assert eigenvalues[0] > -1e-12 * eigenvalues[-1]


def test_an_unknown_kernel_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'cauchy'.*laplacian, gaussian"):
        RadialKernel("cauchy", 1.0, torch.zeros(2))


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.inf, math.nan])
def test_a_bandwidth_that_is_no_positive_distance_is_refused(bandwidth: float) -> None:
    with pytest.raises(ConfigError, match="bandwidth"):
        RadialKernel("gaussian", bandwidth, torch.zeros(2))


def test_a_callable_gives_its_values_and_its_diagonal() -> None:
    x = points(150, 3)
    kernel = CallableKernel(lambda a, b: (a @ b.T + 1) ** 2)
    expected = (x @ x.T + 1) ** 2
    out = torch.empty(150, 150)
    assert kernel.block(kernel.left(x), kernel.right(x), out=out) is out
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(kernel.diagonal(x), expected.diagonal())


def test_a_callable_of_the_wrong_shape_is_refused_with_both_shapes() -> None:
    kernel = CallableKernel(lambda a, b: b @ a.T)
    with pytest.raises(ConfigError, match=r"\(5, 4\).*\(4, 5\)"):
        block(kernel, points(4, 2), points(5, 2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_callable_with_a_value_that_is_not_finite_is_refused(value: float) -> None:
    kernel = CallableKernel(lambda a, b: torch.full((len(a), len(b)), value))
    with pytest.raises(ConfigError, match="not finite"):
        block(kernel, points(4, 2), points(5, 2))


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_the_median_bandwidth_is_near_the_median_of_all_distances(offset: float) -> None:
    x = points(500, 6)
    everything = torch.pdist(x.double()).median().item()
    assert median_bandwidth(x + offset) == pytest.approx(everything, rel=0.03)


def test_the_median_bandwidth_of_two_rows_is_their_distance() -> None:
    assert median_bandwidth(torch.tensor([[0.0, 0.0], [3.0, 4.0]])) == pytest.approx(5)


@pytest.mark.parametrize(
    ("n", "message"),
    [(0, "0 sample.*bandwidth"), (1, "1 sample is left"), (30, "30 sampled rows.*--bandwidth")],
)
def test_the_median_bandwidth_of_equal_or_too_few_rows_is_refused(n: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        median_bandwidth(torch.ones(n, 3))
