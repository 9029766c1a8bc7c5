"""Kernel functions, evaluated by blocks k_zx = K(Z, X).

A radial kernel K(x, z) = phi(|x - z| / bandwidth) takes its squared distances from one matrix product
over two extra columns,

    |x - z|^2 = [-2z, |z|^2, 1] . [x, 1, |x|^2],

so that a block costs one product and the few element-wise passes of phi, all in the block's own memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ep3stream.config import KERNEL_DEFAULTS, Precision
from ep3stream.errors import ConfigError
from ep3stream.solver.gpu import applied_profile, factors, fused_product, rounded
from ep3stream.solver.points import Points, products

KernelFunction = Callable[[Tensor, Tensor], Tensor]

CALLABLE = "callable"

_CHECKED_ROWS = 64

_CHECKED_SHARE = 0.01

_STRIP_ENTRIES = 1 << 18

_LOG2_E = 1 / math.log(2)


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


def _laplacian(scaled: Tensor, shape: float, out: Tensor) -> None:
    # sqrt and exp themselves take twice as long on CPUs as rsqrt, a division and exp2. At zero, -1 / inf is -0.
    torch.exp2(torch.div(scaled.new_full((), -1), scaled.rsqrt_(), out=scaled), out=out)


def _gaussian(scaled: Tensor, shape: float, out: Tensor) -> None:
    torch.exp2(scaled.neg_(), out=out)


def _dispersal(scaled: Tensor, shape: float, out: Tensor) -> None:
    torch.exp2(scaled.pow_(shape / 2).mul_(-_LOG2_E), out=out)


def _rational_quadratic(scaled: Tensor, shape: float, out: Tensor) -> None:
    # With log1p in place of a power of a sum near one: a large shape, near the Gaussian, keeps its digits.
    torch.exp2(scaled.mul_(0.5 / shape).log1p_().mul_(-shape * _LOG2_E), out=out)


def _matern32(scaled: Tensor, shape: float, out: Tensor) -> None:
    for columns in column_strips(*scaled.shape):
        distance = scaled[:, columns].sqrt_()
        decay = distance.neg().exp_()
        torch.mul(distance.add_(1), decay, out=out[:, columns])


def _matern52(scaled: Tensor, shape: float, out: Tensor) -> None:
    for columns in column_strips(*scaled.shape):
        part = scaled[:, columns]
        distance = part.sqrt()
        decay = distance.neg().exp_()
        torch.mul(part.div_(3).add_(distance).add_(1), decay, out=out[:, columns])


class _Profile(NamedTuple):
    """phi of the squared distance in bandwidths, t^2, from factor t^2, which is used up: the points carry the factor.

    No temporaries but for Matern's strips; the last argument, where the values go, may be the first one itself.
    """

    factor: float
    apply: Callable[[Tensor, float, Tensor], None]


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
    Memory beside the block: none, or one more where the columns are packed (`points.py`): a tile's. `matern32` 1 MiB,
    `matern52` 2 MiB, for strips of 2^18 values.
    precision: what inputs are rounded to first, for tensor cores (`precision.py`).
    """

    name: str
    bandwidth: float
    centre: Tensor
    shape: float = 1.0
    precision: Precision = "float32"

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
        """[-2z, |z|^2, 1] in the unit that the profile asks for."""
        if self.precision != "float32" and x.dtype == torch.float32:
            return self._rounded(x, is_left=True)
        points, scaled = self._prepared(x, -2, -1)
        scaled.mul_(-2)
        return points

    def right(self, x: Tensor) -> Points:
        """[x, 1, |x|^2] in the unit that the profile asks for."""
        if self.precision != "float32" and x.dtype == torch.float32:
            return self._rounded(x, is_left=False)
        return self._prepared(x, -1, -2)[0]

    def _rounded(self, x: Tensor, is_left: bool) -> Points:
        unit = self.bandwidth / math.sqrt(_PROFILES[self.name].factor)
        scaled = rounded((x - self.centre.to(x)) / unit, self.precision)
        return Points(factors(scaled, _norms(scaled), self.precision, is_left), precision=self.precision)

    def _prepared(self, x: Tensor, norm_at: int, one_at: int) -> tuple[Points, Tensor]:
        """x in that unit with its two columns, and its first d. One array: fresh memory costs more than arithmetic."""
        unit = self.bandwidth / math.sqrt(_PROFILES[self.name].factor)
        prepared = x.new_empty(len(x), x.shape[1] + 2)
        scaled = torch.sub(x, self.centre.to(x), out=prepared[:, :-2]).div_(unit)
        norms = _norms(scaled)
        prepared[:, norm_at], prepared[:, one_at] = norms, 1
        is_factor = norms.device.type == "cpu" and bool((norms < torch.finfo(norms.dtype).max / 8).all())
        return Points(prepared, is_factor), scaled

    def block(self, z: Points, x: Points, out: Tensor | None = None) -> Tensor:
        """K(Z, X). Squared distances within rounding of zero become zero, so that K(x, x) = 1 to 1e-6."""
        squared = products(z, x, out, not_negative=True)
        out = squared if out is None else out
        if not applied_profile(squared, self.name, self.shape, out):
            _PROFILES[self.name].apply(squared, self.shape, out)
        return out

    def fused(self, weights: Tensor, z: Points, x: Points, over_left: bool) -> Tensor | None:
        """weights @ K(Z, X), or weights @ K(X, Z) where the sum is not over the left points; None if not fused."""
        left, right = (z.prepared, -0.5), (x.prepared, 1.0)
        (a, a_unit), (b, b_unit) = (left, right) if over_left else (right, left)
        is_exact = self.precision == "float32"
        d = self.centre.numel()
        return fused_product(weights, a, b, (a_unit, b_unit), self.name, self.shape, d, is_exact)

    def diagonal(self, x: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(x[:, 0])


def _norms(scaled: Tensor) -> Tensor:
    """|x|^2, (n,), for x of (n, d), less what rounding may add to a squared distance.

    A product of d terms is off by about (4 + sqrt(d) / 4) eps (|z|^2 + |x|^2) at worst (measured, d up to
    5000); the square root of what is left of a true zero would show it: 1e-7 becomes 3e-4. Taking that
    much off the norms makes such distances negative, for `block` to clamp, whatever the other rows are.
    """
    rounding = (4 + math.sqrt(scaled.shape[1]) / 4) * torch.finfo(scaled.dtype).eps
    squared: Tensor = torch.linalg.vecdot(scaled, scaled)
    return squared.mul_(1 - rounding)


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
