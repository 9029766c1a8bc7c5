"""Kernel blocks on GPUs: products on tensor cores, and Triton kernels that save passes over memory.

Reduced precision (`tf32`, `bfloat16`). Tensor cores multiply factors with 10 (TF32) or 7 (bfloat16) bits after the
leading one, and add the products in float32. Taken so, |z|^2 - 2 z.x + |x|^2 would lose 5e-4 (TF32) or 4e-3 (bfloat16)
of the norms, and K(x, x) would not be 1. But the product of two numbers with so few bits is exact in float32.
Therefore the inputs are rounded first, the norms are those of the rounded inputs, and each norm is cut into a sum of
three short numbers that keeps the bits of float32. With |z|^2 = h1 + h2 + h3 and |x|^2 = g1 + g2 + g3,

    |z - x|^2 = [-2z, h1, h2, h3, 1, 1, 1] . [x, 1, 1, 1, g1, g2, g3]

has only factors that tensor cores take without a further rounding. The result is the float32 kernel of inputs that are
off by at most 2^-11 (TF32) or 2^-8 (bfloat16) of themselves, the same on any device, with K(x, x) = 1.

Three products (`bf16x3`). A number is the sum of two of bfloat16, x = x_h + x_l, and is off by at most 2^-16 of itself.
A product is z_h x_h + z_h x_l + z_l x_h, without z_l x_l. If the norms are |x|^2 - |x_l|^2, the squared distance is
|z - x|^2 - |z_l - x_l|^2. This is zero for z = x, and otherwise off by some 5e-6 of |x|^2, about twice what float32
loses. The parts of a number lie side by side, so that one matrix product of three times the width does all.

Products of kernel blocks with weights and residuals stay in float32: weights are large and of both signs where the
kernel is smooth, and in TF32, with 11 bits of them, a fit with the Gaussian kernel diverges (emulated). With up to some
24 outputs they take no longer than reading the block does. With more than 256 they are three products of bfloat16:
16 bits are enough (emulated).

Many features. A GPU adds the products one after another, and tensor cores cut off what a sum cannot hold: 3e-3 of
K(x, x) = 1 would be lost at 784 features (Laplacian), where the sum comes to -2 z.x before the norms are added. So each
46 features have their own norms behind them, [.., -2z_k, h_k, 1, ..] . [.., x_k, 1, g_k, ..], and no partial sum is far
above the squared distance of the features so far. There h_k is one short number. What it lacks is added to the norm of
the last features, which has three. `tests/test_precision.py` adds as tensor cores do.

Triton. `triton_*.py` serve float32 tensors of radial kernels and of kernels on columns on a GPU. Everywhere else the
functions here say that they did nothing, and the caller computes with torch. Triton is imported at the first use only,
and tried once: where it cannot compile, torch serves, and a warning says so. So is each program of `triton_gemm.py`,
which needs a GPU with the registers and the shared memory of an H100.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ep3stream.config import Precision

_LOGGER = logging.getLogger(__name__)

_DROPPED_BITS = {"tf32": 13, "bfloat16": 16}
_NORM_PARTS = {"float32": 1, "tf32": 3, "bfloat16": 3, "bf16x3": 2}
_GROUP = 46  # With two numbers of norms, 48: a multiple of 16.

# Tensor cores want rows that begin at multiples of 16 bytes.
_WIDTH = 8

# The place of a kernel here is its number in Triton's programs.
RADIAL_KINDS = ("laplacian", "gaussian", "matern32", "matern52", "dispersal", "rational_quadratic")
KINDS = (*RADIAL_KINDS, "product", "anova")

# A product that forms no block computes every entry twice and saves 12 bytes of traffic. With so many features or
# columns, some 80 instructions an entry, that takes as long on an H100; beyond, a block is formed. With more outputs,
# the sums do not fit the registers of one program.
MAX_FEATURES = dict.fromkeys(KINDS, 32) | {"anova": 8}
MAX_OUTPUTS = 128

# Where one program forms a block of many features and multiplies it with weights (`triton_gemm.py`), because that takes
# less time by reckoning (`tools/gpu_time.py`). In float32 the block's product is nine tenths of a step, and torch's is
# the best. Other kernels have too many instructions for so large a tile, and more sums do not fit its registers.
GEMM_KINDS: tuple[str, ...] = ("laplacian", "gaussian")
GEMM_PRECISIONS: tuple[Precision, ...] = ("bf16x3", "tf32", "bfloat16")
GEMM_OUTPUTS = 32

# Devices that Triton runs on; tests add the CPU, for Triton's interpreter.
DEVICES = {"cuda"}


class ColumnConstants(NamedTuple):
    """What Triton's programs know of a kernel on columns; values: (2, k), as for `triton_columns.column_block`."""

    name: str
    power: float
    values: Tensor
    n_numbers: int


def rounded(x: Tensor, precision: Precision) -> Tensor:
    """x, float32, rounded to the nearest numbers that `precision` holds; halves away from zero."""
    if precision == "float32":
        return x
    if precision == "bf16x3":
        high = rounded(x, "bfloat16")
        return high + rounded(x - high, "bfloat16")
    dropped = _DROPPED_BITS[precision]
    return (x.view(torch.int32) + (1 << (dropped - 1)) & -(1 << dropped)).view(torch.float32)


def factor_width(n_features: int, precision: Precision) -> int:
    """The number of columns of the factors of `factors`."""
    n_groups = (n_features - 1) // _GROUP
    return -(-(n_features + 2 * (n_groups + _NORM_PARTS[precision])) // _WIDTH) * _WIDTH


def factors(scaled: Tensor, precision: Precision, is_left: bool, norm_share: float) -> Tensor:
    """The left or right factor of the product above, with zero columns up to a multiple of 8.

    scaled: (n, d), already rounded; up to 46 features are the first d columns. norm_share: what is taken of the squared
    norms, 1 or a little less.
    """
    n, d = scaled.shape
    n_parts, n_before = _NORM_PARTS[precision], (d - 1) // _GROUP
    first = n_before * (_GROUP + 2)
    last = scaled[:, n_before * _GROUP :]
    norm_at = first + last.shape[1]
    prepared = scaled.new_zeros(n, factor_width(d, precision))
    unit = -2 if is_left else 1
    torch.mul(last, unit, out=prepared[:, first:norm_at])
    norms = _squared_norms(last, precision) * norm_share
    if n_before:
        each = scaled[:, : n_before * _GROUP].unflatten(1, (n_before, _GROUP))
        groups = prepared[:, :first].unflatten(1, (n_before, _GROUP + 2))
        torch.mul(each, unit, out=groups[:, :, :_GROUP])
        own = _squared_norms(each, precision) * norm_share
        shorter = rounded(own, precision)
        groups[:, :, _GROUP + (not is_left)], groups[:, :, _GROUP + is_left] = shorter, 1
        norms += (own - shorter).sum(1)
    one_at = norm_at + n_parts if is_left else norm_at
    norm_at += 0 if is_left else n_parts
    prepared[:, one_at : one_at + n_parts] = 1
    for column in range(norm_at, norm_at + n_parts):
        prepared[:, column] = rounded(norms, precision)
        if column + 1 < norm_at + n_parts:
            norms = norms - prepared[:, column]
    return prepared


def _squared_norms(x: Tensor, precision: Precision) -> Tensor:
    """What the product of x, (..., d), with itself comes to in this precision, (...)."""
    squared: Tensor = torch.linalg.vecdot(x, x)
    if precision == "bf16x3":
        low = x - rounded(x, "bfloat16")
        squared -= torch.linalg.vecdot(low, low)
    return squared


def tripled(prepared: Tensor, is_left: bool) -> Tensor:
    """Numbers in `bf16x3`, (n, k), as three of bfloat16 each, (n, 3 k), for the left or the right side of a product."""
    high = rounded(prepared, "bfloat16")
    low = prepared - high
    return torch.stack([high, high, low] if is_left else [high, low, high], 2).flatten(1)


def usual_device() -> torch.device:
    """The current GPU where there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def float32_products(in_tf32: bool = False) -> Iterator[None]:
    """Within this context a GPU's float32 products are in float32, or in TF32, whatever the program has set.

    What the program has set is there again afterwards. It holds for the process: products that other threads of the
    program start meanwhile are computed so too.
    """
    matmul: Any = torch.backends.cuda.matmul
    # Before torch 2.9 there is only the older name, which later ones refuse to read beside the newer one.
    is_older = not hasattr(matmul, "fp32_precision")
    name = "allow_tf32" if is_older else "fp32_precision"
    wanted = in_tf32 if is_older else "tf32" if in_tf32 else "ieee"
    before = getattr(matmul, name)
    setattr(matmul, name, wanted)
    try:
        yield
    finally:
        setattr(matmul, name, before)


@contextmanager
def tensor_cores(precision: Precision, device: torch.device) -> Iterator[None]:
    """Within this context float32 products on a GPU are computed in TF32, if `precision` is another than float32."""
    if precision == "float32" or device.type != "cuda":
        yield
        return
    with float32_products(in_tf32=True):
        yield


def multiplies_half(device: torch.device) -> bool:
    """Whether torch multiplies bfloat16 into float32 there."""
    return device.type == "cuda" and "dtype_out" in torch.ops.aten.mm.overloads()


def split_product(few: Tensor, block: Tensor) -> Tensor:
    """few @ block, (k, m), of (k, n) and (n, m) in float32, by three products of bfloat16: 16 bits of each factor."""
    k, high, block_high = len(few), few.bfloat16(), block.bfloat16()
    both = torch.cat([high, (few - high).bfloat16()])
    found = torch.mm(both, block_high, out_dtype=torch.float32)
    rest = torch.mm(high, (block - block_high).bfloat16(), out_dtype=torch.float32)
    return found[:k].add_(found[k:]).add_(rest)


def in_half(prepared: Tensor, precision: Precision, is_left: bool) -> Tensor | None:
    """A copy in bfloat16, which holds these numbers exactly, for products on a GPU; None where these are in TF32.

    They are in another `precision`, and with a torch older than 2.8, which multiplies bfloat16 into float32 nowhere:
    TF32 holds the same numbers exactly too, at half the speed. In `bf16x3` the copy has three times the width.
    """
    if not multiplies_half(prepared.device) or precision not in ("bfloat16", "bf16x3"):
        return None
    return (tripled(prepared, is_left) if precision == "bf16x3" else prepared).bfloat16()


@functools.cache
def triton_runs(device_type: str) -> bool:
    """Whether Triton is here and can compile for such devices, tried once; a failure is told as a warning.

    torch's CUDA builds bring Triton. Its first program needs a C compiler, which a machine may lack.
    """
    try:
        from ep3stream.solver.triton_radial import radial_profile

        tried = torch.zeros(1, 1, device=device_type)
        radial_profile(tried, KINDS.index("gaussian"), 1.0, tried)
        return bool(tried.item() == 1)
    except Exception as error:  # A compiler and a driver may raise whatever they like.
        _LOGGER.warning("kernels take several times as long, because Triton does not run here: %.300s", error)
        return False


def serves(kind: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton evaluates such a kernel for tensors of that dtype on that device."""
    return device.type in DEVICES and dtype == torch.float32 and kind in KINDS and triton_runs(device.type)


@functools.cache
def gemm_runs(kind: str, dtype: torch.dtype, is_kept: bool, n_padded: int, device: torch.device) -> bool:
    """Whether this program of `triton_gemm.py` compiles and runs on this device, tried once; a failure is told.

    dtype: of the factors; is_kept: whether a block is written; n_padded: outputs of the product, 0 for none.
    """
    try:
        from ep3stream.solver.triton_gemm import radial_gemm

        zeros = torch.zeros(16, 16, dtype=dtype, device=device)
        block = torch.zeros(16, 16, device=device) if is_kept else None
        weights = torch.ones(n_padded, 16, device=device) if n_padded else None
        found = radial_gemm(zeros, zeros, KINDS.index(kind), 1.0, weights, block)
        is_right = block is None or bool((block == 1).all())
        return is_right and (found is None or bool((found == 16).all()))
    except Exception as error:  # A compiler and a driver may raise whatever they like.
        _LOGGER.warning(
            "blocks take several passes over memory, for want of one Triton program: %.300s", error
        )
        return False


def gemm_serves(kind: str, device: torch.device, precision: Precision) -> bool:
    """Whether one program may form a block of so precise points and multiply it with weights."""
    return kind in GEMM_KINDS and precision in GEMM_PRECISIONS and serves(kind, device, torch.float32)


def gemm(
    left: Tensor, right: Tensor, kind: str, shape: float, weights: Tensor | None, block: Tensor | None
) -> Tensor | None:
    """Writes phi(left right'), (n, m), into `block`, and returns weights @ phi, (k, m), of weights of (k, n).

    left, right: (n, w) and (m, w), factors of squared distances for tensor cores, where `gemm_serves`. Without weights
    it returns the block. None, and nothing written, where the program does not serve so many outputs, or does not run.
    """
    if weights is not None and (len(weights) > GEMM_OUTPUTS or weights.dtype != torch.float32):
        return None
    from ep3stream.solver.triton_gemm import padded, radial_gemm

    n_padded = 0 if weights is None else padded(len(weights))
    if not gemm_runs(kind, left.dtype, block is not None, n_padded, left.device):
        return None
    weights = None if weights is None else weights.contiguous()
    found = radial_gemm(left.contiguous(), right.contiguous(), KINDS.index(kind), shape, weights, block)
    return block if weights is None else found


def fuses(kind: str, device: torch.device, n_features: int, n_outputs: int) -> bool:
    """Whether products with this kernel form no block. n_features: for kernels on columns the columns in use."""
    is_small = n_features <= MAX_FEATURES.get(kind, 0) and n_outputs <= MAX_OUTPUTS
    return is_small and serves(kind, device, torch.float32)


def fused_product(
    weights: Tensor,
    a: Tensor,
    b: Tensor,
    units: tuple[float, float],
    kind: str,
    shape: float,
    n_features: int,
) -> Tensor | None:
    """weights @ K(A, B), (k, n_b), of a radial kernel; None where Triton does not serve.

    a, b: (n_a, n_features or more) and (n_b, n_features or more); their first columns, times the number in `units`, are
    the points in the unit of phi. shape: as for `triton_products.times`.
    """
    if not (fuses(kind, a.device, n_features, len(weights)) and weights.dtype == a.dtype == torch.float32):
        return None
    from ep3stream.solver.triton_products import times

    left, right = (
        torch.mul(points[:, :n_features].T, unit, out=points.new_empty(n_features, len(points)))
        for points, unit in zip((a, b), units, strict=True)
    )
    return times(weights.contiguous(), left, right, KINDS.index(kind), shape)


def fused_columns(weights: Tensor, a: Tensor, b: Tensor, of: ColumnConstants) -> Tensor | None:
    """weights @ K(A, B), (k, n_b), of a kernel on columns, for prepared points; None where Triton does not serve."""
    if not (fuses(of.name, a.device, a.shape[1], len(weights)) and weights.dtype == a.dtype == torch.float32):
        return None
    from ep3stream.solver.triton_products import times

    points = _by_column(a), _by_column(b)
    return times(weights.contiguous(), *points, KINDS.index(of.name), of.power, of.values, of.n_numbers)


def filled_columns(a: Tensor, b: Tensor, of: ColumnConstants, out: Tensor) -> bool:
    """Writes the block K(A, B) into `out`; returns False and writes nothing where Triton does not serve."""
    if not serves(of.name, a.device, a.dtype):
        return False
    from ep3stream.solver.triton_columns import column_block

    column_block(_by_column(a), _by_column(b), of.values, of.n_numbers, of.name == "anova", of.power, out)
    return True


def summed_columns(a: Tensor, b: Tensor, of: ColumnConstants, weighted: Tensor) -> Tensor | None:
    """The sums of `triton_columns.column_sums`, (2, k), float64; None where Triton does not serve."""
    if not serves(of.name, a.device, a.dtype):
        return None
    from ep3stream.solver.triton_columns import column_sums

    points = _by_column(a), _by_column(b)
    return column_sums(*points, of.values, of.n_numbers, of.name == "anova", of.power, weighted)


def _by_column(points: Tensor) -> Tensor:
    return points.T.contiguous()


def apply_profile(squared: Tensor, kind: str, shape: float, out: Tensor) -> None:
    """Writes phi of squared distances into `out`, of negative ones phi(0); for what `serves`."""
    from ep3stream.solver.triton_radial import radial_profile

    radial_profile(squared, KINDS.index(kind), shape, out)
