"""Memory for one batch on its way to the solver, allocated once and used again.

    free -> gather -> send -> batch (the consumer computes) -> release -> free

On a GPU, `send` starts a copy on a side stream. Two events keep memory from being overwritten too early: host memory
is filled again once its copy is over, device memory once the work queued before `release` has been computed.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.store.backend import y_row
from ep3stream.store.manifest import Manifest
from ep3stream.stream.order import Rows


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step: x (m, d) float32, and y, class ids (m,) int32 or targets (m, c) float32.

    The rows lie on the stream's device. They are valid until the next batch is asked for; on a GPU, for the work that
    was queued on the current stream until then. waited_s: seconds without work for want of a batch, see `DataWaits`.
    """

    step: int
    x: Tensor
    y: Tensor
    waited_s: float


class DataWaits:
    """How long a device has nothing to compute because its next batch is not there yet.

    A GPU's host runs ahead of it, and waits for a batch also where the GPU still computes and uses all slots. So two
    events tell: the first is over when the GPU has done what was queued before the wait, the second when it has also
    the batch. For the CPU the wait itself counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: float | torch.cuda.Event = 0.0
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin(self) -> None:
        """The wait for a batch begins."""
        self._began = time.perf_counter() if self._device.type == "cpu" else self._event()

    def end(self) -> float:
        """The batch is here, and the current stream has been told to wait for it.

        Returns seconds, those of a GPU once they have passed there: then the sum of all that were not returned before.
        """
        if isinstance(self._began, float):
            return time.perf_counter() - self._began
        self._under_way.append((self._began, self._event()))
        waited_s = 0.0
        while self._under_way and self._under_way[0][1].query():
            began, ended = self._under_way.popleft()
            waited_s += began.elapsed_time(ended) / 1000
        return waited_s

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        torch.cuda.current_stream(self._device).record_event(event)
        return event


class BatchSlot:
    """Memory for batches of up to `max_rows` rows; for a GPU page-locked, and the same again on the device.

    copies: the side stream of a GPU; None for the CPU. The producer calls `begin`, `gather` and `send`, the consumer
    `batch` and `release`; only one of the two has the slot at a time.
    """

    def __init__(
        self, manifest: Manifest, max_rows: int, device: torch.device, copies: torch.cuda.Stream | None
    ) -> None:
        pin = copies is not None
        y_shape = (max_rows, *y_row(manifest.task, manifest.n_outputs))
        y_dtype = torch.from_numpy(np.empty(0, manifest.y_dtype)).dtype
        self._host_x = torch.zeros(max_rows, manifest.n_features, pin_memory=pin)
        self._host_y = torch.zeros(y_shape, dtype=y_dtype, pin_memory=pin)
        self._x = torch.empty_like(self._host_x, device=device) if pin else self._host_x
        self._y = torch.empty_like(self._host_y, device=device) if pin else self._host_y
        self._stored_x = self._host_x.numpy()
        if manifest.x_dtype != "float32":
            self._stored_x = np.zeros(self._stored_x.shape, manifest.x_dtype)
        self._device, self._copies = device, copies
        self._copying: torch.cuda.Event | None = None
        self._copied: torch.cuda.Event | None = None
        self._copied_s = 0.0
        self._released = self._consumer_event()
        self._step = self._n_rows = 0

    def begin(self, step: int) -> None:
        """Start the batch of a step, after waiting until the last batch has been copied out of the host memory."""
        if self._copying is not None and self._copied is not None:
            self._copied.synchronize()
            self._copied_s = self._copying.elapsed_time(self._copied) / 1000
        self._step, self._n_rows = step, 0

    def gather(self, x: NDArray[Any], y: NDArray[Any], rows: Rows) -> None:
        """Append the rows numbered `rows` of x (N, d) and y (N, ...) to the batch."""
        place = slice(self._n_rows, self._n_rows + len(rows))
        # mode="clip" lets numpy write into `out` without a buffer of its own.
        np.take(x, rows, axis=0, out=self._stored_x[place], mode="clip")
        np.take(y, rows, axis=0, out=self._host_y.numpy()[place], mode="clip")
        self._n_rows = place.stop

    def send(self) -> None:
        """Convert the batch to float32 and start its copy to the device."""
        n_rows = self._n_rows
        if self._stored_x.dtype != np.float32:
            np.copyto(self._host_x.numpy()[:n_rows], self._stored_x[:n_rows])
        if self._copies is None:
            return
        with torch.cuda.stream(self._copies):
            if self._released is not None:
                self._copies.wait_event(self._released)
            self._copying = self._copies.record_event(torch.cuda.Event(enable_timing=True))
            self._x[:n_rows].copy_(self._host_x[:n_rows], non_blocking=True)
            self._y[:n_rows].copy_(self._host_y[:n_rows], non_blocking=True)
            self._copied = self._copies.record_event(torch.cuda.Event(enable_timing=True))

    def take_copied_s(self) -> float:
        """The seconds that the last finished copy took the device; 0 when asked again."""
        copied_s, self._copied_s = self._copied_s, 0.0
        return copied_s

    def batch(self, waits: DataWaits) -> Batch:
        """The batch, for use on the current stream, which waits for the copy to the device; the caller does not.

        It ends the wait that the caller has begun.
        """
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        return Batch(self._step, self._x[: self._n_rows], self._y[: self._n_rows], waits.end())

    def release(self) -> None:
        """Declare that the consumer has queued all its work on the batch."""
        self._released = self._consumer_event()

    def _consumer_event(self) -> torch.cuda.Event | None:
        return None if self._copies is None else torch.cuda.current_stream(self._device).record_event()
