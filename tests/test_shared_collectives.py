"""Collectives in shared memory: threads stand for ranks, and a process that only sleeps for one that never comes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest
import torch
from torch import Tensor

from ep3stream.mesh.shared_collectives import SLOT_BYTES, SharedCollectives, can_share_memory, shared_bytes

SIZE = 3
pytestmark = pytest.mark.skipif(not can_share_memory(), reason="only on Linux, x86-64")


def room(size: int) -> Tensor:
    return torch.zeros(shared_bytes(size), dtype=torch.uint8)


def on_every_rank(action: Callable[[SharedCollectives, int], Tensor], timeout_s: float = 60) -> list[Tensor]:
    """What `action` gives for the collectives and number of each rank."""
    shared, pids = room(SIZE), [os.getpid()] * SIZE
    with ExitStack() as open_ones, ThreadPoolExecutor(SIZE) as pool:
        ranks = [SharedCollectives(shared, rank, pids, timeout_s) for rank in range(SIZE)]
        for each in ranks:
            open_ones.enter_context(closing(each))
        return list(pool.map(action, ranks, range(SIZE)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("n", [0, 1, 1000, SLOT_BYTES // 4 + 3, SLOT_BYTES])
def test_sums_have_the_same_bits_on_every_rank_whatever_the_length(n: int, dtype: torch.dtype) -> None:
    mine = [
        torch.randn(n, generator=torch.Generator().manual_seed(rank)).mul(1e3).to(dtype)
        for rank in range(SIZE)
    ]

    def summed(shared: SharedCollectives, rank: int) -> Tensor:
        tensor = mine[rank].clone()
        shared.sum_(tensor)
        return tensor

    for found in on_every_rank(summed):
        assert torch.equal(found, mine[0] + mine[1] + mine[2])


def test_many_calls_in_a_row_never_mix() -> None:
    def talked(shared: SharedCollectives, rank: int) -> Tensor:
        found = []
        for call in range(500):
            tensor = torch.full((1 + call % 7,), float(call * (rank + 1)))
            (shared.sum_ if call % 2 else shared.max_)(tensor)
            found.append(tensor[-1].clone())
            said = torch.full((2, 3), float(rank + call))
            shared.broadcast_(said, call % SIZE)
            found.append(said[1, 2].clone())
        return torch.stack(found)

    expected = [
        value for call in range(500) for value in (call * (6 if call % 2 else SIZE), call % SIZE + call)
    ]
    for found in on_every_rank(talked):
        assert found.tolist() == expected


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_a_rank_that_has_ended_is_not_waited_for(sleeper: subprocess.Popen[bytes]) -> None:
    pids = [os.getpid(), sleeper.pid]
    with closing(SharedCollectives(room(2), 0, pids, 60)) as shared:
        sleeper.kill()  # Nobody has asked for its exit status yet, as when an elastic agent has not looked.
        with pytest.raises(RuntimeError, match="rank 1 has ended"):
            shared.sum_(torch.ones(3))


def test_a_rank_that_keeps_silent_is_waited_for_so_long(sleeper: subprocess.Popen[bytes]) -> None:
    with (
        closing(SharedCollectives(room(2), 0, [os.getpid(), sleeper.pid], 0.2)) as shared,
        pytest.raises(RuntimeError, match="rank 1 has kept silent for"),
    ):
        shared.sum_(torch.ones(3))


def test_a_process_that_is_not_there_cannot_be_watched(sleeper: subprocess.Popen[bytes]) -> None:
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(OSError, match="No such process"):
        SharedCollectives(room(2), 0, [os.getpid(), sleeper.pid], 60)
