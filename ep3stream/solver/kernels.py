"""Kernel functions, evaluated by blocks k_zx = K(Z, X).

A radial kernel K(x, z) = phi(|x - z| / bandwidth) takes its squared distances from one matrix product with two extra
columns,

    |x - z|^2 = [-2z, |z|^2, 1] . [x, 1, |x|^2],

so that a block costs one product and the few element-wise passes of phi, all in the memory of the block.

A new radial kernel is an entry of `_PROFILES`, and of `gpu.RADIAL_KINDS` for Triton. Any other kernel is a class with
the methods of `Kernel`, which `named_kernels.py` builds from its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ep3stream.config import KERNEL_DEFAULTS, Precision
from ep3stream.errors import ConfigError
from ep3stream.solver.gpu import (
    apply_profile,
    factors,
    fused_product,
    fuses,
    gemm,
    gemm_serves,
    in_half,
    rounded,
    serves,
)
from ep3stream.solver.points import Points, products, sides
from ep3stream.solver.tiles import column_strips

KernelFunction = Callable[[Tensor, Tensor], Tensor]

# The name of a kernel that the user gives as a function.
CALLABLE = "callable"

# A callable is tried on so many rows, and may be off by so much of its largest value.
_CHECKED_ROWS = 64
_CHECKED_SHARE = 0.01
LOG2_E = 1 / math.log(2)


class Kernel(Protocol):
    """The methods that the solver needs of a kernel K, which is symmetric and positive semidefinite."""

    @property
    def name(self) -> str:
        """Its name in settings and model files."""
        ...

    @property
    def parameters(self) -> dict[str, Any]:
        """All other numbers that settings and model files hold of the kernel; empty for a callable."""
        ...

    def left(self, x: Tensor) -> Points:
        """x, (n, d), prepared as the rows of blocks; O(nd)."""
        ...

    def right(self, x: Tensor) -> Points:
        """x, (n, d), prepared as the columns of blocks; O(nd)."""
        ...

    def block(self, z: Points, x: Points, out: Tensor | None = None) -> Tensor:
        """K(Z, X), (len(z), len(x)), for z from `left` and x from `right`, written into `out` where given."""
        ...

    def diagonal(self, x: Tensor) -> Tensor:
        """K(x_i, x_i) of each row of x, (n, d); returns (n,)."""
        ...


def _laplacian(scaled: Tensor, shape: float, out: Tensor) -> None:
    # On CPUs sqrt and exp take twice as long as rsqrt, a division and exp2. At zero, -1 / inf is -0.
    torch.exp2(torch.div(scaled.new_full((), -1), scaled.rsqrt_(), out=scaled), out=out)


def _gaussian(scaled: Tensor, shape: float, out: Tensor) -> None:
    torch.exp2(scaled.neg_(), out=out)


def _dispersal(scaled: Tensor, shape: float, out: Tensor) -> None:
    torch.exp2(scaled.pow_(shape / 2).mul_(-LOG2_E), out=out)


def _rational_quadratic(scaled: Tensor, shape: float, out: Tensor) -> None:
    # log1p, not a power of 1 + t^2 / (2 shape): with a large shape, near the Gaussian, that sum loses its digits.
    torch.exp2(scaled.mul_(0.5 / shape).log1p_().mul_(-shape * LOG2_E), out=out)


def _matern32(scaled: Tensor, shape: float, out: Tensor) -> None:
    for columns in column_strips(len(scaled), scaled.shape[1], scaled.device):
        distance = scaled[:, columns].sqrt_()
        decay = distance.neg().exp_()
        torch.mul(distance.add_(1), decay, out=out[:, columns])


def _matern52(scaled: Tensor, shape: float, out: Tensor) -> None:
    for columns in column_strips(len(scaled), scaled.shape[1], scaled.device):
        part = scaled[:, columns]
        distance = part.sqrt()
        decay = distance.neg().exp_()
        torch.mul(part.div_(3).add_(distance).add_(1), decay, out=out[:, columns])


class _Profile(NamedTuple):
    """phi(t), t = |x - z| / bandwidth, computed from factor t^2; the prepared points carry the factor.

    apply(scaled, shape, out): writes phi into `out`, which may be `scaled`, and overwrites `scaled`, the matrix of
    factor t^2. Only the Matern kernels need temporaries, a strip at a time.
    """

    factor: float
    apply: Callable[[Tensor, float, Tensor], None]


_PROFILES = {
    "laplacian": _Profile(LOG2_E**2, _laplacian),
    "gaussian": _Profile(LOG2_E / 2, _gaussian),
    "matern32": _Profile(3, _matern32),
    "matern52": _Profile(5, _matern52),
    "dispersal": _Profile(1, _dispersal),
    "rational_quadratic": _Profile(1, _rational_quadratic),
}

# w(t) = -phi'(t) / t of t^2 > 0 and the shape.
_SLOPES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "laplacian": lambda squared, shape: (-squared.sqrt()).exp() / squared.sqrt(),
    "gaussian": lambda squared, shape: (-squared / 2).exp(),
    "matern32": lambda squared, shape: 3 * (-(3 * squared).sqrt()).exp(),
    "matern52": lambda squared, shape: 5 / 3 * (1 + (5 * squared).sqrt()) * (-(5 * squared).sqrt()).exp(),
    "dispersal": lambda squared, shape: (
        shape * squared ** (shape / 2 - 1) * (-(squared ** (shape / 2))).exp()
    ),
    "rational_quadratic": lambda squared, shape: (1 + squared / (2 * shape)) ** (-shape - 1),
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

    bandwidth: in the unit of a distance between inputs; EigenPro3's bandwidth of `dispersal` is this bandwidth^shape.
    centre: (d,), subtracted from every input. In exact arithmetic this changes nothing; it keeps |x|^2 small against
    |x - z|^2, which float32 needs. An error e of t^2, some 1e-7 (|x|^2 + |z|^2) / bandwidth^2 in float32, becomes an
    error e^(a / 2) of phi(t) = 1 - t^a + ...: none to speak of where phi is smooth, but 1e-4 where a is 1.
    precision: the inputs are first rounded to it, for tensor cores (`gpu.py`).
    Memory beside the block: none, or another tile where the columns are packed (`points.py`); one strip of columns for
    `matern32` and two for `matern52` (`tiles.py`).
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
        """The bandwidth, and the shape where the kernel has one."""
        return {name: getattr(self, name) for name in KERNEL_DEFAULTS[self.name]}

    def left(self, x: Tensor) -> Points:
        """[-2z, |z|^2, 1], in the unit in which the profile takes distances."""
        return self._prepared(x, is_left=True)

    def right(self, x: Tensor) -> Points:
        """[x, 1, |x|^2], in the unit in which the profile takes distances."""
        return self._prepared(x, is_left=False)

    def _prepared(self, x: Tensor, is_left: bool) -> Points:
        unit = self.bandwidth / math.sqrt(_PROFILES[self.name].factor)
        if (self.precision != "float32" or x.device.type == "cuda") and x.dtype == torch.float32:
            scaled = rounded((x - self.centre.to(x)) / unit, self.precision)
            prepared = factors(scaled, self.precision, is_left, 1 - _rounding(scaled))
            return Points(
                prepared, packed=in_half(prepared, self.precision, is_left), precision=self.precision
            )
        # In one array from the start: fresh memory costs more than the arithmetic.
        prepared = x.new_empty(len(x), x.shape[1] + 2)
        scaled = torch.sub(x, self.centre.to(x), out=prepared[:, :-2]).div_(unit)
        norms = _norms(scaled)
        norm_at, one_at = (-2, -1) if is_left else (-1, -2)
        prepared[:, norm_at], prepared[:, one_at] = norms, 1
        if is_left:
            scaled.mul_(-2)
        is_factor = norms.device.type == "cpu" and bool((norms < torch.finfo(norms.dtype).max / 8).all())
        return Points(prepared, is_factor)

    def block(self, z: Points, x: Points, out: Tensor | None = None) -> Tensor:
        """K(Z, X). Squared distances that are zero within rounding become zero, so that K(x, x) = 1 to 1e-6."""
        if gemm_serves(self.name, z.device, z.precision):
            whole = z.prepared.new_empty(len(z), len(x)) if out is None else out
            if gemm(*sides(z, x), self.name, self.shape, None, whole) is not None:
                return whole
        by_triton = serves(self.name, z.device, z.prepared.dtype)
        squared = products(z, x, out, not_negative=not by_triton)
        out = squared if out is None else out
        if by_triton:
            apply_profile(squared, self.name, self.shape, out)
        else:
            _PROFILES[self.name].apply(squared, self.shape, out)
        return out

    def fuses(self, device: torch.device, n_outputs: int) -> bool:
        """Whether products of so many outputs form no block on this device."""
        return fuses(self.name, device, self.centre.numel(), n_outputs)

    def slopes(self, z: Points, x: Points) -> Tensor:
        """w(t) = -phi'(t) / t, (len(z), len(x)): the gradient of K(x, z) at x is w(t) (z - x) / bandwidth^2.

        0 where t is 0 within rounding, where not every kernel has a gradient. For points in float32 or float64.
        """
        squared = products(z, x, not_negative=True) / _PROFILES[self.name].factor
        return _SLOPES[self.name](squared, self.shape).masked_fill_(squared == 0, 0.0)

    def fused(
        self, weights: Tensor, z: Points, x: Points, over_left: bool, block: Tensor | None = None
    ) -> Tensor | None:
        """The product without forming the block, or while forming it, by Triton; None where Triton does not serve.

        weights @ K(Z, X) for weights of (k, len(z)) with `over_left`, else weights @ K(X, Z) for (k, len(x)).
        block: where K(Z, X) is written, with `over_left`; nothing is written where the result is None.
        """
        left, right = (z.prepared, -0.5), (x.prepared, 1.0)
        (a, a_unit), (b, b_unit) = (left, right) if over_left else (right, left)
        n_features = self.centre.numel()
        if (
            block is None
            and (found := fused_product(weights, a, b, (a_unit, b_unit), self.name, self.shape, n_features))
            is not None
        ):
            return found
        if not gemm_serves(self.name, z.device, z.precision):
            return None
        rows, columns = sides(z, x) if over_left else sides(z, x)[::-1]
        return gemm(rows, columns, self.name, self.shape, weights, block)

    def resolution(self, x: Tensor) -> Tensor:
        """The distance, in bandwidths, below which other points near x, (n, d), are taken for x itself, (n,).

        sqrt(2 r) |x - centre| / bandwidth, r the rounding of `_norms`: about |x - centre| / bandwidth / 1000.
        """
        lengths: Tensor = (x - self.centre.to(x)).norm(dim=1) / self.bandwidth
        return lengths * math.sqrt(2 * _rounding(x))

    def diagonal(self, x: Tensor) -> Tensor:
        """Ones, (n,): phi(0) is 1."""
        return torch.ones_like(x[:, 0])


def _norms(scaled: Tensor) -> Tensor:
    """|x|^2, (n,), of the rows of x, (n, d), made smaller by what rounding may add to a squared distance.

    A product of d terms is off by at most about (4 + sqrt(d) / 4) eps (|z|^2 + |x|^2) (measured, d up to 5000). Where
    the true distance is zero, the square root would enlarge that error: 1e-7 becomes 3e-4. With the norms this much
    smaller such squared distances come out negative, and `block` sets them to zero.
    """
    squared: Tensor = torch.linalg.vecdot(scaled, scaled)
    return squared.mul_(1 - _rounding(scaled))


def _rounding(x: Tensor) -> float:
    """How much smaller `_norms` makes the squared norms of x, (n, d), relative to what they are."""
    return float((4 + math.sqrt(x.shape[1]) / 4) * torch.finfo(x.dtype).eps)


@dataclass(frozen=True, slots=True)
class CallableKernel:
    """Any symmetric positive semidefinite kernel that the user gives as a function on torch tensors.

    function: maps z, (a, d), and x, (b, d), to K(Z, X), (a, b). It must be deterministic, or a resumed fit is not
    identical. not_finite: whether any value so far was not finite, 0-d, on a GPU, whose host would wait if it looked at
    each block; None to look at each block.
    """

    function: KernelFunction
    name: str = CALLABLE
    not_finite: Tensor | None = field(default=None, compare=False, repr=False)

    @classmethod
    def checked(cls, function: KernelFunction, sample: Tensor) -> CallableKernel:
        """The kernel, after a trial on up to 64 rows of sample, (n, d); the trial takes O(64^3) time.

        Raises ConfigError unless the function can be called and is symmetric and positive semidefinite on these rows
        to 1%: rounding stays far below that, and a function that is no kernel is far above it on random rows.
        """
        if not callable(function):
            raise ConfigError(
                f"kernel is {function!r:.80}, which cannot be called; give a function k(z, x), or name a kernel "
                "in the settings"
            )
        kernel, points = cls(function), Points(sample[:_CHECKED_ROWS])
        # Two calls, so that a kernel with other values each time is found too.
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

    def without_waits(self, device: torch.device) -> CallableKernel:
        """On a GPU the kernel that leaves it to `require_finite` to find values that are not finite."""
        if device.type != "cuda":
            return self
        return replace(self, not_finite=torch.zeros((), dtype=torch.bool, device=device))

    def require_finite(self) -> None:
        """Raises ConfigError where a value of the blocks so far was not finite; waits for the GPU."""
        if self.not_finite is not None and bool(self.not_finite):
            raise ConfigError(f"kernel {self.name!r} returned a value that is not finite; check its domain")

    @property
    def parameters(self) -> dict[str, Any]:
        """Empty: a callable has no parameters that the package knows of."""
        return {}

    def left(self, x: Tensor) -> Points:
        """x itself: the function takes points as they are."""
        return Points(x)

    def right(self, x: Tensor) -> Points:
        """x itself: the function takes points as they are."""
        return Points(x)

    def block(self, z: Points, x: Points, out: Tensor | None = None) -> Tensor:
        """`function(z, x)`; raises ConfigError for a wrong type or shape, or a value that is not finite."""
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
        is_bad = torch.isfinite(values).all().logical_not()
        if self.not_finite is None:
            replace(self, not_finite=is_bad).require_finite()
        else:
            self.not_finite.logical_or_(is_bad)
        return values.to(z.prepared.dtype) if out is None else out.copy_(values)

    def diagonal(self, x: Tensor) -> Tensor:
        """K(x_i, x_i), (n,), from the diagonals of blocks of 64 rows: 64 n evaluations, O(64^2) memory."""
        return torch.cat([self.block(Points(rows), Points(rows)).diagonal() for rows in x.split(64)])
