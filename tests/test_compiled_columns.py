"""Compiled loops of kernels on columns: who waits for the compiler, and what becomes of its files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import torch

from ep3stream.solver.columns import ColumnKernel

USES_A_BLOCK = """
import sys, torch
torch.set_num_threads(1)
from ep3stream.solver.columns import ColumnKernel
from ep3stream.solver.kernels import RadialKernel
x = torch.linspace(0, 1, 8)[:, None]
radial = RadialKernel("laplacian", 1.0, torch.zeros(1))
radial.block(radial.left(x), radial.right(x))
assert "numba" not in sys.modules, "a radial kernel waits for Numba"
kernel = ColumnKernel.of("product", torch.tensor([[1.0], [0.0], [1.0]]))
block = kernel.block(kernel.left(x), kernel.right(x))
assert torch.allclose(block, (-(x - x.T).abs()).exp(), atol=1e-6)
assert "numba" in sys.modules
"""


def test_only_kernels_on_columns_wait_for_numba():
    subprocess.run([sys.executable, "-c", USES_A_BLOCK], check=True, timeout=120)


# Each time in a process of its own, forked from one that has loaded torch and not yet Numba, which waits for no thread.
USES_IT_OVER_AND_OVER = f"""
import os, sys
from pathlib import Path
os.environ["OMP_NUM_THREADS"] = "1"
place = Path(os.environ["NUMBA_CACHE_DIR"])
import torch
import ep3stream.solver.columns

def run():
    pid = os.fork()
    if not pid:
        code = 1
        try:
            exec({USES_A_BLOCK!r})
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0

place.write_text("a file where a directory should be")
run()
place.unlink()
run()
files = [file for file in place.rglob("*") if file.is_file()]
assert files
for file in files:
    file.write_bytes(file.read_bytes()[:7])
run()
run()
assert any(file.stat().st_size > 7 for file in files if file.suffix == ".nbc"), "every process compiles anew"
"""


def test_machine_code_that_cannot_be_kept_or_is_damaged_is_compiled_again(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    command = [sys.executable, "-c", USES_IT_OVER_AND_OVER]
    subprocess.run(command, check=True, timeout=250, env=environment)


def test_threads_stay_for_the_next_calls_as_many_as_one_has_needed():
    kernel = ColumnKernel.of("product", torch.ones(3, 7) * torch.tensor([[0.3], [0], [1]]))
    points = kernel.left(torch.randn(2048, 7, generator=torch.Generator().manual_seed(0)))
    alone = kernel.block(points, points)
    before, there = torch.get_num_threads(), len(own_threads())
    try:
        for n_threads in (3, 3, 2):
            torch.set_num_threads(n_threads)
            assert torch.equal(kernel.block(points, points), alone)
        assert 1 <= len(own_threads()) <= max(2, there)
    finally:
        torch.set_num_threads(before)


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("kernel-loops")]
