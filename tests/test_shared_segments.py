"""Segments shared between processes: the same rows, nothing left behind, and another way where that one fails."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
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
from ep3stream.stream.shared_segments import SharedSegment, this_machine

LAYOUT: Any = (((5000, 64), "float32"), ((5000,), "int32"))


@pytest.fixture(autouse=True)
def _no_block_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shared_segments, "_free_blocks", [])
    yield
    shared_segments._free_blocks.clear()
    gc.collect()
    assert [file for file in map(_target, os.listdir("/proc/self/fd")) if "ep3stream-rows" in file] == []


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
        "import sys, pickle; shared = pickle.load(sys.stdin.buffer); x, y = shared.rows({}); "
        "print(x.shape, x.min(), y.sum(), y.dtype, shared.fill_result)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(shared), capture_output=True, check=True
    )
    assert done.stdout.decode().split() == ["(5000,", "64)", "7.0", "35000", "int32", "told"]


def test_memory_is_used_again_only_when_its_owner_lets_go() -> None:
    first, mapped = share(1), {}
    second = share(2)
    x, _ = pickle.loads(pickle.dumps(first)).rows(mapped)
    assert x[0, 0] == 1
    assert first._address != second._address
    address = first._address
    del first
    third = share(3)
    assert third._address == address
    assert x[0, 0] == 3


def test_a_client_keeps_few_blocks_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_segments, "_MAPPED_BLOCKS", 3)
    mapped: dict[int, Any] = {}
    for shared in [share(value) for value in range(6)]:
        pickle.loads(pickle.dumps(shared)).rows(mapped)
    assert len(mapped) == 3


def test_an_owner_that_is_gone_is_an_os_error() -> None:
    shared = share(1)
    process, file, inode = shared._address
    for address in ((2**22 - 1, file, inode), (process, 0, inode), (process, file, inode + 1)):
        with pytest.raises(OSError, match=r"No such file|another one|Permission"):
            SharedSegment(address, LAYOUT, None).rows({})


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
        1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


def batches(reader: SplitReader, dask: str | None) -> list[Any]:
    info = reader.info
    order = RowOrder(1, info.n_rows, info.segment_rows, 1, 1000, np.empty(0, np.int64))
    with BatchStream(reader, order, 0, order.steps_per_epoch, torch.device("cpu"), dask) as stream:
        return [(batch.x.clone(), batch.y.clone()) for batch in stream]


@pytest.mark.parametrize("way", ["shared", "sent", "owner gone"])
def test_a_stream_gets_the_same_batches_shared_sent_or_when_the_owner_is_gone(
    reader: SplitReader, cluster: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    looked: list[int] = []
    map_memory = shared_segments._map_memory

    def note(*address: int) -> Any:
        looked.append(address[0])
        if way == "owner gone":
            raise FileNotFoundError(2, "No such file or directory")
        return map_memory(*address)

    monkeypatch.setattr(shared_segments, "_map_memory", note)
    if way == "sent":
        monkeypatch.setattr(segment_reads, "this_machine", lambda: None)
    found = batches(reader, cluster.scheduler_address)
    for (x, y), (other_x, other_y) in zip(found, batches(reader, None), strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
    assert bool(looked) == (way != "sent")
    deadline = time.monotonic() + 200
    while cluster.scheduler.tasks and time.monotonic() < deadline:
        time.sleep(0.01)


def test_processes_of_this_machine_know_each_other() -> None:
    code = "from ep3stream.stream.shared_segments import this_machine; print(this_machine())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert this_machine() == other.stdout.strip()


def test_the_reader_tells_the_layout_of_its_segments(reader: SplitReader, tmp_path: Path) -> None:
    for segment in (0, reader.info.n_segments - 1):
        x, y = reader.read_segment(segment)
        assert reader.layout(segment) == ((x.shape, str(x.dtype)), (y.shape, str(y.dtype)))
