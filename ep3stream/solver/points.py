"""Points prepared for the two sides of kernel blocks, and the matrix product of the two.

On CPUs the product is most of a block's cost, and torch.mm lays the right side out anew for every tile of left
rows. oneDNN, which torch carries, does so once for all tiles and is the faster of the two beside it: 11 to 18% at
d = 784, twice as fast at d = 8 (docs/benchmarks.md). What torch offers of it has no public name, so it is tried out
before use, and torch.mm does where it is missing. Results do not depend on the number of tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ep3stream.config import Precision
from ep3stream.solver.gpu import half_product, tensor_cores

# Of fewer points a copy in another layout costs more than it saves.
_FEWEST_PACKED = 64

_ROWS_HINT = 512


@dataclass(frozen=True, slots=True)
class Points:
    """A set of points prepared for one side of a kernel's blocks.

    prepared: (n, k), k and its meaning the kernel's own; is_factor: whether blocks are made of `products` of it, and
    none can overflow; packed: the same for oneDNN, in its layout where that pays, or in bfloat16 on a GPU, once a
    right side has one.
    precision: what every number of `prepared` is exact in (`precision.py`).
    """

    prepared: Tensor
    is_factor: bool = False
    packed: Tensor | None = None
    precision: Precision = "float32"

    def __len__(self) -> int:
        return self.prepared.shape[0]

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.prepared.device

    def __getitem__(self, rows: slice) -> Points:
        return Points(self.prepared[rows], self.is_factor, precision=self.precision)

    def for_products(self, n_products: int) -> Points:
        """The same, made ready for the right side of so many `products`; for more than one as much memory again."""
        x = self.prepared
        if self.precision == "bfloat16" and x.device.type == "cuda":
            return replace(self, packed=x.bfloat16())
        is_worth_it = self.is_factor and self.packed is None and len(x) >= _FEWEST_PACKED
        if not is_worth_it or x.device.type != "cpu" or x.dtype != torch.float32 or not _can_pack():
            return self
        if n_products == 1:
            return replace(self, packed=x)  # oneDNN packs it itself, with less ado and to the same bits.
        return replace(self, packed=torch.ops.mkldnn._reorder_linear_weight(x, _ROWS_HINT))


@dataclass(frozen=True, slots=True)
class UnpreparedPoints:
    """Points for the left side of blocks, prepared by the tile whenever a block is formed, and not kept.

    points: (n, d); prepare: a tile of them as `Points`. O(nd) more time a block in return for n d less memory.
    """

    points: Tensor
    prepare: Callable[[Tensor], Points]

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, rows: slice) -> Points:
        return self.prepare(self.points[rows])

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.points.device

    @property
    def precision(self) -> Precision:
        """That of `prepare`."""
        return self[:0].precision


LeftPoints = Points | UnpreparedPoints


def products(z: Points, x: Points, out: Tensor | None = None, not_negative: bool = False) -> Tensor:
    """Z X', (len(z), len(x)), in `out` or, where that does not serve the product, in memory of its own.

    not_negative: max(Z X', 0). oneDNN's maximum turns nan into 0, but points with one are no factors.
    """
    if x.packed is None or not z.is_factor or len(z) == 0:
        if z.precision == "bfloat16" and z.prepared.device.type == "cuda":
            found = half_product(z.prepared, x.prepared if x.packed is None else x.packed, out)
        else:
            with tensor_cores(z.precision, z.prepared.device):
                found = torch.mm(z.prepared, x.prepared.T, out=out)
        return found.clamp_min_(0) if not_negative else found
    return _linear(z.prepared, x.packed, "relu" if not_negative else "none")


def skinny_product(few: Tensor, block: Tensor, out: Tensor) -> None:
    """Few rows times a block's transpose, (k, m) and (n, m), into `out`, (k, n)."""
    if few.device.type == "cpu" and few.dtype == torch.float32 and len(few) and len(block) and _can_pack():
        out.copy_(_linear(few, block, "none"))
    else:
        out.copy_(few @ block.T)


def _linear(rows: Tensor, columns: Tensor, then: str) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, columns, None, then, [], "")
    return found


@functools.cache
def _can_pack() -> bool:
    """Whether this torch has oneDNN's packed product, by the names used here, and it multiplies."""
    rows, columns = torch.arange(24.0).view(4, 6), torch.arange(30.0).view(5, 6)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(columns, len(rows))
        found = _linear(rows, packed, "relu")
    except (
        AttributeError,
        RuntimeError,
    ):  # The second is also what torch calls an operator not built for here.
        return False
    return bool(torch.equal(found, rows @ columns.T))
