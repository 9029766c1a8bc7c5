"""Who owns which centers, and that several ranks compute what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from kernel_problem import ONE_RANK, Problem, generator, laplacian, levels, points, sphere, unit_targets
from torch import Tensor

from ep3stream.errors import ConfigError, RankError
from ep3stream.mesh import Mesh, join, joined
from ep3stream.mesh.shared_collectives import LostPeer, can_share_memory, new_shared_file
from ep3stream.planning.costs import Sizes, reduced_bytes_of_step
from ep3stream.solver.eigenpro import build_eigenpro
from ep3stream.solver.exact import build_exact
from ep3stream.solver.kernels import CallableKernel, RadialKernel
from ep3stream.solver.step import Solver

CPU = torch.device("cpu")
FAST, LEVEL = 20, 80
# Centers, the rank to raise to, and the size of the groups of a local tail: whole ones, and on two or three ranks.
CASES = ((50, 0, 0), (1, 0, 0), (50, FAST, 0), (120, LEVEL, 0), (50, 0, 5), (50, 0, 8), (50, 0, 40))


@given(n_rows=st.integers(0, 10_000), size=st.integers(1, 64))
def test_every_row_is_dealt_once_in_order_and_evenly(n_rows: int, size: int) -> None:
    shares = [Mesh(rank, size, CPU).shard_range(n_rows) for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(n_rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_without_a_group_is_a_mesh_of_one_that_leaves_tensors_alone() -> None:
    mesh = Mesh.of_this_process(CPU)
    assert (mesh.rank, mesh.size) == (0, 1)
    tensor = torch.arange(6.0).view(3, 2)
    for same in (mesh.all_reduce(tensor), mesh.broadcast(tensor), mesh.all_gather_rows(tensor, 3)):
        assert same is tensor


def weights_after_five_steps(mesh: Mesh, p: int, widest_rank: int = 0, group_size: int = 0) -> Tensor:
    """Of the whole model, (p, 2), on every rank; the step size is measured too, by the ranks together.

    With a `widest_rank` the kernel is one for which the rank is raised to it: eigenvalues that fall fast, or a level.
    """
    kernel = RadialKernel("gaussian", 3.0, torch.zeros(3)) if widest_rank else laplacian(3)
    rows = points(p, 3, 0, torch.float32), points(120, 3, 1, torch.float32)
    case = Problem(kernel, *rows, n_landmarks=40, widest_rank=widest_rank)
    if widest_rank == LEVEL:
        rows = sphere(p, 12, 0), sphere(120, 12, 1)
        case = Problem(CallableKernel(levels), *rows, 30, 4, p, widest_rank=widest_rank)
    case = replace(case, group_size=group_size)
    projection = case.projection(mesh)[0]
    assert projection.basis.shape[1] == min(p, max(widest_rank, 10))
    assert (projection.tail is not None) == bool(group_size)
    solver = replace(case.solver(unit_targets(2, torch.float32), mesh), ridge=0.1)
    eta = case.stability(solver, 40).step_size(solver.momentum)
    state, y = solver.initial_state(), points(120, 2, 2, torch.float32)
    for step in range(5):
        rows = slice(20 * step, 20 * step + 40)
        solver.step(state, case.x[rows], y[rows], eta)
    return mesh.all_gather_rows(state.weights.T.contiguous(), p)


SIZES = Sizes(1, 3, 2, 50, 40, 4, 10, 50, 30, 1)


def sent_by_steps(mesh: Mesh) -> dict[str, tuple[int, int]]:
    """By projection: bytes given to the all-reduces of a step, and what costs.py says of it; of one that is scored."""
    case = Problem(laplacian(3), points(50, 3, 0, torch.float32), points(120, 3, 1, torch.float32))
    rows = mesh.shard_range(50)
    shard = case.z[rows.start : rows.stop]
    nystrom, _ = case.projection(mesh)
    grouped, _ = replace(case, group_size=8).projection(mesh)
    exact, _ = build_exact(case.kernel, case.z, case.x[:50], 4, mesh, generator(5))
    eigenpro, _ = build_eigenpro(
        case.kernel, shard, case.z[:30], case.x[:50], 50, (4, 10), (2, 0.0), mesh, generator(5)
    )
    found = {}
    y = points(120, 2, 2, torch.float32)[:40]
    projections = {"nystrom": nystrom, "grouped": grouped, "exact": exact, "eigenpro": eigenpro}
    for name, projection in projections.items():
        centers = case.kernel.left(shard)
        targets = unit_targets(2, torch.float32)
        solver = Solver(case.kernel, centers, projection, targets, 0.0, 0.0, mesh)  # type: ignore[arg-type]
        kind = "nystrom" if name == "grouped" else name
        group_size = 8 if name == "grouped" else 0
        sizes = replace(SIZES, projection=kind, passes=2, devices=mesh.size, group_size=group_size)
        state = solver.initial_state()
        for score in (False, True):
            before = mesh.sent["all_reduce"]
            solver.step(state, case.x[:40], y, 1e-4, score=score and name != "eigenpro")
            expected = (
                reduced_bytes_of_step(sizes, projection.n_leading if kind == "nystrom" else None)
                + score * 4 * 2 * 40
            )
            found[f"{name} {score}"] = (mesh.sent["all_reduce"] - before, expected)
    # The centers' batches are small here, which costs.py does not know; and the passes look at |h|^2.
    batches, sent = len(eigenpro.batches), found.pop("eigenpro False")
    found["eigenpro"] = (sent[0], sent[1] + 4 * 2 * 10 * 2 * (batches - 1) + 8)
    del found["eigenpro True"]
    return found


def talk(mesh: Mesh) -> list[Any]:
    """What ranks say to each other, and hand over."""
    whole = torch.arange(22.0).view(11, 2)
    shard = mesh.scatter_rows(whole if mesh.is_leader else None)
    columns = mesh.scatter_rows(whole.T.contiguous() if mesh.is_leader else None, dim=1)
    back, columns_back = mesh.gather(shard, 11), mesh.gather(columns, 11, dim=1)
    assert (back is None) == (columns_back is None) == (not mesh.is_leader)
    if back is not None and columns_back is not None:
        assert torch.equal(back, whole)
        assert torch.equal(columns_back, whole.T)
    assert torch.equal(mesh.replicate(whole if mesh.is_leader else None), whole)
    heard: list[Any] = [
        len(shard),
        mesh.all_reduce_max([mesh.rank, -mesh.rank]),
        mesh.broadcast_object(lambda: {"by": mesh.rank}),
    ]

    def fail_on_the_last() -> None:
        if mesh.rank == mesh.size - 1:
            raise ConfigError("mine")

    for action in (fail_on_the_last, lambda: [][mesh.rank]):
        try:
            mesh.all_or_raise(action)
        except Exception as error:
            heard.append([type(error).__name__, getattr(error, "from_rank", None)])
    return heard


def lose_a_rank(rank: int, is_silent: bool, folder: str) -> None:
    """Rank 1 ends, or keeps silent for longer than rank 0 waits, and rank 0 writes down what it is told of that."""
    connected, lost = (Path(folder) / f"{what}-{is_silent}" for what in ("connected", "lost"))
    method, timeout = f"file://{folder}/rendezvous-{is_silent}", timedelta(seconds=5 if is_silent else 60)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2, timeout=timeout)
    if rank == 1:
        # A rank that ends before the other is connected fails the other's start, which is another error.
        while not (lost if is_silent else connected).exists():
            time.sleep(0.05)
        os._exit(0)
    connected.touch()
    mesh = Mesh.of_this_process(CPU)
    # What is sent to a rank that ends may still fit into a buffer, so that a first call succeeds.
    with pytest.raises(RankError, match="rank 0 of 2 waits for another one in vain") as caught:
        deque(iter(lambda: mesh.all_reduce(torch.ones(1000)), None), maxlen=0)
    lost.write_text(str(caught.value))
    os._exit(0)


def fail_to_map(mesh: Mesh) -> None:
    """Where a shared file cannot be mapped, no file is left."""
    made: list[Path] = []

    def make(n_bytes: int) -> Path:
        made.append(new_shared_file(n_bytes))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ep3stream.mesh.mesh.new_shared_file", make)
        patch.setattr(torch, "from_file", lambda *_, **__: [][0])
        with pytest.raises(IndexError):
            mesh.node_buffer([3], torch.float32)
        with pytest.raises(IndexError):
            mesh.once_per_node(lambda: [torch.ones(3)])
    assert len(made) == (2 if mesh.is_reader else 0)
    assert not any(path.exists() for path in made)


def run_rank(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        over_gloo = Mesh.of_this_process(CPU)
        with joined(60) as mesh:
            assert (mesh.shared is not None) == can_share_memory()
            for case in CASES:
                weights = weights_after_five_steps(mesh, *case)
                np.save(f"{folder}/{'-'.join(map(str, case))}-{rank}.npy", weights.numpy())
            # Sums of two are the same in either order.
            assert size > 2 or torch.equal(weights, weights_after_five_steps(over_gloo, *case))
            (Path(folder) / f"sent-{rank}.json").write_text(json.dumps(sent_by_steps(mesh)))
            told = talk(mesh)
            fail_to_map(mesh)
        assert told == talk(over_gloo)
        (Path(folder) / f"talk-{rank}.json").write_text(json.dumps(told))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("error", [None, RankError("lost"), KeyboardInterrupt()])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("abort_ends", [True, False])
def test_a_rank_that_fails_on_a_gpu_leaves_without_waiting_for_the_others(
    device: str, error: BaseException | None, abort_ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    end = threading.Event()

    def abort() -> None:
        called.append("abort")
        if not abort_ends:
            end.wait()
        raise RuntimeError("what NCCL says of a group that is gone")

    monkeypatch.setattr(dist, "destroy_process_group", lambda: called.append("destroy"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", abort)
    monkeypatch.setattr(join, "_ABORT_S", 10.0 if abort_ends else 0.01)
    monkeypatch.setattr(join, "is_rank", lambda: True)
    monkeypatch.setattr(join, "_device", lambda local_rank: torch.device(device))
    monkeypatch.setattr(join, "_init_process_group", lambda device, timeout: None)
    monkeypatch.setattr(join, "_mesh_of_group", lambda device, timeout: Mesh(0, 1, device))
    with pytest.raises(type(error)) if error else nullcontext(), joined(60):
        if error:
            raise error
    end.set()
    assert called == ["abort" if error and device == "cuda" else "destroy"]


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_ranks_give_the_weights_of_one(size: int, tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(size), str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=250
    )
    assert done.returncode == 0, done.stderr.decode()
    for case in CASES:
        alone, (_, widest_rank, _) = weights_after_five_steps(ONE_RANK, *case), case
        files = [tmp_path / f"{'-'.join(map(str, case))}-{rank}.npy" for rank in range(size)]
        ranks = [torch.from_numpy(np.load(file)) for file in files]
        assert all(torch.equal(ranks[0], other) for other in ranks[1:])
        # Sums in another order differ by rounding, which 1 / mu amplifies where the eigenvalues fall fast.
        assert (ranks[0] - alone).norm() < (1e-3 if widest_rank == FAST else 1e-5) * alone.norm()
    for rank in range(size):
        sent = json.loads((tmp_path / f"sent-{rank}.json").read_text())
        assert len(sent) == 7
        assert all(counted == expected for counted, expected in sent.values()), sent
        heard = json.loads((tmp_path / f"talk-{rank}.json").read_text())
        assert heard[1:3] == [[size - 1, 0], {"by": 0}]
        # Each has the error itself, or is told of it.
        assert heard[3] == ["ConfigError", None if rank == size - 1 else size - 1]
        assert heard[4] == (["IndexError", None] if rank == 0 else ["RankError", 0])


class Answer:
    """Stands for the collectives of torch: fails as it is told to."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def sum_(self, tensor: Tensor) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4321"),
        RuntimeError("Read error [127.0.0.1]:4321: Connection reset by peer"),
        RuntimeError("Timed out waiting 1000ms for recv operation to complete"),
        dist.DistBackendError("NCCL error, ncclRemoteError: A call failed possibly due to a network error"),
        LostPeer("rank 1 has ended"),
    ],
    ids=lambda error: str(error)[:12],
)
def test_a_lost_peer_is_a_rank_error(error: Exception) -> None:
    mesh = Mesh(0, 2, CPU, shared=Answer(error))  # type: ignore[arg-type]
    with pytest.raises(RankError, match="in vain") as caught:
        mesh.all_reduce(torch.ones(3))
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB; the last call timed out"),
        RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12"
        ),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        dist.DistBackendError("NCCL error, ncclUnhandledCudaError: Cuda failure 2 'out of memory'"),
        dist.DistBackendError("NCCL error, ncclInvalidUsage: Duplicate GPU detected"),
    ],
    ids=lambda error: str(error)[:12],
)
def test_any_other_error_of_a_collective_passes_unchanged(error: Exception) -> None:
    mesh = Mesh(0, 2, CPU, shared=Answer(error))  # type: ignore[arg-type]
    with pytest.raises(type(error)) as caught:
        mesh.all_reduce(torch.ones(3))
    assert caught.value is error


def test_collectives_take_tensors_that_are_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(tensor: Tensor, **_: Any) -> None:
        assert tensor.is_contiguous()
        tensor.copy_(torch.arange(6.0).view(tensor.shape))

    monkeypatch.setattr(dist, "broadcast", fill)
    monkeypatch.setattr(dist, "all_reduce", fill)
    mesh = Mesh(0, 2, CPU)
    for collective in (mesh.broadcast, mesh.all_reduce):
        columns = torch.zeros(2, 3).T
        assert collective(columns) is columns
        assert torch.equal(columns, torch.arange(6.0).view(3, 2))


def test_a_rank_that_ends_or_keeps_silent_is_told_over_gloo_too(tmp_path: Path) -> None:
    command = [sys.executable, __file__, "lose", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, timeout=250)
    assert done.returncode == 0, done.stderr.decode()
    assert "imed out waiting 5000ms" in (tmp_path / "lost-True").read_text()
    assert (tmp_path / "lost-False").exists()


def main(what: str, folder: str) -> None:
    """A process of one thread that has imported torch once may fork its ranks; pytest's own may not."""
    start = partial(torch.multiprocessing.start_processes, start_method="fork")
    if what == "lose":
        for is_silent in (False, True):
            start(lose_a_rank, (is_silent, folder), nprocs=2)
    else:
        start(run_rank, (int(what), folder), nprocs=int(what))


if __name__ == "__main__":
    main(*sys.argv[1:])
