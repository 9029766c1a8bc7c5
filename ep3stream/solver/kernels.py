"""Kernel functions, evaluated by blocks k_zx = K(Z, X).

A radial kernel K(x, z) = phi(|x - z| / bandwidth) takes its squared distances from one matrix product
over two extra columns,

    |x - z|^2 = [z, |z|^2, 1] . [-2x, 1, |x|^2],

so that a block costs one product and the few element-wise passes of phi, all in the block's own memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ep3stream.config import KERNEL_DEFAULTS
from ep3stream.errors import ConfigError

KernelFunction = Callable[[Tensor, Tensor], Tensor]
CALLABLE = "callable"

_CHECKED_ROWS = 64
_CHECKED_SHARE = 0.01
_STRIP_ENTRIES = 1 << 18
_LOG2_E = 1 / math.log(2)


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

    @property
    def parameters(self) -> dict[str, Any]:
        """Everything else that settings and model files say of it; empty for a callable."""
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


def column_strips(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Consecutive runs of columns of about 2^18 entries: work tensors of a strip stay small and in the cache."""
    width = max(1, _STRIP_ENTRIES // max(n_rows, 1))
    for start in range(0, n_columns, width):
        yield slice(start, min(start + width, n_columns))


def _laplacian(scaled: Tensor, shape: float) -> None:
    # sqrt and exp themselves take twice as long on CPUs as rsqrt, a division and exp2. At zero, -1 / inf is -0.
    torch.div(scaled.new_full((), -1), scaled.rsqrt_(), out=scaled).exp2_()


def _gaussian(scaled: Tensor, shape: float) -> None:
    scaled.neg_().exp2_()


def _dispersal(scaled: Tensor, shape: float) -> None:
    scaled.pow_(shape / 2).mul_(-_LOG2_E).exp2_()


def _rational_quadratic(scaled: Tensor, shape: float) -> None:
    # With log1p in place of a power of a sum near one: a large shape, near the Gaussian, keeps its digits.
    scaled.mul_(0.5 / shape).log1p_().mul_(-shape * _LOG2_E).exp2_()


def _matern32(scaled: Tensor, shape: float) -> None:
    for columns in column_strips(*scaled.shape):
        distance = scaled[:, columns].sqrt_()
        decay = distance.neg().exp_()
        distance.add_(1).mul_(decay)


def _matern52(scaled: Tensor, shape: float) -> None:
    for columns in column_strips(*scaled.shape):
        part = scaled[:, columns]
        distance = part.sqrt()
        decay = distance.neg().exp_()
        part.div_(3).add_(distance).add_(1).mul_(decay)


class _Profile(NamedTuple):
    """phi of the squared distance in bandwidths, t^2, in place, from factor t^2: the points carry the factor.

    No temporaries but for Matern's strips.
    """

    factor: float
    apply: Callable[[Tensor, float], None]


_PROFILES = {
    "laplacian": _Profile(_LOG2_E**2, _laplacian),
    "gaussian": _Profile(_LOG2_E / 2, _gaussian),
    "matern32": _Profile(3, _matern32),
    "matern52": _Profile(5, _matern52),
    "dispersal": _Profile(1, _dispersal),
    "rational_quadratic": _Profile(1, _rational_quadratic),
}
RADIAL_KERNELS = tuple(_PROFILES)


@dataclass(frozen=True, slots=True)
class RadialKernel:
    """phi(t), t = |x - z| / bandwidth, with phi(0) = 1:

    laplacian            exp(-t)
    gaussian             exp(-t^2 / 2)
    matern32             (1 + sqrt(3) t) exp(-sqrt(3) t)                     Rasmussen and Williams 2006, 4.17
    matern52             (1 + sqrt(5) t + 5 t^2 / 3) exp(-sqrt(5) t)
    dispersal            exp(-t^shape), 0 < shape <= 2                       Schoenberg 1938
    rational_quadratic   (1 + t^2 / (2 shape))^-shape                        Rasmussen and Williams 2006, 4.19

    bandwidth has the unit of a distance between inputs; that of EigenPro3's `dispersal` is bandwidth^shape.
    `centre`, (d,), is subtracted from every input: it changes nothing in exact arithmetic and keeps |x|^2 small
    against |x - z|^2, which float32 needs. What float32 rounds off t^2, some 1e-7 (|x|^2 + |z|^2) / bandwidth^2,
    comes out of phi(t) = 1 - t^a + ... as that to the power a / 2: nothing where phi is smooth, 1e-4 where a is 1.
    Memory beside the block: none; `matern32` 1 MiB, `matern52` 2 MiB, for strips of 2^18 values.
    """

    name: str
    bandwidth: float
    centre: Tensor
    shape: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in _PROFILES:
            raise ConfigError(f"kernel is {self.name!r}; choose one of {', '.join(_PROFILES)}, or a callable")
        if not 0 < self.bandwidth < float("inf"):
            raise ConfigError(f"bandwidth is {self.bandwidth}; it must be a positive, finite distance")

    @property
    def parameters(self) -> dict[str, Any]:
        """Bandwidth, and the shape where the kernel has one."""
        own = KERNEL_DEFAULTS[self.name]
        return {name: getattr(self, name) for name in own}

    def left(self, x: Tensor) -> Points:
        """[z, |z|^2, 1] in the unit that the profile asks for."""
        scaled, squared, ones = self._scaled(x)
        return Points(torch.cat([scaled, squared, ones], 1))

    def right(self, x: Tensor) -> Points:
        """[-2x, 1, |x|^2] in the unit that the profile asks for."""
        scaled, squared, ones = self._scaled(x)
        return Points(torch.cat([scaled.mul_(-2), ones, squared], 1))

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        unit = self.bandwidth / math.sqrt(_PROFILES[self.name].factor)
        scaled = (x - self.centre.to(x)) / unit
        squared = scaled.square().sum(1, keepdim=True)
        # A product of d terms is off by about (4 + sqrt(d) / 4) eps (|z|^2 + |x|^2) at worst (measured, d up to
        # 5000); the square root of what is left of a true zero would show it: 1e-7 becomes 3e-4. Taking that
        # much off the norms makes such distances negative, for `block` to clamp, whatever the other rows are.
        rounding = (4 + math.sqrt(x.shape[1]) / 4) * torch.finfo(x.dtype).eps
        return scaled, squared.mul_(1 - rounding), torch.ones_like(squared)

    def block(self, z: Points, x: Points, out: Tensor | None = None) -> Tensor:
        """K(Z, X). Squared distances within rounding of zero become zero, so that K(x, x) = 1 to 1e-6."""
        values = torch.mm(z.prepared, x.prepared.T, out=out)
        _PROFILES[self.name].apply(values.clamp_min_(0), self.shape)
        return values

    def diagonal(self, x: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(x[:, 0])


@dataclass(frozen=True, slots=True)
class CallableKernel:
    """Any symmetric positive semidefinite k(z, x) -> K(Z, X), torch tensors in and out.

    `function` maps (a, d) and (b, d) to (a, b). It must be deterministic for a resumed fit to be identical.
    """

    function: KernelFunction
    name: str = CALLABLE

    @classmethod
    def checked(cls, function: KernelFunction, sample: Tensor) -> CallableKernel:
        """The kernel, tried on up to 64 rows of sample, (n, d), whose matrix takes O(64^3) time to look at.

        ConfigError unless it can be called and is symmetric and positive semidefinite on these rows, to 1%:
        rounding stays far below that, and a kernel of the wrong kind is far above it on random rows.
        """
        if not callable(function):
            raise ConfigError(
                f"kernel is {function!r:.80}, which cannot be called; give a function k(z, x), or name a kernel "
                "in the settings"
            )
        kernel, points = cls(function), Points(sample[:_CHECKED_ROWS])
        # Two calls, so that a kernel that gives other values each time is found out too.
        values = kernel.block(points, points).double()
        again = kernel.block(points, points).double()
        difference = float((values - again.T).abs().max())
        if difference > _CHECKED_SHARE * float(values.abs().max()):
            raise ConfigError(
                f"kernel {kernel.name!r} is not symmetric: K(z, x) and K(x, z) differ by up to {difference:.3g} "
                f"on {len(points)} rows; return the same value for either order, each time"
            )
        eigenvalues = torch.linalg.eigvalsh((values + values.T) / 2)
        low, high = float(eigenvalues[0]), float(eigenvalues[-1])
        if low < -_CHECKED_SHARE * high:
            raise ConfigError(
                f"kernel {kernel.name!r} is not positive semidefinite: its matrix on {len(points)} rows has "
                f"eigenvalues from {low:.3g} to {high:.3g}; use one that is"
            )
        return kernel

    @property
    def parameters(self) -> dict[str, Any]:
        """None."""
        return {}

    def left(self, x: Tensor) -> Points:
        """x itself."""
        return Points(x)

    def right(self, x: Tensor) -> Points:
        """x itself."""
        return Points(x)

    def block(self, z: Points, x: Points, out: Tensor | None = None) -> Tensor:
        """`function(z, x)`; raises ConfigError on a wrong type or shape, or a value that is not finite."""
        values = self.function(z.prepared, x.prepared)
        if not isinstance(values, Tensor) or values.is_complex():
            kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise ConfigError(
                f"kernel {self.name!r} returned {kind}; it must return a torch tensor of real numbers"
            )
        values = values.detach()
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
