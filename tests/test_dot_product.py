"""Kernels of dot products against their formulas in float64, and every kernel by its name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ep3stream.config import KERNEL_DEFAULTS, KernelConfig
from ep3stream.errors import ConfigError
from ep3stream.solver.columns import COLUMN_KERNELS
from ep3stream.solver.dot_product import NtkKernel, PolynomialKernel
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.named_kernels import (
    NAMED_KERNELS,
    kernel_tensors,
    measured_kernel,
    median_norm,
    named_kernel,
)


def points(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def block(kernel: Kernel, z: Tensor, x: Tensor) -> Tensor:
    return kernel.block(kernel.left(z), kernel.right(x))


def kappas(u: Tensor) -> tuple[Tensor, Tensor]:
    """kappa_0 and kappa_1 as they are printed."""
    return 1 - u.acos() / math.pi, (u * (math.pi - u.acos()) + (1 - u**2).sqrt()) / math.pi


def dense_ntk(z: Tensor, x: Tensor, depth: int, bias: float) -> Tensor:
    """The printed recursion, (p, m); in float64 its angles are good to 2e-8 at u = 1."""
    z, x = z.double(), x.double()
    norms = z.norm(dim=1)[:, None] * x.norm(dim=1)
    signal = z @ x.T
    tangent = signal + bias**2
    for _ in range(depth - 1):
        kappa_0, kappa_1 = kappas((signal / norms.clamp_min(1e-300)).clamp(-1, 1))
        signal = norms * kappa_1
        tangent = tangent * kappa_0 + signal + bias**2
    return tangent


def scaled_error(kernel: Kernel, z: Tensor, x: Tensor, expected: Tensor) -> Tensor:
    """|K(Z, X) - expected| / sqrt(K(z, z) K(x, x))."""
    scale = (kernel.diagonal(z).double()[:, None] * kernel.diagonal(x).double()).sqrt()
    return (block(kernel, z, x) - expected).abs() / scale


def near_and_far(d: int, offset: float) -> tuple[Tensor, Tensor]:
    """Points, and the same ones again, turned by 1e-4, stretched, negated and others."""
    x = points(60, d) + offset
    nearby = x[10:20] + 1e-4 * x[10:20].norm(dim=1, keepdim=True) / d**0.5 * points(10, d, 1)
    return x, torch.cat([x[:10], nearby, 1.001 * x[20:30], -x[30:40], points(30, d, 2) + offset])


@pytest.mark.parametrize("depth", [1, 2, 3, 10])
@pytest.mark.parametrize("bias", [0.0, 1.5])
@pytest.mark.parametrize("d", [2, 50, 784])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_the_tangent_kernel_matches_its_recursion_even_where_arccos_loses_digits(
    depth: int, bias: float, d: int, offset: float
) -> None:
    x, z = near_and_far(d, offset)
    error = scaled_error(NtkKernel(depth, bias), z, x, dense_ntk(z, x, depth, bias))
    assert error.max() < 3e-6
    assert error.median() < 3e-7


def test_a_network_of_two_layers_has_the_tangent_kernel_of_its_random_features() -> None:
    """E over weights w of the gradients' products, of relu(w.x) sqrt(2) and of its inner weights."""
    x, z = points(5, 3), points(4, 3, 1)
    w = points(400_000, 3, 2)
    on_x, on_z = (w @ x.T).clamp_min(0), (w @ z.T).clamp_min(0)
    outer = 2 * on_z.T @ on_x / len(w)
    inner = 2 * (on_z > 0).float().T @ (on_x > 0).float() / len(w) * (z @ x.T)
    torch.testing.assert_close(block(NtkKernel(2, 0.0), z, x), outer + inner, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_point_has_the_tangent_kernel_depth_times_its_squared_norm_and_bias(
    depth: int, offset: float
) -> None:
    x = points(50, 20) + offset
    kernel = NtkKernel(depth, 0.5)
    expected = (depth * (x.double().square().sum(1) + 0.25)).float()
    torch.testing.assert_close(kernel.diagonal(x), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(block(kernel, x, x).diagonal(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_on_the_sphere_only_directions_count(depth: int) -> None:
    x, z = near_and_far(7, 0.0)
    on_sphere = NtkKernel(depth, 0.5, on_sphere=True)
    unit_z, unit_x = (each / each.norm(dim=1, keepdim=True) for each in (z.double(), x.double()))
    expected = dense_ntk(unit_z, unit_x, depth, 0.5)
    assert scaled_error(on_sphere, z, x, expected).max() < 1e-6
    assert scaled_error(on_sphere, 1e15 * z, 1e-30 * x, expected).max() < 1e-6
    torch.testing.assert_close(on_sphere.diagonal(x), torch.full((60,), depth * 1.25))


@pytest.mark.parametrize("degree", [1, 2, 3, 6])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_the_polynomial_matches_its_formula(degree: int, offset: float, shift: float) -> None:
    x, z = points(40, 30) + shift, points(50, 30, 1) + shift
    bandwidth = median_norm(x)
    kernel = PolynomialKernel(bandwidth, degree, offset)
    expected = (z.double() @ x.double().T / bandwidth**2 + offset) ** degree
    assert scaled_error(kernel, z, x, expected).max() < 5e-6
    torch.testing.assert_close(
        kernel.diagonal(x), block(kernel, x, x).diagonal(), rtol=2e-6 * degree, atol=1e-7
    )


def kernels() -> list[Kernel]:
    return [
        NtkKernel(3, 0.0),
        NtkKernel(3, 1.0),
        NtkKernel(1, 0.0),
        NtkKernel(4, 0.7, on_sphere=True),
        PolynomialKernel(2.0, 3, 1.0),
        PolynomialKernel(2.0, 4, 0.0),
    ]


def kernel_id(kernel: Kernel) -> str:
    return f"{kernel.name}-{kernel.parameters}"


@pytest.mark.parametrize("kernel", kernels(), ids=kernel_id)
def test_matrices_of_equal_opposite_and_zero_points_are_positive_semidefinite(kernel: Kernel) -> None:
    x = torch.cat([points(60, 4), points(20, 4), -points(20, 4), 3 * points(5, 4), torch.zeros(2, 4)])
    k_xx = block(kernel, x.double(), x.double())
    eigenvalues = torch.linalg.eigvalsh(k_xx)
    # The first angles are good to 2e-8.
    assert eigenvalues[0] > -1e-7 * eigenvalues[-1]
    torch.testing.assert_close(kernel.diagonal(x), k_xx.diagonal().float(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kernel", kernels(), ids=kernel_id)
def test_blocks_are_written_into_the_memory_given(kernel: Kernel) -> None:
    x = points(700, 4)
    out = torch.empty(600, 700)
    returned = kernel.block(kernel.left(x)[slice(3, 603)], kernel.right(x), out=out)
    assert returned is out
    for rows in (slice(0, 10), slice(590, 600)):
        expected = block(kernel, x[3:603][rows], x[500:])
        torch.testing.assert_close(out[rows, 500:], expected, atol=1e-5, rtol=1e-6)


def test_every_kernel_is_built_from_its_name_and_gives_back_its_parameters() -> None:
    x = points(50, 4)
    for name in set(NAMED_KERNELS) - set(COLUMN_KERNELS):  # test_column_kernels.py has those.
        kernel = measured_kernel(KernelConfig(name), x, x.mean(0))
        assert kernel.name == name
        assert list(kernel.parameters) == list(KERNEL_DEFAULTS[name])
        again = named_kernel(name, kernel.parameters, kernel_tensors(kernel))
        assert torch.equal(block(again, x, x), block(kernel, x, x))


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("sinc", {}, "kernel is 'sinc'; choose one of auto, laplacian"),
        ("gaussian", {}, "needs bandwidth"),
        ("gaussian", {"bandwidth": "median"}, "needs bandwidth"),
        ("gaussian", {"bandwidth": 1.0}, "needs kernel_centre"),
        ("dispersal", {"bandwidth": 1.0, "shape": 3.0}, "shape is 3.0"),
        ("polynomial", {"bandwidth": 1.0, "degree": 2}, "needs offset"),
        ("ntk_relu", {"depth": 2, "bias": 0.0, "bandwidth": 2.0}, "does not have"),
    ],
)
def test_a_kernel_with_parameters_missing_or_wrong_is_refused(name: str, parameters, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        named_kernel(name, parameters, {})


def test_values_beyond_float32_are_refused_before_the_fit() -> None:
    choice = KernelConfig("polynomial", bandwidth=1e-3, degree=10)
    with pytest.raises(ConfigError, match=r"not finite in float32.*larger bandwidth"):
        measured_kernel(choice, points(20, 3), torch.zeros(3))


def test_the_median_norm_makes_a_typical_value_two_and_none_of_zeros_is_refused() -> None:
    x = points(400, 5)
    kernel = measured_kernel(KernelConfig("polynomial", degree=1), x, x.mean(0))
    assert kernel.diagonal(x).median() == pytest.approx(2, rel=1e-3)
    for zeros in (torch.zeros(3, 2), torch.zeros(0, 2)):
        with pytest.raises(ConfigError, match=rf"{len(zeros)} sampled rows or more are zero"):
            median_norm(zeros)
