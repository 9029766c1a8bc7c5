"""Products by tiles, and leading eigenpairs, against dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ep3stream.solver import tiles as tiling
from ep3stream.solver.blocks import BatchBlock, kernel_block, kernel_times, times_kernel
from ep3stream.solver.columns import COLUMN_KERNELS, ColumnKernel
from ep3stream.solver.kernels import CallableKernel, Kernel, RadialKernel
from ep3stream.solver.spectrum import CONVERGED, SPANNING, leading_eigenpairs
from ep3stream.solver.tiles import tile_rows, tiles

SHAPES = [(41, 17, 3), (1, 1, 1), (16, 1, 2), (0, 5, 2)]


def points(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def kernels() -> list[Kernel]:
    return [
        RadialKernel("laplacian", 2.0, torch.zeros(4)),
        CallableKernel(lambda z, x: (z @ x.T).div(4).exp()),
    ]


@pytest.fixture(params=[1, 3, 16, 41, 1024])
def height(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The test runs with tiles of each of these heights."""
    n_rows: int = request.param
    monkeypatch.setattr(tiling, "TILE_ROWS", n_rows)
    return n_rows


def test_tiles_cover_each_row_once_in_order(height: int) -> None:
    runs = list(tiles(41, tile_rows(torch.device("cpu"), 3)))
    assert [row for run in runs for row in range(run.start, run.stop)] == list(range(41))
    assert max(run.stop - run.start for run in runs) == min(height, 41)


@pytest.mark.parametrize(("gpu_bytes", "most"), [(141 * 10**9, 70), (8 << 30, 1100)])
def test_tiles_of_a_gpu_are_as_large_as_its_memory_allows(
    gpu_bytes: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, p, m = torch.device("cuda"), 1_048_576, 4096
    monkeypatch.setattr(tiling, "gpu_tile_bytes", lambda device: gpu_bytes // 512)
    assert len(list(tiles(p, tile_rows(gpu, m)))) < most
    assert 4 * m * tile_rows(gpu, m) <= gpu_bytes / 256
    assert tile_rows(gpu, 1 << 24) == tile_rows(torch.device("cpu"), m) == tiling.TILE_ROWS


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(("p", "m", "k"), SHAPES)
@pytest.mark.usefixtures("height")
def test_products_by_tiles_equal_dense_ones(kernel: Kernel, p: int, m: int, k: int) -> None:
    z, x = kernel.left(points(p, 4, 0)), kernel.right(points(m, 4, 1))
    k_zx = kernel.block(z, x)
    right, left = points(m, k, 2), points(k, p, 3)
    torch.testing.assert_close(kernel_block(kernel, z, x, torch.empty(p, m)), k_zx)
    torch.testing.assert_close(kernel_times(kernel, z, x, right), k_zx @ right, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(times_kernel(kernel, left, z, x), left @ k_zx, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", ["left_times", "times", "whole", "columns"])
@pytest.mark.parametrize("memory", ["none", "exact", "more than enough"])
@pytest.mark.parametrize(("p", "m", "k"), SHAPES)
@pytest.mark.usefixtures("height")
def test_a_batch_block_gives_the_same_whichever_product_comes_first(
    first: str, memory: str, p: int, m: int, k: int
) -> None:
    kernel = RadialKernel("laplacian", 2.0, torch.zeros(4))
    z, x = kernel.left(points(p, 4, 0)), kernel.right(points(m, 4, 1))
    rooms = {
        "none": None,
        "exact": torch.empty(p, m),
        "more than enough": torch.full((p + 2, m + 3), torch.nan),
    }
    block = BatchBlock(kernel, z, x, rooms[memory])
    k_zb, left, right = kernel.block(z, x), points(k, p, 2), points(k, m, 3)
    some = slice(m // 3, m // 3 + 2)
    expected = {"left_times": left @ k_zb, "times": right @ k_zb.T, "whole": k_zb, "columns": k_zb[:, some]}
    got = {
        "left_times": lambda: block.left_times(left),
        "times": lambda: block.times(right),
        "whole": block.whole,
        "columns": lambda: block.columns(some),
    }
    for product in [first, *expected]:
        torch.testing.assert_close(got[product](), expected[product], atol=1e-5, rtol=1e-5)


def test_a_kept_block_is_formed_once_and_a_recomputed_one_for_each_product() -> None:
    rows_formed = 0

    def counting(z: Tensor, x: Tensor) -> Tensor:
        nonlocal rows_formed
        rows_formed += len(z)
        return z @ x.T

    kernel = CallableKernel(counting)
    z, x = kernel.left(points(10, 4, 0)), kernel.right(points(6, 4, 1))
    for memory, expected in ((torch.empty(10, 6), 10), (None, 20)):
        rows_formed = 0
        block = BatchBlock(kernel, z, x, memory)
        block.left_times(points(2, 10, 2))
        block.times(points(2, 6, 3))
        assert rows_formed == expected


@pytest.mark.parametrize(("size", "n_pairs"), [(1, 1), (5, 9), (60, 20), (400, 12)])
def test_leading_eigenpairs_are_those_of_the_dense_solver(size: int, n_pairs: int) -> None:
    x = points(size, 3, 0).double()
    matrix = torch.exp(-torch.cdist(x, x))
    values, vectors = leading_eigenpairs(matrix, n_pairs, torch.Generator().manual_seed(1))
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:n_pairs]
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(values), dtype=torch.float64))
    assert (matrix @ vectors - vectors * values).norm(dim=0).max() < 1e-3 * values[0]


@pytest.mark.parametrize("n_iterations", [SPANNING, CONVERGED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leading_eigenpairs_of_a_matrix_of_lower_rank_are_found(
    dtype: torch.dtype, n_iterations: int
) -> None:
    """Three groups of coincident points, far apart: an LU factorisation meets pivots that are zero."""
    group = torch.arange(400) % 7 // 3
    matrix = (group[:, None] == group).to(dtype)
    values, vectors = leading_eigenpairs(matrix, 12, torch.Generator().manual_seed(1), n_iterations)
    expected = group.bincount().sort(descending=True).values.double()
    torch.testing.assert_close(values[:3], expected, rtol=1e-5, atol=0)
    assert values[3:].abs().max() < 1e-3
    assert (matrix.double() @ vectors[:, :3] - vectors[:, :3] * expected).norm() < 1e-3


@pytest.mark.parametrize("name", COLUMN_KERNELS)
def test_two_threads_form_the_block_of_one(name):
    x = torch.randn(1500, 4, generator=torch.Generator().manual_seed(0))
    kernel = ColumnKernel.of(name, torch.tensor([[0.5, 1.0, 0.2, 0.7], [0.0] * 4, [1.0] * 4]), 1.0)
    weights = torch.ones(2, 1300)
    n_before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            block = BatchBlock(kernel, kernel.left(x[:1300]), kernel.right(x[1300:]), torch.empty(1300 * 200))
            found.append((block.left_times(weights), block.whole()))
    finally:
        torch.set_num_threads(n_before)
    (product, whole), (other_product, other_whole) = found
    assert torch.equal(other_whole, whole)
    torch.testing.assert_close(other_product, product)
