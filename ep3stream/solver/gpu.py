"""Kernel blocks on GPUs: products on tensor cores, and Triton kernels that save passes over memory.

Reduced precision (`tf32`, `bfloat16`). Tensor cores multiply factors with 10 (TF32) or 7 (bfloat16) bits after the
leading one, and add the products in float32. Taken so, |z|^2 - 2 z.x + |x|^2 would lose 5e-4 (TF32) or 4e-3 (bfloat16)
of the norms, and K(x, x) would not be 1. But the product of two numbers with so few bits is exact in float32.
Therefore the inputs are rounded first, the norms are those of the rounded inputs, and each norm is cut into a sum of
three short numbers that keeps the bits of float32. With |z|^2 = h1 + h2 + h3 and |x|^2 = g1 + g2 + g3,

    |z - x|^2 = [-2z, h1, h2, h3, 1, 1, 1] . [x, 1, 1, 1, g1, g2, g3]

has only factors that tensor cores take without a further rounding. The result is the float32 kernel of inputs that are
off by at most 2^-11 (TF32) or 2^-8 (bfloat16) of themselves, the same on any device, with K(x, x) = 1.

Triton. `triton_radial.py` is used for float32 tensors of a radial kernel on a GPU. Everywhere else the functions here
say that they did nothing, and the caller computes with torch. Triton is imported at the first use only.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ep3stream.config import Precision

_DROPPED_BITS = {"tf32": 13, "bfloat16": 16}
_NORM_PARTS = 3

# Tensor cores want rows that begin at multiples of 16 bytes.
_WIDTH = 8

# With more features, distances from a product on tensor cores gain more than a fused product saves. With more outputs,
# the sums do not fit the registers of one program.
MAX_FEATURES = 32
MAX_OUTPUTS = 128

# The place of a kernel here is its number in `triton_radial`.
KINDS = ("laplacian", "gaussian", "matern32", "matern52", "dispersal", "rational_quadratic")

# Devices that Triton runs on; tests add the CPU, for Triton's interpreter.
DEVICES = {"cuda"}


def rounded(x: Tensor, precision: Precision) -> Tensor:
    """x, float32, rounded to the nearest numbers that `precision` holds; halves away from zero."""
    if precision == "float32":
        return x
    dropped = _DROPPED_BITS[precision]
    return (x.view(torch.int32) + (1 << (dropped - 1)) & -(1 << dropped)).view(torch.float32)


def factors(scaled: Tensor, norms: Tensor, precision: Precision, is_left: bool) -> Tensor:
    """The left or right factor of the product above, (n, d + 6), with zero columns up to a multiple of 8.

    scaled: (n, d), already rounded; norms: (n,), the squared norms |x|^2 of its rows.
    """
    n, d = scaled.shape
    prepared = scaled.new_zeros(n, -(-(d + 2 * _NORM_PARTS) // _WIDTH) * _WIDTH)
    prepared[:, :d] = scaled * (-2 if is_left else 1)
    first_norm, first_one = (d, d + _NORM_PARTS) if is_left else (d + _NORM_PARTS, d)
    prepared[:, first_one : first_one + _NORM_PARTS] = 1
    for part in range(_NORM_PARTS):
        prepared[:, first_norm + part] = rounded(norms, precision)
        norms = norms - prepared[:, first_norm + part]
    return prepared


@contextmanager
def tensor_cores(precision: Precision, device: torch.device) -> Iterator[None]:
    """Within this context float32 products on a GPU are computed in TF32, unless `precision` is float32."""
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
    """Z X' on a GPU for numbers that bfloat16 holds exactly, summed in float32; into `out` where given."""
    left, right = z.bfloat16(), x if x.dtype == torch.bfloat16 else x.bfloat16()
    found: Tensor = torch.mm(left, right.T, out_dtype=torch.float32)
    return found if out is None else out.copy_(found)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; torch's CUDA builds bring it."""
    return importlib.util.find_spec("triton") is not None


def _serves(kind: str, device: torch.device, dtype: torch.dtype) -> bool:
    return device.type in DEVICES and dtype == torch.float32 and kind in KINDS and has_triton()


def fuses(kind: str, device: torch.device, n_features: int, n_outputs: int) -> bool:
    """Whether `fused_product` serves this kernel: then a step with that many outputs never forms a block."""
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
    """weights @ K(A, B), (k, n_b), by `triton_radial.times_radial`; None where Triton does not serve."""
    if not (fuses(kind, a.device, n_features, len(weights)) and weights.dtype == a.dtype == torch.float32):
        return None
    from ep3stream.solver.triton_radial import times_radial

    return times_radial(weights.contiguous(), a, b, units, KINDS.index(kind), shape, n_features, is_exact)


def applied_profile(squared: Tensor, kind: str, shape: float, out: Tensor) -> bool:
    """Writes phi of squared distances into `out`; returns False and writes nothing where Triton does not serve."""
    if not _serves(kind, squared.device, squared.dtype):
        return False
    from ep3stream.solver.triton_radial import radial_profile

    radial_profile(squared, KINDS.index(kind), shape, out)
    return True
