"""Kernels on columns: a product over the columns of a table, each with a weight of its own.

A distance kernel mixes all columns into one length, and a category becomes as many 0/1 features as it has values. Here
every column has its own factor, a category is compared by equality, and a weight says how much the column matters; the
weights are learnt (`column_weights.py`). With few columns a block costs a few element-wise operations for each, in
strips that stay in the cache, and no matrix product.

On CPUs the loops of `compiled_columns.py` form float32 blocks and slopes of the powers 1 and 2. Everywhere else, and
where Numba cannot be imported, torch does, an operation at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ep3stream.errors import ConfigError
from ep3stream.solver.column_loops import ColumnLoops, compiled_loops
from ep3stream.solver.kernels import LOG2_E
from ep3stream.solver.points import Points

COLUMN_KERNELS = ("product", "anova")

# Entries of a strip for each thread: two strips fit into the 1 MiB of cache of a core.
_STRIP_ENTRIES = 1 << 16
_GPU_STRIP_ENTRIES = 1 << 26
# Numbers times weights are brought within this, so that differences do not overflow; codes never reach it.
_FARTHEST = 1e38

# The anova form multiplies factors 1 + c k, and divides by the 1 + c of several columns at once before these overflow.
_MOST = 2.0**60


class _Column(NamedTuple):
    """A column in use: its place among the columns in use, and its numbers; weight to base 2, for categories."""

    at: int
    is_category: bool
    weight: float
    share: float


@dataclass(frozen=True, slots=True)
class ColumnKernel:
    """A product over columns j, with K(x, x) = 1:

    product   prod_j k_j
    anova     prod_j (1 + c_j k_j) / (1 + c_j)

    k_j = exp(-(w_j |x_j - z_j|)^power) for a number and exp(-w_j [x_j != z_j]) for a category. Each k_j is positive
    semidefinite for 0 < power <= 2 (Schoenberg 1938), sums with positive factors and products of such kernels are too
    (Schur 1911). With `product` rows that differ much in one column share nothing; with `anova` they still share the
    effects of the other columns (Duvenaud, Nickisch, Rasmussen 2011). power 1 and 2 are Laplace and Gauss factors.

    weights, shares: (d,), w and c; is_category: (d,), bool; all in host memory, whatever the device of the points. A
    column with the weight 0, or with `anova` the share 0, is left out of the work. Cost of a block by compiled
    loops: 3 operations a number with `product` and 6 with `anova`, 2 a category; slopes cost two or three blocks. By
    torch it is 3, 5 and 2 passes. Memory beside the block: one strip of 2^16 values a thread.
    """

    name: str
    weights: Tensor
    is_category: Tensor
    shares: Tensor
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in COLUMN_KERNELS:
            raise ConfigError(f"kernel is {self.name!r}; choose one of {', '.join(COLUMN_KERNELS)}")
        for what, values in (("weights", self.weights), ("shares", self.shares)):
            if not bool(((values >= 0) & values.isfinite()).all()):
                raise ConfigError(f"{what} of the {self.name} kernel must be finite and not negative")
        if not 0 < self.power <= 2:
            raise ConfigError(f"power is {self.power}; the {self.name} kernel takes one in (0, 2]")

    @classmethod
    def of(cls, name: str, metric: Tensor, power: float = 1.0) -> ColumnKernel:
        """From the rows weights, categories (0 or 1) and shares of `metric`, (3, d)."""
        weights, is_category, shares = metric.detach().float().cpu()
        return cls(name, weights, is_category != 0, shares, power)

    @property
    def metric(self) -> Tensor:
        """Weights, categories and shares, (3, d), for `of`."""
        return torch.stack([self.weights, self.is_category.float(), self.shares])

    @property
    def parameters(self) -> dict[str, Any]:
        """The power."""
        return {"power": self.power}

    @property
    def used(self) -> Tensor:
        """Numbers of the columns that the kernel depends on, (k,)."""
        is_used = self.weights > 0
        if self.name == "anova":
            is_used = is_used & (self.shares > 0)
        return is_used.nonzero()[:, 0]

    def left(self, x: Tensor) -> Points:
        """The columns in use, (n, k): numbers times w (log2 e)^(1 / power), codes of categories as they are."""
        factors = torch.where(self.is_category, 1.0, self.weights * LOG2_E ** (1 / self.power))
        scaled = x[:, self.used.to(x.device)] * factors[self.used].to(x)
        return Points(scaled.clamp_(-_FARTHEST, _FARTHEST))

    def right(self, x: Tensor) -> Points:
        """The columns in use, (n, k), as on the left."""
        return self.left(x)

    def diagonal(self, x: Tensor) -> Tensor:
        """Ones, (n,)."""
        return torch.ones_like(x[:, 0])

    def scaled(self, factor: float) -> ColumnKernel:
        """The kernel with all weights times `factor`."""
        return replace(self, weights=self.weights * factor)

    def block(self, z: Points, x: Points, out: Tensor | None = None) -> Tensor:
        """K(Z, X), (len(z), len(x)), strip by strip."""
        out = z.prepared.new_empty(len(z), len(x)) if out is None else out
        if not out.numel():
            return out
        if (loops := self._loops(z.prepared, x.prepared, out)) is not None:
            loops.fill(z.prepared, x.prepared, out)
            return out
        return self.block_by_torch(z, x, out)

    def block_by_torch(self, z: Points, x: Points, out: Tensor) -> Tensor:
        """K(Z, X) without compiled loops, written into `out`, (len(z), len(x)), with at least one entry."""
        fill = self._fill_product if self.name == "product" else self._fill_anova
        columns, of_x = self._columns(), list(x.prepared.T.contiguous())
        for rows, work in self._strips(z, x):
            fill(columns, z.prepared[rows], of_x, out[rows], work)
        return out

    def _loops(self, *operands: Tensor) -> ColumnLoops | None:
        """The compiled loops, where they serve these matrices."""
        is_served = self.power in (1, 2) and all(
            each.device.type == "cpu" and each.dtype == torch.float32 and each.is_contiguous()
            for each in operands
        )
        if not is_served or (loops := compiled_loops()) is None:
            return None
        used = self.used
        parts = (self.is_category, self.weights.double() * LOG2_E, self.shares.double())
        return ColumnLoops(
            loops, self.name == "anova", self.power == 2, *(part[used].numpy() for part in parts)
        )

    def _fill_product(
        self, columns: list[_Column], z: Tensor, x: list[Tensor], total: Tensor, work: Tensor
    ) -> None:
        total.zero_()
        for column in columns:
            distance = self._distances(column, z, x[column.at], work)
            total.sub_(distance, alpha=column.weight if column.is_category else 1)
        total.exp2_()

    def _fill_anova(
        self, columns: list[_Column], z: Tensor, x: list[Tensor], total: Tensor, work: Tensor
    ) -> None:
        total.fill_(1)
        due = 1.0  # What is still to be divided by.
        for column in columns:
            distance, share = self._distances(column, z, x[column.at], work), column.share
            if column.is_category:
                # (1 + c k) / (1 + c), where k is 1 or exp(-w).
                total.addcmul_(total, distance, value=-share / (1 + share) * (1 - 2**-column.weight))
                continue
            total.addcmul_(total, distance.neg_().exp2_(), value=share)
            due *= 1 + share
            if due > _MOST:
                total.div_(due)
                due = 1.0
        total.div_(due)

    def _strips(self, z: Points, x: Points) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive rows of the block, and room for them, (rows, len(x)), that stays in the cache."""
        entries = _STRIP_ENTRIES * torch.get_num_threads() if z.device.type == "cpu" else _GPU_STRIP_ENTRIES
        height = min(len(z), max(1, entries // max(len(x), 1)))
        room = z.prepared.new_empty(height, len(x))
        for start in range(0, len(z), max(height, 1)):
            rows = slice(start, min(start + height, len(z)))
            yield rows, room[: rows.stop - rows.start]

    def _columns(self) -> list[_Column]:
        parts = (self.is_category, self.weights * LOG2_E, self.shares)
        in_use = zip(*(part[self.used].tolist() for part in parts), strict=True)
        return [_Column(at, *numbers) for at, numbers in enumerate(in_use)]

    def _distances(self, column: _Column, z: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """(a, b), for prepared rows z, (a, k), and a column of x: -log2 of a number's factor, 0 or 1 for a category."""
        of_z = z[:, column.at, None]
        if column.is_category:
            return torch.ne(of_z, x, out=out)
        torch.sub(of_z, x, out=out).abs_()
        return out if self.power == 1 else out.pow_(self.power)

    def slopes(self, z: Tensor, x: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor]:
        """d L / d log w and d L / d log c, (d,) each, of any function L of the block K(Z, X).

        weighted: K(Z, X) times d L / d K(Z, X), entry by entry, (len(z), len(x)). Costs about as much as a block.
        """
        left, right = self.left(z), self.right(x)
        if weighted.numel() and (loops := self._loops(left.prepared, right.prepared, weighted)) is not None:
            of_exponents, of_shares = loops.slopes(left.prepared, right.prepared, weighted)
        else:
            of_exponents, of_shares = self._slopes_by_torch(left, right, weighted)
        degrees = torch.where(self.is_category[self.used], 1.0, self.power).double() / LOG2_E
        found = torch.zeros(2, len(self.weights), dtype=torch.float64)
        found[:, self.used] = torch.stack([of_exponents * degrees, of_shares])
        return found[0], found[1]

    def _slopes_by_torch(self, z: Points, x: Points, weighted: Tensor) -> tuple[Tensor, Tensor]:
        """d L / d log e, for the exponents e of the columns in use, and d L / d log c, (k,) each, float64."""
        columns, of_x = self._columns(), list(x.prepared.T.contiguous())
        of_exponents, of_shares = (torch.zeros(len(columns), dtype=torch.float64) for _ in range(2))
        for rows, work in self._strips(z, x):
            part, factor = weighted[rows], torch.empty_like(work)
            whole = float(part.sum())
            for column in columns:
                at, share, weight = column.at, column.share, column.weight if column.is_category else 1.0
                exponent = self._distances(column, z.prepared[rows], of_x[at], work)
                if self.name == "product":
                    of_exponents[at] -= weight * _inner(exponent, part)
                    continue
                # c k / (1 + c k) of the sensitivity.
                torch.mul(exponent, -weight, out=factor).exp2_().mul_(share)
                torch.div(factor, factor + 1, out=factor).mul_(part)
                of_exponents[at] -= weight * _inner(exponent, factor)
                of_shares[at] += float(factor.sum()) - whole * share / (1 + share)
        return of_exponents, of_shares


def _inner(a: Tensor, b: Tensor) -> float:
    """Sum of a times b, entry by entry, both contiguous."""
    return float(torch.dot(a.view(-1), b.view(-1)))
