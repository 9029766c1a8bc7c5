"""Points prepared for the two sides of kernel blocks, and the matrix product of the two sides.

On CPUs the product is most of a block's cost. torch.mm packs the right side anew for every tile of left rows; oneDNN,
which torch ships, packs it once for all tiles and is also faster: 11 to 18% at d = 784, twice as fast at d = 8
(docs/benchmarks.md). torch has no public name for this function, so `_can_pack` tries it before use, and torch.mm
serves where it is missing. Results do not depend on the number of tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ep3stream.config import Precision
from ep3stream.solver.gpu import in_half, tensor_cores, tripled
from ep3stream.solver.tiles import tiles_of

# With fewer points a copy in another layout costs more than it saves.
_FEWEST_PACKED = 64
_ROWS_HINT = 512


@dataclass(frozen=True, slots=True)
class Points:
    """A set of n points prepared for one side of a kernel's blocks.

    prepared: (n, k); k and the meaning of the columns are the kernel's.
    is_factor: whether blocks are made from `products` of `prepared`, and these cannot overflow.
    packed: `prepared` in oneDNN's layout where that pays, after `for_products`; on a GPU its copy in bfloat16, as
    `gpu.in_half` makes it; otherwise None.
    precision: the precision in which every number of `prepared` is exact (`gpu.py`).
    """

    prepared: Tensor
    is_factor: bool = False
    packed: Tensor | None = None
    precision: Precision = "float32"

    def __len__(self) -> int:
        return self.prepared.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the prepared points."""
        return self.prepared.device

    def __getitem__(self, rows: slice) -> Points:
        half = None if self.packed is None or self.packed.dtype != torch.bfloat16 else self.packed[rows]
        return Points(self.prepared[rows], self.is_factor, half, self.precision)

    def for_products(self, n_products: int) -> Points:
        """The same points, packed for the right side of `n_products` products; a copy of them for more than one."""
        x = self.prepared
        is_worth_it = self.is_factor and self.packed is None and len(x) >= _FEWEST_PACKED
        if not is_worth_it or x.device.type != "cpu" or x.dtype != torch.float32 or not _can_pack():
            return self
        if n_products == 1:
            return replace(
                self, packed=x
            )  # For one product oneDNN packs x itself: cheaper, and the same bits.
        return replace(self, packed=torch.ops.mkldnn._reorder_linear_weight(x, _ROWS_HINT))


@dataclass(frozen=True, slots=True)
class UnpreparedPoints:
    """Points for one side of blocks that are prepared a tile at a time, for each block again.

    points: (n, d); prepare: maps a tile of them to `Points`. Costs O(nd) more time a block than prepared points, and
    saves the memory of n d numbers.
    """

    points: Tensor
    prepare: Callable[[Tensor], Points]

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, rows: slice) -> Points:
        return self.prepare(self.points[rows])

    def whole(self) -> Points:
        """All of them, prepared; beside the result this takes the memory of a tile or a few."""
        first = self[:0]
        prepared = first.prepared.new_empty(len(self), first.prepared.shape[1])
        packed = None
        if first.packed is not None:
            packed = first.packed.new_empty(len(self), first.packed.shape[1])
        is_factor = first.is_factor
        for rows in tiles_of(prepared):
            part = self[rows]
            prepared[rows], is_factor = part.prepared, is_factor and part.is_factor
            if packed is not None:
                assert part.packed is not None
                packed[rows] = part.packed
        return Points(prepared, is_factor, packed, first.precision)

    @property
    def device(self) -> torch.device:
        """The device of the points."""
        return self.points.device


LeftPoints = Points | UnpreparedPoints


def products(z: Points, x: Points, out: Tensor | None = None, not_negative: bool = False) -> Tensor:
    """Z X', (len(z), len(x)), or max(Z X', 0) with `not_negative`.

    Written into `out` where the product that serves can do so, otherwise into new memory. oneDNN's maximum turns nan
    into 0, but points with a nan have no `is_factor`.
    """
    if x.packed is not None and z.is_factor and len(z):
        return _linear(z.prepared, x.packed, "relu" if not_negative else "none")
    left, right = sides(z, x)
    if left.dtype == torch.bfloat16:
        found = torch.mm(left, right.T, out_dtype=torch.float32, out=out)
    else:
        with tensor_cores(z.precision, z.device):
            found = torch.mm(left, right.T, out=out)
    return found.clamp_min_(0) if not_negative else found


def sides(z: Points, x: Points) -> tuple[Tensor, Tensor]:
    """The factors as tensor cores multiply them, without a further rounding: both in bfloat16, or both as prepared."""
    if z.packed is not None and z.packed.dtype == torch.bfloat16:
        right = in_half(x.prepared, z.precision, is_left=False) if x.packed is None else x.packed
        assert right is not None
        return z.packed, right
    if z.precision == "bf16x3":
        return tripled(z.prepared, is_left=True), tripled(x.prepared, is_left=False)
    return z.prepared, x.prepared


def skinny_product(few: Tensor, block: Tensor, out: Tensor) -> None:
    """Writes few @ block', for few of (k, m) and a block of (n, m), into `out`, (k, n); k is small."""
    if few.device.type == "cpu" and few.dtype == torch.float32 and len(few) and len(block) and _can_pack():
        out.copy_(_linear(few, block, "none"))
    else:
        out.copy_(few @ block.T)


def _linear(rows: Tensor, columns: Tensor, then: str) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, columns, None, then, [], "")
    return found


@functools.cache
def _can_pack() -> bool:
    """Whether this torch has oneDNN's packed product under the names used here, and its result is right."""
    rows, columns = torch.arange(24.0).view(4, 6), torch.arange(30.0).view(5, 6)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(columns, len(rows))
        found = _linear(rows, packed, "relu")
    except (AttributeError, RuntimeError):  # torch raises RuntimeError for an operator that was not built.
        return False
    return bool(torch.equal(found, rows @ columns.T))
