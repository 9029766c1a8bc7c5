"""Batches read ahead of the solver: segments by tasks, in order, into memory that is allocated once.

    tasks, one a segment           one thread                      the trainer
    store -> windows (2 of them) -> gathers rows -> batch slots -> computes

An error in a task reaches the trainer in place of the batch that lacks the rows. A fit's state holds nothing of the
rows read ahead: a stream starts at any step.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ep3stream.errors import InputError
from ep3stream.store.backend import ReadTimes, y_row
from ep3stream.store.reader import SplitReader
from ep3stream.store.retries import finish_read
from ep3stream.stream.batch_slots import Batch, BatchSlot, DataWaits
from ep3stream.stream.order import RowOrder, Rows, WindowVisit
from ep3stream.stream.segment_reads import DaskReads, Finish, LocalReads, SegmentReads

_WINDOWS = 2
_BATCH_SLOTS = 3


@dataclass(slots=True)
class StreamTimes(ReadTimes):
    """Seconds spent so far, without those of the consumer.

    read_s, decode_s: summed over tasks, of which several run at once. The others are those of the one thread that
    makes batches. segments_s: waiting for tasks; gather_s: putting rows into batches; copy_s: making batches float32
    and copying them to the device.
    """

    segments_s: float = 0.0
    gather_s: float = 0.0
    copy_s: float = 0.0


class BatchStream:
    """Iterates over the batches of steps `start`..`stop`-1, counted over all epochs. A context manager.

    `dask`: address of a running Dask scheduler whose workers see the store under the same path; None reads in
    this process. Memory: two windows, 8 bytes for each of their rows, and three batches (with Dask, up to two
    windows of results besides). Raises InputError when order and reader disagree about the rows, or when used
    outside `with`.

    A segment that fails with an input/output error, or does not come within the reader's `read_timeout_s`, is asked for
    twice more; then a DamagedDataError names the segment.

    Leaving `with`, at any moment, ends all threads. It waits for reads of this process that are under way, for ten
    seconds at most; a thread whose read does not end is left behind. Entered again, the stream goes on after the last
    batch that it gave.
    """

    def __init__(
        self,
        reader: SplitReader,
        order: RowOrder,
        start: int,
        stop: int,
        device: torch.device,
        dask: str | None = None,
    ) -> None:
        info = reader.info
        expected = (info.n_rows, info.segment_rows)
        if (order.n_rows, order.segment_rows) != expected:
            raise InputError(
                f"order has {order.n_rows} rows in segments of {order.segment_rows} but split {info.name} "
                f"has {expected[0]} in segments of {expected[1]}; make the order from that split"
            )
        if not 0 <= start <= stop:
            raise InputError(f"steps {start} to {stop}: use 0 <= start <= stop")
        self.times, self._waits = StreamTimes(), DataWaits(device)
        self._reader, self._order, self._stop = reader, order, stop
        self._device, self._dask = device, dask
        self._next_step = start
        self._is_open = False
        self._resources = ExitStack()

    def __enter__(self) -> BatchStream:
        if self._is_open:
            raise InputError("this BatchStream is open already; make another one")
        self._held: BatchSlot | None = None
        self._free: SimpleQueue[BatchSlot | None] = SimpleQueue()
        self._ready: SimpleQueue[BatchSlot | BaseException] = SimpleQueue()
        # The stack is left in reverse: the producer is freed from everything it may wait for, then joined.
        with ExitStack() as stack:
            copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
            slot_rows = min(self._order.batch_size, self._order.epoch_rows)
            for _ in range(_BATCH_SLOTS):
                self._free.put(BatchSlot(self._reader.manifest, slot_rows, self._device, copies))
            if copies is not None:
                stack.callback(copies.synchronize)
            reads = self._reads()
            stack.enter_context(reads)
            sorter = stack.enter_context(ThreadPoolExecutor(1, "ep3stream-order"))
            windows = [_Window(self._reader, self._order, reads, sorter) for _ in range(_WINDOWS)]
            producer = threading.Thread(
                target=self._run, args=(windows, self._next_step), name="ep3stream-prefetch", daemon=True
            )
            producer.start()
            stack.callback(producer.join)
            stack.callback(reads.stop)
            stack.callback(self._free.put, None)
            self._resources = stack.pop_all()
        self._is_open = True
        return self

    def _reads(self) -> SegmentReads:
        if self._dask is None:
            return LocalReads(self._reader)
        return DaskReads(self._reader, self._dask)

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        self._resources.close()
        del self._held, self._free, self._ready  # Frees the memory of the slots.

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._waits.begin()
        if not self._is_open:
            raise InputError("a BatchStream gives batches only inside its with block; open it there")
        if self._held is not None:
            self._held.release()
            self._free.put(self._held)
            self._held = None
        if self._next_step == self._stop:
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._next_step = self._stop  # Nothing follows an error.
            raise item
        self._held = item
        self._next_step += 1
        return item.batch(self._waits)

    def _run(self, windows: list[_Window], start: int) -> None:
        try:
            self._produce(windows, start)
        except BaseException as error:  # The consumer raises it.
            self._ready.put(error)

    def _produce(self, windows: list[_Window], start: int) -> None:
        """Fill slots with the rows of one step after another, until the last step or until no slot comes."""
        filled = self._filled(windows, start)
        window = None
        for step in range(start, self._stop):
            slot = self._free.get()
            if slot is None:
                return
            slot.begin(step)
            first, end = self._order.batch_bounds(step % self._order.steps_per_epoch)
            missing = end - first
            while missing:
                if window is None or not len(window.rows):
                    window = next(filled)
                began = time.perf_counter()
                missing -= window.move_rows(missing, slot)
                self.times.gather_s += time.perf_counter() - began
            began = time.perf_counter()
            slot.send()
            self.times.copy_s += slot.take_copied_s() + time.perf_counter() - began
            self._ready.put(slot)

    def _filled(self, windows: list[_Window], start: int) -> Iterator[_Window]:
        """Yield window after window with its rows; while one is used, the reads of the next are under way."""
        begun: deque[_Window] = deque()
        for window, visit in zip(cycle(windows), self._order.visits(start, self._stop), strict=False):
            window.begin(visit)
            begun.append(window)
            if len(begun) == len(windows):
                begun[0].finish(self.times)
                yield begun.popleft()
        for window in begun:
            window.finish(self.times)
            yield window


class _Window:
    """Memory for the segments of one window, the reads under way into it, and its rows yet to be used."""

    def __init__(
        self,
        reader: SplitReader,
        order: RowOrder,
        reads: SegmentReads,
        sorter: ThreadPoolExecutor,
    ) -> None:
        manifest = reader.manifest
        shape = (min(order.window_segments, order.n_segments), min(order.segment_rows, order.n_rows))
        y_shape = y_row(manifest.task, manifest.n_outputs)
        # Filled, and so taken from the system now: a machine with too little memory fails before the first step.
        self._x = np.full((*shape, manifest.n_features), 0, manifest.x_dtype)
        self._y = np.full((*shape, *y_shape), 0, manifest.y_dtype)
        self._reader, self._order, self._reads, self._sorter = reader, order, reads, sorter
        self._begun: deque[Finish] = deque()
        self.rows: Rows = np.empty(0, np.int64)

    def begin(self, visit: WindowVisit) -> None:
        """Begin to read the window's segments and to permute its rows; the rows it had are lost."""
        for place, segment in enumerate(visit.segments.tolist()):
            self._begun.append(self._reads.begin(segment, self._x[place], self._y[place]))
        self._segments = visit.segments
        self._used = visit.used
        self._sorting: Future[Rows] = self._sorter.submit(
            self._order.window_rows, visit.epoch, visit.index, visit.segments
        )

    def finish(self, times: StreamTimes) -> None:
        """Wait until every row is here; add the seconds of waiting and reading to `times`."""
        began = time.perf_counter()
        read_again: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}
        for place, segment in enumerate(self._segments.tolist()):

            def begin_again(place: int = place, segment: int = segment) -> Finish:
                read_again[place] = np.empty_like(self._x[place]), np.empty_like(self._y[place])
                return self._reads.begin(segment, *read_again[place])

            # Popped, and so let go of: a cluster keeps a result for as long as its future lives here.
            took = finish_read(self._reader, segment, self._begun.popleft(), begin_again)
            times.read_s += took.read_s
            times.decode_s += took.decode_s
        if read_again:
            # In new memory: a read that hangs may yet write to the old one.
            self._x, self._y = self._x.copy(), self._y.copy()
            for place, (x, y) in read_again.items():
                self._x[place], self._y[place] = x, y
        self.rows = self._sorting.result()[self._used :]
        times.segments_s += time.perf_counter() - began

    def move_rows(self, limit: int, slot: BatchSlot) -> int:
        """Give up to `limit` of the next rows to `slot`; returns how many."""
        moved, self.rows = self.rows[:limit], self.rows[limit:]
        x, y = (rows.reshape(-1, *rows.shape[2:]) for rows in (self._x, self._y))
        slot.gather(x, y, moved)
        return len(moved)
