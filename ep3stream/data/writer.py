"""Writing a store: rows come in any portions, leave as segments, and nothing is visible before `commit`."""

from __future__ import annotations

import logging
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
from numpy.typing import NDArray

from ep3stream.config import MIB, Format
from ep3stream.data.backend import SplitLayout, WritingBackend, fsync, y_row
from ep3stream.data.hdf5_backend import Hdf5Writer
from ep3stream.data.manifest import (
    STORE_FORMAT_VERSION,
    Codec,
    Manifest,
    SplitInfo,
    is_split_name,
    segment_digest,
)
from ep3stream.data.spec import StoreSpec, checked_rows
from ep3stream.data.statistics import Moments
from ep3stream.data.zarr_backend import ZarrWriter
from ep3stream.errors import InputError
from ep3stream.package import created_by

_logger = logging.getLogger(__name__)

_THREADS = 2
# Below this ratio decompression costs more time than the smaller read saves.
_MIN_RATIO = 1.1
_SAMPLE_BYTES = 4 * MIB


def create_store(path: str | Path, spec: StoreSpec, format: Format) -> StoreWriter:
    """Start a store that appears at `path` when it is committed; until then it is `.NAME.partial` beside it.

    Raises InputError when something is at `path` already, and for lz4 in HDF5, which would need a plug-in.
    """
    final = Path(path).absolute()
    _refuse_existing(final)
    if format == "hdf5":
        if spec.codec == "lz4":
            raise InputError(
                "codec is lz4 but hdf5 stores are never compressed; use codec auto or format zarr"
            )
        spec = replace(spec, codec="none", expected_rows=None)
    partial = final.with_name(f".{final.name}.partial")
    with _disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        if _remove(partial):
            _logger.warning("replaced %s, left by a writer that did not finish", partial)
        try:
            backend: WritingBackend = Hdf5Writer(partial) if format == "hdf5" else ZarrWriter(partial)
        except BaseException:
            _remove(partial)
            raise
    return StoreWriter(final, partial, spec, backend)


@dataclass(frozen=True, slots=True)
class _Summary:
    """What the manifest says about rows; targets or class_counts has no column where the task has none."""

    features: Moments
    targets: Moments
    class_counts: NDArray[np.int64]

    @classmethod
    def of(cls, spec: StoreSpec, x: NDArray[Any], y: NDArray[Any]) -> _Summary:
        if spec.task == "regression":
            return cls(Moments.of(x), Moments.of(y), np.zeros(0, np.int64))
        return cls(Moments.of(x), Moments.empty(0), np.bincount(y, minlength=spec.n_outputs))

    def merge(self, other: _Summary) -> _Summary:
        return _Summary(
            self.features.merge(other.features),
            self.targets.merge(other.targets),
            self.class_counts + other.class_counts,
        )


@dataclass(slots=True)
class _OpenSplit:
    """A split while it grows: rows to hand over (the first `filled` of x and y), and those handed over."""

    name: str
    x: NDArray[Any]
    y: NDArray[Any]
    missing: NDArray[np.int64]
    filled: int = 0
    handed_over: int = 0
    segments_per_file: int = 1
    digests: list[str] = field(default_factory=list)
    summary: _Summary | None = None


class StoreWriter:
    """Takes rows, cuts them into segments, and writes these in 2 threads while the caller prepares more.

    A context manager: leaving it without `commit`, or by an exception, removes what was made.
    """

    def __init__(self, final: Path, partial: Path, spec: StoreSpec, backend: WritingBackend) -> None:
        self._final = final
        self._partial = partial
        self._spec = spec
        self._backend = backend
        self._codec: Codec | None = None if spec.codec == "auto" else spec.codec
        self._splits: dict[str, _OpenSplit] = {}
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="store-writer")
        self._in_flight: deque[tuple[_OpenSplit, Future[tuple[list[str], _Summary]]]] = deque()
        self._open = True

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._abandon()

    def append(
        self, split: str, x: NDArray[Any], y: NDArray[Any], missing: NDArray[np.int64] | None = None
    ) -> None:
        """Add rows to a split. x: (m, d); y: (m,) class ids, or (m, c) targets; any m.

        missing: (d,), how many cells of each column of x had no value in the source and were filled in.
        Raises InputError for rows that do not fit the spec, are not finite or are of no known class (none of
        them is added then), and when the disk refuses earlier ones (the writer is closed then).
        """
        self._require_open()
        state = self._split(split)
        x, y = checked_rows(self._spec, split, state.handed_over + state.filled, x, y)
        if missing is not None:
            state.missing += missing
        taken = 0
        while taken < len(x):
            count = min(len(x) - taken, len(state.x) - state.filled)
            state.x[state.filled : state.filled + count] = x[taken : taken + count]
            state.y[state.filled : state.filled + count] = y[taken : taken + count]
            state.filled += count
            taken += count
            if state.filled == len(state.x):
                self._hand_over(state)

    def commit(self) -> Manifest:
        """Write what is left, bring all of it to the disk, manifest last, and give the store its name.

        A split without rows does not exist in the store. Raises InputError when there are no rows at all,
        when the disk refuses, or when the name was taken meanwhile.
        """
        self._require_open()
        for state in self._splits.values():
            if state.filled:
                self._hand_over(state)
        while self._in_flight:
            self._collect()
        splits = {name: self._split_info(state) for name, state in self._splits.items() if state.summary}
        if not splits:
            raise InputError(f"{self._final}: no rows were appended; a store needs at least one")
        data = self._manifest(splits).to_json()
        # Read back what will be read: a store that this version cannot open must not be committed.
        manifest = Manifest.from_json(data, f"the new manifest of {self._final}")
        with self._all_or_nothing():
            self._backend.finish(data)
            _refuse_existing(self._final)
            self._partial.rename(self._final)
            self._open = False
            fsync(self._final.parent)
        self._pool.shutdown()
        return manifest

    def _require_open(self) -> None:
        if not self._open:
            raise InputError(f"{self._final}: the writer is closed; create another store")

    def _split(self, name: str) -> _OpenSplit:
        if name not in self._splits:
            if not is_split_name(name):
                raise InputError(f"split name {name!r} is not allowed; use up to 64 letters, digits, _ and -")
            missing = np.zeros(self._spec.n_features, np.int64)
            self._splits[name] = _OpenSplit(name, *self._empty_rows(), missing)
        return self._splits[name]

    def _empty_rows(self) -> tuple[NDArray[Any], NDArray[Any]]:
        spec = self._spec
        rows = spec.segment_rows * spec.segments_per_file
        x = np.empty((rows, spec.n_features), spec.x_dtype)
        return x, np.empty((rows, *y_row(spec.task, spec.n_outputs)), spec.y_dtype)

    def _hand_over(self, state: _OpenSplit) -> None:
        """Give the filled rows to a thread, and wait while too many are on their way."""
        x, y, start = state.x[: state.filled], state.y[: state.filled], state.handed_over
        if start == 0:
            self._create_split(state)
        self._in_flight.append((state, self._pool.submit(self._write, state.name, start, x, y)))
        state.handed_over += len(x)
        state.filled = 0
        while len(self._in_flight) > _THREADS:
            self._collect()
        state.x, state.y = self._empty_rows()

    def _create_split(self, state: _OpenSplit) -> None:
        spec = self._spec
        if self._codec is None:
            self._codec = _choose_codec(state.x[: min(state.filled, spec.segment_rows)])
        # A split that ends within its first file gets a chunk and a file no longer than it is.
        state.segments_per_file = min(spec.segments_per_file, -(-state.filled // spec.segment_rows))
        layout = SplitLayout(
            name=state.name,
            chunk_rows=min(spec.segment_rows, state.filled),
            chunks_per_file=state.segments_per_file,
            rows={"x": (spec.n_features,), "y": y_row(spec.task, spec.n_outputs)},
            dtypes={"x": spec.x_dtype, "y": spec.y_dtype},
            codec=self._codec,
        )
        with self._all_or_nothing():
            self._backend.create_split(layout)

    def _write(self, split: str, start: int, x: NDArray[Any], y: NDArray[Any]) -> tuple[list[str], _Summary]:
        """Runs in a thread: store these rows, and say what they are."""
        rows = self._spec.segment_rows
        self._backend.write(split, start, x, y)
        digests = [segment_digest(x[i : i + rows], y[i : i + rows]) for i in range(0, len(x), rows)]
        return digests, _Summary.of(self._spec, x, y)

    def _collect(self) -> None:
        """Wait for the oldest rows on their way; in this order a split's digests come in theirs."""
        state, future = self._in_flight.popleft()
        with self._all_or_nothing():
            digests, summary = future.result()
        state.digests += digests
        state.summary = state.summary.merge(summary) if state.summary else summary

    def _split_info(self, state: _OpenSplit) -> SplitInfo:
        assert state.summary is not None
        regression = self._spec.task == "regression"
        features = state.summary.features.statistics()
        return SplitInfo(
            name=state.name,
            n_rows=state.handed_over,
            segment_rows=self._spec.segment_rows,
            segments_per_file=state.segments_per_file,
            digests=tuple(state.digests),
            features=replace(features, missing=tuple(state.missing.tolist())),
            targets=state.summary.targets.statistics() if regression else None,
            class_counts=None if regression else tuple(state.summary.class_counts.tolist()),
        )

    def _manifest(self, splits: dict[str, SplitInfo]) -> Manifest:
        assert self._codec is not None
        spec = self._spec
        return Manifest(
            format_version=STORE_FORMAT_VERSION,
            created_by=created_by(),
            task=spec.task,
            n_features=spec.n_features,
            n_outputs=spec.n_outputs,
            x_dtype=spec.x_dtype,
            y_dtype=spec.y_dtype,
            feature_names=spec.feature_names,
            target_names=spec.target_names,
            class_names=spec.class_names,
            columns=spec.columns,
            shuffle_seed=spec.shuffle_seed,
            source=spec.source,
            codec=self._codec,
            splits=splits,
        )

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """A step without which the store would lack rows: when it fails, nothing can be committed."""
        try:
            with _disk_errors(self._final):
                yield
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        self._open = False
        self._pool.shutdown(wait=True, cancel_futures=True)
        for _, future in self._in_flight:
            error = None if future.cancelled() else future.exception()
            if error is not None:
                _logger.info("%s was being abandoned when a write failed: %r", self._final, error)
        with suppress(Exception):  # A full disk fails the close as well; the file goes anyway.
            self._backend.close()
        _remove(self._partial)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise InputError(f"{path} exists; remove it or choose another name")


def _remove(path: Path) -> bool:
    """Remove a file or a tree; whether there was one."""
    if not os.path.lexists(path):
        return False
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    return True


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error}); free space, check permissions or choose another place"
        ) from error


def _choose_codec(x: NDArray[Any]) -> Codec:
    """lz4 when a sample of the first segment shrinks enough to be worth it, else none."""
    sample = np.ascontiguousarray(x[: max(1, _SAMPLE_BYTES // x[0].nbytes)])
    packed = numcodecs.Blosc(cname="lz4", clevel=1, shuffle=numcodecs.Blosc.BITSHUFFLE).encode(sample)
    return "lz4" if sample.nbytes >= _MIN_RATIO * len(packed) else "none"
