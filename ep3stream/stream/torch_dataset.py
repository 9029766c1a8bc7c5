"""A split as a PyTorch data set of batches: each row once over all workers and ranks, resumable in mid-epoch."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ep3stream.config import MIB, parse_bytes
from ep3stream.errors import InputError
from ep3stream.store.reader import SplitReader
from ep3stream.store.scan import scan
from ep3stream.stream.order import RowOrder
from ep3stream.stream.prefetch import BatchStream

_STATE_VERSION = 1
_WINDOWS = 2
_NO_ROWS = np.empty(0, np.int64)
_CPU = torch.device("cpu")

TorchBatch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _Share:
    """Which part of the rows a reader has, and everything that the rows of its steps depend on."""

    store: str
    split: str
    seed: int
    batch_size: int
    shuffle: bool
    window_segments: int
    shards: int
    shard: int


class StoreDataset(IterableDataset[TorchBatch]):
    """Batches (x, y) of a split: x, (m, d), float32; y, class ids (m,), int64, or targets (m, c), float32.

        data = StoreDataset(open_store("flights.zarr").split("train"), batch_size=512)
        for epoch in range(3):
            data.set_epoch(epoch)
            for x, y in DataLoader(data, batch_size=None, num_workers=2):
                ...

    Both are less the offsets of the store, `reader.manifest.offsets`, which added in float64 make the file's values.
    An epoch gives every row once, over all workers and ranks. Each worker gets as many batches as the others, and their
    sizes differ by at most one row. The order is a function of seed and epoch. Every pass has the order of `epoch`, so
    call `set_epoch` before each pass, as with a DistributedSampler. Without `shuffle`, rows come in the store's order.

    rank, world_size: the number of this process among those that share the rows, such as those of distributed training;
    the workers of a DataLoader need no setting. memory: bytes of read-ahead in each worker, at least two segments.
    `state_dict` returns the position after the last batch, and `load_state_dict` goes on there: in this process, or in
    each worker under torchdata's StatefulDataLoader. Raises InputError for sizes that do not fit the split.
    """

    def __init__(
        self,
        reader: SplitReader,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        memory: int | str = 256 * MIB,
    ) -> None:
        super().__init__()
        if not 0 <= rank < world_size:
            raise InputError(f"rank is {rank} of {world_size}; use 0 to {world_size - 1}")
        manifest, info = reader.manifest, reader.info
        row_bytes = manifest.n_features * np.dtype(manifest.x_dtype).itemsize + 4 * manifest.n_outputs
        segment_bytes = min(info.segment_rows, info.n_rows) * row_bytes
        self._reader, self._batch_size, self._shuffle, self._seed = reader, batch_size, shuffle, seed
        self._rank, self._world_size = rank, world_size
        self._window_segments = max(1, parse_bytes(memory) // (_WINDOWS * segment_bytes))
        # Shared memory, because a DataLoader may keep its workers running from epoch to epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._step = 0
        self._resume_at: int | None = None
        self._order(self._share())  # Checks the sizes.

    @property
    def epoch(self) -> int:
        """The epoch whose order the next pass has."""
        return int(self._epoch)

    @property
    def n_rows(self) -> int:
        """The number of rows of an epoch, over all workers and ranks."""
        return self._reader.info.n_rows

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of `epoch`, from its beginning; also in workers that a DataLoader keeps running."""
        if epoch < 0:
            raise InputError(f"epoch is {epoch}; use 0 or more")
        self._epoch.fill_(epoch)
        self._step, self._resume_at = 0, None

    def __iter__(self) -> Iterator[TorchBatch]:
        share = self._share()
        order = self._order(share)
        of_shard = order.steps_per_epoch // share.shards
        self._step, self._resume_at = self._resume_at or 0, None
        first = share.shard * of_shard
        batches = self._shuffled if self._shuffle else self._in_order
        with closing(batches(order, first + self._step, first + of_shard)) as steps:
            for batch in steps:
                self._step += 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """The settings on which the rows depend, the epoch, and how many of its batches were given."""
        step = self._step if self._resume_at is None else self._resume_at
        return {"version": _STATE_VERSION, **asdict(self._share()), "epoch": self.epoch, "step": step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next pass give the rest of the state's epoch; InputError names a setting that differs from it."""
        if state.get("version") != _STATE_VERSION:
            raise InputError(
                f"the state has the version {state.get('version')!r}; this one reads {_STATE_VERSION}"
            )
        for name, mine in asdict(self._share()).items():
            if state.get(name) != mine:
                raise InputError(
                    f"{name} is {mine!r} but was {state.get(name)!r} in the state; give the same one, "
                    "and as many workers and ranks"
                )
        self.set_epoch(state["epoch"])
        self._resume_at = state["step"]

    def _share(self) -> _Share:
        worker = get_worker_info()
        n_workers, index = (1, 0) if worker is None else (worker.num_workers, worker.id)
        return _Share(
            store=self._reader.manifest.fingerprint,
            split=self._reader.info.name,
            seed=self._seed,
            batch_size=self._batch_size,
            shuffle=self._shuffle,
            window_segments=self._window_segments,
            shards=self._world_size * n_workers,
            shard=self._rank * n_workers + index,
        )

    def _order(self, share: _Share) -> RowOrder:
        info = self._reader.info
        sizes = (info.n_rows, info.segment_rows, share.window_segments, share.batch_size)
        return RowOrder(share.seed, *sizes, _NO_ROWS, share.shards)

    def _shuffled(self, order: RowOrder, start: int, stop: int) -> Generator[TorchBatch, None, None]:
        offset = self.epoch * order.steps_per_epoch
        with BatchStream(self._reader, order, start + offset, stop + offset, _CPU) as stream:
            for batch in stream:
                # Copies: the stream uses its memory again, while a worker's batch is used in another process.
                yield batch.x.clone(), _whole(batch.y.clone())

    def _in_order(self, order: RowOrder, start: int, stop: int) -> Generator[TorchBatch, None, None]:
        """The rows in the store's order; rows of a segment beyond the end of a batch are held for the next batch."""
        row = order.batch_bounds(start)[0] // order.segment_rows * order.segment_rows
        held: list[NDArray[Any]] = []
        with closing(
            scan(self._reader, range(row // order.segment_rows, self._reader.info.n_segments))
        ) as segments:
            for step in range(start, stop):
                first, end = order.batch_bounds(step)
                while row < end:
                    segment = next(segments)
                    fresh = [rows[max(0, first - row) :] if not held else rows for rows in segment]
                    held = [np.concatenate(both) for both in zip(held, fresh, strict=True)] if held else fresh
                    row += len(segment[0])
                x, y = (rows[: end - first].copy() for rows in held)
                held = [rows[end - first :] for rows in held]
                yield torch.from_numpy(x.astype(np.float32, copy=False)), _whole(torch.from_numpy(y))


def _whole(y: Tensor) -> Tensor:
    """Class ids as int64, which torch's losses need; targets as they are."""
    return y if y.is_floating_point() else y.long()
