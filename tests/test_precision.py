"""Inputs rounded for tensor cores: what they multiply exactly a CPU does too, so that the errors are measured here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_problem import points
from small_stores import make_store, plain_config
from torch import Tensor

import ep3stream
from ep3stream.config import KernelConfig, Precision
from ep3stream.errors import ConfigError
from ep3stream.solver.blocks import BatchBlock
from ep3stream.solver.gpu import rounded
from ep3stream.solver.kernels import RADIAL_KERNELS, RadialKernel
from ep3stream.solver.named_kernels import named_kernel, with_precision

BITS: dict[Precision, int] = {"tf32": 11, "bfloat16": 8}


@given(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), st.sampled_from(list(BITS)))
def test_rounding_keeps_so_many_bits_and_errs_by_half_of_the_last(value: float, precision: Precision) -> None:
    (found,) = rounded(torch.tensor([value]), precision)
    mantissa, _ = np.frexp(found.item())
    assert (mantissa * 2 ** BITS[precision]).is_integer()
    assert abs(found.item() - value) <= 2.0 ** -BITS[precision] * max(abs(value), 1e-37)
    assert rounded(found[None], precision).item() == found.item()


def test_bfloat16_is_torchs_own() -> None:
    x = points(1000, 3, 0, torch.float32)
    differs = rounded(x, "bfloat16") != x.bfloat16().float()
    assert differs.float().mean() < 1e-3  # Halves only, which torch rounds to even.


def block(kernel: RadialKernel, z: Tensor, x: Tensor) -> Tensor:
    return kernel.block(kernel.left(z), kernel.right(x))


@pytest.mark.parametrize("precision", BITS)
@pytest.mark.parametrize("name", RADIAL_KERNELS)
@pytest.mark.parametrize("d", [5, 784])
def test_a_block_is_that_of_the_rounded_inputs_and_k_of_a_point_with_itself_is_one(
    name: str, d: int, precision: Precision
) -> None:
    z, x = points(60, d, 1, torch.float32), points(70, d, 2, torch.float32)
    x[:10] = z[:10]
    kernel = RadialKernel(name, d**0.5, torch.full((d,), 0.1), 1.5, precision)
    left, right = kernel.left(z), kernel.right(x)
    for side in (left, right):
        assert torch.equal(side.prepared, rounded(side.prepared, precision)), "tensor cores would round it"
        assert side.prepared.shape[1] % 8 == 0
    found = kernel.block(left, right)
    assert (found.diagonal()[:10] - 1).abs().max() < 1e-6
    # In float64 on the same rounded inputs, which are in the unit of phi.
    unit = left.prepared[:, :d].double() / -2, right.prepared[:, :d].double()
    plain = RadialKernel(name, 1.0, torch.zeros(d, dtype=torch.float64), 1.5)
    factor = (plain.left(torch.eye(1, d).double()).prepared[0, 0] / -2).item()
    exact = block(plain, *(side / factor for side in unit))
    assert (found - exact).abs().max() < 2e-5


@pytest.mark.parametrize(("precision", "largest"), [("tf32", 2e-4), ("bfloat16", 2e-3)])
def test_the_error_against_unrounded_inputs_is_that_of_the_inputs(
    precision: Precision, largest: float
) -> None:
    d = 784
    z, x = points(300, d, 1, torch.float32), points(200, d, 2, torch.float32)
    exact = RadialKernel("laplacian", d**0.5, torch.zeros(d))
    found = block(with_precision(exact, precision), z, x)  # type: ignore[arg-type]
    error = (found - block(exact, z, x)).abs().max()
    assert largest / 40 < error < largest


def test_kernels_of_products_have_no_use_for_it() -> None:
    kernel = named_kernel("polynomial", KernelConfig("polynomial", 2.0).parameters(), None)
    with pytest.raises(
        ConfigError, match="precision is 'tf32', but the kernel 'polynomial' is evaluated in float32"
    ):
        with_precision(kernel, "tf32")


@pytest.mark.parametrize(("precision", "largest"), [("tf32", 3e-4), ("bfloat16", 3e-3)])
def test_a_fit_as_a_gpu_does_it_is_as_good(tmp_path, monkeypatch, precision, largest) -> None:
    """Products with the block in TF32 too, whose rounding of either factor is put in here."""
    store = make_store(tmp_path / "store.zarr", n_rows=4000)
    config = {"solver": {"centers": 300, "epochs": 3}, "run": {"checkpoint_minutes": 0.0}}
    plain = ep3stream.fit(store, tmp_path / "plain", plain_config(**config))
    for name in ("left_times", "times"):
        exact = getattr(BatchBlock, name)

        def in_tf32(self, matrix, exact=exact):
            if self._kept is not None:
                rounded_block = rounded(self.whole(), "tf32")
                self._kept.copy_(rounded_block)
            return exact(self, rounded(matrix.contiguous(), "tf32"))

        monkeypatch.setattr(BatchBlock, name, in_tf32)
    config["solver"] |= {"precision": precision}
    fast = ep3stream.fit(store, tmp_path / "fast", plain_config(**config))
    monkeypatch.undo()
    scores = [ep3stream.evaluate(run, store)["r2"] for run in (plain, fast)]
    assert scores[0] > 0.94
    assert abs(scores[1] - scores[0]) < largest, scores
