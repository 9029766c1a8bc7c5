"""Inputs rounded for tensor cores: what they multiply exactly a CPU does too, so that the errors are measured here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

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
from ep3stream.solver.gpu import factors, rounded, tripled
from ep3stream.solver.kernels import _PROFILES, RADIAL_KERNELS, RadialKernel, _rounding
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


@given(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False))
def test_in_three_products_a_number_is_the_sum_of_two_of_bfloat16(value: float) -> None:
    found = rounded(torch.tensor([[value]]), "bf16x3")
    # The second one of a number below 1e-35 is subnormal and has fewer bits.
    assert abs(found.item() - value) <= 2.0**-16 * max(abs(value), 1e-35)
    assert torch.equal(rounded(found, "bf16x3"), found)
    (left,), (right,) = (tripled(found, is_left) for is_left in (True, False))
    for parts in (left, right):
        assert torch.equal(parts.bfloat16().float(), parts)
    assert left[0] + left[2] == right[0] + right[1] == found
    assert left.tolist() == [right[0], right[2], right[1]]


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
    factor = _PROFILES[name].factor ** 0.5
    inputs = (rounded((side - 0.1) / (d**0.5 / factor), precision).double() / factor for side in (z, x))
    exact = block(RadialKernel(name, 1.0, torch.zeros(d, dtype=torch.float64), 1.5), *inputs)
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


@pytest.mark.parametrize("name", RADIAL_KERNELS)
@pytest.mark.parametrize("d", [9, 64, 784])
def test_three_products_are_nearly_as_good_as_float32(name: str, d: int) -> None:
    """Against float64. Points that are near lose most: their squared distance is off by 5e-6 of the squared norms."""
    z, x = points(300, d, 1, torch.float32), points(200, d, 2, torch.float32)
    x[:10], x[10:60] = z[:10], z[10:60] + 0.05 * points(50, d, 3, torch.float32)
    plain = RadialKernel(name, d**0.5, torch.full((d,), 0.1), 1.5)
    truth, errors = block(plain, z.double(), x.double()), {}
    precisions: tuple[Precision, ...] = ("float32", "bf16x3", "tf32")
    for precision in precisions:
        found = block(replace(plain, precision=precision), z, x)
        assert (found.diagonal()[:10] - 1).abs().max() < 1e-6
        errors[precision] = (found - truth).abs()
    mean, largest = (
        {each: float(how(error)) for each, error in errors.items()} for how in (torch.mean, torch.max)
    )
    assert mean["bf16x3"] < min(2e-6, 10 * mean["float32"], 0.4 * mean["tf32"])
    assert largest["bf16x3"] < 12 * largest["float32"]


def tensor_cores_product(a: Tensor, b: Tensor, n_each: int) -> Tensor:
    """a @ b' as tensor cores add: the sum so far and `n_each` products at a time, none with bits below the largest's.

    Of each summand 25 bits remain, counted from the first of the largest, and 24 of each sum; the rest is cut off, as
    on an A100 (Fasi, Higham, Mikaitis, Pranesh 2021, "Numerical behavior of NVIDIA tensor cores").
    """

    def cut(values: Tensor, largest: Tensor, bits: int) -> Tensor:
        unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest)[1] - bits)
        return (values / unit).trunc() * unit

    total = a.new_zeros(len(a), len(b), dtype=torch.float64)
    for first in range(0, a.shape[1], n_each):
        left, right = (side[:, first : first + n_each].double() for side in (a, b))
        terms = torch.cat([left[:, None] * right, total[:, :, None]], 2)
        total = cut(terms, terms.abs().amax(2, keepdim=True), 25).sum(2)
        total = cut(total, total, 24)
    return total.float()


def serial_product(a: Tensor, b: Tensor) -> Tensor:
    """The products of equal rows of a and b, added one after another in float32, as a GPU does without tensor cores."""
    total = a.new_zeros(len(a))
    for left, right in zip(a.T.double(), b.T.double(), strict=True):
        total = (total + left * right).float()
    return total


@pytest.mark.parametrize(
    ("precision", "n_each"), [("tf32", 4), ("tf32", 8), ("bfloat16", 16), ("bf16x3", 16)]
)
@pytest.mark.parametrize("d", [46, 62, 784, 1280])
def test_k_of_a_point_with_itself_is_one_as_tensor_cores_add(
    d: int, precision: Precision, n_each: int
) -> None:
    x = points(24, d, 1, torch.float32)
    kernel = RadialKernel("laplacian", d**0.5, torch.full((d,), 0.1), 1.0, precision)
    left, right = kernel.left(x).prepared, kernel.right(x).prepared
    if precision == "bf16x3":
        left, right = tripled(left, is_left=True), tripled(right, is_left=False)
    squared = tensor_cores_product(left, right, n_each).clamp_min(0)
    found = torch.exp2(-squared.sqrt())
    assert (found.diagonal() - 1).abs().max() <= 1e-6
    # Of different points it is that of the same inputs without a further error.
    exact = torch.exp2(-(left.double() @ right.double().T).clamp_min(0).sqrt())
    assert (found - exact).fill_diagonal_(0).abs().max() < 3e-6


@pytest.mark.parametrize("d", [784, 1280])
def test_in_float32_too_where_a_gpu_adds_one_product_after_another(d: int) -> None:
    x = points(3000, d, 1, torch.float32) / d**0.5
    share = 1 - _rounding(x)
    left, right = (factors(x, "float32", is_left, share) for is_left in (True, False))
    other = factors(x.roll(1, 0), "float32", False, share)
    assert serial_product(left, right).max() <= 0
    found = serial_product(left, other)
    assert (found - (x - x.roll(1, 0)).square().sum(1)).abs().max() < 1e-5


def test_kernels_of_products_have_no_use_for_it() -> None:
    kernel = named_kernel("polynomial", KernelConfig("polynomial", 2.0).parameters(), None)
    with pytest.raises(
        ConfigError, match="precision is 'tf32', but the kernel 'polynomial' is evaluated in float32"
    ):
        with_precision(kernel, "tf32")


@pytest.mark.parametrize("kernel", ["laplacian", "gaussian"])
def test_a_fit_is_as_good(tmp_path: Path, kernel: str) -> None:
    """The Gaussian has weights that are large and of both signs, to which rounded products would do harm."""
    store, scores = make_store(tmp_path / "store.zarr", n_rows=4000), {}
    for precision, largest in (("float32", 0.0), ("bf16x3", 1e-4), ("tf32", 1e-3), ("bfloat16", 0.05)):
        solver = {"centers": 300, "epochs": 3, "precision": precision}
        config = plain_config(solver=solver, kernel={"name": kernel}, run={"checkpoint_minutes": 0.0})
        run = ep3stream.fit(store, tmp_path / precision, config)
        scores[precision] = ep3stream.evaluate(run, store)["r2"]
        assert abs(scores[precision] - scores["float32"]) <= largest, scores
    assert scores["float32"] > 0.94


def test_auto_is_float32_on_a_cpu_and_a_fit_that_says_so_goes_on(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", n_rows=700)
    for precision, epochs in (("auto", 1), ("float32", 2), ("auto", 2)):
        solver = {"centers": 80, "epochs": epochs, "precision": precision}
        config = plain_config(solver=solver, kernel={"name": "laplacian"})
        run = ep3stream.fit(store, tmp_path / "run", config, override=True)
    assert json.loads((run / "run.json").read_text())["plan"]["precision"] == "float32"
    with pytest.raises(ConfigError, match="precision"):
        ep3stream.fit(store, run, plain_config(solver=solver | {"precision": "tf32"}), override=True)
