"""Writing a store: rows come in any portions, leave as segments, and nothing is visible before `commit`."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
from numpy.typing import NDArray

from ep3stream.config import MIB, Format
from ep3stream.conversion.numbers import Moments
from ep3stream.conversion.spec import StoreSpec, checked_rows
from ep3stream.disk import fsync
from ep3stream.errors import DamagedDataError, DiskError, InputError
from ep3stream.store.backend import SplitLayout, WritingBackend, remove, y_row
from ep3stream.store.hdf5_store import Hdf5Writer
from ep3stream.store.json_files import created_by
from ep3stream.store.manifest import (
    STORE_FORMAT_VERSION,
    Codec,
    Manifest,
    SplitInfo,
    is_split_name,
    segment_digest,
)
from ep3stream.store.zarr_store import ZarrWriter

_logger = logging.getLogger(__name__)

_THREADS = 2

# Below this ratio packing and unpacking cost more time than the smaller files save: random floats shrink by a
# tenth, and are then written at a third and read at half of the rate.
_MIN_RATIO = 1.25

_SAMPLE_BYTES = 4 * MIB


def create_store(path: str | Path, spec: StoreSpec, format: Format) -> StoreWriter:
    """Start a store that appears at `path` when it is committed; until then it is `.NAME.partial` beside it.

    Raises InputError when something is at `path` already, and for lz4 in HDF5, which would need a plug-in.
    """
    final = Path(path).absolute()
    refuse_existing(final)
    with _disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
    return StoreWriter.start(final, final.with_name(f".{final.name}.partial"), spec, format)


@dataclass(frozen=True, slots=True)
class _Written:
    """Rows on the disk: segment digests, and what the manifest says about the rows.

    targets or class_counts has no column where the task has none; missing counts cells of x that were filled in.
    """

    n_rows: int
    digests: tuple[str, ...]
    features: Moments
    targets: Moments
    class_counts: NDArray[np.int64]
    missing: NDArray[np.int64]

    @classmethod
    def of(cls, spec: StoreSpec, x: NDArray[Any], y: NDArray[Any], missing: NDArray[np.int64]) -> _Written:
        """Of the rows of whole segments, the last of which may be shorter."""
        rows = spec.segment_rows
        digests = tuple(segment_digest(x[i : i + rows], y[i : i + rows]) for i in range(0, len(x), rows))
        if spec.task == "regression":
            return cls(len(x), digests, Moments.of(x), Moments.of(y), np.zeros(0, np.int64), missing)
        counts = np.bincount(y, minlength=spec.n_outputs)
        return cls(len(x), digests, Moments.of(x), Moments.empty(0), counts, missing)

    def followed_by(self, other: _Written) -> _Written:
        """These rows, then the others."""
        return _Written(
            self.n_rows + other.n_rows,
            self.digests + other.digests,
            self.features.merge(other.features),
            self.targets.merge(other.targets),
            self.class_counts + other.class_counts,
            self.missing + other.missing,
        )

    def state(self) -> dict[str, Any]:
        """As JSON; `from_state` gives back every bit."""
        return {
            "n_rows": self.n_rows,
            "digests": list(self.digests),
            "features": self.features.state(),
            "targets": self.targets.state(),
            "class_counts": self.class_counts.tolist(),
            "missing": self.missing.tolist(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> _Written:
        """What `state` gave."""
        return cls(
            state["n_rows"],
            tuple(state["digests"]),
            Moments.from_state(state["features"]),
            Moments.from_state(state["targets"]),
            np.array(state["class_counts"], np.int64),
            np.array(state["missing"], np.int64),
        )


@dataclass(slots=True)
class _OpenSplit:
    """A split while it grows: rows to hand over (the first `filled` of x and y), handed over, and written."""

    name: str
    x: NDArray[Any]
    y: NDArray[Any]
    missing: NDArray[np.int64]
    filled: int = 0
    handed_over: int = 0
    segments_per_file: int = 1
    written: _Written | None = None


class StoreWriter:
    """Takes rows, cuts them into segments, and writes these in 2 threads while the caller prepares more.

    A context manager: leaving it without `commit`, or by an exception, removes what was made, unless
    `keeps_partial`: then `state` is all it takes to go on in another process.
    """

    def __init__(
        self,
        final: Path,
        partial: Path,
        spec: StoreSpec,
        backend: WritingBackend,
        keeps_partial: bool = False,
    ) -> None:
        self._final = final
        self._partial = partial
        self._spec = spec
        self._backend = backend
        self._keeps_partial = keeps_partial
        self._codec: Codec | None = None if spec.codec == "auto" else spec.codec
        self._sample_ratio: float | None = None
        self._splits: dict[str, _OpenSplit] = {}
        self._spare: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="store-writer")
        self._in_flight: deque[tuple[_OpenSplit, Future[_Written]]] = deque()
        self._open = True

    @classmethod
    def start(
        cls, final: Path, partial: Path, spec: StoreSpec, format: Format, keeps_partial: bool = False
    ) -> StoreWriter:
        """A writer of an empty store at `partial`, replacing what is there; raises InputError."""
        if format == "hdf5":
            if spec.codec in ("lz4", "zstd"):
                raise InputError(
                    f"codec is {spec.codec} but hdf5 stores are never compressed; use codec auto or format zarr"
                )
            spec = replace(spec, codec="none", expected_rows=None)
        with _disk_errors(final):
            if remove(partial) and not keeps_partial:
                _logger.warning("replaced %s, left by a writer that did not finish", partial)
            try:
                backend: WritingBackend = (
                    Hdf5Writer(partial) if format == "hdf5" else ZarrWriter.create(partial)
                )
            except BaseException:
                remove(partial)
                raise
        return cls(final, partial, spec, backend, keeps_partial)

    @classmethod
    def resume(cls, final: Path, partial: Path, spec: StoreSpec, state: Mapping[str, Any]) -> StoreWriter:
        """A writer that goes on behind the rows of `state` in the Zarr store that an earlier one left.

        Reads those rows; raises DamagedDataError where they are not as written.
        """
        splits = {name: _Written.from_state(split["written"]) for name, split in state["splits"].items()}
        try:
            layouts = {
                name: (
                    _layout(spec, name, written.n_rows, split["segments_per_file"], state["codec"]),
                    written.n_rows,
                )
                for (name, written), split in zip(splits.items(), state["splits"].values(), strict=True)
            }
            backend = ZarrWriter.reopen(partial, layouts)
            for name, written in splits.items():
                _require_written(backend, name, written, spec.segment_rows)
        except (OSError, ValueError, KeyError) as error:
            raise DamagedDataError(f"{partial} is not what was written ({error!r:.200})") from error
        writer = cls(final, partial, spec, backend, keeps_partial=True)
        writer._codec, writer._sample_ratio = state["codec"], state["sample_ratio"]
        for name, written in splits.items():
            opened = writer._split(name)
            opened.written, opened.handed_over = written, written.n_rows
            opened.segments_per_file = state["splits"][name]["segments_per_file"]
        return writer

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._abandon()

    def state(self) -> dict[str, Any]:
        """What `resume` needs, as JSON: the splits' whole files that are written by now."""
        return {
            "codec": self._codec,
            "sample_ratio": self._sample_ratio,
            "splits": {
                name: {"segments_per_file": split.segments_per_file, "written": split.written.state()}
                for name, split in self._splits.items()
                if split.written is not None
            },
        }

    def rows_written(self, split: str) -> int:
        """Rows of a split that `state` is_main_process of."""
        state = self._splits.get(split)
        return state.written.n_rows if state is not None and state.written is not None else 0

    def append(
        self, split: str, x: NDArray[Any], y: NDArray[Any], missing: NDArray[np.bool_] | None = None
    ) -> None:
        """Add rows to a split. x: (m, d); y: (m,) class ids, or (m, c) targets; any m.

        missing: (m, d), true for the cells of x that had no value in the source and were filled in.
        Raises InputError for rows that do not fit the spec, are not finite or are of no known class (none of
        them is added then), and when the disk refuses earlier ones (the writer is closed then).
        """
        state = self._split(split)
        x, y = checked_rows(self._spec, split, state.handed_over + state.filled, x, y)
        self.append_checked(split, x, y, missing)

    def append_checked(
        self, split: str, x: NDArray[Any], y: NDArray[Any], missing: NDArray[np.bool_] | None = None
    ) -> None:
        """As `append`, for rows in the store's types that were found finite and of known classes before."""
        self._require_open()
        state = self._split(split)
        taken = 0
        while taken < len(x):
            count = min(len(x) - taken, len(state.x) - state.filled)
            state.x[state.filled : state.filled + count] = x[taken : taken + count]
            state.y[state.filled : state.filled + count] = y[taken : taken + count]
            if missing is not None:
                state.missing += missing[taken : taken + count].sum(0)
            state.filled += count
            taken += count
            if state.filled == len(state.x):
                self._hand_over(state)

    def commit(
        self, source: Sequence[Mapping[str, Any]] | None = None, conversion: Mapping[str, Any] | None = None
    ) -> Manifest:
        """Write what is left, bring all of it to the disk, manifest last, and give the store its name.

        source and conversion: what the manifest says where the spec could not know it. A split without rows
        does not exist in the store. Raises InputError when there are no rows at all, when the disk refuses, or
        when the name was taken meanwhile.
        """
        self._require_open()
        for state in self._splits.values():
            if state.filled:
                self._hand_over(state)
        while self._in_flight:
            self._collect()
        splits = {name: self._split_info(state) for name, state in self._splits.items() if state.written}
        if not splits:
            raise InputError(f"{self._final}: no rows were appended; a store needs at least one")
        conversion = dict(conversion or {})
        if self._sample_ratio is not None:
            conversion["codec_sample_ratio"] = self._sample_ratio
        manifest = self._manifest(splits, self._spec.source if source is None else tuple(source), conversion)
        data = manifest.to_json()
        # Read back what will be read: a store that this version cannot open must not be committed.
        manifest = Manifest.from_json(data, f"the new manifest of {self._final}")
        with self._all_or_nothing():
            self._backend.finish(data)
            refuse_existing(self._final)
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
        if self._spare:  # The first touch of new memory costs more than writing it to a file.
            return self._spare.pop()
        spec = self._spec
        rows = spec.segment_rows * spec.segments_per_file
        x = np.empty((rows, spec.n_features), spec.x_dtype)
        return x, np.empty((rows, *y_row(spec.task, spec.n_outputs)), spec.y_dtype)

    def _hand_over(self, state: _OpenSplit) -> None:
        """Give the filled rows to a thread, and wait while too many are on their way."""
        if state.handed_over == 0:
            self._create_split(state)
        rows = (state.name, state.handed_over, state.x, state.y, state.filled)
        if self._backend.writes_in_order:
            with self._all_or_nothing():
                self._store(*rows)
        self._in_flight.append((state, self._pool.submit(self._work, *rows, state.missing)))
        state.handed_over += state.filled
        while len(self._in_flight) > _THREADS:
            self._collect()
        state.filled, state.missing = 0, np.zeros(self._spec.n_features, np.int64)
        state.x, state.y = self._empty_rows()

    def _create_split(self, state: _OpenSplit) -> None:
        spec = self._spec
        if self._codec is None:
            self._sample_ratio = round(_sample_ratio(state.x[: min(state.filled, spec.segment_rows)]), 3)
            self._codec = "lz4" if self._sample_ratio >= _MIN_RATIO else "none"
        # A split that ends within its first file gets a chunk and a file no longer than it is.
        state.segments_per_file = min(spec.segments_per_file, -(-state.filled // spec.segment_rows))
        layout = _layout(spec, state.name, state.filled, state.segments_per_file, self._codec)
        with self._all_or_nothing():
            self._backend.create_split(layout)

    def _store(self, split: str, start: int, x: NDArray[Any], y: NDArray[Any], n_rows: int) -> None:
        self._backend.write(split, start, x[:n_rows], y[:n_rows])

    def _work(
        self,
        split: str,
        start: int,
        x: NDArray[Any],
        y: NDArray[Any],
        n_rows: int,
        missing: NDArray[np.int64],
    ) -> _Written:
        """Runs in a thread: store the first rows of x and y, say what they are, and give their memory back."""
        if not self._backend.writes_in_order:
            self._store(split, start, x, y, n_rows)
        written = _Written.of(self._spec, x[:n_rows], y[:n_rows], missing)
        self._spare.append((x, y))
        return written

    def _collect(self) -> None:
        """Wait for the oldest rows on their way; in this order a split's digests come in theirs."""
        state, future = self._in_flight.popleft()
        with self._all_or_nothing():
            written = future.result()
        state.written = state.written.followed_by(written) if state.written else written

    def _split_info(self, state: _OpenSplit) -> SplitInfo:
        assert state.written is not None
        regression, written = self._spec.task == "regression", state.written
        return SplitInfo(
            name=state.name,
            n_rows=written.n_rows,
            segment_rows=self._spec.segment_rows,
            segments_per_file=state.segments_per_file,
            digests=written.digests,
            features=written.features.statistics(written.missing),
            targets=written.targets.statistics(np.zeros(self._spec.n_outputs, np.int64))
            if regression
            else None,
            class_counts=None if regression else tuple(written.class_counts.tolist()),
        )

    def _manifest(
        self,
        splits: dict[str, SplitInfo],
        source: tuple[Mapping[str, Any], ...],
        conversion: Mapping[str, Any],
    ) -> Manifest:
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
            source=source,
            conversion=conversion,
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
                _logger.debug("%s was being abandoned when a write failed: %r", self._final, error)
        with suppress(Exception):  # A full disk fails the close as well; the file goes anyway.
            self._backend.close()
        if not self._keeps_partial:
            remove(self._partial)


def _layout(spec: StoreSpec, split: str, n_rows: int, segments_per_file: int, codec: Codec) -> SplitLayout:
    """Of a split with these rows or more. One that ends within its first segment gets a chunk as short."""
    return SplitLayout(
        name=split,
        chunk_rows=min(spec.segment_rows, n_rows),
        chunks_per_file=segments_per_file,
        rows={"x": (spec.n_features,), "y": y_row(spec.task, spec.n_outputs)},
        dtypes={"x": spec.x_dtype, "y": spec.y_dtype},
        codec=codec,
    )


def _require_written(backend: ZarrWriter, split: str, written: _Written, segment_rows: int) -> None:
    for index, digest in enumerate(written.digests):
        start = index * segment_rows
        if segment_digest(*backend.read_back(split, start, start + segment_rows)) != digest:
            raise ValueError(f"split {split}, segment {index}")


def refuse_existing(path: Path) -> None:
    """Raise InputError where something has the name already."""
    if os.path.lexists(path):
        raise InputError(f"{path} exists; remove it or choose another name")


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{path} cannot be written ({error}); free space or correct permissions, then run the same command to go on"
        ) from error


def _sample_ratio(x: NDArray[Any]) -> float:
    """By how much lz4 shrinks a sample of the first segment: 1.5 is to two thirds."""
    sample = np.ascontiguousarray(x[: max(1, _SAMPLE_BYTES // x[0].nbytes)])
    packed = numcodecs.Blosc(cname="lz4", clevel=1, shuffle=numcodecs.Blosc.BITSHUFFLE).encode(sample)
    return sample.nbytes / len(packed)
