"""Products with kernel blocks, tile by tile, in memory that does not grow with p.

Weights and residuals are held outputs first, (c, p) and (c, m): on CPUs a skinny matrix times a wide block is several
times faster than the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ep3stream.solver.columns import ColumnKernel
from ep3stream.solver.gpu import multiplies_half, split_product
from ep3stream.solver.kernels import Kernel, RadialKernel
from ep3stream.solver.points import LeftPoints, Points, skinny_product
from ep3stream.solver.skinny import are_few, few_times_transposed
from ep3stream.solver.tiles import tile_rows, tiles, tiles_of

# Of a GPU: with more outputs, by reckoning, three products of bfloat16, for which a block is read and written several
# times, take less time than one in float32.
MOST_IN_FLOAT32 = 256


def _tiles_of(z: LeftPoints, x: Points) -> Iterator[slice]:
    return tiles(len(z), tile_rows(z.device, len(x)))


def _n_tiles(z: LeftPoints, x: Points) -> int:
    return -(-len(z) // tile_rows(z.device, len(x)))


def _is_one_tile(kernel: Kernel, z: LeftPoints) -> bool:
    """Whether a block that has memory is computed as a whole: on GPUs radial kernels need no other memory for it.

    On several threads of CPUs kernels on columns too: after a product torch's threads spin for a while on the cores
    that the threads of the next tile need. Tile by tile, two threads took longer than one.
    """
    if not isinstance(z, Points):
        return False
    if z.device.type == "cuda":
        return isinstance(kernel, RadialKernel)
    return isinstance(kernel, ColumnKernel) and torch.get_num_threads() > 1


def fuses(kernel: Kernel, device: torch.device, n_outputs: int) -> bool:
    """Whether products of so many outputs with blocks of the kernel form no block on this device."""
    return isinstance(kernel, RadialKernel | ColumnKernel) and kernel.fuses(device, n_outputs)


def _fused(kernel: Kernel, weights: Tensor, z: LeftPoints, x: Points, over_left: bool) -> Tensor | None:
    """The product without a block, by Triton or compiled loops; None where neither serves."""
    if not isinstance(kernel, RadialKernel | ColumnKernel) or not isinstance(z, Points):
        return None
    return kernel.fused(weights, z, x, over_left)


def tiled_blocks(kernel: Kernel, z: LeftPoints, x: Points) -> Iterator[tuple[slice, Tensor]]:
    """Pairs of a slice of rows and K(Z[rows], X). All tiles share one memory: use each before the next."""
    x = x.for_products(_n_tiles(z, x))
    tile = x.prepared.new_empty(min(tile_rows(z.device, len(x)), len(z)), len(x))
    for rows in _tiles_of(z, x):
        yield rows, kernel.block(z[rows], x, out=tile[: rows.stop - rows.start])


def kernel_block(kernel: Kernel, z: LeftPoints, x: Points, out: Tensor) -> Tensor:
    """Writes K(Z, X) into `out`, (p, m), by tiles of rows, which on CPUs stay in the cache, and returns it."""
    if _is_one_tile(kernel, z):
        return kernel.block(z[:], x, out)
    x = x.for_products(_n_tiles(z, x))
    for rows in _tiles_of(z, x):
        kernel.block(z[rows], x, out=out[rows])
    return out


def kernel_matrix(kernel: Kernel, points: Tensor) -> Tensor:
    """K(X, X), (n, n), exactly symmetric, for points of (n, d); the blocks below the diagonal are those above it."""
    z, x = kernel.left(points), kernel.right(points)
    matrix = points.new_empty(len(points), len(points))
    for rows in _tiles_of(z, x):
        block = kernel.block(z[rows], x[rows.start :])
        matrix[rows, rows.start :] = block
        matrix[rows.stop :, rows] = block[:, rows.stop - rows.start :].T
        own = matrix[rows, rows]
        own.copy_((own + own.T) / 2)
    return matrix


def kernel_times(kernel: Kernel, z: LeftPoints, x: Points, matrix: Tensor) -> Tensor:
    """K(Z, X) @ matrix, (p, k), column by column in memory, for a matrix of (m, k); holds at most one tile of K."""
    if (fused := _fused(kernel, matrix.T, z, x, over_left=False)) is not None:
        return fused.T
    product = matrix.new_empty(matrix.shape[1], len(z)).T
    for rows, block in tiled_blocks(kernel, z, x):
        torch.mm(block, matrix, out=product[rows])
    return product


def times_kernel(kernel: Kernel, matrix: Tensor, z: LeftPoints, x: Points) -> Tensor:
    """matrix @ K(Z, X), (k, m), for a matrix of (k, p); holds at most one tile of K."""
    if (fused := _fused(kernel, matrix, z, x, over_left=True)) is not None:
        return fused
    product = matrix.new_zeros(matrix.shape[0], len(x))
    for rows, block in tiled_blocks(kernel, z, x):
        product.addmm_(matrix[:, rows], block)
    return product


class BatchBlock:
    """k_zb = K(Z_shard, X_b) of one batch, for products from both sides.

    memory: room for (p_shard, m) numbers. With it the block is formed once, by the first call that needs it: tile by
    tile, or at once (`_is_one_tile`), or while it is multiplied, where the kernel has such a program (`fused`). Without
    it (None) every product forms the block again, in the memory of one tile.
    """

    def __init__(self, kernel: Kernel, z: LeftPoints, x: Points, memory: Tensor | None) -> None:
        n_products = _n_tiles(z, x) if memory is not None else 2 * _n_tiles(z, x)
        self._kernel, self._z, self._x = kernel, z, x.for_products(n_products)
        self._kept = None if memory is None else memory.view(-1)[: len(z) * len(x)].view(len(z), len(x))
        self._formed = False

    @property
    def n_centers(self) -> int:
        """p_shard, the number of rows of the block."""
        return len(self._z)

    def left_times(self, matrix: Tensor) -> Tensor:
        """matrix @ k_zb: (k, p_shard) -> (k, m)."""
        if self._kept is None:
            return times_kernel(self._kernel, matrix, self._z, self._x)
        if self._is_split(len(matrix)):
            product = matrix.new_zeros(matrix.shape[0], len(self._x))
            for rows in tiles_of(whole := self.whole()):
                product += split_product(matrix[:, rows], whole[rows])
            return product
        if (
            not self._formed
            and isinstance(self._kernel, RadialKernel | ColumnKernel)
            and isinstance(self._z, Points)
        ):
            found = self._kernel.fused(matrix, self._z, self._x, over_left=True, block=self._kept)
            if found is not None:
                self._formed = True
                return found
        if self._formed or _is_one_tile(self._kernel, self._z):
            return matrix @ self.whole()
        product = matrix.new_zeros(matrix.shape[0], len(self._x))
        for rows in _tiles_of(self._z, self._x):
            self._kernel.block(self._z[rows], self._x, out=self._kept[rows])
            product.addmm_(matrix[:, rows], self._kept[rows])
        self._formed = True
        return product

    def times(self, matrix: Tensor) -> Tensor:
        """matrix @ k_zb': (k, m) -> (k, p_shard)."""
        if self._kept is None:
            return kernel_times(self._kernel, self._z, self._x, matrix.T).T
        kept = self.whole()
        if self._is_split(len(matrix)):
            return torch.cat([split_product(matrix, kept[rows].T) for rows in tiles_of(kept)], 1)
        if kept.device.type == "cuda":
            return matrix @ kept.T
        if isinstance(self._kernel, ColumnKernel) and are_few(matrix):
            return few_times_transposed(matrix, kept, by_loops=True)
        product = matrix.new_empty(matrix.shape[0], len(self._z))
        # By tiles here too: on CPUs one skinny product with the whole tall block takes half as long again.
        for rows in _tiles_of(self._z, self._x):
            skinny_product(matrix, kept[rows], out=product[:, rows])
        return product

    def _is_split(self, n_outputs: int) -> bool:
        """Whether products of so many outputs are three of bfloat16, on a GPU: then float32 would take longer."""
        is_short = isinstance(self._z, Points) and self._z.precision != "float32"
        return is_short and n_outputs > MOST_IN_FLOAT32 and multiplies_half(self._z.device)

    def columns(self, rows_of_x: slice) -> Tensor:
        """K(Z_shard, X_b[rows_of_x]); a view of the block where it has memory, otherwise new memory."""
        if self._kept is None:
            return BatchBlock(self._kernel, self._z, self._x[rows_of_x], None).whole()
        return self.whole()[:, rows_of_x]

    def whole(self) -> Tensor:
        """k_zb itself, (p_shard, m), in the block's memory or, where it has none, in new memory."""
        if self._kept is None:
            empty = self._x.prepared.new_empty(len(self._z), len(self._x))
            return kernel_block(self._kernel, self._z, self._x, out=empty)
        if not self._formed:
            kernel_block(self._kernel, self._z, self._x, out=self._kept)
            self._formed = True
        return self._kept
