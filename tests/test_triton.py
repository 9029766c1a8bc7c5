"""What Triton does of kernel blocks, by its interpreter, against torch in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is installed on no other system than Linux")

from kernel_problem import Problem, points, unit_targets
from torch import Tensor

from ep3stream.config import Precision
from ep3stream.solver import gpu
from ep3stream.solver.blocks import BatchBlock, fuses, kernel_times, times_kernel
from ep3stream.solver.columns import COLUMN_KERNELS, ColumnKernel
from ep3stream.solver.kernels import _PROFILES, RADIAL_KERNELS, RadialKernel
from ep3stream.solver.points import Points
from ep3stream.solver.step import Solver


def test_under_its_interpreter_triton_gives_what_torch_gives() -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-m",
        "triton",
        "-p",
        "no:cacheprovider",
        __file__,
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        timeout=250,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stdout.decode()
    assert done.stdout.count(b".") > 20, "they were not run"


@pytest.fixture
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICES", {"cpu"})


def kernel(name: str, d: int, dtype: torch.dtype = torch.float32) -> RadialKernel:
    shape = {"dispersal": 0.7, "rational_quadratic": 1e4}.get(name, 1.0)
    return RadialKernel(name, 1.5, torch.full((d,), 0.25, dtype=dtype), shape)


def exact_block(name: str, z: Tensor, x: Tensor) -> Tensor:
    own = kernel(name, z.shape[1], torch.float64)
    return own.block(own.left(z.double()), own.right(x.double()))


@pytest.mark.triton
@pytest.mark.parametrize("name", RADIAL_KERNELS)
@pytest.mark.parametrize(("p", "m", "d", "k"), [(80, 70, 5, 3), (1, 1, 1, 1), (65, 64, 2, 20)])
@pytest.mark.usefixtures("_on_cpu")
def test_fused_products_are_those_of_float64(name: str, p: int, m: int, d: int, k: int) -> None:
    z, x = points(p, d, 1, torch.float32), points(m, d, 2, torch.float32)
    x[0] = z[0]
    own, exact = kernel(name, d), exact_block(name, z, x)
    left, right = own.left(z), own.right(x)
    weights, residual = points(k, p, 3, torch.float32), points(m, k, 4, torch.float32)
    over_left, over_right = times_kernel(own, weights, left, right), kernel_times(own, left, right, residual)
    assert (over_left - weights.double() @ exact).abs().max() < 3e-6 * (weights.abs().double() @ exact).max()
    assert (over_right - exact @ residual.double()).abs().max() < 3e-6 * (
        exact @ residual.abs().double()
    ).max()


@pytest.mark.triton
@pytest.mark.usefixtures("_on_cpu")
def test_a_center_met_by_its_own_row_weighs_exactly_one() -> None:
    z = 100 + points(5, 8, 1, torch.float32)
    own = kernel("laplacian", 8)
    own = RadialKernel("laplacian", 1e-3, own.centre)
    left, right = own.left(z), own.right(z)
    assert torch.equal(times_kernel(own, torch.eye(5), left, right), torch.eye(5))


@pytest.mark.triton
@pytest.mark.parametrize("name", RADIAL_KERNELS)
def test_one_pass_over_a_block_gives_phi(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    z, x = points(33, 40, 1, torch.float32), points(70, 40, 2, torch.float32)
    x[0] = z[0]
    own = kernel(name, 40)
    by_torch = own.block(own.left(z), own.right(x))
    monkeypatch.setattr(gpu, "DEVICES", {"cpu"})
    memory = torch.zeros(50, 70)
    by_triton = own.block(own.left(z), own.right(x), out=memory[10:43])
    assert by_triton.data_ptr() == memory[10:43].data_ptr()
    assert (by_triton - by_torch).abs().max() < 1e-6
    assert not memory[:10].any()
    assert not memory[43:].any()


@pytest.mark.triton
@pytest.mark.parametrize(("d", "is_fused"), [(4, True), (32, True), (33, False)])
def test_a_step_without_a_block_is_the_step_with_one(
    d: int, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same bits each time."""
    case = Problem(kernel("laplacian", d), points(34, d, 0, torch.float32), points(60, d, 1, torch.float32))
    y = points(60, 2, 2, torch.float32)

    def stepped(solver: Solver) -> Tensor:
        state = solver.initial_state()
        for step in range(2):
            rows = slice(30 * step, 30 * step + 30)
            solver.step(state, case.x[rows], y[rows], 1e-3, score=True)
        return state.weights

    solver = case.solver(unit_targets(2, torch.float32))
    by_torch = stepped(solver)
    monkeypatch.setattr(gpu, "DEVICES", {"cpu"})
    assert fuses(solver.kernel, case.x.device, 4) == is_fused
    by_triton = stepped(solver)
    assert torch.equal(by_triton, stepped(solver))
    assert (by_triton - by_torch).norm() < 1e-5 * by_torch.norm()


@pytest.mark.triton
@pytest.mark.usefixtures("_on_cpu")
def test_what_it_does_not_know_is_left_to_torch() -> None:
    cpu = torch.device("cpu")
    assert gpu.fuses("laplacian", cpu, 32, 128)
    assert not gpu.fuses("laplacian", cpu, 32, 129)
    assert not gpu.fuses("laplacian", cpu, 33, 128)
    assert not gpu.fuses("polynomial", cpu, 3, 1)
    assert gpu.fuses("product", cpu, 32, 1)
    assert not gpu.fuses("anova", cpu, 32, 1)
    own = kernel("laplacian", 3)
    z, x = points(5, 3, 1), points(4, 3, 2)
    exact = own.block(own.left(z), own.right(x))
    assert torch.allclose(times_kernel(own, torch.eye(5).double(), own.left(z), own.right(x)), exact)


def gemm_problem(
    name: str, precision: Precision, n_left: int = 300, n_right: int = 150, d: int = 70
) -> tuple[RadialKernel, Points, Points, Tensor]:
    """A kernel, points for both sides, some of them the same, and the kernel's block: more than one tile either way.

    The block is torch's in float64 of the points as the precision rounds them.
    """
    z, x = points(n_left, d, 1, torch.float32), points(n_right, d, 2, torch.float32)
    x[:20] = z[:20]
    own = RadialKernel(name, d**0.5, torch.full((d,), 0.25), precision=precision)
    left, right = own.left(z), own.right(x)
    exact = left.prepared.double() @ right.prepared.double().T
    _PROFILES[name].apply(exact.clamp_min_(0), own.shape, exact)
    return own, left, right, exact


@pytest.mark.triton
@pytest.mark.parametrize("precision", gpu.GEMM_PRECISIONS)
@pytest.mark.parametrize("name", gpu.GEMM_KINDS)
def test_one_program_forms_a_block_of_many_features_and_multiplies_it(
    name: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, left, right, exact = gemm_problem(name, precision)
    monkeypatch.setattr(gpu, "DEVICES", {"cpu"})
    monkeypatch.setattr(gpu, "apply_profile", None)  # In the place of this program nothing else may run.
    # Two products in bf16x3 are left out; in float32 roots of distances near zero lose most.
    near = 5e-5 if precision == "bf16x3" else 5e-6
    assert (own.block(left, right).diagonal()[:20] - 1).abs().max() < 1e-6
    for k in (1, 20, gpu.GEMM_OUTPUTS):
        weights = points(k, 300, 3, torch.float32)
        memory = torch.full((310 * 150,), 7.0)
        block = BatchBlock(own, left, right, memory)
        found = block.left_times(weights)
        kept = block.whole()
        assert (kept - exact).abs().max() < near
        assert (memory[300 * 150 :] == 7).all()
        # The product has float32's digits of the block that was formed, and the same bits without a block.
        off = (found - weights.double() @ kept.double()).abs().max()
        assert off < 1e-6 * weights.abs().sum(1).max()
        assert torch.equal(times_kernel(own, weights, left, right), found)
        residual = points(150, k, 4, torch.float32)
        other = kernel_times(own, left, right, residual) - kept.double() @ residual.double()
        assert other.abs().max() < 1e-6 * residual.abs().sum(0).max()


@pytest.mark.triton
def test_where_that_program_does_not_run_it_is_said_once_and_torch_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ep3stream.solver import triton_gemm

    def fails(*_: object) -> None:
        raise RuntimeError("out of resource: shared memory")

    own, left, right, exact = gemm_problem("laplacian", "bf16x3", 30, 20)
    monkeypatch.setattr(gpu, "DEVICES", {"cpu"})
    monkeypatch.setattr(triton_gemm, "radial_gemm", fails)
    gpu.gemm_runs.cache_clear()
    try:
        for _ in range(2):
            block = BatchBlock(own, left, right, torch.zeros(30 * 20))
            assert (block.left_times(torch.eye(30)[:16]) - exact[:16]).abs().max() < 5e-5
            assert (block.whole() - exact).abs().max() < 5e-5
    finally:
        gpu.gemm_runs.cache_clear()
    told = [record for record in caplog.records if "out of resource" in record.getMessage()]
    assert len(told) == 2  # Of the program with a product, and of the one without.


@pytest.mark.triton
@pytest.mark.usefixtures("_on_cpu")
def test_that_program_takes_what_it_is_faster_at() -> None:
    cpu = torch.device("cpu")
    assert not gpu.gemm_serves("laplacian", cpu, "float32")
    assert not gpu.gemm_serves("matern32", cpu, "bf16x3")
    own, left, right, exact = gemm_problem("laplacian", "tf32")
    weights = points(gpu.GEMM_OUTPUTS + 1, 300, 3, torch.float32)
    assert own.fused(weights, left, right, over_left=True) is None
    assert (times_kernel(own, weights, left, right) - weights.double() @ exact).abs().max() < 1e-3


def column_problem(name: str, power: float, n_columns: int = 7) -> tuple[ColumnKernel, Tensor, Tensor]:
    """A kernel on numbers and categories in turn, one of them without a weight, and rows for both sides."""
    is_category = torch.arange(n_columns) % 3 == 1
    weights, shares = (0.1 + points(1, n_columns, seed, torch.float32)[0].abs() for seed in (1, 2))
    weights[2] = 0
    own = ColumnKernel(name, weights, is_category, shares, power)
    z, x = (points(n, n_columns, seed, torch.float32) for n, seed in ((35, 3), (70, 4)))
    z, x = (torch.where(is_category, each.abs().floor(), each) for each in (z, x))
    x[0] = z[0]
    return own, z, x


@pytest.mark.triton
@pytest.mark.parametrize("name", COLUMN_KERNELS)
@pytest.mark.parametrize("power", [1.0, 2.0, 0.7])
@pytest.mark.usefixtures("_on_cpu")
def test_blocks_products_and_slopes_on_columns_are_those_of_float64(name: str, power: float) -> None:
    own, z, x = column_problem(name, power)
    exact = own.block(own.left(z.double()), own.right(x.double()))
    left, right = own.left(z), own.right(x)
    memory = torch.zeros(50, 70)
    own.block(left, right, out=memory[10:45])
    assert (memory[10:45] - exact).abs().max() < 2e-6
    assert memory[10, 0] == 1
    assert not memory[:10].any()
    assert not memory[45:].any()
    for k in (3, 9):
        weights, residual = points(k, 35, 5, torch.float32), points(70, k, 6, torch.float32)
        over_left, over_right = (
            times_kernel(own, weights, left, right),
            kernel_times(own, left, right, residual),
        )
        assert (over_left - weights.double() @ exact).abs().max() < 1e-5 * weights.abs().sum(1).max()
        assert (over_right - exact @ residual.double()).abs().max() < 1e-5 * residual.abs().sum(0).max()
    weighted = exact * points(35, 70, 7)
    expected = own.slopes(z.double(), x.double(), weighted)
    for mine, theirs in zip(own.slopes(z, x, weighted.float()), expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.triton
@pytest.mark.parametrize("name", COLUMN_KERNELS)
@pytest.mark.usefixtures("_on_cpu")
def test_a_kernel_of_no_column_is_one(name: str) -> None:
    own = ColumnKernel.of(name, torch.zeros(3, 4))
    z, x = own.left(points(3, 4, 1, torch.float32)), own.right(points(5, 4, 2, torch.float32))
    assert torch.equal(own.block(z, x), torch.ones(3, 5))
    assert torch.equal(times_kernel(own, torch.ones(1, 3), z, x), torch.full((1, 5), 3.0))


@pytest.mark.triton
def test_a_machine_where_triton_does_not_compile_is_told_so_once_and_computes_with_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ep3stream.solver import triton_radial

    def fails(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    own, z, x = column_problem("anova", 1.0)
    by_torch = own.block(own.left(z), own.right(x))
    monkeypatch.setattr(gpu, "DEVICES", {"cpu"})
    monkeypatch.setattr(triton_radial, "radial_profile", fails)
    gpu.triton_runs.cache_clear()
    try:
        for _ in range(2):
            assert torch.equal(own.block(own.left(z), own.right(x)), by_torch)
            assert not fuses(own, z.device, 1)
    finally:
        gpu.triton_runs.cache_clear()
    assert caplog.text.count("Failed to find C compiler") == 1
