"""Batches come in order from any step, errors reach the consumer, and leaving leaves nothing behind."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ep3stream.conversion.spec import StoreSpec
from ep3stream.conversion.writer import create_store
from ep3stream.errors import ConfigError, DamagedDataError, Ep3streamError, InputError
from ep3stream.store import reader as reader_module
from ep3stream.store import retries
from ep3stream.store.backend import ReadTimes
from ep3stream.store.files import LocalFiles
from ep3stream.store.reader import SplitReader, open_store
from ep3stream.stream import segment_reads
from ep3stream.stream.batch_slots import DataWaits
from ep3stream.stream.order import RowOrder
from ep3stream.stream.prefetch import BatchStream

CPU = torch.device("cpu")
N_ROWS, SEGMENT_ROWS = 103, 10
SPEC = StoreSpec(
    task="classification",
    n_features=3,
    n_outputs=7,
    x_dtype="float32",
    feature_names=("a", "b", "c"),
    target_names=("label",),
    class_names=None,
    columns={},
    shuffle_seed=None,
    source=(),
    segment_bytes=3 * 4 * SEGMENT_ROWS,
)
REGRESSION = replace(SPEC, task="regression", n_outputs=2, target_names=("u", "v"))
ORDER = RowOrder(
    seed=1,
    n_rows=N_ROWS,
    segment_rows=SEGMENT_ROWS,
    window_segments=2,
    batch_size=8,
    excluded=np.array([0, 5, *range(40, 50), 102]),
)
STEPS = ORDER.steps_per_epoch  # 12 of 7 or 8 rows


def _write(path: Path, format: Any = "zarr", spec: StoreSpec = SPEC) -> SplitReader:
    """A split whose first feature is the row number; the others and y follow from it."""
    rows = np.arange(N_ROWS)
    x = np.stack([rows, rows * 2, -rows], axis=1).astype(spec.x_dtype)
    y = rows % 7 if spec.task == "classification" else np.stack([rows / 2, rows * 3], axis=1)
    with create_store(path, spec, format) as writer:
        writer.append("train", x, y)
        writer.commit()
    return open_store(path).split("train")


@pytest.fixture
def reader(tmp_path: Path) -> SplitReader:
    return _write(tmp_path / "s")


def _stream(reader: SplitReader, start: int, stop: int, order: RowOrder = ORDER, **more: Any) -> BatchStream:
    return BatchStream(reader, order, start, stop, CPU, **more)


def _copies(stream: BatchStream) -> list[tuple[int, Any, Any]]:
    with stream:
        return [(batch.step, batch.x.tolist(), batch.y.tolist()) for batch in stream]


def _expected_rows(order: RowOrder, epochs: int) -> list[list[int]]:
    """The row numbers of each step, by the order alone."""
    batches = []
    for epoch in range(epochs):
        rows: list[int] = []
        for visit in order.visits(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            flat = order.window_rows(epoch, visit.index, visit.segments)
            place, row = np.divmod(flat, order.segment_rows)
            rows += (visit.segments[place] * order.segment_rows + row).tolist()
        batches += [rows[slice(*order.batch_bounds(step))] for step in range(order.steps_per_epoch)]
    return batches


def _becomes(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true within some seconds."""
    deadline = time.monotonic() + 200
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def _own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ep3stream")]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert _own_threads() == []
    assert [thread for thread in set(threading.enumerate()) - before if "IO loop" in thread.name] == []


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
@pytest.mark.parametrize("spec", [SPEC, REGRESSION], ids=["ids", "targets"])
@pytest.mark.parametrize("x_dtype", ["float32", "float16"])
def test_batches_hold_the_rows_of_the_order(
    tmp_path: Path, format: Any, spec: StoreSpec, x_dtype: Any
) -> None:
    spec = replace(spec, x_dtype=x_dtype, segment_bytes=3 * np.dtype(x_dtype).itemsize * SEGMENT_ROWS)
    reader = _write(tmp_path / "s", format, spec)
    expected = _expected_rows(ORDER, 2)
    with _stream(reader, 0, 2 * STEPS) as stream:
        for step, batch in enumerate(stream):
            rows = torch.tensor(expected[step])
            classes = spec.task == "classification"
            y = (rows % 7).int() if classes else torch.stack([rows / 2, rows * 3.0], dim=1)
            assert batch.step == step
            torch.testing.assert_close(
                batch.x, torch.stack([rows, rows * 2, -rows], 1).float(), rtol=0, atol=0
            )
            torch.testing.assert_close(batch.y, y, rtol=0, atol=0)
        assert step == 2 * STEPS - 1


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_a_stream_from_any_step_goes_on_as_one_from_step_0(tmp_path: Path, format: Any) -> None:
    reader = _write(tmp_path / "s", format)
    whole = _copies(_stream(reader, 0, 3 * STEPS))
    for start in range(3 * STEPS + 1):
        assert _copies(_stream(reader, start, 3 * STEPS)) == whole[start:]
    assert _copies(_stream(reader, 5, STEPS + 2)) == whole[5 : STEPS + 2]


@pytest.mark.parametrize(
    "order",
    [
        replace(ORDER, window_segments=100),
        replace(ORDER, batch_size=1000),
        replace(ORDER, batch_size=1, window_segments=1),
        replace(ORDER, excluded=np.arange(1, N_ROWS)),
    ],
    ids=["one window", "one batch", "one row a batch", "one row"],
)
def test_extreme_sizes_stream_the_same_rows(reader: SplitReader, order: RowOrder) -> None:
    batches = _copies(_stream(reader, 0, 2 * order.steps_per_epoch, order))
    assert [[row[0] for row in x] for _, x, _ in batches] == _expected_rows(order, 2)


@pytest.fixture(scope="module")
def all_readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SplitReader]:
    folder = tmp_path_factory.mktemp("readers")
    return {format: _write(folder / format, format) for format in ("zarr", "hdf5")}


@settings(max_examples=60)
@given(data=st.data())
def test_every_row_comes_once_an_epoch_whatever_the_read_ahead_the_resume_and_the_ranks(
    all_readers: dict[str, SplitReader], data: st.DataObject
) -> None:
    """Ranks that share an epoch, each of which stops and goes on at random steps, with any windows and batches."""
    reader = all_readers[data.draw(st.sampled_from(sorted(all_readers)))]
    excluded = data.draw(st.sets(st.integers(0, N_ROWS - 1), max_size=60))
    order = RowOrder(
        seed=data.draw(st.integers(0, 2**63 - 1)),
        n_rows=N_ROWS,
        segment_rows=SEGMENT_ROWS,
        window_segments=data.draw(st.integers(1, 13)),
        batch_size=data.draw(st.integers(1, 120)),
        excluded=np.array(sorted(excluded), np.int64),
        shards=data.draw(st.integers(1, 5)),
    )
    epoch, of_rank = data.draw(st.integers(0, 1000)), order.steps_per_epoch // order.shards
    seen: list[float] = []
    for rank in range(order.shards):
        first = epoch * order.steps_per_epoch + rank * of_rank
        stops = sorted(
            {first, first + of_rank, *data.draw(st.sets(st.integers(first, first + of_rank), max_size=2))}
        )
        for start, stop in pairwise(stops):
            with _stream(
                reader, start, stop if data.draw(st.booleans()) else first + of_rank, order
            ) as stream:
                for batch in islice(stream, stop - start):
                    seen += batch.x[:, 0].tolist()
    assert sorted(seen) == sorted(set(range(N_ROWS)) - excluded)


def test_a_split_shorter_than_a_segment_streams(tmp_path: Path) -> None:
    reader = _write(tmp_path / "s", spec=replace(SPEC, segment_bytes=3 * 4 * 1000))
    order = replace(ORDER, segment_rows=1000)
    batches = _copies(_stream(reader, 0, STEPS, order))
    assert [[row[0] for row in x] for _, x, _ in batches] == _expected_rows(order, 1)


@pytest.mark.parametrize("first_window", [0, 5], ids=["inside an epoch", "over its end"])
def test_one_window_is_read_ahead_and_no_more(reader: SplitReader, first_window: int) -> None:
    order = replace(ORDER, batch_size=1)
    ends = [0, *order.window_ends(order.segments(0)).tolist()]
    recorded = _Faulty(reader)
    start = ends[first_window]
    ahead = [segment for visit in islice(order.visits(start, 10**6), 2) for segment in visit.segments]
    with _stream(recorded, start, 10**6, order) as stream:
        next(stream)
        assert _becomes(lambda: len(recorded.attempts) >= len(ahead))
        time.sleep(0.05)
        assert sorted(recorded.attempts) == sorted(ahead)


def test_a_batch_keeps_its_rows_until_the_next_is_asked_for(reader: SplitReader) -> None:
    expected = _expected_rows(ORDER, 1)
    with _stream(reader, 0, STEPS) as stream:
        for batch in stream:
            time.sleep(0.01)  # The producer fills every slot it has.
            assert batch.x[:, 0].tolist() == expected[batch.step]


def test_batches_share_three_slots_of_memory(reader: SplitReader) -> None:
    with _stream(reader, 0, 5 * STEPS) as stream:
        assert len({batch.x.data_ptr() for batch in stream}) == 3


def test_a_loop_left_and_taken_up_again_misses_no_batch(reader: SplitReader) -> None:
    with _stream(reader, 0, STEPS) as stream:
        first = [batch.step for batch in islice(stream, 5)]
        assert first + [batch.step for batch in stream] == list(range(STEPS))
        assert list(stream) == []


def test_a_stream_entered_again_goes_on(reader: SplitReader) -> None:
    stream = _stream(reader, 0, STEPS)
    with stream:
        for batch in islice(stream, 4):
            assert batch.step < 4
    assert _copies(stream) == _copies(_stream(reader, 4, STEPS))


def test_a_stream_gives_nothing_outside_its_with_block(reader: SplitReader) -> None:
    stream = _stream(reader, 0, STEPS)
    with pytest.raises(InputError, match="inside its with block"):
        next(stream)
    with stream:
        next(stream)
        with pytest.raises(InputError, match="open already"):
            stream.__enter__()
    with pytest.raises(InputError, match="inside its with block"):
        next(stream)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"n_rows": 104}, "order has 104 rows"), ({"segment_rows": 11}, "segments of 11")],
)
def test_an_order_of_another_split_is_refused(reader: SplitReader, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _stream(reader, 0, 1, replace(ORDER, **change))


def test_times_count_reading_gathering_and_waiting(reader: SplitReader) -> None:
    slow = _Faulty(reader, delay_s=0.02)
    began = time.perf_counter()
    with _stream(slow, 0, STEPS) as stream:
        waited_s = [batch.waited_s for batch in stream]
    elapsed_s = time.perf_counter() - began
    # 11 segments, two threads: each waits through its own.
    assert 11 * 0.02 <= stream.times.read_s < 2 * elapsed_s
    assert 0 < stream.times.gather_s < elapsed_s
    assert 0.02 <= waited_s[0] <= sum(waited_s) < elapsed_s


class _Gpu:
    """A stream of a GPU and the clock of its host, in ms: what is queued is done by `done_at`."""

    def __init__(self) -> None:
        self.now = self.done_at = 0.0

    def compute(self, until: float) -> None:
        self.done_at = until

    def record_event(self, event: _Event) -> _Event:
        event.at = self.done_at = max(self.now, self.done_at)
        return event

    def wait_event(self, event: _Event) -> None:
        self.done_at = max(self.done_at, event.at)


class _Event:
    def __init__(self, gpu: _Gpu, at: float = 0.0) -> None:
        self.gpu, self.at = gpu, at

    def query(self) -> bool:
        return self.gpu.now >= self.at

    def elapsed_time(self, other: _Event) -> float:
        return other.at - self.at


def test_a_gpu_waits_for_data_only_while_it_has_nothing_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = _Gpu()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: _Event(gpu))
    waits = DataWaits(torch.device("cuda"))

    def waited_ms(asked_at: float, came_at: float, copied_at: float = 0.0) -> float:
        gpu.now = asked_at
        waits.begin()
        gpu.now = came_at
        gpu.wait_event(_Event(gpu, copied_at))
        return 1000 * waits.end()

    gpu.compute(until=10)
    assert waited_ms(asked_at=1, came_at=4) == 0  # The host waits, for a slot that the GPU still uses.
    gpu.compute(until=20)
    assert waited_ms(asked_at=5, came_at=9) == 0
    assert waited_ms(asked_at=11, came_at=26) == 6  # From 20 to 26.
    gpu.compute(until=30)
    assert waited_ms(asked_at=28, came_at=29, copied_at=33) == 0  # Not known yet.
    gpu.compute(until=40)
    # From 30 to 33, while the copy was under way, and from 41 to 43.
    assert waited_ms(asked_at=41, came_at=43) == 3 + 2


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_times_tell_reading_bytes_from_making_rows_of_them(
    tmp_path: Path, format: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, pause_s = _write(tmp_path / f"store.{format}", format), 0.05
    digest = reader_module.segment_digest

    def slow_digest(*rows: NDArray[Any]) -> str:
        time.sleep(pause_s)
        return digest(*rows)

    monkeypatch.setattr(reader_module, "segment_digest", slow_digest)
    times = ReadTimes()
    reader.read_segment(0, times=times)
    assert 0 < times.read_s < pause_s <= times.decode_s
    read = LocalFiles.read_into

    def slow_read(*arguments: Any) -> None:
        time.sleep(pause_s)
        read(*arguments)

    if format == "zarr":
        monkeypatch.setattr(LocalFiles, "read_into", slow_read)
        slow = ReadTimes()
        reader.read_segment(1, times=slow)
        assert 2 * pause_s <= slow.read_s < slow.decode_s + 2 * pause_s


class _Faulty(SplitReader):
    """Reads slowly, or fails: `errors[segment]` are raised one a read until there are none left."""

    def __init__(
        self, reader: SplitReader, errors: dict[int, list[Exception]] | None = None, delay_s: float = 0
    ) -> None:
        super().__init__(reader.path, "train", reader.manifest.fingerprint, open_store(reader.path))
        self.errors, self.delay_s = errors or {}, delay_s
        self.attempts: list[int] = []

    def read_segment(
        self,
        index: int,
        x_out: NDArray[Any] | None = None,
        y_out: NDArray[Any] | None = None,
        times: ReadTimes | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        self.attempts.append(index)
        time.sleep(self.delay_s)
        if self.errors.get(index):
            raise self.errors[index].pop(0)
        return super().read_segment(index, x_out, y_out, times)


def _damaged(cause: Exception | None) -> DamagedDataError:
    error = DamagedDataError("split train, segment 3 cannot be read")
    error.__cause__ = cause
    return error


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "PAUSES_S", (0.001, 0.001))
    monkeypatch.setattr(retries, "_OUTAGES", {})


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("make", [lambda: OSError("gone"), lambda: _damaged(OSError("gone"))])
def test_a_read_that_fails_twice_succeeds_at_the_third_attempt(
    reader: SplitReader, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    flaky = _Faulty(reader, {3: [make(), make()]})
    assert _copies(_stream(flaky, 0, STEPS)) == _copies(_stream(reader, 0, STEPS))
    assert flaky.attempts.count(3) == 3
    first, last = (record.message for record in caplog.records)
    assert first.startswith(f"{reader.path}: a read failed, trying again: ")
    assert last == f"{reader.path}: reads go on; 2 had failed"


@pytest.mark.usefixtures("short_pauses")
def test_an_outage_that_all_readers_meet_is_told_in_one_line_and_its_end_in_another(
    reader: SplitReader, caplog: pytest.LogCaptureFixture
) -> None:
    expected = _copies(_stream(reader, 0, STEPS))
    n_segments = reader.info.n_segments
    flaky = _Faulty(reader, {index: [OSError("gone"), OSError("gone")] for index in range(n_segments)})
    assert _copies(_stream(flaky, 0, STEPS)) == expected
    assert len(flaky.attempts) > 2 * n_segments
    first, *ends = (record.message for record in caplog.records)
    assert "a read failed" in first
    assert len(ends) == 1
    assert re.search(r"reads go on; \d+ had failed", ends[0])


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    ("cause", "attempts"), [(OSError("gone"), 3), (ValueError("checksum"), 1), (None, 1)]
)
def test_only_input_output_errors_are_tried_again(
    reader: SplitReader, cause: Exception | None, attempts: int
) -> None:
    broken = _Faulty(reader, {3: [_damaged(cause) for _ in range(9)]})
    with pytest.raises(DamagedDataError, match="segment 3"):
        _copies(_stream(broken, 0, STEPS))
    assert broken.attempts.count(3) == attempts


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_a_damaged_segment_reaches_the_consumer_once_after_the_batches_before_it(
    tmp_path: Path, format: Any
) -> None:
    reader = _write(tmp_path / "s", format)
    damaged = int(ORDER.segments(0)[5])
    needle = reader.read_segment(damaged)[0].tobytes()
    for file in [tmp_path / "s"] if format == "hdf5" else (tmp_path / "s/train/x").rglob("c/*/*"):
        file.write_bytes(file.read_bytes().replace(needle, needle[:-1] + b"\x01"))
    sound = _expected_rows(ORDER, 1)
    # The segments of the first two windows are sound.
    rows = int(ORDER.window_ends(ORDER.segments(0))[1])
    before = [step for step in range(STEPS) if ORDER.batch_bounds(step)[1] <= rows]
    seen = []
    with _stream(open_store(tmp_path / "s").split("train"), 0, 2 * STEPS) as stream:
        for batch in islice(stream, len(before)):
            assert batch.x[:, 0].tolist() == sound[batch.step]
            seen.append(batch.step)
        with pytest.raises(DamagedDataError, match=f"split train, segment {damaged} "):
            next(stream)
        assert list(stream) == []
    assert seen == before


def test_leaving_while_reads_are_waiting_begins_no_more_of_them(reader: SplitReader) -> None:
    slow = _Faulty(reader, delay_s=0.2)
    with _stream(slow, 0, 9 * STEPS, replace(ORDER, window_segments=100)):
        time.sleep(0.1)
    assert len(slow.attempts) == 2  # One in each thread.
    assert _own_threads() == []


def test_leaving_by_an_error_of_the_consumer_leaves_no_thread(reader: SplitReader) -> None:
    def consume() -> None:
        with _stream(reader, 0, STEPS) as stream:
            for batch in stream:
                if batch.step == 2:
                    raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        consume()
    assert _own_threads() == []


def test_a_stream_that_cannot_be_set_up_leaves_no_thread(
    reader: SplitReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unstartable(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr("ep3stream.stream.prefetch.threading.Thread", Unstartable)
    with pytest.raises(RuntimeError, match="new thread"):
        _stream(reader, 0, STEPS).__enter__()
    assert _own_threads() == []


def test_fifty_random_starts_and_stops_give_the_right_batches_and_leave_nothing(reader: SplitReader) -> None:
    rng = np.random.default_rng(0)
    expected = _expected_rows(ORDER, 3)
    jittery = _Faulty(reader)
    for _ in range(50):
        jittery.delay_s = rng.choice([0, 0.001, 0.003])
        start = int(rng.integers(0, 3 * STEPS))
        with _stream(jittery, start, 3 * STEPS) as stream:
            for batch in islice(stream, int(rng.integers(0, 20))):
                assert batch.x[:, 0].tolist() == expected[batch.step]
            time.sleep(rng.choice([0, 0.002]))
        assert _own_threads() == []


@pytest.fixture
def cluster() -> Iterator[Any]:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1,
        threads_per_worker=2,
        processes=False,
        protocol="tcp",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    ) as cluster:
        yield cluster


def test_a_dask_cluster_gives_the_same_batches(reader: SplitReader, cluster: Any) -> None:
    whole = _copies(_stream(reader, 0, 2 * STEPS))
    stream = _stream(reader, 7, 2 * STEPS, dask=cluster.scheduler_address)
    assert _copies(stream) == whole[7:]
    assert stream.times.read_s > 0
    assert _becomes(lambda: _open_tasks(cluster) == 0)


def test_leaving_a_dask_stream_leaves_no_task_and_no_client(reader: SplitReader, cluster: Any) -> None:
    for n_batches in (0, 1, 5):
        with _stream(reader, 0, 99 * STEPS, dask=cluster.scheduler_address) as stream:
            for batch in islice(stream, n_batches):
                assert len(batch.x) > 6
        assert _becomes(
            lambda: _own_threads() == []
        )  # Those of a worker, which opens the store, end by themselves.
    assert _becomes(lambda: _open_tasks(cluster) == 0)


def test_leaving_a_dask_stream_cancels_the_reads_that_wait(
    reader: SplitReader, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = _Faulty(reader, delay_s=0.2)
    monkeypatch.setattr(segment_reads, "_reader_on_worker", lambda *_: slow)
    order = replace(ORDER, window_segments=100)
    with _stream(reader, 0, STEPS, order, dask=cluster.scheduler_address):
        assert _becomes(lambda: len(slow.attempts) > 0)
    assert _becomes(lambda: _open_tasks(cluster) == 0)
    assert len(slow.attempts) < 8


def _open_tasks(cluster: Any) -> int:
    """Tasks and clients the scheduler still knows."""
    scheduler = cluster.scheduler
    return len(scheduler.tasks) + sum(name.startswith("Client") for name in scheduler.clients)


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("error", [OSError("gone"), _damaged(OSError("gone"))])
def test_dask_workers_try_again_too(
    reader: SplitReader, cluster: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    flaky = _Faulty(reader, {3: [error] * 2})
    monkeypatch.setattr(segment_reads, "_reader_on_worker", lambda *_: flaky)
    batches = _copies(_stream(reader, 0, STEPS, dask=cluster.scheduler_address))
    assert batches == _copies(_stream(reader, 0, STEPS))
    assert flaky.attempts.count(3) == 3


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    ("error", "kind"), [(_damaged(None), DamagedDataError), (ZeroDivisionError("odd"), Ep3streamError)]
)
def test_an_error_on_a_dask_worker_names_the_segment(
    reader: SplitReader, cluster: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type
) -> None:
    broken = _Faulty(reader, {3: [error] * 9})
    monkeypatch.setattr(segment_reads, "_reader_on_worker", lambda *_: broken)
    with pytest.raises(kind, match="segment 3"):
        _copies(_stream(reader, 0, STEPS, dask=cluster.scheduler_address))
    assert _own_threads() == []


def test_a_dask_worker_without_memory_is_told_as_such(
    reader: SplitReader, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = _Faulty(reader, {3: [MemoryError("too little")] * 9})
    monkeypatch.setattr(segment_reads, "_reader_on_worker", lambda *_: broken)
    with pytest.raises(MemoryError, match="too little"):
        _copies(_stream(reader, 0, STEPS, dask=cluster.scheduler_address))
    assert _own_threads() == []


@pytest.mark.parametrize("address", ["nonsense", "foo://127.0.0.1:1", "tcp://127.0.0.1:9"])
def test_a_dask_address_without_a_scheduler_is_refused(reader: SplitReader, address: str) -> None:
    with pytest.raises(ConfigError, match=r"no scheduler answers there .* correct the address"):
        _stream(reader, 0, STEPS, dask=address).__enter__()


@pytest.mark.gpu
def test_batches_on_a_gpu_are_copied_from_pinned_memory_and_never_overwritten_too_early(
    tmp_path: Path,
) -> None:
    device = torch.device("cuda")
    reader = _write(tmp_path / "s")
    expected = _expected_rows(ORDER, 20)
    seen = []
    with BatchStream(reader, ORDER, 3, 20 * STEPS, device) as stream:
        for batch in stream:
            assert batch.x.device.type == batch.y.device.type == "cuda"
            # The GPU is kept busy (a millisecond or so), so that it reads the batch long after the loop went on.
            torch.cuda._sleep(2_000_000)
            seen.append((batch.step, batch.x[:, 0].clone(), batch.y.clone()))
            held = stream._held
            assert held is not None
            assert held._host_x.is_pinned()
            assert held._host_y.is_pinned()
    assert [step for step, _, _ in seen] == list(range(3, 20 * STEPS))
    for step, x, y in seen:
        assert x.tolist() == expected[step]
        assert y.tolist() == [row % 7 for row in expected[step]]
