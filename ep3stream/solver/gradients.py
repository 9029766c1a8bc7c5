"""Gradients of a kernel machine of distances, and the metric that they make: the recursive feature machine.

    grad f(x) = sum_i a_i w(t_i) (z_i - x) / bandwidth^2,    t_i = |x - z_i| / bandwidth,    w(t) = -phi'(t) / t,

two matrix products a block. M, the mean of grad f grad f' over rows and outputs, says along which directions f changes:
the average gradient outer product of Radhakrishnan, Beaglehole, Pandit, Belkin, Science 2024. With inputs x M^(1/2) in
the place of x distances see these directions more, and the others less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ep3stream.mesh import Mesh
from ep3stream.solver.gpu import float32_products
from ep3stream.solver.kernels import RadialKernel
from ep3stream.solver.tiles import tile_rows, tiles

# Beyond so many outputs this many random combinations of them are taken for each block of rows.
_OUTPUTS = 4


class GradientProducts:
    """The sum of grad f grad f' over rows, (k, k), or of its diagonal, (k,), in float64; rows come block by block.

    points: this rank's centers, (p_shard, k), as the kernel takes them; weights: (c, p_shard). Every rank adds the same
    rows and has the same sums. Memory for k times the rows of a block, four times, beside the sum.
    """

    def __init__(
        self, kernel: RadialKernel, points: Tensor, weights: Tensor, is_diagonal: bool, mesh: Mesh, seed: int
    ) -> None:
        k = points.shape[1]
        self.n_rows, self.sum = 0, torch.zeros(k if is_diagonal else (k, k), dtype=torch.float64)
        self._kernel, self._centers, self._weights, self._mesh = kernel, kernel.left(points), weights, mesh
        self._points = points - kernel.centre.to(points)
        self._generator = torch.Generator().manual_seed(seed)

    @float32_products()
    def add(self, x: Tensor) -> None:
        """Adds the gradients at points x, (m, k); O(4 p_shard m k) time."""
        weights = self._weights
        if len(weights) > _OUTPUTS:
            # E[s s'] = 1 for random signs s, so that the sums have the same mean.
            signs = torch.randint(2, (_OUTPUTS, len(weights)), generator=self._generator).to(weights)
            weights = (2 * signs - 1) @ weights / _OUTPUTS**0.5
        found = self._mesh.all_reduce(self.gradients(x, weights)).flatten(0, 1)
        self.n_rows += len(x)
        if self.sum.ndim == 1:
            self.sum += found.double().square().sum(0).cpu()
        else:
            self.sum += (found.T @ found).double().cpu()

    def gradients(self, x: Tensor, weights: Tensor) -> Tensor:
        """This rank's share of grad f at points x, (m, k), for weights of (c, p_shard): (c, m, k)."""
        c, right = len(weights), self._kernel.right(x)
        toward, whole = x.new_zeros(c * x.shape[1], len(x)), x.new_zeros(c, len(x))
        for rows in tiles(len(self._points), tile_rows(x.device, max(toward.shape))):
            slopes = self._kernel.slopes(self._centers[rows], right)
            weighted = weights[:, None, rows] * self._points[rows].T
            toward.addmm_(weighted.flatten(0, 1), slopes)
            whole.addmm_(weights[:, rows], slopes)
        centred = x - self._kernel.centre.to(x)
        moved = toward.view(c, x.shape[1], len(x)).transpose(1, 2) - whole[:, :, None] * centred
        return moved / self._kernel.bandwidth**2


def metric_diagonal(products: Tensor, directions: Tensor | None) -> Tensor:
    """The diagonal of M, (D,), for scaled inputs, from the products, (k, k) or (k,), for points along `directions`."""
    diagonal = products if products.ndim == 1 else products.diagonal()
    if directions is None:
        return diagonal
    along = directions.double()
    if along.ndim == 1:  # d/ds f(s v) = v f'.
        return diagonal * along.square()
    return ((along @ products) * along).sum(1)


def metric_directions(products: Tensor, directions: Tensor | None, is_diagonal: bool) -> Tensor:
    """A with A A' = M for scaled inputs, where M has the trace D, so that a bandwidth that is given keeps its meaning.

    products, directions: as for `metric_diagonal`. Returns (D,) with `is_diagonal`, which leaves out the rest of M,
    else (D, k), whose columns are orthogonal, the longest first. Without any gradient M is 1.
    """
    if is_diagonal:
        root = metric_diagonal(products, directions).clamp_min(0).sqrt()
    else:
        values, vectors = torch.linalg.eigh(products)
        root = vectors * values.clamp_min(0).sqrt()
        if directions is not None:
            along = directions.double()
            root = along[:, None] * root if along.ndim == 1 else along @ root
        vectors, values, _ = torch.linalg.svd(root, full_matrices=False)
        root = vectors * values
    if not root.any():
        return torch.ones(len(root))
    found: Tensor = root * (len(root) / root.square().sum()).sqrt()
    return found.float().contiguous()
