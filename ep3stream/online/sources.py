"""The batches that a `KernelModel` is given: arrays, a split of a store, or a loader of the user's own; checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.config import Task
from ep3stream.errors import InputError
from ep3stream.solver.targets import TargetCode
from ep3stream.store.reader import SplitReader
from ep3stream.stream.order import RowOrder
from ep3stream.stream.prefetch import epoch_batches
from ep3stream.stream.scan import sample_rows, scan
from ep3stream.training.plan import Shape

Array = Tensor | NDArray[Any]

Pair = tuple[Array, Array]

Names = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...] | None]

_SAMPLES, _EPOCHS = 2, 4  # Purposes of random numbers.

_OWN_BATCH = 4096

_UNKNOWN_ROWS = 1 << 40


@dataclass(frozen=True, slots=True)
class RowForm:
    """The form of rows: d features, c outputs, and what y says. Raises InputError naming what has another."""

    n_features: int
    n_outputs: int
    task: Task
    device: torch.device

    def pair(self, x: Array, y: Array) -> tuple[Tensor, Tensor]:
        """x, (m, d), and y: (m,) class ids or (m, c) values, on the device."""
        inputs, targets = self.inputs(x), _tensor(y, "y")
        if len(inputs) != len(targets) or targets.ndim not in (1, 2):
            raise InputError(f"x has {len(inputs)} rows but y has the shape {tuple(targets.shape)}")
        coded = self._ids(targets) if self.task == "classification" else self._values(targets)
        return inputs, coded.to(self.device)

    def inputs(self, x: Array, name: str = "x") -> Tensor:
        """x, (m, d), m >= 1, in float32 on the device, with finite distances."""
        rows = _tensor(x, name)
        if rows.ndim != 2 or rows.shape[1] != self.n_features or not len(rows):
            raise InputError(
                f"{name} has the shape {tuple(rows.shape)}; the centers have {self.n_features} features, "
                f"so it must be (m, {self.n_features}) with at least one row"
            )
        rows = rows.detach().float()
        if not bool(rows.square().sum(1).isfinite().all()):
            raise InputError(
                f"{name} has a value that is not finite, or whose square is not in float32; "
                "fill missing values and use a larger unit"
            )
        return rows.to(self.device)

    def code(self, y: Tensor) -> TargetCode:
        """From y as `pair` gives it: the frequencies of classes, or mean and spread of targets."""
        if self.task == "classification":
            frequency = torch.bincount(y, minlength=self.n_outputs).double() / len(y)
            return TargetCode(True, frequency.float(), torch.ones_like(frequency, dtype=torch.float32))
        spread, mean = torch.std_mean(y.double(), 0, correction=0)
        return TargetCode(False, mean.float(), torch.where(spread > 0, spread, 1.0).float())

    def names(self, reader: SplitReader | None) -> Names:
        """Of features, targets and classes: those of the store, or x0, x1, ...; InputError unless it has as many."""
        classes = None
        if reader is None:
            targets = tuple(f"y{i}" for i in range(self.n_outputs))
            if self.task == "classification":
                targets, classes = ("y",), tuple(str(i) for i in range(self.n_outputs))
            return tuple(f"x{i}" for i in range(self.n_features)), targets, classes
        manifest = reader.manifest
        if (manifest.task, manifest.n_features, manifest.n_outputs) != (
            self.task,
            self.n_features,
            self.n_outputs,
        ):
            raise InputError(
                f"{reader.path} is for {manifest.task} of {manifest.n_features} features to {manifest.n_outputs} "
                f"outputs, the model for {self.task} of {self.n_features} to {self.n_outputs}; make it to fit"
            )
        classes = None if manifest.class_names is None else tuple(manifest.class_names)
        return tuple(manifest.feature_names), tuple(manifest.target_names), classes

    def shape(self, reader: SplitReader | None) -> Shape:
        """For the plan; of what is not a store, the rows are taken to be without end and well mixed."""
        d, c = self.n_features, self.n_outputs
        row_bytes = 4 * (d + (1 if self.task == "classification" else c))
        if reader is None:
            return Shape(_UNKNOWN_ROWS, d, c, _OWN_BATCH, row_bytes, True)
        is_shuffled = reader.manifest.shuffle_seed is not None
        return Shape(reader.info.n_rows, d, c, reader.info.segment_rows, row_bytes, is_shuffled)

    def _ids(self, y: Tensor) -> Tensor:
        c = self.n_outputs
        if y.ndim == 2:
            is_one_hot = y.shape[1] == c and bool(
                ((y == 1).sum(1) == 1).all() and ((y != 0).sum(1) == 1).all()
            )
            if not is_one_hot:
                raise InputError(
                    f"y of the shape {tuple(y.shape)} is not one-hot rows of n_outputs = {c} classes; "
                    "give class ids of (m,), or use task='regression' for other targets"
                )
            return y.argmax(1)
        if y.is_floating_point() or y.is_complex():
            raise InputError(
                f"y holds {y.dtype}, but class ids are whole numbers; use y.long() or a task='regression'"
            )
        ids = y.long()
        if int(ids.min()) < 0 or int(ids.max()) >= c:
            raise InputError(
                f"y holds class ids from {int(ids.min())} to {int(ids.max())}, but n_outputs is {c}; "
                f"use ids from 0 to {c - 1}"
            )
        return ids

    def _values(self, y: Tensor) -> Tensor:
        values = y[:, None] if y.ndim == 1 else y
        if values.shape[1] != self.n_outputs:
            hint = "; for class ids use task='classification'" if y.ndim == 1 else ""
            raise InputError(f"y has the shape {tuple(y.shape)} but n_outputs is {self.n_outputs}{hint}")
        values = values.detach().float()
        if not bool(values.isfinite().all()):
            raise InputError("y has a value that is not finite in float32; drop those rows")
        return values


def _tensor(values: Array, name: str) -> Tensor:
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} holds {array.dtype}, not numbers; give a tensor or an array of numbers")
    # torch may not write to it, and knows neither other byte orders nor large unsigned integers.
    with np.errstate(over="ignore"):
        dtype = np.float32 if array.dtype.kind == "f" else np.int64
        return torch.from_numpy(np.require(array, dtype, ["C", "W"]))


@runtime_checkable
class Source(Protocol):
    """Rows to fit to or to score."""

    @property
    def n_rows(self) -> int:
        """Of an epoch; a number without end where nobody knows."""
        ...

    def drawn(self, n_rows: int, seed: int) -> Pair | None:
        """So many random rows of all, in random order; None where they only come in batches."""
        ...

    def epoch(self, seed: int, epoch: int, window_segments: int, device: torch.device) -> Iterator[Pair]:
        """The batches of one epoch, in an order that depends on (seed, epoch) where it is not the user's own."""
        ...

    def all(self) -> Iterator[Pair]:
        """Every row once."""
        ...


Data = Pair | SplitReader | Iterable[Pair] | Source


@dataclass(frozen=True, slots=True)
class ArraySource:
    """x, (n, d), and y of n rows, tensors or arrays; copied a batch at a time."""

    x: Array
    y: Array

    @property
    def n_rows(self) -> int:
        """n."""
        return len(self.x)

    def drawn(self, n_rows: int, seed: int) -> Pair:
        """The first of a permutation."""
        return self._take(np.random.default_rng((seed, _SAMPLES)).permutation(self.n_rows)[:n_rows])

    def epoch(self, seed: int, epoch: int, window_segments: int, device: torch.device) -> Iterator[Pair]:
        """A permutation of all rows."""
        order = np.random.default_rng((seed, _EPOCHS, epoch)).permutation(self.n_rows)
        for start in range(0, self.n_rows, _OWN_BATCH):
            yield self._take(order[start : start + _OWN_BATCH])

    def all(self) -> Iterator[Pair]:
        """As they lie."""
        for start in range(0, self.n_rows, _OWN_BATCH):
            rows = slice(start, start + _OWN_BATCH)
            yield self.x[rows], self.y[rows]

    def _take(self, rows: NDArray[np.int64]) -> Pair:
        x, y = (a[torch.from_numpy(rows)] if isinstance(a, Tensor) else a[rows] for a in (self.x, self.y))
        return x, y


@dataclass(frozen=True, slots=True)
class StoreSource:
    """A split of a store, streamed in the order of `RowOrder`."""

    reader: SplitReader

    @property
    def n_rows(self) -> int:
        """Of the split."""
        return self.reader.info.n_rows

    def drawn(self, n_rows: int, seed: int) -> Pair:
        """Read by segment."""
        rows = sample_rows(self.reader.info, min(n_rows, self.n_rows), seed, _SAMPLES)
        return self.reader.read_rows(rows)

    def epoch(self, seed: int, epoch: int, window_segments: int, device: torch.device) -> Iterator[Pair]:
        """Every row once; a batch is overwritten by the next."""
        batch_size, none = min(_OWN_BATCH, self.n_rows), np.empty(0, np.int64)
        segment_rows = self.reader.info.segment_rows
        order = RowOrder(seed, self.n_rows, segment_rows, window_segments, batch_size, none)
        yield from epoch_batches(self.reader, order, epoch, device)

    def all(self) -> Iterator[Pair]:
        """As they lie."""
        yield from scan(self.reader)


@dataclass(frozen=True, slots=True)
class LoaderSource:
    """Any iterable of (x, y), such as a shuffled DataLoader, gone through once an epoch."""

    loader: Iterable[Pair]

    @property
    def n_rows(self) -> int:
        """Of its data set, where it has one with a length."""
        data = getattr(self.loader, "dataset", None)
        return max(1, len(data)) if isinstance(data, Sized) else _UNKNOWN_ROWS

    def drawn(self, n_rows: int, seed: int) -> None:
        """None."""

    def epoch(self, seed: int, epoch: int, window_segments: int, device: torch.device) -> Iterator[Pair]:
        """As they come."""
        yield from self.loader

    def all(self) -> Iterator[Pair]:
        """As they come."""
        yield from self.loader


def source_of(data: Data) -> Source:
    """What `data` is; InputError for an (x, y) that do not match."""
    if isinstance(data, Source):
        return data
    if isinstance(data, SplitReader):
        return StoreSource(data)
    if isinstance(data, tuple) and len(data) == 2 and all(hasattr(part, "shape") for part in data):
        x, y = cast(Pair, data)
        if len(x) != len(y) or not len(x):
            raise InputError(f"x has {len(x)} rows and y {len(y)}; give as many of both, at least one")
        return ArraySource(x, y)
    if isinstance(data, Tensor | np.ndarray | str) or not isinstance(data, Iterable):
        raise InputError(
            f"the data are a {type(data).__name__}; give (x, y), a loader of such pairs, or a split of a store, "
            "open_store(path).split(name)"
        )
    return LoaderSource(cast(Iterable[Pair], data))
