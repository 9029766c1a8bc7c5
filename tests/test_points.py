"""The packed product of kernel blocks: what it must share with torch.mm, and with the float64 formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ep3stream.solver import points, tiles
from ep3stream.solver.blocks import BatchBlock, kernel_block, times_kernel
from ep3stream.solver.dot_product import PolynomialKernel
from ep3stream.solver.kernels import RADIAL_KERNELS, Kernel, RadialKernel
from ep3stream.solver.points import UnpreparedPoints


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def formed(kernel: Kernel, z: Tensor, x: Tensor) -> Tensor:
    """K(Z, X) as a step forms it: by tiles, packed where this torch can."""
    return kernel_block(kernel, kernel.left(z), kernel.right(x), torch.empty(len(z), len(x)))


def test_points_prepared_by_the_tile_give_the_blocks_of_those_prepared_before() -> None:
    kernel, z, x = RadialKernel("laplacian", 2.0, torch.ones(5)), rows(1300, 5), rows(70, 5, seed=1)
    by_tile, columns = UnpreparedPoints(z, kernel.left), kernel.right(x)
    found = kernel_block(kernel, by_tile, columns, torch.empty(1300, 70))
    assert torch.equal(found, formed(kernel, z, x))
    weights = rows(3, 1300, seed=2)
    for memory in (None, torch.empty(1300, 70)):
        block = BatchBlock(kernel, by_tile, columns, memory)
        torch.testing.assert_close(block.left_times(weights), weights @ found)
        torch.testing.assert_close(block.times(weights[:, :70]), weights[:, :70] @ found.T)
        assert block.n_centers == 1300


@pytest.fixture(params=["packed", "torch.mm"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs with the packed product, where this torch has one, and as it does where it has none."""
    if request.param == "torch.mm":
        monkeypatch.setattr(points, "_can_pack", lambda: False)


@pytest.mark.parametrize("name", RADIAL_KERNELS)
@pytest.mark.parametrize("d", [1, 64, 784, 3000])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.usefixtures("way")
def test_a_tiled_block_is_one_where_a_point_meets_itself(name: str, d: int, offset: float) -> None:
    x = rows(600, d) + offset
    kernel = RadialKernel(name, math.sqrt(d), x.mean(0), 1.5)
    assert (formed(kernel, x, x).diagonal() - 1).abs().max() <= 1e-6


@pytest.mark.parametrize("d", [3, 64, 784])
@pytest.mark.usefixtures("way")
def test_tiled_blocks_match_the_formula(d: int) -> None:
    z, x = rows(700, d), rows(100, d, seed=1)
    expected = torch.exp(-torch.cdist(z.double(), x.double()) / math.sqrt(d))
    assert (formed(RadialKernel("laplacian", math.sqrt(d), x.mean(0)), z, x) - expected).abs().max() < 1e-5
    expected = (z.double() @ x.double().T / d + 1) ** 3
    found = formed(PolynomialKernel(math.sqrt(d), 3, 1.0), z, x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("way")
def test_an_outlier_does_not_change_the_other_values_of_a_tiled_block() -> None:
    x = rows(100, 5)
    kernel = RadialKernel("laplacian", 2.0, torch.zeros(5))
    far = torch.cat([x, torch.full((1, 5), 1e4)])
    torch.testing.assert_close(formed(kernel, far, far)[:100, :100], formed(kernel, x, x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e19])
@pytest.mark.usefixtures("way")
def test_a_point_without_a_distance_is_never_taken_for_a_near_one(value: float) -> None:
    z, x = rows(600, 4), rows(100, 4, seed=1)
    kernel = RadialKernel("laplacian", 1.0, torch.zeros(4))
    z[3, 1] = x[7, 2] = value
    k_zx = formed(kernel, z, x)
    expected = kernel.block(kernel.left(z), kernel.right(x))
    torch.testing.assert_close(k_zx, expected, equal_nan=True)
    assert not (k_zx[3] > 0).any()
    assert not (k_zx[:, 7] > 0).any()


@pytest.mark.parametrize("d", [8, 30, 130, 784])
def test_values_do_not_depend_on_the_number_of_tiles(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    z, x = rows(300, d), rows(200, d, seed=1)
    kernel = RadialKernel("laplacian", 5.0, torch.zeros(d))
    whole = formed(kernel, z, x)
    # Vectors of a pass over a tile end where it ends, so tiles are whole numbers of them here.
    for n_rows in (8, 64, 192):
        monkeypatch.setattr(tiles, "TILE_ROWS", n_rows)
        assert torch.equal(formed(kernel, z, x), whole)


@pytest.mark.usefixtures("way")
def test_no_centers_and_few_points_are_products_too() -> None:
    kernel = RadialKernel("laplacian", 2.0, torch.zeros(3))
    for n, m in ((0, 100), (5, 1), (1, 100)):
        z, x, weights = rows(n, 3), rows(m, 3, seed=1), rows(2, n, seed=2)
        product = times_kernel(kernel, weights, kernel.left(z), kernel.right(x))
        expected = weights.double() @ torch.exp(-torch.cdist(z.double(), x.double()) / 2)
        torch.testing.assert_close(product.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_torch_whose_packed_product_is_another_or_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    can_pack = points._can_pack.__wrapped__

    def missing(*_: object) -> Tensor:
        raise RuntimeError("no such operator")

    for broken in (missing, lambda a, b, then: torch.zeros(len(a), 5)):
        monkeypatch.setattr(points, "_linear", broken)
        assert not can_pack()
