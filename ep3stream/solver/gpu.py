"""Kernel blocks by tensor cores: distances that are exact for inputs rounded first, products in TF32.

TF32 keeps 10 bits of a factor's mantissa and bfloat16 7, and both add up in float32. A squared distance taken as
|z|^2 - 2 z.x + |x|^2 would lose what the norms lose, 5e-4 or 4e-3 of them, and K(x, x) with it. But the product of two
numbers of so few bits is exact in float32. So inputs are rounded first, the norms are those of the rounded inputs, each
cut into three such numbers with the bits of float32 between them, and every factor of the product

    |z - x|^2 = [-2z, h1, h2, h3, 1, 1, 1] . [x, 1, 1, 1, g1, g2, g3]

is one that tensor cores take as it is. What comes out is float32's kernel of inputs off by at most 2^-11 or 2^-8 of
themselves, on any device, and K(x, x) = 1.

What Triton does of kernel blocks, where there are a GPU, Triton and a kernel it knows; else the callers' torch does.

A machine without any of them never imports Triton.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ep3stream.config import Precision

_PARTS = 3

_DROPPED_BITS = {"tf32": 13, "bfloat16": 16}

# Tensor cores want rows that begin at multiples of 16 bytes.
_WIDTH = 8


def rounded(x: Tensor, precision: Precision) -> Tensor:
    """float32 numbers that the precision holds, nearest to x, halves away from zero."""
    if precision == "float32":
        return x
    dropped = _DROPPED_BITS[precision]
    return (x.view(torch.int32) + (1 << (dropped - 1)) & -(1 << dropped)).view(torch.float32)


def factors(scaled: Tensor, norms: Tensor, precision: Precision, is_left: bool) -> Tensor:
    """One side of the product above, (n, d + 6) and zeros up to a multiple of 8; scaled: (n, d), rounded already."""
    n, d = scaled.shape
    prepared = scaled.new_zeros(n, -(-(d + 2 * _PARTS) // _WIDTH) * _WIDTH)
    prepared[:, :d] = scaled * (-2 if is_left else 1)
    first_norm, first_one = (d, d + _PARTS) if is_left else (d + _PARTS, d)
    prepared[:, first_one : first_one + _PARTS] = 1
    for part in range(_PARTS):
        prepared[:, first_norm + part] = rounded(norms, precision)
        norms = norms - prepared[:, first_norm + part]
    return prepared


@contextmanager
def tensor_cores(precision: Precision, device: torch.device) -> Iterator[None]:
    """While entered, float32 products on a GPU are in TF32, unless the precision is float32's own."""
    if precision == "float32" or device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def half_product(z: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    """Z X' of numbers that bfloat16 holds, summed in float32, on a GPU."""
    left, right = z.bfloat16(), x if x.dtype == torch.bfloat16 else x.bfloat16()
    found: Tensor = torch.mm(left, right.T, out_dtype=torch.float32)
    return found if out is None else out.copy_(found)


# Beyond, the product of distances on tensor cores gains more than the fused one saves; and more outputs than these do
# not fit a program's registers.
MAX_FEATURES = 32

MAX_OUTPUTS = 128

KINDS = ("laplacian", "gaussian", "matern32", "matern52", "dispersal", "rational_quadratic")

# Devices that Triton runs on; tests add the CPU, for its interpreter.
DEVICES = {"cuda"}


@functools.cache
def has_triton() -> bool:
    """Whether it is installed; torch's CUDA builds bring it."""
    return importlib.util.find_spec("triton") is not None


def _serves(kind: str, device: torch.device, dtype: torch.dtype) -> bool:
    return device.type in DEVICES and dtype == torch.float32 and kind in KINDS and has_triton()


def fuses(kind: str, device: torch.device, n_features: int, n_outputs: int) -> bool:
    """Whether products of so many outputs never form a block."""
    is_small = n_features <= MAX_FEATURES and n_outputs <= MAX_OUTPUTS
    return is_small and _serves(kind, device, torch.float32)


def fused_product(
    weights: Tensor,
    a: Tensor,
    b: Tensor,
    units: tuple[float, float],
    kind: str,
    shape: float,
    n_features: int,
    is_exact: bool,
) -> Tensor | None:
    """weights @ K(A, B), (k, n_b), as `triton_radial.times_radial`; None where that does not serve."""
    if not (fuses(kind, a.device, n_features, len(weights)) and weights.dtype == a.dtype == torch.float32):
        return None
    from ep3stream.solver.triton_radial import times_radial

    return times_radial(weights.contiguous(), a, b, units, kind, shape, n_features, is_exact)


def applied_profile(squared: Tensor, kind: str, shape: float, out: Tensor) -> bool:
    """phi of squared distances into `out`, in one pass; False where torch has to do it."""
    if not _serves(kind, squared.device, squared.dtype):
        return False
    from ep3stream.solver.triton_radial import radial_profile

    radial_profile(squared, kind, shape, out)
    return True
