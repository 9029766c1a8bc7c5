"""What Triton does of kernel blocks, where there are a GPU, Triton and a kernel it knows; else the callers' torch does.

A machine without any of them never imports Triton.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

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
