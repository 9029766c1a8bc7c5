"""Every Triton kernel compiles for an H100, and holds its numbers in registers. No GPU is needed for that."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is installed on no other system than Linux")

from ep3stream.solver import triton_columns, triton_gemm, triton_products, triton_radial
from ep3stream.solver.gpu import GEMM_OUTPUTS, KINDS, MAX_FEATURES, MAX_OUTPUTS


@pytest.fixture
def tool(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton_registers

    yield triton_registers
    del sys.modules["triton_registers"]


def test_no_kernel_spills_registers_where_it_needs_most_of_them(tool):
    widest = MAX_FEATURES["rational_quadratic"]
    programs = [
        *(tool.times("rational_quadratic", k, widest) for k in (1, MAX_OUTPUTS)),
        tool.times("rational_quadratic", 16, 9),
        tool.times("anova", 16, power=0.5),
        tool.on_columns(triton_columns._column_block, True, 0.5),
        tool.on_columns(triton_columns._column_sums, False, 0.5),
        tool.profile("dispersal"),
        tool.gemm("laplacian", "bf16", True, GEMM_OUTPUTS),
    ]
    spilled = {str(program): spills for program in programs if (spills := tool.figures(program).spills)}
    assert not spilled
    modules = (triton_columns, triton_gemm, triton_products, triton_radial)
    kernels = [each for module in modules for each in vars(module).values() if hasattr(each, "params")]
    # What is not launched is part of these: tiles and their pieces.
    launched = {each for each in kernels if f"{each.__name__}[(" in "".join(map(inspect.getsource, modules))}
    assert {program.kernel for program in programs} == launched


def test_the_tool_lists_every_kernel_and_tells_a_program_that_spills(tool):
    named = [str(program) for program in tool.programs()]
    assert len(set(named)) == len(named)
    assert all(any(kind in name for name in named) for kind in KINDS)
    program = tool.times("laplacian", 16)
    crowded = program._replace(options=program.options | {"num_warps": 1})
    found = tool.figures(crowded)
    assert found.spills > 100
    assert found.registers == 255
