"""On a CUDA device: the same step as on the CPU, and a fit that resumes to the same bits."""

from __future__ import annotations

import pytest
import torch
from kernel_problem import generator, points
from small_stores import make_store, plain_config

import ep3stream
from ep3stream.mesh import Mesh
from ep3stream.solver.kernels import RadialKernel
from ep3stream.solver.projection import build_nystrom
from ep3stream.solver.step import Solver, SolverState
from ep3stream.solver.targets import TargetCode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

P, D, M, C = 500, 8, 256, 3


def stepped(device: torch.device, n_steps: int = 5) -> SolverState:
    """The state after a few steps on the same rows, everything on `device`."""
    mesh = Mesh(0, 1, device)
    centers = points(P, D, 1, torch.float32).to(device)
    sample = points(400, D, 2, torch.float32).to(device)
    kernel = RadialKernel("laplacian", 4.0, torch.zeros(D, device=device))
    projection, _ = build_nystrom(kernel, centers, centers, sample, P, 100, 40, mesh, generator())
    targets = TargetCode(False, torch.zeros(C, device=device), torch.ones(C, device=device))
    solver = Solver(kernel, kernel.left(centers), projection, targets, 0.9, 3.0, mesh)
    state = solver.initial_state()
    for step in range(n_steps):
        x = points(M, D, 10 + step, torch.float32).to(device)
        solver.step(state, x, x[:, :C].sin(), 1e-3)
    return state


def test_a_step_on_the_gpu_is_the_step_on_the_cpu():
    on_cpu, on_gpu = stepped(torch.device("cpu")), stepped(torch.device("cuda"))
    for name, expected in on_cpu.tensors().items():
        scale = float(expected.abs().max())
        found = on_gpu.tensors()[name].cpu()
        assert torch.allclose(found, expected, rtol=0, atol=1e-4 * scale), name


class Stop(Exception):
    """Stands for a kill."""


def test_a_fit_on_the_gpu_that_was_killed_ends_with_the_same_bytes(tmp_path):
    store = make_store(tmp_path / "smooth.zarr")
    changes = {
        "solver": {"centers": 150, "model_rank": 40, "batch_size": 32, "epochs": 2},
        "run": {"checkpoint_steps": 7},
    }
    config = plain_config(**changes)

    def kill(progress):
        if progress.step >= 24:
            raise Stop

    whole = ep3stream.fit(store, tmp_path / "whole", config)
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "killed", config, observe=kill)
    ep3stream.fit(store, tmp_path / "killed", config)
    for file in (whole / "model").iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / "model" / file.name).read_bytes()
    assert ep3stream.evaluate(whole, store)["r2"] > 0.8
