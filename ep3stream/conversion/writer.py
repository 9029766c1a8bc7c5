"""Writes a store: rows come in any portions, are written as segments, and nobody sees the store before `commit`."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ep3stream.disk import delete, make_directory, partial_path, rename, sync
from ep3stream.errors import DamagedDataError, DiskError, InputError
from ep3stream.store.backend import SplitLayout, WritingBackend, y_row
from ep3stream.store.json_files import created_by
from ep3stream.store.manifest import (
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


# Writes the rows of a slice to x, (k, d), and y; returns which cells of x were filled in, (k, d), None if none was.
MakeRows = Callable[[slice, NDArray[Any], NDArray[Any]], NDArray[np.bool_] | None]


def create_store(path: str | Path, spec: StoreSpec, format: Format) -> StoreWriter:
    """Starts a store that appears at `path` when it is committed; until then it is `.NAME.partial` beside it.

    Raises InputError if something is at `path` already, and for lz4 in HDF5, which would need a plug-in.
    """
    final = Path(path).absolute()
    refuse_existing(final)
    with _disk_errors_named(final):
        make_directory(final.parent)
    return StoreWriter.start(final, partial_path(final), spec, format)


def refuse_existing(path: Path) -> None:
    """Raises InputError if something has the name `path` already."""
    if os.path.lexists(path):
        raise InputError(f"{path} exists; remove it or choose another name")


class StoreWriter:
    """Takes rows, cuts them into segments, and writes these in 2 threads while the caller prepares more.

    A context manager. If its block ends without `commit`, or by an exception, what was made is removed. With
    `keeps_partial` it stays, and another process can go on from the last `state`.
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
        self._is_open = True

    # Beginning.

    @classmethod
    def start(
        cls, final: Path, partial: Path, spec: StoreSpec, format: Format, keeps_partial: bool = False
    ) -> StoreWriter:
        """Returns a writer of an empty store at `partial`, and removes what was there; raises InputError."""
        if format == "hdf5":
            if spec.codec in ("lz4", "zstd"):
                raise InputError(
                    f"codec is {spec.codec} but hdf5 stores are never compressed; use codec auto or format zarr"
                )
            spec = replace(spec, codec="none", expected_rows=None)
        with _disk_errors_named(final):
            if delete(partial) and not keeps_partial:
                _logger.warning("replaced %s, left by a writer that did not finish", partial)
            try:
                backend = _new_hdf5(partial) if format == "hdf5" else ZarrWriter.create(partial)
            except BaseException:
                delete(partial)
                raise
        return cls(final, partial, spec, backend, keeps_partial)

    @classmethod
    def resume(cls, final: Path, partial: Path, spec: StoreSpec, state: Mapping[str, Any]) -> StoreWriter:
        """Returns a writer that goes on after the rows of `state` in the Zarr store that an earlier writer left.

        Reads those rows; raises DamagedDataError if they are not as written.
        """
        splits = state["splits"]
        written = {name: _Written.from_state(split["written"]) for name, split in splits.items()}
        try:
            layouts = {
                name: (
                    _layout(spec, name, rows.n_rows, splits[name]["segments_per_file"], state["codec"]),
                    rows.n_rows,
                )
                for name, rows in written.items()
            }
            backend = ZarrWriter.reopen(partial, layouts)
            for name, rows in written.items():
                for index, digest in enumerate(rows.digests):
                    start = index * spec.segment_rows
                    if segment_digest(*backend.read_back(name, start, start + spec.segment_rows)) != digest:
                        raise ValueError(f"split {name}, segment {index}")
        except (OSError, ValueError, KeyError) as error:
            raise DamagedDataError(f"{partial} is not what was written ({error!r:.200})") from error
        writer = cls(final, partial, spec, backend, keeps_partial=True)
        writer._codec, writer._sample_ratio = state["codec"], state["sample_ratio"]
        for name, rows in written.items():
            split = writer._split(name)
            split.written, split.handed_over = rows, rows.n_rows
            split.segments_per_file = splits[name]["segments_per_file"]
        return writer

    def __enter__(self) -> StoreWriter:
        return self

    # Writing.

    def append(
        self, split: str, x: NDArray[Any], y: NDArray[Any], missing: NDArray[np.bool_] | None = None
    ) -> None:
        """Adds any number m of rows to a split. x: (m, d); y: (m,) class ids, or (m, c) targets.

        missing: (m, d), true for the cells of x that had no value in the source and were filled in.
        Raises InputError for rows that do not fit the spec, are not finite or are of no known class; none of the rows
        is added then. Raises DiskError if the disk refuses earlier rows; the writer is closed then.
        """
        rows = self._split(split)
        x, y = checked_rows(self._spec, split, rows.handed_over + rows.filled, x, y)
        self.append_checked(split, x, y, missing)

    def append_checked(
        self, split: str, x: NDArray[Any], y: NDArray[Any], missing: NDArray[np.bool_] | None = None
    ) -> None:
        """Does the same as `append` for rows in the store's dtypes that are known to be finite and of known classes."""

        def copy(taken: slice, x_out: NDArray[Any], y_out: NDArray[Any]) -> NDArray[np.bool_] | None:
            x_out[:], y_out[:] = x[taken], y[taken]
            return None if missing is None else missing[taken]

        self.append_made(split, len(x), copy)

    def append_made(self, split: str, n_rows: int, make: MakeRows) -> None:
        """Does the same as `append_checked` for n rows that `make` writes to their place, some at a time."""
        self._require_open()
        rows = self._split(split)
        taken = 0
        while taken < n_rows:
            count = min(n_rows - taken, len(rows.x) - rows.filled)
            place = slice(rows.filled, rows.filled + count)
            missing = make(slice(taken, taken + count), rows.x[place], rows.y[place])
            if missing is not None:
                rows.missing += np.count_nonzero(missing, axis=0)
            rows.filled += count
            taken += count
            if rows.filled == len(rows.x):
                self._hand_over(rows)

    def rows_written(self, split: str) -> int:
        """Returns how many rows of a split are written: those that `state` describes."""
        rows = self._splits.get(split)
        return rows.written.n_rows if rows is not None and rows.written is not None else 0

    def state(self) -> dict[str, Any]:
        """Returns what `resume` needs, as JSON: the whole files of each split that are written by now."""
        return {
            "codec": self._codec,
            "sample_ratio": self._sample_ratio,
            "splits": {
                name: {"segments_per_file": split.segments_per_file, "written": split.written.state()}
                for name, split in self._splits.items()
                if split.written is not None
            },
        }

    def _require_open(self) -> None:
        if not self._is_open:
            raise InputError(f"{self._final}: the writer is closed; create another store")

    def _split(self, name: str) -> _OpenSplit:
        if name not in self._splits:
            if not is_split_name(name):
                raise InputError(f"split name {name!r} is not allowed; use up to 64 letters, digits, _ and -")
            missing = np.zeros(self._spec.n_features, np.int64)
            self._splits[name] = _OpenSplit(name, *self._empty_rows(), missing)
        return self._splits[name]

    def _empty_rows(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Returns memory for the x and y of one file's rows."""
        if self._spare:  # The first touch of new memory costs more than writing it to a file.
            return self._spare.pop()
        spec = self._spec
        rows = spec.segment_rows * spec.segments_per_file
        x = np.empty((rows, spec.n_features), spec.x_dtype)
        return x, np.empty((rows, *y_row(spec.task, spec.n_outputs)), spec.y_dtype)

    def _hand_over(self, rows: _OpenSplit) -> None:
        """Gives the filled rows to a thread, and waits while too many are on their way."""
        if rows.handed_over == 0:
            self._create_split(rows)
        x, y = rows.x[: rows.filled], rows.y[: rows.filled]
        if self._backend.writes_in_order:
            with self._all_or_nothing():
                self._backend.write(rows.name, rows.handed_over, x, y)
        future = self._pool.submit(
            self._write, rows.name, rows.handed_over, rows.x, rows.y, rows.filled, rows.missing
        )
        self._in_flight.append((rows, future))
        rows.handed_over += rows.filled
        while len(self._in_flight) > _THREADS:
            self._collect()
        rows.filled, rows.missing = 0, np.zeros(self._spec.n_features, np.int64)
        rows.x, rows.y = self._empty_rows()

    def _create_split(self, rows: _OpenSplit) -> None:
        """Makes the arrays of a split, given its first rows; the first split's rows decide on the codec."""
        spec = self._spec
        if self._codec is None:
            self._sample_ratio = round(_sample_ratio(rows.x[: min(rows.filled, spec.segment_rows)]), 3)
            self._codec = "lz4" if self._sample_ratio >= _MIN_RATIO else "none"
        # A split that ends within its first file gets a chunk and a file no longer than it is.
        rows.segments_per_file = min(spec.segments_per_file, -(-rows.filled // spec.segment_rows))
        layout = _layout(spec, rows.name, rows.filled, rows.segments_per_file, self._codec)
        with self._all_or_nothing():
            self._backend.create_split(layout)

    def _write(
        self,
        split: str,
        start: int,
        x: NDArray[Any],
        y: NDArray[Any],
        n_rows: int,
        missing: NDArray[np.int64],
    ) -> _Written:
        """Runs in a thread: writes the first rows of x and y, returns their description, and gives back the memory."""
        if not self._backend.writes_in_order:
            self._backend.write(split, start, x[:n_rows], y[:n_rows])
        written = _Written.of(self._spec, x[:n_rows], y[:n_rows], missing)
        self._spare.append((x, y))
        return written

    def _collect(self) -> None:
        """Waits for the oldest rows on their way. So the digests of a split are collected in the split's order."""
        rows, future = self._in_flight.popleft()
        with self._all_or_nothing():
            written = future.result()
        rows.written = rows.written.followed_by(written) if rows.written else written

    # Ending.

    def feature_means(self, split: str) -> NDArray[np.float64]:
        """Writes all rows given so far, and returns the mean of each feature of the split, (d,)."""
        self._write_rest()
        written = self._splits[split].written
        assert written is not None
        return written.features.mean

    def _write_rest(self) -> None:
        self._require_open()
        for rows in self._splits.values():
            if rows.filled:
                self._hand_over(rows)
        while self._in_flight:
            self._collect()

    def commit(
        self,
        source: Sequence[Mapping[str, Any]] | None = None,
        conversion: Mapping[str, Any] | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Writes the rest, brings everything to the disk, the manifest last, and renames the store to its name.

        source, conversion and columns: what the manifest says if the spec could not know it. A split without rows
        does not exist in the store. Returns the manifest. Raises InputError if there are no rows at all or the name
        was taken meanwhile, and DiskError.
        """
        if columns is not None:
            self._spec = replace(self._spec, columns=columns)
        self._write_rest()
        manifest = self._manifest(self._spec.source if source is None else tuple(source), conversion or {})
        data = manifest.to_json()
        # A store that this version cannot open must not be committed: the manifest is read back before.
        manifest = Manifest.from_json(data, f"the new manifest of {self._final}")
        with self._all_or_nothing():
            self._backend.finish(data)
            refuse_existing(self._final)
            rename(self._partial, self._final)
            self._is_open = False
            sync(self._final.parent)
        self._pool.shutdown()
        return manifest

    def _manifest(self, source: tuple[Mapping[str, Any], ...], conversion: Mapping[str, Any]) -> Manifest:
        spec = self._spec
        splits = {name: _split_info(spec, rows) for name, rows in self._splits.items() if rows.written}
        if not splits:
            raise InputError(f"{self._final}: no rows were appended; a store needs at least one")
        if self._sample_ratio is not None:
            conversion = {**conversion, "codec_sample_ratio": self._sample_ratio}
        assert self._codec is not None
        return Manifest(
            format_version=Manifest.format_of(spec.columns),
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

    def __exit__(self, *_: object) -> None:
        if self._is_open:
            self._abandon()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """For a step without which the store would lack rows: if the step fails, the writer is closed for good."""
        try:
            with _disk_errors_named(self._final):
                yield
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        self._is_open = False
        self._pool.shutdown(wait=True, cancel_futures=True)
        for _, future in self._in_flight:
            error = None if future.cancelled() else future.exception()
            if error is not None:
                _logger.debug("%s was being abandoned when a write failed: %r", self._final, error)
        with suppress(Exception):  # On a full disk the close fails too, and the file is removed anyway.
            self._backend.close()
        if not self._keeps_partial:
            delete(self._partial)


@dataclass(slots=True)
class _OpenSplit:
    """A split while it grows.

    The first `filled` rows of x and y wait to be handed over; their `missing` cells are counted by feature. Before
    them, `handed_over` rows were given to a thread. `written` describes those of them that are written.
    """

    name: str
    x: NDArray[Any]
    y: NDArray[Any]
    missing: NDArray[np.int64]
    filled: int = 0
    handed_over: int = 0
    segments_per_file: int = 1
    written: _Written | None = None


@dataclass(frozen=True, slots=True)
class _Written:
    """What the manifest says about written rows: the digest of each segment, and statistics.

    targets has no column in classification, and class_counts none in regression. missing counts, by feature, the
    cells of x that were filled in.
    """

    n_rows: int
    digests: tuple[str, ...]
    features: Moments
    targets: Moments
    class_counts: NDArray[np.int64]
    missing: NDArray[np.int64]

    @classmethod
    def of(cls, spec: StoreSpec, x: NDArray[Any], y: NDArray[Any], missing: NDArray[np.int64]) -> _Written:
        """Returns the description of the rows of whole segments, the last of which may be shorter."""
        rows = spec.segment_rows
        digests = tuple(segment_digest(x[i : i + rows], y[i : i + rows]) for i in range(0, len(x), rows))
        if spec.task == "regression":
            return cls(len(x), digests, Moments.of(x), Moments.of(y), np.zeros(0, np.int64), missing)
        counts = np.bincount(y, minlength=spec.n_outputs)
        return cls(len(x), digests, Moments.of(x), Moments.empty(0), counts, missing)

    def followed_by(self, other: _Written) -> _Written:
        """Returns the description of these rows and then the other rows."""
        return _Written(
            self.n_rows + other.n_rows,
            self.digests + other.digests,
            self.features.merge(other.features),
            self.targets.merge(other.targets),
            self.class_counts + other.class_counts,
            self.missing + other.missing,
        )

    def state(self) -> dict[str, Any]:
        """Returns the description as JSON; `from_state` gives back every bit."""
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
        """Returns the description that `state` was called on."""
        return cls(
            state["n_rows"],
            tuple(state["digests"]),
            Moments.from_state(state["features"]),
            Moments.from_state(state["targets"]),
            np.array(state["class_counts"], np.int64),
            np.array(state["missing"], np.int64),
        )


def _new_hdf5(path: Path) -> WritingBackend:
    from ep3stream.store.hdf5_store import Hdf5Writer  # Stores of Zarr do not wait for h5py.

    return Hdf5Writer(path)


def _split_info(spec: StoreSpec, rows: _OpenSplit) -> SplitInfo:
    """Returns what the manifest says about a split of which all rows are written."""
    written = rows.written
    assert written is not None
    is_regression, no_missing = spec.task == "regression", np.zeros(spec.n_outputs, np.int64)
    return SplitInfo(
        name=rows.name,
        n_rows=written.n_rows,
        segment_rows=spec.segment_rows,
        segments_per_file=rows.segments_per_file,
        digests=written.digests,
        features=written.features.statistics(written.missing),
        targets=written.targets.statistics(no_missing) if is_regression else None,
        class_counts=None if is_regression else tuple(written.class_counts.tolist()),
    )


def _layout(spec: StoreSpec, split: str, n_rows: int, segments_per_file: int, codec: Codec) -> SplitLayout:
    """Returns the layout of a split with at least n_rows. A split shorter than a segment has a chunk of its length."""
    return SplitLayout(
        name=split,
        chunk_rows=min(spec.segment_rows, n_rows),
        chunks_per_file=segments_per_file,
        rows={"x": (spec.n_features,), "y": y_row(spec.task, spec.n_outputs)},
        dtypes={"x": spec.x_dtype, "y": spec.y_dtype},
        codec=codec,
    )


def _sample_ratio(x: NDArray[Any]) -> float:
    """Returns by which factor lz4 shrinks a sample of the first segment: 1.5 means to two thirds."""
    sample = np.ascontiguousarray(x[: max(1, _SAMPLE_BYTES // x[0].nbytes)])
    packed = numcodecs.Blosc(cname="lz4", clevel=1, shuffle=numcodecs.Blosc.BITSHUFFLE).encode(sample)
    return sample.nbytes / len(packed)


@contextmanager
def _disk_errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{path} cannot be written ({error}); free space or correct permissions, then run the same command to go on"
        ) from error
