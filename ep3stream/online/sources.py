"""Where the rows of `KernelModel` and of the estimators come from: arrays, a split of a store, or a loader of batches.

Rows of arrays and stores have numbers: they are drawn and ordered by the seed as `fit` does it. Rows of a loader come
as they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.config import MIB, Task
from ep3stream.conversion.numbers import Moments
from ep3stream.errors import InputError
from ep3stream.solver.model import unmasked
from ep3stream.solver.targets import TargetCode
from ep3stream.store.json_files import created_by
from ep3stream.store.manifest import STORE_FORMAT_VERSION, ColumnStatistics, Manifest, SplitInfo
from ep3stream.store.reader import Split, SplitReader
from ep3stream.store.scan import scan
from ep3stream.stream.batch_slots import Batch
from ep3stream.stream.order import RowOrder
from ep3stream.stream.prefetch import BatchStream
from ep3stream.training.plan import ProblemSize
from ep3stream.values.offsets import Offsets, shifted

Array = Tensor | NDArray[Any]

Pair = tuple[Array, Array]

Names = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...] | None]

# Rows of a loader that does not say how many it has.
UNKNOWN_ROWS = 1 << 40

# Arrays are shuffled by segments of about so many bytes, as a store with the default settings is.
_SEGMENT_BYTES = 16 * MIB
_SCORED_ROWS = 4096


@dataclass(frozen=True, slots=True)
class RowForm:
    """The form that rows must have: d features, c outputs, and what y says. Methods raise InputError for other rows.

    offsets: what is subtracted from x and y, in float64, before they are rounded.
    """

    n_features: int
    n_outputs: int
    task: Task
    device: torch.device
    offsets: Offsets | None = None

    def pair(self, x: Array, y: Array) -> tuple[Tensor, Tensor]:
        """x, (m, d), and y, (m,) class ids or (m, c) values, checked, on the device."""
        offsets = None if self.offsets is None or self.task == "classification" else self.offsets.y
        inputs, targets = self.inputs(x), _tensor(y, "y", offsets)
        if len(inputs) != len(targets) or targets.ndim not in (1, 2):
            raise InputError(f"x has {len(inputs)} rows but y has the shape {tuple(targets.shape)}")
        coded = self._ids(targets) if self.task == "classification" else self._values(targets)
        return inputs, coded.to(self.device)

    def inputs(self, x: Array, name: str = "x") -> Tensor:
        """x, (m, d), m >= 1, in float32 on the device, with finite distances."""
        rows = _tensor(x, name, None if self.offsets is None else self.offsets.x)
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
        """How targets are coded, from y as `pair` gives it: by the frequencies of classes, or mean and spread."""
        if self.task == "classification":
            frequency = torch.bincount(y, minlength=self.n_outputs).double() / len(y)
            return TargetCode(True, frequency.float(), torch.ones_like(frequency, dtype=torch.float32))
        spread, mean = torch.std_mean(y.double(), 0, correction=0)
        return TargetCode(False, mean.float(), torch.where(spread > 0, spread, 1.0).float())

    def names(self, reader: SplitReader | None) -> Names:
        """Names of features, targets and classes: the store's, or x0, x1, ...; InputError unless it has as many."""
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

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in float32, with its targets or its class."""
        return 4 * (self.n_features + (1 if self.task == "classification" else self.n_outputs))

    def shape(self, n_rows: int) -> ProblemSize:
        """Sizes for the plan, of batches from a loader; they are taken to be well mixed."""
        return ProblemSize(n_rows, self.n_features, self.n_outputs, _SCORED_ROWS, self.row_bytes, True)

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
            raise InputError(
                "y has a value that is not finite in float32, whose largest number is 3.4e38; "
                "drop those rows, or divide y"
            )
        return values


def _tensor(values: Array, name: str, offsets: NDArray[np.float64] | None = None) -> Tensor:
    """values as a tensor, less the offsets of their columns."""
    if offsets is not None and offsets.any() and values.shape[1:] in ((), (len(offsets),)):
        values = shifted(as_array(values), offsets)
    if isinstance(values, Tensor):
        return values
    array = np.asarray(unmasked(values, name))
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} holds {array.dtype}, not numbers; give a tensor or an array of numbers")
    # torch may not write to it, and knows neither other byte orders nor large unsigned integers.
    with np.errstate(over="ignore"):
        dtype = np.float32 if array.dtype.kind == "f" else np.int64
        return torch.from_numpy(np.require(array, dtype, ["C", "W"]))


def as_array(values: Array) -> NDArray[Any]:
    """values as an array of NumPy, with their own type but for bfloat16."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return values.float().numpy() if values.dtype == torch.bfloat16 else values.numpy()
    return np.asarray(values)


@runtime_checkable
class NumberedSource(Protocol):
    """Rows that have numbers, so that they can be drawn and put into an order."""

    @property
    def n_rows(self) -> int:
        """How many rows there are."""
        ...

    @property
    def segment_rows(self) -> int:
        """How many rows lie in a segment."""
        ...

    def split(self) -> Split:
        """The rows with their statistics; O(n d) time where nobody has summed them yet."""
        ...

    def batches(
        self, order: RowOrder, steps: range, device: torch.device
    ) -> AbstractContextManager[Iterator[Batch]]:
        """The batches of these steps, counted over all epochs; each is valid until the next one is asked for."""
        ...

    def all(self) -> Iterator[Pair]:
        """Every row once, in the order in which the rows lie."""
        ...


@runtime_checkable
class BatchSource(Protocol):
    """Rows that come in batches of any size."""

    @property
    def n_rows(self) -> int:
        """Rows of an epoch; 2^40 where nobody knows."""
        ...

    def drawn(self, n_rows: int, seed: int) -> Pair | None:
        """So many random rows of all, in random order; None where rows only come in batches."""
        ...

    def epoch(self, seed: int, epoch: int) -> Iterator[Pair]:
        """The batches of one epoch, in an order that depends on (seed, epoch) unless it is the user's."""
        ...

    def all(self) -> Iterator[Pair]:
        """Every row once."""
        ...


Source = NumberedSource | BatchSource

Data = Pair | SplitReader | Iterable[Pair] | Source


@dataclass(slots=True)
class ArraySource:
    """x, (n, d), and y of n rows, tensors or arrays; copied a batch at a time."""

    x: Array
    y: Array
    form: RowForm
    _split: ArraySplit | None = field(default=None, init=False, repr=False)

    @property
    def n_rows(self) -> int:
        """How many rows the arrays have."""
        return len(self.x)

    @property
    def segment_rows(self) -> int:
        """As many as a store of the same rows would have by default."""
        return max(1, _SEGMENT_BYTES // self.form.row_bytes)

    def split(self) -> Split:
        """The arrays as a split, after one pass that checks and sums them; the pass is made once."""
        if self._split is None:
            self._split = ArraySplit.of(self)
        return self._split

    def batches(
        self, order: RowOrder, steps: range, device: torch.device
    ) -> AbstractContextManager[Iterator[Batch]]:
        """Gathered from the arrays, window by window of the order."""
        return nullcontext(self._batches(order, steps, replace(self.form, device=device)))

    def _batches(self, order: RowOrder, steps: range, form: RowForm) -> Iterator[Batch]:
        pending, step = np.empty(0, np.int64), steps.start
        for visit in order.visits(steps.start, steps.stop):
            places = order.window_rows(visit.epoch, visit.index, visit.segments)[visit.used :]
            first_rows = visit.segments[places // order.segment_rows] * order.segment_rows
            pending = np.concatenate([pending, first_rows + places % order.segment_rows])
            while step < steps.stop:
                first, end = order.batch_bounds(step % order.steps_per_epoch)
                if len(pending) < end - first:
                    break
                x, y = form.pair(*self.take(pending[: end - first]))
                yield Batch(step, x, y, 0.0)
                pending, step = pending[end - first :], step + 1

    def all(self) -> Iterator[Pair]:
        """Slices of the arrays."""
        for start in range(0, self.n_rows, _SCORED_ROWS):
            rows = slice(start, start + _SCORED_ROWS)
            yield self.x[rows], self.y[rows]

    def take(self, rows: NDArray[np.int64]) -> Pair:
        """A copy of these rows."""
        x, y = (a[torch.from_numpy(rows)] if isinstance(a, Tensor) else a[rows] for a in (self.x, self.y))
        return x, y


@dataclass(frozen=True, slots=True)
class ArraySplit:
    """Arrays in memory with what a store's manifest says of a split: names, sizes and statistics."""

    source: ArraySource
    info: SplitInfo
    manifest: Manifest

    @classmethod
    def of(cls, source: ArraySource) -> ArraySplit:
        """Checks and sums all rows, O(n d) time; raises InputError for rows of another form."""
        form = replace(source.form, device=torch.device("cpu"))
        is_classification = form.task == "classification"
        features, targets = Moments.empty(form.n_features), Moments.empty(form.n_outputs)
        counts = np.zeros(form.n_outputs, np.int64)
        for pair in source.all():
            x, y = (rows.numpy() for rows in form.pair(*pair))
            features = features.merge(Moments.of(x))
            if is_classification:
                counts += np.bincount(y, minlength=form.n_outputs)
            else:
                targets = targets.merge(Moments.of(y))
        info = SplitInfo(
            name="train",
            n_rows=source.n_rows,
            segment_rows=source.segment_rows,
            segments_per_file=1,
            digests=(),
            features=_statistics(features),
            targets=None if is_classification else _statistics(targets),
            class_counts=tuple(counts.tolist()) if is_classification else None,
        )
        feature_names, target_names, class_names = form.names(None)
        manifest = Manifest(
            format_version=STORE_FORMAT_VERSION,
            created_by=created_by(),
            task=form.task,
            n_features=form.n_features,
            n_outputs=form.n_outputs,
            x_dtype="float32",
            y_dtype="int32" if is_classification else "float32",
            feature_names=feature_names,
            target_names=target_names,
            class_names=class_names,
            columns={},
            shuffle_seed=None,
            source=(),
            conversion={},
            codec="none",
            splits={"train": info},
        )
        return cls(source, info, manifest)

    def read_rows(self, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """x, (m, d), and y of these rows."""
        x, y = self.source.form.pair(*self.source.take(rows))
        return x.cpu().numpy(), y.cpu().numpy()


def _statistics(moments: Moments) -> ColumnStatistics:
    return moments.statistics(np.zeros(len(moments.mean), np.int64))


@dataclass(frozen=True, slots=True)
class StoreSource:
    """A split of a store, streamed."""

    reader: SplitReader

    @property
    def n_rows(self) -> int:
        """Rows of the split."""
        return self.reader.info.n_rows

    @property
    def segment_rows(self) -> int:
        """Rows of a segment of the store."""
        return self.reader.info.segment_rows

    def split(self) -> Split:
        """The reader itself: the manifest has the statistics."""
        return self.reader

    def batches(
        self, order: RowOrder, steps: range, device: torch.device
    ) -> AbstractContextManager[Iterator[Batch]]:
        """Read ahead, as in a fit."""
        return BatchStream(self.reader, order, steps.start, steps.stop, device)

    def all(self) -> Iterator[Pair]:
        """Every row once, in the order of the store, a segment at a time."""
        yield from scan(self.reader)


@dataclass(frozen=True, slots=True)
class LoaderSource:
    """Any iterable of (x, y), such as a shuffled DataLoader, gone through once an epoch."""

    loader: Iterable[Pair]

    @property
    def n_rows(self) -> int:
        """The length of the loader's data set, where it has one."""
        data = getattr(self.loader, "dataset", None)
        return max(1, len(data)) if isinstance(data, Sized) else UNKNOWN_ROWS

    def drawn(self, n_rows: int, seed: int) -> None:
        """None: rows of a loader cannot be drawn."""

    def epoch(self, seed: int, epoch: int) -> Iterator[Pair]:
        """The loader's own batches."""
        yield from self.loader

    def all(self) -> Iterator[Pair]:
        """The loader's own batches."""
        yield from self.loader


def source_of(data: Data, form: RowForm) -> Source:
    """The source that `data` stands for; InputError for an (x, y) that do not match and for other kinds of data."""
    if isinstance(data, NumberedSource | BatchSource):
        return data
    if isinstance(data, SplitReader):
        return StoreSource(data)
    if isinstance(data, tuple) and len(data) == 2 and all(hasattr(part, "shape") for part in data):
        x, y = cast(Pair, data)
        if len(x) != len(y) or not len(x):
            raise InputError(f"x has {len(x)} rows and y {len(y)}; give as many of both, at least one")
        return ArraySource(x, y, form)
    if isinstance(data, Tensor | np.ndarray | str) or not isinstance(data, Iterable):
        raise InputError(
            f"the data are a {type(data).__name__}; give (x, y), a loader of such pairs, or a split of a store, "
            "open_store(path).split(name)"
        )
    return LoaderSource(cast(Iterable[Pair], data))
