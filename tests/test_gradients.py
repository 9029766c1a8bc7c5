"""Gradients of kernel machines of distances, against autograd, and the metrics that are made of them."""

from __future__ import annotations

import pytest
import torch

from ep3stream.mesh import Mesh
from ep3stream.solver.export import _radial
from ep3stream.solver.gradients import GradientProducts, metric_diagonal, metric_directions
from ep3stream.solver.kernels import RADIAL_KERNELS, RadialKernel

MESH = Mesh(0, 1, torch.device("cpu"))


def problem(name: str, c: int = 2, k: int = 4, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    kernel = RadialKernel(name, 1.7, 3 + torch.zeros(k, dtype=dtype), 1.3)
    centers, x = (3 + torch.randn(n, k, generator=generator, dtype=dtype) for n in (700, 30))
    return kernel, centers, x, torch.randn(c, 700, generator=generator, dtype=dtype)


def by_autograd(kernel, centers, x, weights) -> torch.Tensor:
    x = x.clone().requires_grad_()
    outputs = _radial(kernel, x - kernel.centre, centers - kernel.centre) @ weights.T
    return torch.stack([torch.autograd.grad(each.sum(), x, retain_graph=True)[0] for each in outputs.T])


@pytest.mark.parametrize("name", RADIAL_KERNELS)
def test_gradients_and_their_products_are_those_of_autograd(name):
    kernel, centers, x, weights = problem(name)
    expected = by_autograd(kernel, centers, x, weights)
    products = GradientProducts(kernel, centers, weights, False, MESH, 0)
    torch.testing.assert_close(products.gradients(x, weights), expected, rtol=1e-8, atol=1e-8)
    shares = [
        GradientProducts(kernel, centers[part], weights[:, part], False, MESH, 0).gradients(
            x, weights[:, part]
        )
        for part in (slice(0, 300), slice(300, 700))
    ]
    torch.testing.assert_close(shares[0] + shares[1], expected, rtol=1e-8, atol=1e-8)
    for rows in x.split(7):
        products.add(rows)
    assert products.n_rows == 30
    torch.testing.assert_close(products.sum, torch.einsum("cmi,cmj->ij", expected, expected))
    diagonal = GradientProducts(kernel, centers, weights, True, MESH, 0)
    diagonal.add(x)
    torch.testing.assert_close(diagonal.sum, products.sum.diagonal())


def test_a_row_that_is_a_center_has_the_gradient_of_the_others():
    kernel, centers, x, weights = problem("laplacian", dtype=torch.float32)
    x[0] = centers[5]
    others = torch.arange(700) != 5
    found = GradientProducts(kernel, centers, weights, False, MESH, 0).gradients(x, weights)
    expected = by_autograd(kernel, centers[others], x[:1], weights[:, others])
    torch.testing.assert_close(found[:, :1], expected, rtol=1e-3, atol=1e-3)


def test_of_many_outputs_random_combinations_have_the_same_products_on_average():
    kernel, centers, x, weights = problem("gaussian", c=12)
    expected = by_autograd(kernel, centers, x, weights)
    products = GradientProducts(kernel, centers, weights, False, MESH, 1)
    for _ in range(400):
        products.add(x)
    wanted = torch.einsum("cmi,cmj->ij", expected, expected)
    assert float((products.sum / 400 - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize(
    "directions", [None, torch.rand(4) + 0.5, torch.randn(6, 4)], ids=["none", "1d", "2d"]
)
def test_a_metric_is_for_scaled_inputs_whatever_the_points_are(directions):
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    products, along = factor @ factor.T, torch.eye(4, dtype=torch.float64)
    if directions is not None:
        along = directions.double().diag() if directions.ndim == 1 else directions.double()
    metric = along @ products @ along.T
    torch.testing.assert_close(metric_diagonal(products, directions), metric.diagonal())
    metric *= len(metric) / metric.trace()
    full = metric_directions(products, directions, False).double()
    torch.testing.assert_close(full @ full.T, metric, rtol=1e-4, atol=1e-4)
    diagonal = metric_directions(products, directions, True).double()
    torch.testing.assert_close(diagonal**2, metric.diagonal(), rtol=1e-4, atol=1e-4)
    assert full.norm(dim=0).diff().max() <= 0


def test_the_diagonal_of_a_diagonal_needs_no_whole_metric():
    products, directions = torch.rand(4, dtype=torch.float64), torch.rand(4)
    expected = (products * directions.double() ** 2).sqrt()
    found = metric_directions(products, directions, True).double()
    torch.testing.assert_close(found / found[0], expected / expected[0], rtol=1e-5, atol=1e-5)
