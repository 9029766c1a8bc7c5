"""Kernels on columns: a product over the columns of a table, each with a weight of its own.

A distance kernel mixes all columns into one length, and a category becomes as many 0/1 features as it has values. Here
every column has its own factor, a category is compared by equality, and a weight says how much the column matters; the
weights are learnt (`column_weights.py`). With few columns a block costs a few element-wise operations for each, in
strips that stay in the cache, and no matrix product.

On CPUs the loops of `compiled_columns.py` form float32 blocks and slopes of the powers 1 and 2, on GPUs the programs of
`triton_columns.py` and `triton_products.py` of any power. Everywhere else, and where Numba or Triton do not run, torch
does, an operation at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ep3stream.errors import ConfigError
from ep3stream.solver.column_loops import FEWEST_ROWS, ColumnLoops
from ep3stream.solver.gpu import ColumnConstants, filled_columns, fused_columns, fuses, summed_columns
from ep3stream.solver.kernels import LOG2_E
from ep3stream.solver.loops import compiled_loops
from ep3stream.solver.points import Points
from ep3stream.solver.skinny import are_few
from ep3stream.solver.tiles import tile_rows, tiles

COLUMN_KERNELS = ("product", "anova")

# Entries of a strip for each thread: two strips fit into the 1 MiB of cache of a core.
_STRIP_ENTRIES = 1 << 16
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


class _Table(NamedTuple):
    """The columns in use on a device: their places, (k,), what left and right multiply them by, and constants."""

    places: Tensor
    factors: Tensor
    constants: ColumnConstants


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
    # By device and type of points: every step of a fit prepares some, and an upload would wait for the device.
    _tables: dict[tuple[torch.device, torch.dtype], _Table] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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
        """Places of the columns that the kernel depends on, (k,): first those of numbers, then those of categories."""
        is_used = self.weights > 0
        if self.name == "anova":
            is_used = is_used & (self.shares > 0)
        parts = (is_used & ~self.is_category, is_used & self.is_category)
        return torch.cat([part.nonzero()[:, 0] for part in parts])

    def _table(self, device: torch.device, dtype: torch.dtype) -> _Table:
        if (device, dtype) not in self._tables:
            used = self.used
            factors = torch.where(self.is_category, 1.0, self.weights * LOG2_E ** (1 / self.power))[used]
            constants = ColumnConstants(
                self.name,
                self.power,
                self._constants(used).to(device),
                int((~self.is_category[used]).sum()),
            )
            self._tables[device, dtype] = _Table(used.to(device), factors.to(device, dtype), constants)
        return self._tables[device, dtype]

    def _constants(self, used: Tensor) -> Tensor:
        """(2, k), float32, as for `triton_columns.column_block`."""
        is_category = self.is_category[used]
        losses, c = self.weights[used].double() * LOG2_E, self.shares[used].double()
        if self.name == "product":
            return torch.stack([losses, torch.zeros_like(losses)]).float()
        kept = (1 + c * 2**-losses) / (1 + c)
        # The sum of both is 1 in float32 too: rounding loses half of 1's last bit at most.
        rests = torch.where(is_category, kept, 1 / (1 + c)).float()
        return torch.stack([rests, torch.where(is_category, 0, 1 - rests)])

    def left(self, x: Tensor) -> Points:
        """The columns in use, (n, k): numbers times w (log2 e)^(1 / power), codes of categories as they are."""
        table = self._table(x.device, x.dtype)
        # Four times as fast as x[:, places].
        scaled = x.index_select(1, table.places).mul_(table.factors)
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
        table = self._table(z.device, z.prepared.dtype)
        if filled_columns(z.prepared, x.prepared, table.constants, out):
            return out
        return self.block_by_torch(z, x, out)

    def fuses(self, device: torch.device, n_outputs: int) -> bool:
        """Whether products of so many outputs form no block on this device."""
        return fuses(self.name, device, len(self.used), n_outputs)

    def fused(
        self, weights: Tensor, z: Points, x: Points, over_left: bool, block: Tensor | None = None
    ) -> Tensor | None:
        """The product without forming the block, or while forming it; None where neither loops nor Triton serve.

        weights @ K(Z, X) for weights of (k, len(z)) with `over_left`, else weights @ K(X, Z) for (k, len(x)).
        block: where K(Z, X) is written, with `over_left`; nothing is written where the result is None.
        """
        operands = (z.prepared, x.prepared) if block is None else (z.prepared, x.prepared, block)
        if are_few(weights) and len(x) >= FEWEST_ROWS and (loops := self._loops(*operands)) is not None:
            return loops.product(weights, z.prepared, x.prepared, over_left, block)
        if block is not None:
            return None
        a, b = (z, x) if over_left else (x, z)
        constants = self._table(z.device, z.prepared.dtype).constants
        return fused_columns(weights, a.prepared, b.prepared, constants)

    def block_by_torch(self, z: Points, x: Points, out: Tensor) -> Tensor:
        """K(Z, X) without compiled loops, written into `out`, (len(z), len(x)), with at least one entry."""
        fill = self._fill_product if self.name == "product" else self._fill_anova
        columns, of_x = self._columns(), list(x.prepared.T.contiguous())
        for rows, work in self._strips(z, x):
            fill(columns, z.prepared[rows], of_x, out[rows], work)
        return out

    def _loops(self, *operands: Tensor) -> ColumnLoops | None:
        """The compiled loops, where they serve these matrices, points first."""
        is_served = self.power in (1, 2) and all(
            each.device.type == "cpu" and each.dtype == torch.float32 and each.is_contiguous()
            for each in operands
        )
        if not is_served or (loops := compiled_loops()) is None:
            return None
        constants = self._table(operands[0].device, operands[0].dtype).constants
        return ColumnLoops(
            loops, self.name == "anova", self.power == 2, constants.n_numbers, constants.values.numpy()
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
        height = tile_rows(z.device, len(x))
        if z.device.type == "cpu":
            height = max(1, _STRIP_ENTRIES * torch.get_num_threads() // max(len(x), 1))
        room = z.prepared.new_empty(min(height, len(z)), len(x))
        for rows in tiles(len(z), height):
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
        whole = weighted.sum(1).double().sum()  # One sum in float64 takes many times as long.
        sums, k = self._sums(left, right, weighted), len(self.used)
        # All in one transfer: each waits for the device.
        of_t, of_t_e, whole = torch.cat([sums.view(-1), whole.view(1)]).cpu().tensor_split((k, 2 * k))
        used = self.used
        is_category, c = self.is_category[used], self.shares[used].double()
        weights = torch.where(is_category, self.weights[used].double() * LOG2_E, 1.0)
        of_shares = torch.zeros_like(of_t)
        if self.name == "anova":
            # c k / (1 + c k) for values that differ; for those that do not, c / (1 + c).
            of_differing = c * 2**-weights / (1 + c * 2**-weights)
            of_shares = torch.where(
                is_category, (of_differing - c / (1 + c)) * of_t_e, of_t - whole * c / (1 + c)
            )
            of_t_e = torch.where(is_category, of_differing, 1.0) * of_t_e
        degrees = torch.where(is_category, 1.0, self.power).double() / LOG2_E
        found = torch.zeros(2, len(self.weights), dtype=torch.float64)
        found[:, used] = torch.stack([-weights * of_t_e * degrees, of_shares])
        return found[0], found[1]

    def _sums(self, z: Points, x: Points, weighted: Tensor) -> Tensor:
        """For each column in use the sum of t and of t e, (2, k), float64, as `triton_columns.column_sums` says."""
        operands = z.prepared, x.prepared, weighted
        if weighted.numel() and (loops := self._loops(*operands)) is not None:
            return loops.sums(*operands)
        constants = self._table(z.device, z.prepared.dtype).constants
        if weighted.numel() and (sums := summed_columns(*operands[:2], constants, weighted)) is not None:
            return sums
        columns, of_x = self._columns(), list(x.prepared.T.contiguous())
        found = torch.zeros(2, len(columns), dtype=torch.float64, device=z.device)
        for rows, work in self._strips(z, x):
            part, factor = weighted[rows], torch.empty_like(work)
            for column in columns:
                at, share = column.at, column.share
                distance = self._distances(column, z.prepared[rows], of_x[at], work)
                t = part
                if self.name == "anova" and not column.is_category:
                    torch.neg(distance, out=factor).exp2_().mul_(share)
                    t = torch.div(factor, factor + 1, out=factor).mul_(part)
                    found[0, at] += t.sum(dtype=torch.float64)
                found[1, at] += distance.mul_(t).sum(dtype=torch.float64)
        return found
