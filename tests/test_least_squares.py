"""The ridge path against dense float64 systems."""

from __future__ import annotations

import pytest
import torch

from ep3stream.errors import ConfigError
from ep3stream.solver.kernels import RADIAL_KERNELS, CallableKernel, RadialKernel
from ep3stream.solver.least_squares import RidgePath
from ep3stream.solver.targets import TargetCode

RIDGES = (0.0, 1e-4, 1e-2, 1.0)


def problem(kernel_name: str, n_rows: int = 1500):
    """Rows over a tile's end, two outputs of different units, and a kernel."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, 3, generator=generator)
    y = torch.stack([x[:, 0].sin() + 5, 10 * x[:, 1] * x[:, 2]], 1)
    targets = TargetCode(False, y.mean(0), y.std(0))
    kernel = RadialKernel(kernel_name, 2.0, x.mean(0), 1.5)
    return kernel, torch.randn(40, 3, generator=generator), x, y, targets


@pytest.mark.parametrize("name", RADIAL_KERNELS)
@pytest.mark.parametrize("ridge", RIDGES[1:])
def test_weights_solve_the_dense_system_of_their_ridge(name, ridge):
    kernel, centers, x, y, targets = problem(name)
    z, rows = centers.double(), x.double()
    k_xz = kernel.block(kernel.left(rows), kernel.right(z))
    k_zz = kernel.block(kernel.left(z), kernel.right(z))
    coded = ((y - targets.offset) / targets.scale).double()
    dense = torch.linalg.solve(k_xz.T @ k_xz + len(x) * ridge * k_zz, k_xz.T @ coded)
    weights = RidgePath.of(kernel, centers, x, y, targets).weights(ridge)
    torch.testing.assert_close(k_xz @ weights, k_xz @ dense, rtol=1e-5, atol=1e-5)


def test_no_ridge_is_the_least_squares_fit():
    kernel, centers, x, y, targets = problem("laplacian")
    k_xz = kernel.block(kernel.left(x.double()), kernel.right(centers.double()))
    coded = ((y - targets.offset) / targets.scale).double()
    residual = k_xz @ RidgePath.of(kernel, centers, x, y, targets).weights(0.0) - coded
    assert float((k_xz.T @ residual).abs().max()) < 1e-6


def test_held_out_errors_are_those_of_the_weights():
    kernel, centers, x, y, targets = problem("matern32")
    path = RidgePath.of(kernel, centers, x[:1000], y[:1000], targets)
    errors, accuracies = path.held_out(x, y, RIDGES)
    k_xz = kernel.block(kernel.left(x.double()), kernel.right(centers.double()))
    for ridge, found in zip(RIDGES, errors, strict=True):
        outputs = k_xz @ path.weights(ridge)
        expected = (outputs - (y - targets.offset) / targets.scale).square().mean(0)
        torch.testing.assert_close(found, expected)
    assert bool(accuracies.isnan().all())


def test_accuracy_is_that_of_the_largest_output_with_its_offset():
    x = torch.zeros(10, 1)
    y = torch.tensor([1] * 7 + [0] * 3)
    targets = TargetCode(True, torch.tensor([0.3, 0.7]), torch.ones(2))
    path = RidgePath.of(RadialKernel("laplacian", 1.0, torch.zeros(1)), torch.ones(1, 1), x, y, targets)
    errors, accuracies = path.held_out(x, y, [1e6])
    assert accuracies.tolist() == [0.7]
    torch.testing.assert_close(errors.mean(), torch.tensor(0.21, dtype=torch.float64), rtol=1e-4, atol=0)


def test_coinciding_centers_are_no_obstacle():
    kernel, centers, x, y, targets = problem("gaussian")
    once = RidgePath.of(kernel, centers, x, y, targets).held_out(x, y, RIDGES[1:])[0]
    twice = RidgePath.of(kernel, torch.cat([centers, centers]), x, y, targets).held_out(x, y, RIDGES[1:])[0]
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-7)


def test_a_function_that_is_no_kernel_is_named():
    _, centers, x, y, targets = problem("gaussian")
    with pytest.raises(ConfigError, match="not positive definite on 40 centers"):
        RidgePath.of(CallableKernel(lambda a, b: -a @ b.T), centers, x, y, targets)
