"""Kernels on columns: a product over the columns of a table, each with a weight of its own.

A distance kernel mixes all columns into one length, and a category becomes as many 0/1 features as it has values. Here
every column has its own factor, a category is compared by equality, and a weight says how much the column matters; the
weights are learnt (`column_weights.py`). With few columns a block costs a few element-wise passes for each, in strips
that stay in the cache, and no matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ep3stream.errors import ConfigError
from ep3stream.solver.points import Points

COLUMN_KERNELS = ("product", "anova")

# Entries of a strip: two of them fit into the 1 MiB of cache of a core.
_STRIP_ENTRIES = 1 << 16
_LOG2_E = 1 / math.log(2)


@dataclass(frozen=True, slots=True)
class ColumnKernel:
    """A product over columns j, with K(x, x) = 1:

    product   prod_j k_j
    anova     prod_j (1 + c_j k_j) / (1 + c_j)

    k_j = exp(-(w_j |x_j - z_j|)^power) for a number and exp(-w_j [x_j != z_j]) for a category. Each k_j is positive
    semidefinite for 0 < power <= 2 (Schoenberg 1938), sums with positive factors and products of such kernels are too
    (Schur 1911). With `product` rows that differ much in one column share nothing; with `anova` they still share the
    effects of the other columns (Duvenaud, Nickisch, Rasmussen 2011). power 1 and 2 are Laplace and Gauss factors.

    weights, shares: (d,), w and c. is_category: (d,), bool. A column with the weight 0, or with `anova` the share 0,
    is left out of the work. Cost of a block: 3 passes a number with `product`, 5 with `anova`, one more a category.
    Memory beside the block: one strip of 2^16 values.
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
        weights, is_category, shares = metric.float()
        return cls(name, weights, is_category != 0, shares, power)

    @property
    def metric(self) -> Tensor:
        """Weights, categories and shares, (3, d), for `of`."""
        return torch.stack([self.weights, self.is_category.float(), self.shares])

    @property
    def parameters(self) -> dict[str, Any]:
        """The power."""
        return {"power": self.power}

    def left(self, x: Tensor) -> Points:
        """The columns in use, (n, k): numbers times their weight, codes of categories as they are."""
        used, factors = self.used().to(x.device), self._factors(x)
        return Points(x[:, used] * factors)

    def right(self, x: Tensor) -> Points:
        """The columns in use, (n, k), as on the left."""
        return self.left(x)

    def diagonal(self, x: Tensor) -> Tensor:
        """Ones, (n,)."""
        return torch.ones_like(x[:, 0])

    def block(self, z: Points, x: Points, out: Tensor | None = None) -> Tensor:
        """K(Z, X), (len(z), len(x)), strip by strip."""
        out = z.prepared.new_empty(len(z), len(x)) if out is None else out
        if out.numel():
            self._fill(z.prepared, x.prepared.T.contiguous(), out)
        return out

    def _fill(self, z: Tensor, columns: Tensor, out: Tensor) -> None:
        each = self._columns(z)
        minus = out.new_full((), -1)
        for rows in strips(len(z), columns.shape[1]):
            total = out[rows]
            total.fill_(1 if self.name == "anova" else 0)
            work = torch.empty_like(total)
            for at, (is_category, weight, share) in enumerate(each):
                _exponent(z[rows, at], columns[at], is_category, weight, self.power, minus, work)
                if self.name == "product":
                    total.add_(work)
                else:
                    rest = work.new_full((), 1 / (1 + share))
                    torch.add(rest, work.exp2_(), alpha=share / (1 + share), out=work)
                    total.mul_(work)
            if self.name == "product":
                total.exp2_()

    def used(self) -> Tensor:
        """Numbers of the columns that the kernel depends on, (k,)."""
        used = self.weights > 0
        if self.name == "anova":
            used &= self.shares > 0
        return used.nonzero()[:, 0]

    def _factors(self, x: Tensor) -> Tensor:
        """What numbers are multiplied by, so that the exponent to base 2 is -|difference|^power; 1 for categories."""
        weights = self.weights * _LOG2_E ** (1 / self.power)
        factors = torch.where(self.is_category, 1.0, weights).to(x)
        return factors[self.used().to(x.device)]

    def _columns(self, z: Tensor) -> list[tuple[bool, float, float]]:
        """Of each column in use: whether it is a category, its weight to base 2, and its share."""
        used = self.used()
        parts = (self.is_category[used], self.weights[used] * _LOG2_E, self.shares[used])
        return list(zip(*(part.tolist() for part in parts), strict=True))

    def slopes(self, z: Tensor, x: Tensor, sensitivity: Tensor) -> tuple[Tensor, Tensor]:
        """d L / d log w and d L / d log c, (d,) each, from sensitivity = d L / d K(Z, X), (len(z), len(x)).

        L is any function of the block. z: (a, d), x: (b, d). Costs about twice a block.
        """
        left, columns = self.left(z).prepared, self.right(x).prepared.T.contiguous()
        weighted = (sensitivity * self.block(Points(left), Points(columns.T))).contiguous()
        used, each = self.used().to(z.device), self._columns(left)
        of_weights, of_shares = (torch.zeros(len(used), dtype=torch.float64) for _ in range(2))
        minus = left.new_full((), -1)
        for rows in strips(len(z), len(x)):
            part = weighted[rows]
            for at, (is_category, weight, share) in enumerate(each):
                work = torch.empty_like(part)
                _exponent(left[rows, at], columns[at], is_category, weight, self.power, minus, work)
                degree = (1.0 if is_category else self.power) / _LOG2_E
                if self.name == "product":
                    of_weights[at] += degree * float(torch.dot(work.view(-1), part.view(-1)))
                    continue
                factor = torch.exp2(work).mul_(share)
                factor.div_(factor + 1)  # c k / (1 + c k)
                of_weights[at] += degree * float((work * factor * part).sum())
                of_shares[at] += float((factor * part).sum() - part.sum() * (share / (1 + share)))
        found = torch.zeros(2, len(self.weights), dtype=torch.float64)
        found[:, used.cpu()] = torch.stack([of_weights, of_shares])
        return found[0], found[1]

    def to(self, device: torch.device) -> ColumnKernel:
        """The same kernel on another device."""
        return ColumnKernel.of(self.name, self.metric.to(device), self.power)

    def scaled(self, factor: float) -> ColumnKernel:
        """The kernel with all weights times `factor`."""
        return replace(self, weights=self.weights * factor)


def _exponent(
    z: Tensor, x: Tensor, is_category: bool, weight: float, power: float, minus: Tensor, out: Tensor
) -> None:
    """Writes log2 of one column's factor, (a, b), into `out`, for prepared z, (a,), and x, (b,)."""
    torch.sub(z[:, None], x, out=out)
    if is_category:
        # Different codes differ by 1 or more.
        torch.copysign(out, minus, out=out).clamp_min_(-1).mul_(weight)
    elif power == 1:
        torch.copysign(out, minus, out=out)
    else:
        out.abs_().pow_(power).neg_()


def strips(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Consecutive runs of rows of about 2^16 entries each."""
    height = max(1, _STRIP_ENTRIES // max(n_columns, 1))
    for start in range(0, n_rows, height):
        yield slice(start, min(start + height, n_rows))
