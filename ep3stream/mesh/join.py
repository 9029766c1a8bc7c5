"""How a process becomes a rank: alone, or started by torchrun or by `launch_ranks`."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from ep3stream.errors import ConfigError, InputError
from ep3stream.mesh.mesh import Groups, Mesh
from ep3stream.mesh.shared_collectives import SharedCollectives, can_share_memory, shared_bytes

# The environment variable by which `launch_ranks` tells its ranks where to meet.
RENDEZVOUS = "EP3STREAM_RENDEZVOUS"

_ABORT_S = 10.0


def is_rank() -> bool:
    """Whether this process is a rank among others: started by torchrun or `launch_ranks`, or with a process group."""
    return dist.is_initialized() or {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def has_met() -> bool:
    """Whether this process has met the other ranks, and not left them."""
    return dist.is_initialized()


def devices_here() -> int:
    """How many devices the setting `auto` stands for: all GPUs, or one CPU."""
    return max(1, torch.cuda.device_count())


def require_devices(n_devices: int) -> None:
    """Raises ConfigError for less than one device, or for more than the GPUs where there are any.

    On CPUs a device is a process, and any number will do.
    """
    if n_devices < 1:
        raise ConfigError(f"devices is {n_devices}; use at least 1, or auto")
    n_gpus = torch.cuda.device_count()
    if n_gpus and n_devices > n_gpus:
        raise ConfigError(
            f"devices is {n_devices}, but there are {n_gpus} GPUs; use --devices {n_gpus} or auto"
        )


@contextmanager
def joined(timeout_s: float) -> Iterator[Mesh]:
    """The mesh of all ranks that were started with this process, or a mesh of this process alone.

    timeout_s: how long a collective waits for the other ranks before it raises RankError. Raises InputError where the
    ranks cannot meet. Uses a process group that the caller has initialised, and does not destroy it.
    """
    timeout = timedelta(seconds=timeout_s)
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    if not is_rank():
        yield Mesh(0, 1, device)
        return
    if dist.is_initialized():
        with _sharing_memory(_mesh_of_group(device, timeout), timeout_s) as mesh:
            yield mesh
        return
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _n_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    _init_process_group(device, timeout)
    try:
        with _sharing_memory(_mesh_of_group(device, timeout), timeout_s) as mesh:
            yield mesh
            # The leader's process serves the store over which the others meet: no rank leaves before all are done.
            mesh.all_reduce_max([0])
    finally:
        if device.type == "cpu" or sys.exc_info()[0] is None:
            dist.destroy_process_group()
        else:
            _abort_process_group()


def _abort_process_group() -> None:
    """Ends NCCL's communication without the other ranks, for some seconds at most.

    After an error they may be gone, or wait elsewhere. To destroy the group is to wait for them, and so is to end the
    process while a collective is under way.
    """

    def abort() -> None:
        with suppress(Exception):  # The error that led here is the one to tell.
            dist.distributed_c10d._abort_process_group()

    thread = threading.Thread(target=abort, name="ep3stream-abort", daemon=True)
    thread.start()
    thread.join(_ABORT_S)


def _device(local_rank: int) -> torch.device:
    """The GPU of this number, which becomes torch's current one, or the CPU where there are no GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    require_devices(local_rank + 1)
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _init_process_group(device: torch.device, timeout: timedelta) -> None:
    """Meets the other ranks at the file that `launch_ranks` has named, or at the address that torchrun has."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend, file = "nccl" if device.type == "cuda" else "gloo", os.environ.get(RENDEZVOUS)
    if file is None:
        method, place = "env://", "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
    else:
        # Each attempt has a file of its own: what a killed one has left would mislead the next.
        method, place = f"{file}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", "on this machine"
        # Ranks of one machine talk over its loopback interface, so that nothing listens on a network.
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, loopback)
    try:
        dist.init_process_group(backend, init_method=method, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:  # Errors of torch's stores and of sockets are RuntimeErrors.
        raise InputError(
            f"the {size} ranks cannot meet at {place} ({str(error).splitlines()[0]:.200}); where the port is taken, "
            "give torchrun another one (--master-port, --rdzv-endpoint), else start all ranks within the time"
        ) from error


def _mesh_of_group(device: torch.device, timeout: timedelta) -> Mesh:
    """The mesh of torch's default group, with groups for each machine.

    torch wants every rank to make every group, in the same order. Ranks are on one machine if their rank less their
    local rank, which is that machine's first rank, is the same.
    """
    rank, size, on_gpu = dist.get_rank(), dist.get_world_size(), device.type == "cuda"
    host = dist.new_group(backend="gloo", timeout=timeout) if on_gpu else None
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    firsts = [0] * size
    firsts[rank] = rank - local_rank
    firsts = Mesh(rank, size, device, groups=Groups(host)).all_reduce_max(firsts)
    groups, local_size = Groups(host, host), firsts.count(rank - local_rank)
    if local_size < size:
        for first in sorted(set(firsts)):
            members = [other for other in range(size) if firsts[other] == first]
            node_host = dist.new_group(members, backend="gloo", timeout=timeout)
            node_device = dist.new_group(members, timeout=timeout) if on_gpu else None
            if rank in members:
                groups = Groups(host, node_host, node_device)
    return Mesh(rank, size, device, local_rank, local_size, groups=groups)


@contextmanager
def _sharing_memory(mesh: Mesh, timeout_s: float) -> Iterator[Mesh]:
    """The mesh, with collectives in shared memory where all of its ranks are on this machine and able to use them."""
    if mesh.size == 1 or mesh.local_size < mesh.size:
        yield mesh
        return
    pids, shared = [0] * mesh.size, None
    pids[mesh.rank] = os.getpid() if can_share_memory() else -1
    memory = mesh.once_per_node(lambda: [torch.zeros(shared_bytes(mesh.size), dtype=torch.uint8)])[0]
    with suppress(OSError):  # A sandbox may forbid to watch a process.
        if min(pids := mesh.all_reduce_max(pids)) > 0:
            shared = SharedCollectives(memory, mesh.rank, pids, timeout_s)
    try:
        can_all = not any(mesh.all_reduce_max([shared is None]))
        yield replace(mesh, shared=shared if can_all else None)
    finally:
        if shared is not None:
            shared.close()
