"""The local tail of the Nystrom projection: beyond the leading pairs, blocks of neighbouring centers.

Where the eigenvalues of K(Z, Z) fall slowly (few dimensions, narrow kernels), what the Nystrom features Phi of rank r
leave out, S = K(Z, Z) - Phi Phi', is far from a multiple of the identity, but it is local: a center shares little of S
with any but its neighbours. So the centers are put into an order in which neighbours are next to each other
(`neighbour_order`), every b of them in a row are a group, and S is replaced by its diagonal blocks,

    K(Z, Z) ~ Phi Phi' + D,    D = diag(S_11, S_22, ...) + rho I = L L',

the "partially independent conditional" approximation (Snelson and Ghahramani, 2007), here as a preconditioner. In
the whitened weights L' alpha it is the identity and r leading pairs, so that `projection.py` needs no other formula
than for a multiple of the identity: it only whitens what comes in, R' h, and what goes out, R theta, R = L^(-T).

O(p b) memory and O(p b c) time a step. Row i of `rows`, (p, b), is the row of its group's R for center i: a rank holds
the rows of its centers. A group that lies on two ranks costs an all-reduce of its b x c numbers for each product; R is
the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ep3stream.mesh import Mesh
from ep3stream.solver.columns import ColumnKernel
from ep3stream.solver.kernels import LOG2_E, CallableKernel, Kernel, RadialKernel
from ep3stream.solver.spectrum import SPANNING, leading_eigenpairs
from ep3stream.solver.tiles import TILE_ROWS, tile_rows, tiles, tiles_of

# rho, as a share of the mean of the diagonal of S: of centers that nearly coincide, none gets a huge weight.
RIDGE_SHARE = 0.1

# Centers that Phi explains less well than this share of all centers are damped.
KNOWN_SHARE = 0.98

# Neighbours are looked for along the leading directions of wide inputs, estimated on so many centers.
_DIRECTIONS, _DIRECTION_ROWS = 16, 1024
# Rows of groups that are multiplied at once on CPUs, and about how many numbers at most.
_ROWS_AT_ONCE, _NUMBERS_AT_ONCE = 1 << 12, 1 << 19


@dataclass(frozen=True, slots=True)
class LocalTail:
    """R = L^(-T) for this rank's centers, block-diagonal.

    rows: (p_shard, b), row i of the block of the group of center i, in the group's order; a last, smaller group leaves
    columns unused. n_centers: p, of all ranks.
    """

    rows: Tensor
    n_centers: int
    mesh: Mesh

    @property
    def group_size(self) -> int:
        """b, the number of centers of a group."""
        return self.rows.shape[1]

    @property
    def _layout(self) -> Layout:
        return Layout.of(self.n_centers, self.group_size, self.mesh)

    @classmethod
    def cost_bytes(cls, share: int, group_size: int) -> int:
        """Bytes of the tail of a rank's share of the centers, and of its set-up: some matrices of a group, float64."""
        return 4 * share * group_size + 6 * 8 * group_size**2

    def whiten(self, h: Tensor) -> Tensor:
        """R' h, (k, p_shard), for h of that shape; O(p b k), in new memory."""
        layout, product = self._layout, torch.empty_like(h)
        for some, blocks in self._pieces(layout, len(h)):
            groups = h[:, some].unflatten(1, (len(blocks), -1)).transpose(0, 1)
            product[:, some] = torch.bmm(groups, blocks).transpose(0, 1).flatten(1)
        for part, sum_ in zip(layout.parted, self._parted_sums(layout, h.T), strict=True):
            product[:, part.here] = sum_[part.within].T
        return product

    def unwhiten(self, theta: Tensor) -> Tensor:
        """R theta, (k, p_shard), for theta of that shape; O(p b k), in new memory."""
        layout, product = self._layout, torch.empty_like(theta)
        for some, blocks in self._pieces(layout, len(theta)):
            groups = theta[:, some].unflatten(1, (len(blocks), -1)).transpose(0, 1)
            product[:, some] = torch.bmm(groups, blocks.mT).transpose(0, 1).flatten(1)
        for part, whole in zip(layout.parted, layout.gathered(theta), strict=True):
            torch.mm(whole, self.rows[part.here].T, out=product[:, part.here])
        return product

    def whitened(self, block: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Pairs of a slice of rows and R' block there, for a block of (p_shard, n); a few groups at a time.

        The rows of a pair may be overwritten in `block` before the next one is asked for.
        """
        layout = self._layout
        for some, blocks in self._pieces(layout, block.shape[1]):
            yield some, torch.bmm(blocks.mT, block[some].unflatten(0, (len(blocks), -1))).flatten(0, 1)
        for part, sum_ in zip(layout.parted, self._parted_sums(layout, block), strict=True):
            yield part.here, sum_[part.within]

    def unwhitened(self, block: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Pairs of a slice of rows and R block there, for a block of (p_shard, n); a few groups at a time."""
        layout = self._layout
        for some, blocks in self._pieces(layout, block.shape[1]):
            yield some, torch.bmm(blocks, block[some].unflatten(0, (len(blocks), -1))).flatten(0, 1)
        for part, whole in zip(layout.parted, layout.gathered(block.T), strict=True):
            yield part.here, self.rows[part.here] @ whole.T

    def solve(self, alpha: Tensor) -> Tensor:
        """L' alpha = R^(-1) alpha, (k, p_shard), for alpha of that shape; O(p b k), in new memory."""
        layout, product = self._layout, torch.empty_like(alpha)

        def solved(blocks: Tensor, right: Tensor) -> Tensor:
            found: Tensor = torch.linalg.solve_triangular(blocks, right.mT, upper=True)
            return found.mT

        for some, blocks in self._pieces(layout, len(alpha)):
            groups = alpha[:, some].unflatten(1, (len(blocks), -1)).transpose(0, 1)
            product[:, some] = solved(blocks, groups).transpose(0, 1).flatten(1)
        blocks_of = layout.gathered(self.rows.T)
        for part, block, whole in zip(layout.parted, blocks_of, layout.gathered(alpha), strict=True):
            n = len(layout.members(part.group))
            product[:, part.here] = solved(block.T[:n, :n], whole[:, :n])[:, part.within]
        return product

    def _pieces(self, layout: Layout, n_columns: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows of groups that lie whole here and their blocks of R, (n, b, b); a smaller last group by itself.

        As many groups at once as are multiplied with so many columns.
        """
        device, first, b = self.rows.device, layout.whole.start, self.group_size
        n_rows = min(_ROWS_AT_ONCE, max(TILE_ROWS, _NUMBERS_AT_ONCE // max(1, n_columns)))
        if device.type == "cuda":
            n_rows = tile_rows(device, n_columns)
        for run in tiles(layout.whole.stop - first, max(1, n_rows // b) * b):
            some = slice(first + run.start, first + run.stop)
            yield some, self.rows[some].unflatten(0, (-1, b))
        if (small := layout.small) is not None:
            yield small, self.rows[small, : small.stop - small.start][None]

    def _parted_sums(self, layout: Layout, block: Tensor) -> Tensor:
        """R' block of the groups that lie on several ranks, (n, b, k), from this rank's rows, (p_shard, k), of it."""
        sums = block.new_zeros(len(layout.parted), self.group_size, block.shape[1])
        for sum_, part in zip(sums, layout.parted, strict=True):
            torch.mm(self.rows[part.here].T, block[part.here], out=sum_)
        return self.mesh.all_reduce(sums) if layout.parted else sums


class Part(NamedTuple):
    """What a rank has of a group that lies on several ranks: the group's number, and its members.

    here: their rows among the rank's centers; within: their places in the group. Both may be empty.
    """

    group: int
    here: slice
    within: slice


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the groups of b consecutive centers lie on this rank.

    whole: the rows of all groups that lie whole here; small: of a last one that is smaller than b, where it lies whole
    here. parted: the groups that lie on several ranks, all of them, on every rank.
    """

    n_centers: int
    group_size: int
    mesh: Mesh
    whole: slice
    small: slice | None
    parted: tuple[Part, ...]

    @classmethod
    def of(cls, n_centers: int, group_size: int, mesh: Mesh) -> Layout:
        """The layout of p centers in groups of b on this rank of the mesh."""
        owned, b = mesh.shard_range(n_centers), group_size
        first, last = -(-owned.start // b), owned.stop // b
        whole = slice(first * b - owned.start, max(first, last) * b - owned.start)
        borders = mesh.shard_starts(n_centers)[1:]
        parted = sorted({start // b for start in borders if start % b and start < n_centers})
        last_start = n_centers // b * b
        is_small = last_start < n_centers and owned.start <= last_start < owned.stop == n_centers
        small = slice(last_start - owned.start, len(owned)) if is_small else None
        return cls(n_centers, b, mesh, whole, small, tuple(cls._part(group, b, owned) for group in parted))

    @staticmethod
    def _part(group: int, b: int, owned: range) -> Part:
        start, stop = max(group * b, owned.start), min((group + 1) * b, owned.stop)
        stop = max(start, stop)
        return Part(
            group,
            slice(start - owned.start, stop - owned.start) if stop > start else slice(0, 0),
            slice(start - group * b, stop - group * b),
        )

    def members(self, group: int) -> range:
        """The centers of a group, by number among all centers."""
        return range(group * self.group_size, min((group + 1) * self.group_size, self.n_centers))

    def gathered(self, h: Tensor) -> list[Tensor]:
        """The columns of h, (k, p_shard), of each parted group, (k, b), on every rank; absent members are zero."""
        if not self.parted:
            return []
        whole = h.new_zeros(len(self.parted), len(h), self.group_size)
        for columns, part in zip(whole, self.parted, strict=True):
            columns[:, part.within] = h[:, part.here]
        return list(self.mesh.all_reduce(whole))

    def groups(self) -> Iterator[Part]:
        """Each group that has centers here."""
        owned, b = self.mesh.shard_range(self.n_centers), self.group_size
        for group in range(owned.start // b, -(-owned.stop // b)):
            yield self._part(group, b, owned)


@dataclass(frozen=True, slots=True)
class Grouping:
    """Groups of `group_size` consecutive ones of p centers, which `neighbour_order` has put in order.

    centers_of: the scaled centers of a range of numbers, (n, d), on the device, of other ranks' centers too.
    """

    group_size: int
    n_centers: int
    centers_of: Callable[[range], Tensor]


def build_tail(
    kernel: Kernel, grouping: Grouping, diagonal: Tensor, features: Tensor, mesh: Mesh
) -> LocalTail | None:
    """R from Phi, (p_shard, r), this rank's rows of the Nystrom features; one group after the other.

    diagonal: K(z, z) of this rank's centers, (p_shard,).

    None where Phi Phi' leaves hardly more than its rounding. In float64, since S is a difference.
    O(p b (d + r + b)) time and, beside the result, O(b^2 + b r) memory.
    """
    n_centers = grouping.n_centers
    layout = Layout.of(n_centers, grouping.group_size, mesh)
    mine = diagonal.clone()
    squares = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for some in tiles_of(features):
        squared = features[some].double().square()
        mine[some] -= squared.sum(1).to(mine)
        squares += squared.sum(0)
    unexplained = mesh.all_gather_rows(mine.clamp_min_(0), n_centers)
    ridge = RIDGE_SHARE * float(unexplained.double().mean())
    sizes = mesh.broadcast(mesh.all_reduce(squares))  # About the eigenvalues.
    if ridge <= torch.finfo(features.dtype).eps * float(sizes.max()):
        return None
    known = max(float(unexplained.kthvalue(max(1, int(KNOWN_SHARE * n_centers)))[0]), ridge)
    rows = features.new_zeros(len(features), grouping.group_size)
    wholes = layout.gathered(features.T)
    gathered = {part.group: whole.T for part, whole in zip(layout.parted, wholes, strict=True)}
    for part in layout.groups():
        members = layout.members(part.group)
        whole = gathered.get(part.group)
        of_group = features[part.here] if whole is None else whole[: len(members)]
        factor = _inverse_factor(kernel, grouping.centers_of(members), of_group, ridge, known)
        rows[part.here, : len(members)] = factor[part.within].to(rows)
    return LocalTail(rows, n_centers, mesh)


def _inverse_factor(kernel: Kernel, centers: Tensor, features: Tensor, ridge: float, known: float) -> Tensor:
    """L^(-T), (n, n), float64, of L L' = D_cc, for the centers, (n, d), of a group and their features, (n, r).

    D = S + rho I + diag(delta). A row at center j, far from all others, has the leverage S_jj^2 / D_jj; delta keeps it
    at `known` or below, as the few centers of a rare category, which Phi does not explain at all, ask for: the step
    probe hardly ever meets such a row, but every epoch does.
    """
    # Distances in float64: in float32 the rounding of nearly coincident centers makes S indefinite. But Phi is of the
    # rounded inputs where the kernel rounds them, which it does in float32 only.
    is_rounded = isinstance(kernel, RadialKernel) and kernel.precision != "float32"
    points = centers if is_rounded or isinstance(kernel, CallableKernel) else centers.double()
    rest = kernel.block(kernel.left(points), kernel.right(points)).double()
    part = features.double()
    rest.addmm_(part, part.T, alpha=-1)
    rest = (rest + rest.T) / 2
    of_center = rest.diagonal().clamp_min(0)
    rest.diagonal().add_((of_center.square() / known - of_center).clamp_min(0))
    while True:
        rest.diagonal().add_(ridge)
        factor, failed_at = torch.linalg.cholesky_ex(rest)
        if not int(failed_at):
            # The factor's condition is at most the root of that of D, some hundreds: float32 is exact enough.
            eye = torch.eye(len(factor), dtype=features.dtype, device=factor.device)
            inverse: Tensor = torch.linalg.solve_triangular(factor.T.to(eye), eye, upper=True)
            return inverse
        ridge *= 10  # The rounding of Phi Phi' can leave S a little below zero.


def neighbour_order(
    kernel: Kernel, centers: Tensor, scaled: Callable[[Tensor], Tensor], group_size: int
) -> Tensor:
    """An order of the centers, (p,), int64, in which every `group_size` of them in a row are neighbours.

    scaled: from some centers, (n, d), to the kernel's inputs on the device. Recursive bisection across the widest
    direction of each part, O(p log(p / b)) beside the O(p d) for the coordinates. Kernels on columns have the columns
    for directions; a category is cut along its codes, the most frequent first.
    """
    if isinstance(kernel, ColumnKernel):
        parts_of = [kernel.left(scaled(some)).prepared for some in centers.split(_ROWS_AT_ONCE)]
        cut, coordinates = _column_cut(kernel), torch.cat(parts_of)
    else:
        cut, coordinates = _along_widest_direction, _leading_coordinates(centers, scaled)
    order = torch.arange(len(centers), device=coordinates.device)
    parts = [slice(0, len(centers))]
    while parts:
        part = parts.pop()
        n_groups = -(-(part.stop - part.start) // group_size)
        if n_groups < 2:
            continue
        members, middle = order[part], part.start + n_groups // 2 * group_size
        order[part] = members[cut(coordinates[members], middle - part.start)]
        parts += [slice(part.start, middle), slice(middle, part.stop)]
    return order.cpu()


def _leading_coordinates(centers: Tensor, scaled: Callable[[Tensor], Tensor]) -> Tensor:
    """The scaled centers along their leading directions, (p, at most 16); all directions where d is small."""
    some = scaled(centers[:: -(-len(centers) // _DIRECTION_ROWS)]).double()
    some = some - some.mean(0)
    is_wide = some.shape[1] > len(some)
    matrix = some @ some.T if is_wide else some.T @ some
    _, vectors = leading_eigenpairs(matrix, _DIRECTIONS, torch.Generator().manual_seed(0), SPANNING)
    leading = normalize(some.T @ vectors if is_wide else vectors, dim=0).to(centers.dtype)
    return torch.cat([scaled(some) @ leading for some in centers.split(_ROWS_AT_ONCE)])


def _along_widest_direction(coordinates: Tensor, first: int) -> Tensor:
    """Places of the points, (n, k), in the order of their leading principal direction, (n,)."""
    centred = coordinates.double()
    centred = centred - centred.mean(0)
    vectors: Tensor = torch.linalg.eigh(centred.T @ centred)[1]
    return (centred @ vectors[:, -1]).sort(stable=True)[1]


def _column_cut(kernel: ColumnKernel) -> Callable[[Tensor, int], Tensor]:
    """A function of prepared centers, (n, k), and a number: their places, (n,), in the order of one column.

    The column is the one where the kernel falls most between those before and those behind that number: by two thirds
    of the mean distance from the median for a number, by the pairs of unlike codes that are parted for a category, in
    units of -log2 of the column's factor. Centers with the same code are in the order of the best number.
    """
    used = kernel.used
    columns = list(zip(kernel.is_category[used].tolist(), kernel.weights[used].tolist(), strict=True))

    def cut(prepared: Tensor, first: int) -> Tensor:
        order, widest = torch.arange(len(prepared), device=prepared.device), 0.0
        for at, (is_category, _) in enumerate(columns):
            distance = (prepared[:, at] - prepared[:, at].median()).abs().pow(kernel.power)
            if not is_category and (fall := 2 / 3 * float(distance.mean())) > widest:
                order, widest = prepared[:, at].sort(stable=True)[1], fall
        by_number = order
        for at, (is_category, weight) in enumerate(columns):
            if not is_category:
                continue
            _, codes, counts = prepared[:, at].unique(return_inverse=True, return_counts=True)
            ranks = counts.sort(descending=True, stable=True)[1].argsort()[codes]
            by_code = by_number[ranks[by_number].sort(stable=True)[1]]
            sides = ranks[by_code].tensor_split([first])
            fall = (
                LOG2_E
                * weight
                * (_unlike(ranks) - sum(len(side) * _unlike(side) for side in sides) / len(ranks))
            )
            if fall > widest:
                order, widest = by_code, fall
        return order

    return cut


def _unlike(codes: Tensor) -> float:
    """The share of pairs of the codes, (n,), that are not the same."""
    shares = codes.bincount().double() / max(1, len(codes))
    return 1 - float(shares.square().sum())
