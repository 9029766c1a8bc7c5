"""Who owns which centers, and that several ranks compute what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from kernel_problem import ONE_RANK, Problem, laplacian, points, unit_targets
from torch import Tensor

from ep3stream.mesh import Mesh

CPU = torch.device("cpu")


@given(n_rows=st.integers(0, 10_000), size=st.integers(1, 64))
def test_every_row_is_dealt_once_in_order_and_evenly(n_rows: int, size: int) -> None:
    shares = [Mesh(rank, size, CPU).owned(n_rows) for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(n_rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_without_a_group_is_a_mesh_of_one_that_leaves_tensors_alone() -> None:
    mesh = Mesh.of_this_process(CPU)
    assert (mesh.rank, mesh.size) == (0, 1)
    tensor = torch.arange(6.0).view(3, 2)
    for same in (mesh.all_reduce(tensor), mesh.broadcast(tensor), mesh.gather_rows(tensor, 3)):
        assert same is tensor


def weights_after_five_steps(mesh: Mesh, p: int) -> Tensor:
    """Of the whole model, (p, 2), on every rank; the step size is measured too, by the ranks together."""
    case = Problem(laplacian(3), points(p, 3, 0, torch.float32), points(120, 3, 1, torch.float32))
    solver = replace(case.solver(unit_targets(2, torch.float32), mesh), ridge=0.1)
    eta = case.stability(solver, 40).step_size(solver.momentum)
    state, y = solver.initial_state(), points(120, 2, 2, torch.float32)
    for step in range(5):
        rows = slice(20 * step, 20 * step + 40)
        solver.step(state, case.x[rows], y[rows], eta)
    return mesh.gather_rows(state.weights.T.contiguous(), p)


def run_rank(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        mesh = Mesh.of_this_process(CPU)
        for p in (50, 1):
            np.save(f"{folder}/{p}-{rank}.npy", weights_after_five_steps(mesh, p).numpy())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_several_ranks_give_the_weights_of_one(size: int, tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(size), str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    for p in (50, 1):
        alone = weights_after_five_steps(ONE_RANK, p)
        ranks = [torch.from_numpy(np.load(tmp_path / f"{p}-{rank}.npy")) for rank in range(size)]
        assert all(torch.equal(ranks[0], other) for other in ranks[1:])
        assert (ranks[0] - alone).norm() < 1e-5 * alone.norm()


if __name__ == "__main__":
    # A process of one thread that has imported torch once may fork its ranks; pytest's own may not.
    torch.multiprocessing.start_processes(
        run_rank, (int(sys.argv[1]), sys.argv[2]), nprocs=int(sys.argv[1]), start_method="fork"
    )
