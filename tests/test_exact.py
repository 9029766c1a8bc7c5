"""The exact projection against dense float64 algebra."""

from __future__ import annotations

import pytest
import torch
from kernel_problem import ONE_RANK, generator, k, laplacian, points

from ep3stream.errors import ConfigError
from ep3stream.solver.exact import build_exact
from ep3stream.solver.kernels import CallableKernel

Z, X = points(40, 3, 1), points(60, 3, 2)
RANK = 5


def build(centers=Z, kernel=None):
    return build_exact(kernel or laplacian(3), centers, X, RANK, ONE_RANK, generator())


def dense_q(centers=Z) -> torch.Tensor:
    """L^(-T) (I - W D W') L^(-1) from the eigenvectors of the preconditioned data operator."""
    kernel = laplacian(3)
    k_zz, k_zx = k(kernel, centers, centers), k(kernel, centers, X)
    k_zz += 1e-6 * torch.eye(len(centers), dtype=torch.float64)
    inverse = torch.linalg.inv(torch.linalg.cholesky(k_zz))
    tau, w = torch.linalg.eigh(inverse @ k_zx @ k_zx.T @ inverse.T / len(X))
    tau, w = tau.flip(0), w.flip(1)
    shrunk = torch.where(tau > tau[RANK], tau[RANK] / tau, 1.0)
    return inverse.T @ (w * shrunk) @ w.T @ inverse


def test_the_direction_is_that_of_dense_algebra():
    projection, spectra = build()
    gradient = points(2, 40, 3)
    assert torch.allclose(projection.direction(gradient), gradient @ dense_q(), rtol=1e-7, atol=1e-9)
    assert len(spectra.data) == RANK + 1
    assert list(spectra.data) == sorted(spectra.data, reverse=True)


def test_the_leverage_is_that_of_dense_algebra():
    k_zb = k(laplacian(3), Z, points(7, 3, 4))
    expected = (k_zb * (dense_q() @ k_zb)).sum(0)
    assert torch.allclose(build()[0].leverage(k_zb, points(7, 3, 4)), expected, rtol=1e-7)


def test_the_leading_data_directions_are_all_shrunk_to_the_next_one():
    k_zx = k(laplacian(3), Z, X)
    projection, spectra = build()
    operator = k_zx.T @ projection.direction(k_zx.T).T / len(X)
    leading = torch.linalg.eigvalsh((operator + operator.T) / 2).flip(0)[: RANK + 1]
    assert torch.allclose(leading, torch.full_like(leading, spectra.data[RANK]), rtol=1e-6)


def test_centers_that_coincide_give_finite_directions():
    twice = torch.cat([Z, Z[:10]])
    projection, _ = build(twice)
    direction = projection.direction(points(2, 50, 3))
    assert bool(torch.isfinite(direction).all())
    k_zx = k(laplacian(3), twice, X)
    fitted = k_zx.T @ projection.direction(k_zx.T).T
    assert torch.allclose(fitted, k_zx.T @ dense_q(twice) @ k_zx, atol=1e-6)


def test_a_kernel_that_is_not_positive_definite_is_refused_with_a_remedy():
    kernel = CallableKernel(lambda z, x: -torch.exp(-torch.cdist(z, x)))
    with pytest.raises(ConfigError, match=r"40 centers is not positive definite .*--projection nystrom"):
        build(kernel=kernel)
