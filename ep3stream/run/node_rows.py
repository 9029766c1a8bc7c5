"""Rows that one rank of each machine reads for all of its ranks: the batches of a fit, and all rows of a scan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.mesh import Mesh
from ep3stream.store.backend import y_row
from ep3stream.store.manifest import Manifest
from ep3stream.store.scan import Segment
from ep3stream.stream.batch_slots import Batch, DataWaits
from ep3stream.stream.order import RowOrder
from ep3stream.stream.prefetch import BatchStream, StreamTimes

# While the reader fills one buffer, ranks behind it may still compute on the other.
_N_BUFFERS = 2


class NodeBatches:
    """The batches of `steps`, the same on every rank: an iterator, and a context manager that stops the reading.

    Every shard of the centers needs every batch whole. So each machine reads all batches, once: its reader does, and
    hands them to the machine's other ranks through shared memory, or from GPU to GPU. An error of a reader is raised
    on every rank.
    """

    def __init__(
        self, mesh: Mesh, manifest: Manifest, order: RowOrder, steps: range, stream: Callable[[], BatchStream]
    ) -> None:
        self._mesh, self._order, self._steps = mesh, order, iter(steps)
        self._stream = stream() if mesh.is_reader else None
        self._entered: AbstractContextManager[Any] = nullcontext() if self._stream is None else self._stream
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._waits = DataWaits(mesh.device)
        if mesh.local_size > 1:
            m = min(order.batch_size, order.epoch_rows)
            y_shape = (m, *y_row(manifest.task, manifest.n_outputs))
            y_dtype = torch.from_numpy(np.empty(0, manifest.y_dtype)).dtype
            for _ in range(_N_BUFFERS):
                x = mesh.node_buffer((m, manifest.n_features), torch.float32)
                self._buffers.append((x, mesh.node_buffer(y_shape, y_dtype)))

    @property
    def times(self) -> StreamTimes:
        """The seconds of the reading so far; zeros on a rank that does not read."""
        return StreamTimes() if self._stream is None else self._stream.times

    def __enter__(self) -> NodeBatches:
        self._entered.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._entered.__exit__(*exc)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        step = next(self._steps)
        if self._mesh.size == 1:
            assert self._stream is not None
            return next(self._stream)
        self._waits.begin()
        x, y = self._mesh.all_or_raise(lambda: self._read(step))
        waited_s = self._waits.end()
        for tensor in (x, y):
            self._mesh.broadcast_in_node(tensor)
        return Batch(step, x, y, waited_s)

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        """The reader's batch, in a buffer where that is shared memory; on other ranks the buffer for the batch."""
        first, end = self._order.batch_bounds(step % self._order.steps_per_epoch)
        batch = None if self._stream is None else next(self._stream)
        if self._buffers and (batch is None or self._mesh.device.type == "cpu"):
            x, y = (buffer[: end - first] for buffer in self._buffers[step % _N_BUFFERS])
            if batch is not None:
                x.copy_(batch.x)
                y.copy_(batch.y)
            return x, y
        assert batch is not None
        return batch.x, batch.y


def node_pieces(
    mesh: Mesh, parts: Callable[[], Iterable[Segment]], n_features: int, n_rows: int
) -> Iterator[tuple[Tensor, NDArray[Any] | None]]:
    """The rows of `parts` in pieces of up to `n_rows`: x, (rows, d) on every rank's device, and y on readers only.

    A piece is valid until the next one is asked for, which every rank must do after a collective on this one. An error
    of a reader is raised on every rank.
    """
    pieces = _split(parts(), n_rows) if mesh.is_reader else iter(())
    buffer = mesh.node_buffer((n_rows, n_features), torch.float32) if mesh.local_size > 1 else None
    while True:
        piece = mesh.all_or_raise(lambda: next(pieces, None))
        if piece is not None and buffer is not None:
            buffer[: len(piece[0])] = torch.from_numpy(piece[0])
        length = mesh.all_reduce_max([0 if piece is None else len(piece[0])])[0]
        if not length:
            return
        if buffer is not None:
            x = buffer[:length]
            mesh.broadcast_in_node(x)
        else:
            assert piece is not None  # Every machine reads the same.
            x = torch.from_numpy(piece[0]).to(mesh.device).float()
        yield x, None if piece is None else piece[1]


def _split(parts: Iterable[Segment], n_rows: int) -> Iterator[Segment]:
    for x, y in parts:
        for start in range(0, len(x), n_rows):
            yield x[start : start + n_rows], y[start : start + n_rows]
