"""What memory a device has, and whether a plan is more than that."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from ep3stream.config import RunConfig, SolverConfig
from ep3stream.errors import ConfigError
from ep3stream.mesh import Mesh
from ep3stream.run.preparation.plan import Plan, Shape, largest_model

_OF_FREE_MEMORY = 0.8
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def machine_bytes(device: torch.device) -> int:
    """Of a GPU its memory; of the CPU that of the machine, or of the container this process is in."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # There is none, or it says `max`.
            limits.append(int(file.read_text()))
    return min(limits)


def memory_budget(asked: int, mesh: Mesh) -> int:
    """Bytes for a fit's arrays on each device: those asked for, but on GPUs four fifths of what is free by default.

    The least of all devices counts, so that the ranks plan alike.
    """
    if mesh.device.type != "cuda" or asked != RunConfig().memory_bytes:
        return asked
    free, _ = torch.cuda.mem_get_info(mesh.device)
    return -mesh.agreed([-int(_OF_FREE_MEMORY * free)])[0]


def require_machine(
    shape: Shape, config: SolverConfig, plan: Plan, device: torch.device, devices: int = 1
) -> None:
    """ConfigError where the device has less memory than the plan takes, whatever the budget allows.

    devices: in all, on this machine where they are shares of its CPU.
    """
    there = machine_bytes(device) // (1 if device.type == "cuda" else devices)
    planned = sum(plan.memory.values())
    if planned <= there:
        return
    fits = largest_model(shape, config, there, devices)
    remedy = f"use at most {fits} centers" if fits < plan.n_centers else f"give --memory {there // 10**6}MB"
    raise ConfigError(
        f"memory allows the {planned / 1e6:.1f} MB that {plan.n_centers} centers with batches of up to "
        f"{plan.max_batch_size} take, but a device has only {there / 1e6:.1f} MB here; {remedy}"
    )
