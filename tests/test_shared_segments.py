"""Segments shared between processes: the same rows, nothing left behind, and another way where that one fails."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ep3stream.conversion.spec import StoreSpec
from ep3stream.conversion.writer import create_store
from ep3stream.store.reader import SplitReader, open_store
from ep3stream.stream import segment_reads, shared_segments
from ep3stream.stream.order import RowOrder
from ep3stream.stream.prefetch import BatchStream
from ep3stream.stream.shared_segments import Address, SharedSegment, this_machine

LAYOUT: Any = (((5000, 64), "float32"), ((5000,), "int32"))


@pytest.fixture(autouse=True)
def _no_block_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shared_segments, "_free_blocks", [])
    yield
    monkeypatch.undo()  # What a test has put in place of a function may hold blocks.
    deadline = time.monotonic() + 30
    while _open_blocks() and time.monotonic() < deadline:  # A worker may yet let go of one.
        shared_segments._free_blocks.clear()
        gc.collect()
        time.sleep(0.01)
    assert _open_blocks() == []


def _open_blocks() -> list[str]:
    return [file for file in map(_target, os.listdir("/proc/self/fd")) if "ep3stream-rows" in file]


def _target(file: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{file}")
    except OSError:
        return ""


def share(value: float) -> SharedSegment:
    def fill(x: Any, y: Any) -> str:
        x[:], y[:] = value, int(value)
        return "told"

    shared = SharedSegment.filled(LAYOUT, fill)
    assert shared is not None
    return shared


def test_another_process_sees_the_rows_and_what_the_filling_returned() -> None:
    shared = share(7)
    code = (
        "import sys, pickle, numpy as np; shared = pickle.load(sys.stdin.buffer); "
        "x, y = np.zeros((6000, 64), 'float32'), np.zeros(6000, 'int32'); shared.copy(x, y, {}); "
        "print(x.min(axis=1).sum(), y.sum(), y[5000:].any(), shared.fill_result)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(shared), capture_output=True, check=True
    )
    assert done.stdout.decode().split() == ["35000.0", "35000", "False", "told"]


def sent(shared: SharedSegment) -> SharedSegment:
    """What another process gets of it."""
    copy: SharedSegment = pickle.loads(pickle.dumps(shared))
    return copy


def copied(shared: SharedSegment, mapped: dict[int, Any] | None = None) -> float:
    """The value of all rows of what `share` has made."""
    x, y = np.zeros((5000, 64), np.float32), np.zeros(5000, np.int32)
    shared.copy(x, y, {} if mapped is None else mapped)
    assert (x == y[0]).all()
    assert (y == y[0]).all()
    return float(y[0])


@pytest.mark.parametrize("is_mapped", [False, True])
def test_memory_is_used_again_when_its_owner_lets_go_and_then_no_longer_taken_for_the_rows_before(
    is_mapped: bool,
) -> None:
    first, mapped = share(1), {}
    address = sent(first)
    if is_mapped:
        assert copied(address, mapped) == 1
    second = share(2)
    assert (copied(sent(first), mapped), copied(sent(second), mapped)) == (1, 2)
    assert first._address[:3] != second._address[:3]
    del first
    if is_mapped:  # Nobody has put other rows there yet.
        assert copied(address, mapped) == 1
    third = share(3)
    assert third._address[:3] == address._address[:3]
    with pytest.raises(OSError, match="has other rows by now"):
        copied(address, mapped)
    assert copied(sent(third), mapped) == 3


def test_memory_is_not_used_again_while_another_process_copies_from_it() -> None:
    """The owner lets go, and reads on, in the middle of a copy; what a killed client held is free again."""
    first = share(1)
    address = sent(first)
    code = """
import sys, pickle
from ep3stream.stream.shared_segments import MappedBlock
address = pickle.load(sys.stdin.buffer)._address
block = MappedBlock(address)
with block.held(address.mark):
    print("held", flush=True)
    sys.stdin.buffer.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(pickle.dumps(address))
        client.stdin.flush()
        assert client.stdout.readline() == b"held\n"
        del first
        others = [share(value) for value in range(2, 9)]
        assert address._address[:3] not in [other._address[:3] for other in others]
        assert copied(address) == 1
        client.kill()
        client.wait()
        assert share(9)._address[:3] == address._address[:3]


def test_rows_that_are_just_being_put_into_a_block_are_not_read() -> None:
    first = share(1)
    address = sent(first)
    del first
    found: list[str] = []

    def fill(x: Any, y: Any) -> None:
        with pytest.raises(OSError, match="are being put there") as caught:
            copied(address)
        found.append(str(caught.value))

    assert SharedSegment.filled(LAYOUT, fill) is not None
    assert found


def test_a_block_whose_filling_fails_is_not_used_again() -> None:
    first = share(1)
    address = first._address
    del first

    def fail(x: Any, y: Any) -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        SharedSegment.filled(LAYOUT, fail)
    assert shared_segments._free_blocks == []
    assert share(2)._address.inode != address.inode


def test_threads_that_share_and_let_go_at_the_same_time_never_mix_rows() -> None:
    def work(number: int) -> bool:
        return all(copied(sent(shared)) == number for _ in range(40) if (shared := share(number)))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))


def test_a_client_keeps_few_blocks_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_segments, "_MAPPED_BLOCKS", 3)
    mapped: dict[int, Any] = {}
    for shared in [share(value) for value in range(6)]:
        copied(sent(shared), mapped)
    assert len(mapped) == 3


def test_an_owner_that_is_gone_is_an_os_error() -> None:
    shared = share(1)
    process, file, inode, mark = shared._address
    for address in ((2**22 - 1, file, inode), (process, 0, inode), (process, file, inode + 1)):
        with pytest.raises(OSError, match=r"No such file|another one|Permission"):
            copied(SharedSegment(Address(*address, mark), LAYOUT, None))


def test_few_rows_and_systems_without_such_memory_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SharedSegment.filled((((10, 3), "float32"), ((10,), "int32")), pytest.fail) is None

    def refuse(*_: Any) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert SharedSegment.filled(LAYOUT, pytest.fail) is None


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> SplitReader:
    spec = StoreSpec(
        task="classification",
        n_features=40,
        n_outputs=9,
        x_dtype="float32",
        feature_names=tuple(f"x{i}" for i in range(40)),
        target_names=("y",),
        class_names=None,
        columns={},
        shuffle_seed=None,
        source=(),
        segment_bytes=1 << 20,
    )
    path = tmp_path_factory.mktemp("shared") / "s"
    x = np.random.default_rng(0).standard_normal((30_000, 40), dtype=np.float32)
    with create_store(path, spec, "zarr") as writer:
        writer.append("train", x, np.arange(30_000) % 9)
        writer.commit()
    return open_store(path).split("train")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from distributed import LocalCluster

    with LocalCluster(
        1,
        threads_per_worker=2,
        processes=False,
        protocol="tcp",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        memory_limit="4GiB",
    ) as cluster:
        yield cluster


def batches(reader: SplitReader, dask: str | None, timeout_s: float = 100) -> list[Any]:
    reader = open_store(reader.path, timeout_s).split(reader.info.name)
    info = reader.info
    order = RowOrder(1, info.n_rows, info.segment_rows, 1, 1000, np.empty(0, np.int64))
    with BatchStream(reader, order, 0, order.steps_per_epoch, torch.device("cpu"), dask) as stream:
        return [(batch.x.clone(), batch.y.clone()) for batch in stream]


@pytest.fixture
def without_tasks(cluster: Any) -> Iterator[None]:
    """Nothing is left on the cluster afterwards."""
    yield
    deadline = time.monotonic() + 200
    while cluster.scheduler.tasks and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not cluster.scheduler.tasks


def at_each_copy(monkeypatch: pytest.MonkeyPatch, do: Callable[[Address], None]) -> None:
    """Has a client call `do` between the moments at which it learns where rows are and at which it copies them."""
    copy = SharedSegment.copy

    def copy_later(shared: SharedSegment, *memory: Any) -> None:
        do(shared._address)
        copy(shared, *memory)

    monkeypatch.setattr(SharedSegment, "copy", copy_later)


def require_same(found: list[Any], expected: list[Any]) -> None:
    for (x, y), (other_x, other_y) in zip(found, expected, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


@pytest.mark.usefixtures("without_tasks")
@pytest.mark.parametrize("way", ["shared", "sent", "owner gone"])
def test_a_stream_gets_the_same_batches_shared_sent_or_when_the_owner_is_gone(
    reader: SplitReader, cluster: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    looked: list[int] = []

    def look(address: Address) -> None:
        looked.append(address.process)
        if way == "owner gone":
            raise FileNotFoundError(2, "No such file or directory")

    at_each_copy(monkeypatch, look)
    if way == "sent":
        monkeypatch.setattr(segment_reads, "this_machine", lambda: None)
    require_same(batches(reader, cluster.scheduler_address), batches(reader, None))
    assert bool(looked) == (way != "sent")


def read_elsewhere(reader: SplitReader, segments: Iterable[int]) -> list[Any]:
    """What a worker does for the next tasks."""
    store = reader.path, reader.info.name, reader.manifest.fingerprint
    return [segment_reads._read_on_worker(*store, segment, this_machine()) for segment in segments]


@pytest.mark.usefixtures("without_tasks")
def test_a_worker_that_moves_its_results_to_disk_and_reads_on_gives_no_wrong_rows(
    reader: SplitReader, cluster: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Short of memory, Dask pickles a result and ends it: the block is free, though the client is about to copy it."""
    (worker,) = cluster.workers.values()
    kept: list[Any] = []

    def move_to_disk(address: Address) -> None:
        while worker.data.fast:
            worker.data.evict()
        kept.extend(read_elsewhere(reader, [0, 1, 2]))

    at_each_copy(monkeypatch, move_to_disk)
    require_same(batches(reader, cluster.scheduler_address), batches(reader, None))
    told = [record for record in caplog.records if "is read again" in record.message]
    assert [record.levelname for record in told if record.levelname == "WARNING"] == ["WARNING"]


@pytest.mark.usefixtures("without_tasks")
def test_a_read_that_is_begun_again_after_a_time_out_gets_the_rows_of_its_own_segment(
    reader: SplitReader, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first read of a segment wakes up, and the worker reads on, as the client is about to copy the second one."""
    wake, read, reads = threading.Event(), segment_reads._read, []

    def hang(reader: SplitReader, segment: int, *memory: Any) -> Any:
        reads.append(segment)
        if segment == 3 and reads.count(3) == 1:
            assert wake.wait(100)
        return read(reader, segment, *memory)

    monkeypatch.setattr(segment_reads, "_read", hang)
    kept: list[Any] = []

    def go_on(address: Address) -> None:
        if reads.count(3) == 2:
            wake.set()
            gc.collect()
            kept.extend(read_elsewhere(reader, [0, 1, 2]))

    at_each_copy(monkeypatch, go_on)
    require_same(batches(reader, cluster.scheduler_address, timeout_s=1), batches(reader, None))
    assert wake.is_set()


def test_processes_of_this_machine_know_each_other() -> None:
    code = "from ep3stream.stream.shared_segments import this_machine; print(this_machine())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert this_machine() == other.stdout.strip()


def test_the_reader_tells_the_layout_of_its_segments(reader: SplitReader, tmp_path: Path) -> None:
    for segment in (0, reader.info.n_segments - 1):
        x, y = reader.read_segment(segment)
        assert reader.layout(segment) == ((x.shape, str(x.dtype)), (y.shape, str(y.dtype)))
