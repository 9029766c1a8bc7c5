"""Kernel functions, evaluated by blocks k_zx = K(Z, X).

A radial kernel K(x, z) = phi(|x - z| / bandwidth) takes its squared distances from one matrix product
over two extra columns,

    |x - z|^2 = [z, |z|^2, 1] . [-2x, 1, |x|^2],

so that a block costs one product and the few element-wise passes of phi, all in the block's own memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ep3stream.errors import ConfigError

KernelFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Points:
    """A set of points prepared for one side of a kernel's blocks."""

    prepared: Tensor

    def __len__(self) -> int:
        return self.prepared.shape[0]

    def __getitem__(self, rows: slice) -> Points:
        return Points(self.prepared[rows])


class Kernel(Protocol):
    """What the solver needs of a kernel. K is symmetric and positive semidefinite."""

    @property
    def name(self) -> str:
        """The name in settings and model files."""
        ...

    def left(self, x: Tensor) -> Points:
        """Prepares x, (n, d), as the rows of blocks; O(nd)."""
        ...

    def right(self, x: Tensor) -> Points:
        """Prepares x, (n, d), as the columns of blocks; O(nd)."""
        ...

    def block(self, z: Points, x: Points, out: Tensor | None = None) -> Tensor:
        """K(Z, X), (len(z), len(x)), for z from `left` and x from `right`, written into `out` where given."""
        ...

    def diagonal(self, x: Tensor) -> Tensor:
        """K(x_i, x_i), (n,)."""
        ...


def _laplacian(squared: Tensor) -> Tensor:
    return squared.sqrt_().neg_().exp_()


def _gaussian(squared: Tensor) -> Tensor:
    return squared.mul_(-0.5).exp_()


_PROFILES: dict[str, Callable[[Tensor], Tensor]] = {"laplacian": _laplacian, "gaussian": _gaussian}
RADIAL_KERNELS = tuple(_PROFILES)


@dataclass(frozen=True, slots=True)
class RadialKernel:
    """phi(|x - z| / bandwidth): `laplacian` exp(-t), `gaussian` exp(-t^2 / 2).

    bandwidth has the unit of a distance between inputs. `centre`, (d,), is subtracted from every input: it
    changes nothing in exact arithmetic and keeps |x|^2 small against |x - z|^2, which float32 needs.
    """

    name: str
    bandwidth: float
    centre: Tensor

    def __post_init__(self) -> None:
        if self.name not in _PROFILES:
            raise ConfigError(f"kernel is {self.name!r}; choose one of {', '.join(_PROFILES)}, or a callable")
        if not 0 < self.bandwidth < float("inf"):
            raise ConfigError(f"bandwidth is {self.bandwidth}; it must be a positive, finite distance")

    def left(self, x: Tensor) -> Points:
        """[z, |z|^2, 1] in units of the bandwidth."""
        scaled, squared, ones = self._scaled(x)
        return Points(torch.cat([scaled, squared, ones], 1))

    def right(self, x: Tensor) -> Points:
        """[-2x, 1, |x|^2] in units of the bandwidth."""
        scaled, squared, ones = self._scaled(x)
        return Points(torch.cat([scaled.mul_(-2), ones, squared], 1))

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scaled = (x - self.centre.to(x)) / self.bandwidth
        squared = scaled.square().sum(1, keepdim=True)
        # A product of d terms is off by about (4 + sqrt(d) / 4) eps (|z|^2 + |x|^2) at worst (measured, d up to
        # 5000); the square root of what is left of a true zero would show it: 1e-7 becomes 3e-4. Taking that
        # much off the norms makes such distances negative, for `block` to clamp, whatever the other rows are.
        rounding = (4 + math.sqrt(x.shape[1]) / 4) * torch.finfo(x.dtype).eps
        return scaled, squared.mul_(1 - rounding), torch.ones_like(squared)

    def block(self, z: Points, x: Points, out: Tensor | None = None) -> Tensor:
        """K(Z, X). Squared distances within rounding of zero become zero, so that K(x, x) = 1 to 1e-6."""
        squared = torch.mm(z.prepared, x.prepared.T, out=out)
        return _PROFILES[self.name](squared.clamp_min_(0))

    def diagonal(self, x: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(x[:, 0])


@dataclass(frozen=True, slots=True)
class CallableKernel:
    """Any symmetric positive semidefinite k(z, x) -> K(Z, X), torch tensors in and out.

    `function` maps (a, d) and (b, d) to (a, b). It must be deterministic for a resumed fit to be identical.
    """

    function: KernelFunction
    name: str = "callable"

    def left(self, x: Tensor) -> Points:
        """x itself."""
        return Points(x)

    def right(self, x: Tensor) -> Points:
        """x itself."""
        return Points(x)

    def block(self, z: Points, x: Points, out: Tensor | None = None) -> Tensor:
        """`function(z, x)`; raises ConfigError on a wrong shape or a value that is not finite."""
        values = self.function(z.prepared, x.prepared)
        expected = (len(z), len(x))
        if tuple(values.shape) != expected:
            raise ConfigError(
                f"kernel {self.name!r} returned the shape {tuple(values.shape)} for {expected[0]} and "
                f"{expected[1]} points; it must return {expected}"
            )
        if not bool(torch.isfinite(values).all()):
            raise ConfigError(f"kernel {self.name!r} returned a value that is not finite; check its domain")
        return values.to(z.prepared.dtype) if out is None else out.copy_(values)

    def diagonal(self, x: Tensor) -> Tensor:
        """K(x_i, x_i) from the diagonals of small blocks: O(n tile) evaluations, O(tile^2) memory."""
        return torch.cat([self.block(Points(rows), Points(rows)).diagonal() for rows in x.split(64)])


def median_bandwidth(x: Tensor) -> float:
    """Median distance between rows of x, (n, d), in random order: 4n pairs across its two halves; O(nd).

    The median heuristic: it gives exp(-1) for a typical pair under the Laplacian kernel. Raises ConfigError
    for fewer than two rows, and when half of the pairs coincide.
    """
    half = len(x) // 2
    one, other = x[:half], x[half : 2 * half]
    pairs = [(one - other.roll(shift, 0)).norm(dim=1) for shift in range(min(half, 8))]
    median = float(torch.cat(pairs).median()) if pairs else 0.0
    if median == 0:
        raise ConfigError(
            f"bandwidth is 'median' but half of the {len(x)} sampled rows or more coincide; "
            "give --bandwidth a positive number"
        )
    return median
