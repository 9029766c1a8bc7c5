"""Rows read by one rank of each machine, for all ranks of it: batches of a fit, and all rows of a scan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.mesh import Mesh
from ep3stream.store.backend import y_row
from ep3stream.store.manifest import Manifest
from ep3stream.stream.batch_slots import Batch
from ep3stream.stream.order import RowOrder
from ep3stream.stream.prefetch import BatchStream, StreamTimes
from ep3stream.stream.scan import Segment

_ROOMS = 2


class NodeBatches:
    """The batches of steps start..stop-1, the same on every rank. A context manager and an iterator.

    Each machine reads all of them, once: a batch is needed whole by every shard of the centers. The reader hands it on
    through memory that the machine's ranks share, or between GPUs. What it fails with is raised on every rank.
    """

    def __init__(
        self, mesh: Mesh, manifest: Manifest, order: RowOrder, steps: range, stream: Callable[[], BatchStream]
    ) -> None:
        self._mesh, self._order, self._steps = mesh, order, iter(steps)
        self._stream = stream() if mesh.reads else None
        self._rooms: list[tuple[Tensor, Tensor]] = []
        if mesh.local_size > 1:
            m = min(order.batch_size, order.epoch_rows)
            y_shape = (m, *y_row(manifest.task, manifest.n_outputs))
            y_dtype = torch.from_numpy(np.empty(0, manifest.y_dtype)).dtype
            # Two: while the reader fills one, ranks behind it may still compute on the other.
            self._rooms = [
                (
                    mesh.node_room((m, manifest.n_features), torch.float32),
                    mesh.node_room(y_shape, y_dtype),
                )
                for _ in range(_ROOMS)
            ]

    @property
    def times(self) -> StreamTimes:
        """Of the reader; zeros elsewhere."""
        return StreamTimes() if self._stream is None else self._stream.times

    def __enter__(self) -> NodeBatches:
        if self._stream is not None:
            self._stream.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.__exit__(kind, error, traceback)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        step = next(self._steps)
        if self._mesh.size == 1:
            assert self._stream is not None
            return next(self._stream)
        began = time.perf_counter()
        x, y = self._mesh.all_or_raise(lambda: self._read(step))
        for tensor in (x, y):
            self._mesh.tell_node(tensor)
        return Batch(step, x, y, time.perf_counter() - began)

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        """The reader's batch; on the others, and where memory is shared on both sides, the room for it."""
        first, end = self._order.batch_bounds(step % self._order.steps_per_epoch)
        batch = None if self._stream is None else next(self._stream)
        if self._rooms and (batch is None or self._mesh.device.type == "cpu"):
            x, y = (room[: end - first] for room in self._rooms[step % _ROOMS])
            if batch is not None:
                x.copy_(batch.x)
                y.copy_(batch.y)
            return x, y
        assert batch is not None
        return batch.x, batch.y


def node_pieces(
    mesh: Mesh, parts: Callable[[], Iterable[Segment]], n_features: int, n_rows: int
) -> Iterator[tuple[Tensor, NDArray[Any] | None]]:
    """x, (up to n_rows, d) on the device of every rank, and y on the ranks that read, of `parts` in pieces.

    A piece is valid until the next one is asked for, which every rank must do after a collective on this one.
    """
    pieces = _split(parts(), n_rows) if mesh.reads else iter(())
    room = mesh.node_room((n_rows, n_features), torch.float32) if mesh.local_size > 1 else None
    while True:
        piece = mesh.all_or_raise(lambda: next(pieces, None))
        if piece is not None and room is not None:
            room[: len(piece[0])] = torch.from_numpy(piece[0])
        length = mesh.all_reduce_max([0 if piece is None else len(piece[0])])[0]
        if not length:
            return
        if room is not None:
            x = room[:length]
            mesh.tell_node(x)
        else:
            assert piece is not None  # Every machine reads the same.
            x = torch.from_numpy(piece[0]).to(mesh.device).float()
        yield x, None if piece is None else piece[1]


def _split(parts: Iterable[Segment], n_rows: int) -> Iterator[Segment]:
    for x, y in parts:
        for start in range(0, len(x), n_rows):
            yield x[start : start + n_rows], y[start : start + n_rows]
