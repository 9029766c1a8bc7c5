"""Memory that the ranks of one machine share: a file that each of them maps.

Sums, maxima and copies over the ranks of one machine, in memory that they share.

Over gloo each takes a millisecond, on loopback too, and a step has seven: a fifth of a step of 70 ms on two cores.
Here it takes a few microseconds, once the last rank has come.
"""

from __future__ import annotations

import os
import platform
import select
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ep3stream.errors import DiskError


def new_map(n_bytes: int) -> Path:
    """A file of this size in memory, or on the disk where there is no room there.

    All of it is reserved now: a write to a map beyond what there is room for would end the process by SIGBUS.
    """
    for directory in ("/dev/shm", tempfile.gettempdir()):
        if not os.access(directory, os.W_OK):
            continue
        handle, name = tempfile.mkstemp(prefix="ep3stream-", dir=directory)
        try:
            os.posix_fallocate(handle, 0, n_bytes)
        except OSError:
            Path(name).unlink()
        else:
            return Path(name)
        finally:
            os.close(handle)
    raise DiskError(
        f"there is no room for {n_bytes / 1e6:.1f} MB that the ranks of a machine share, neither in /dev/shm nor in "
        f"{tempfile.gettempdir()}; free some, or set TMPDIR"
    )


SLOT_BYTES = 1 << 20

# A counter's line of its own, so that ranks do not take each other's cache lines away.
_LINE = 16

# A wait is spent at work for so many looks, then giving way to threads that have some, then, after so long, asleep.
_HASTY_LOOKS = 50

_PATIENT_S, _SLEEP_S = 0.005, 0.0005

_LOOK_AT_PEERS_S = 0.1


def are_possible() -> bool:
    """Whether this machine's ranks can do without gloo: x86-64 stores in order, and Linux tells of a peer's end."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and hasattr(os, "pidfd_open")


def room_bytes(size: int) -> int:
    """What `size` ranks share: a line for each, then two slots for each."""
    return size * (8 * _LINE + 2 * SLOT_BYTES)


class SharedCollectives:
    """Every rank calls the same methods with tensors of the same form, in the same order.

    A call writes into the rank's slot, raises its counter, and waits for the others' counters. Of the two slots of
    each rank calls take turns: who has come to a call has read all of the one before, so that nobody overwrites what
    another still reads.

    room: uint8, zeros at first, `room_bytes` of memory shared by the ranks; pids: the process of each rank. Raises
    OSError where a process cannot be watched, and RuntimeError from each call once a rank ends, or keeps the others
    waiting for timeout_s.
    """

    def __init__(self, room: Tensor, rank: int, pids: Sequence[int], timeout_s: float) -> None:
        self._rank, self._size, self._timeout_s = rank, len(pids), timeout_s
        lines = 8 * _LINE * self._size
        self._counters = memoryview(room[:lines].numpy().data).cast("q")
        self._slots = room[lines:].view(2, self._size, SLOT_BYTES)
        self._done = 0
        self._handles = {os.pidfd_open(pid): other for other, pid in enumerate(pids) if other != rank}
        self._ended = select.poll()
        for handle in self._handles:
            self._ended.register(handle, select.POLLIN)

    def close(self) -> None:
        """Watches nobody any more."""
        while self._handles:
            os.close(self._handles.popitem()[0])

    def sum_(self, tensor: Tensor) -> None:
        """`tensor` summed over the ranks, in place and in the order of the ranks: the same bits on each."""
        self._reduce(tensor, torch.add)

    def max_(self, tensor: Tensor) -> None:
        """The largest of each element, in place."""
        self._reduce(tensor, torch.maximum)

    def copy_(self, tensor: Tensor, source: int) -> None:
        """The tensor of the rank `source`, in place."""
        for part in self._parts(tensor):
            slots = self._slots_of(part)
            if self._rank == source:
                slots[source].copy_(part)
            self._meet()
            part.copy_(slots[source])

    def _reduce(self, tensor: Tensor, combine: Callable[..., Tensor]) -> None:
        for part in self._parts(tensor):
            slots = self._slots_of(part)
            slots[self._rank].copy_(part)
            self._meet()
            part.copy_(slots[0])
            for other in slots[1:]:
                combine(part, other, out=part)

    def _parts(self, tensor: Tensor) -> Sequence[Tensor]:
        return tensor.view(-1).split(SLOT_BYTES // tensor.element_size()) if tensor.numel() else ()

    def _slots_of(self, part: Tensor) -> Tensor:
        """Of this call, (size, len(part))."""
        n_bytes = len(part) * part.element_size()
        return self._slots[self._done % 2, :, :n_bytes].view(part.dtype)

    def _meet(self) -> None:
        """Returns once every rank has come here as often as this one."""
        self._done += 1
        self._counters[_LINE * self._rank] = self._done
        for rank in range(self._size):
            for _ in range(_HASTY_LOOKS):
                if self._counters[_LINE * rank] >= self._done:
                    break
            else:
                self._wait_for(rank)

    def _wait_for(self, rank: int) -> None:
        began = looked = time.monotonic()
        while self._counters[_LINE * rank] < self._done:
            time.sleep(0)  # Lets this process's other threads run, and
            os.sched_yield()  # those of others, such as a rank on the same core.
            now = time.monotonic()
            if now - began > _PATIENT_S:
                time.sleep(_SLEEP_S)
            if now - looked > _LOOK_AT_PEERS_S:
                looked = now
                self._require_peers(rank, now - began)

    def _require_peers(self, awaited: int, waited_s: float) -> None:
        """RuntimeError if one has ended without having come, or the wait has been too long."""
        for handle, _ in self._ended.poll(0):
            other = self._handles[handle]
            if self._counters[_LINE * other] < self._done:
                raise RuntimeError(f"rank {other} has ended")
        if waited_s > self._timeout_s:
            raise RuntimeError(f"rank {awaited} has kept silent for {self._timeout_s:g} s")
