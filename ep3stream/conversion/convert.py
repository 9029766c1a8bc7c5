"""Turns a source into a store: encode, split, order, write; in bounded memory, and all or nothing.

Rows go through a spill (`RowSorter`) where they are put in order, or where something about the store, its
splits or categories, is only known behind the last row; else straight from the source into the store. Both
ways leave marks, from which a conversion that was killed goes on to the same bytes.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ep3stream.config import MIB, ConvertConfig, Format
from ep3stream.conversion.encode import RowEncoder
from ep3stream.conversion.expand import Expansion
from ep3stream.conversion.open_source import open_source
from ep3stream.conversion.recorded_columns import RecordedColumns, take_over
from ep3stream.conversion.rows import Rows
from ep3stream.conversion.shuffle import RowKeys, RowSorter
from ep3stream.conversion.spec import StoreSpec
from ep3stream.conversion.work import (
    ConversionWork,
    Json,
    Upload,
    conversion_work,
    is_begun,
    stand_in,
    was_committed,
)
from ep3stream.conversion.writer import StoreWriter, refuse_existing
from ep3stream.errors import ConfigError, DamagedDataError, InputError, SourceError
from ep3stream.formats.digests import SourceDigests
from ep3stream.formats.source import START, RestartPosition, RowSource
from ep3stream.store.files import Location, ObjectUrl, location
from ep3stream.store.json_files import created_by
from ep3stream.store.manifest import Manifest
from ep3stream.store.reader import open_store

_logger = logging.getLogger(__name__)

_PLAN_VERSION = 1

_MAX_READ_BYTES = 8 * MIB

# What stays in the cache between its stations on the way into the store.
_WRITE_BYTES = 1 * MIB

# How much work a kill may cost, at most.
_PROGRESS_EVERY_S = 1.0

# What may differ when a conversion goes on: the store's content does not depend on it.
_FREE_SETTINGS = ("memory_bytes",)

_STAMPS = ("bytes", "mtime_ns")

Stage = Literal["read", "write", "sync", "upload"]


@dataclass(frozen=True, slots=True)
class ConvertProgress:
    """How far a stage is: `rows` passed it, `share` of it is done, and `n_bytes` of it in this process.

    Bytes are those of the source files while reading, of the store's rows while writing, of its files while
    they go into a bucket.
    """

    stage: Stage
    rows: int
    share: float
    n_bytes: int
    elapsed_s: float

    @property
    def eta_s(self) -> float:
        """Seconds to the end of the stage at the speed so far."""
        return self.elapsed_s * (1 - self.share) / max(self.share, 1e-9)


def convert(
    source: object,
    store: Path | str | ObjectUrl,
    config: ConvertConfig | None = None,
    *,
    x_file: Path | str | None = None,
    y_file: Path | str | None = None,
    restart: bool = False,
    work: Path | str | None = None,
    progress: Callable[[ConvertProgress], None] | None = None,
) -> Manifest:
    """Read a source once and commit it as one store at `store`, a path or s3://bucket/key.

    source: what `open_source` takes. The same source, settings and seed give the same bytes, whatever the
    memory and however often the conversion was killed: the same call goes on, or begins again by `restart`.
    Raises SourceError for what cannot be read as rows, ConfigError for settings that contradict each other
    or the source, and after these nothing is left; DiskError for the disk, after which the same call goes on;
    InputError for the destination, and naming the setting that an unfinished conversion did not have.

    A store for a bucket is made in a work directory first, whole, and then uploaded: in the directory `work`,
    the current one unless said.
    """
    place, tell = location(store), progress or (lambda _: None)
    upload = Upload(place) if isinstance(place, ObjectUrl) else None
    if upload is None and work is not None:
        raise ConfigError(
            f"work is {str(work)!r}, but {store} is no bucket's; leave it out: it lies beside the store"
        )
    near = place if isinstance(place, Path) else stand_in(place, Path(work) if work is not None else None)
    is_made = upload is None and not restart and was_committed(near)
    if upload is None and not is_made:
        refuse_existing(near)
    elif upload is not None and not is_begun(near):
        upload.require_free()
    config, recorded = take_over(config or ConvertConfig())
    opened = open_source(source, config, x_file, y_file)
    config = replace(config, format=config.format or _format_of(place))
    if config.format == "hdf5" and config.codec in ("lz4", "zstd"):
        raise ConfigError(f"codec is {config.codec} but hdf5 stores are never compressed; leave it out")
    if config.format == "hdf5" and upload is not None:
        raise ConfigError(f"{place} is in a bucket, where stores are Zarr; use --format zarr, or a path")
    with conversion_work(near, _plan(opened, config), restart) as files:
        if is_made or (upload is not None and upload.is_over(files)):
            files.remove()
            with open_store(place) as made:
                return made.manifest
        final = near if upload is None else files.finished
        try:
            if upload is None or not final.exists():
                _require_space(opened, final, config, files)
                _Conversion(files, final, opened, config, recorded, tell).run()
        except (SourceError, ConfigError, DamagedDataError):
            files.remove()
            raise
        with open_store(final) as made:
            manifest = made.manifest
        if upload is not None:
            upload.run(files, _Uploading(manifest, tell))
        files.remove()
    return manifest


class _Uploading:
    """Tells of an upload as of a stage."""

    def __init__(self, manifest: Manifest, tell: Callable[[ConvertProgress], None]) -> None:
        self._n_rows = sum(info.n_rows for info in manifest.splits.values())
        self._tell, self._began = tell, time.monotonic()

    def __call__(self, n_bytes: int, total: int) -> None:
        share, elapsed_s = n_bytes / max(1, total), time.monotonic() - self._began
        self._tell(ConvertProgress("upload", round(share * self._n_rows), share, n_bytes, elapsed_s))


def _plan(source: RowSource, config: ConvertConfig) -> dict[str, Any]:
    """What an unfinished conversion must have in common with the one that goes on, as JSON."""
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    return {
        "version": _PLAN_VERSION,
        "ep3stream": created_by(),
        # Whether files are as they were is for their digests to say.
        "source": [{k: v for k, v in part.items() if k not in _STAMPS} for part in source.fingerprint()],
        **{name: _plain(value) for name, value in settings.items() if name not in _FREE_SETTINGS},
    }


def _plain(value: Any) -> Any:
    """As JSON reads it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True, slots=True)
class _Mark:
    """The state of the reading behind some row, from which it goes on: position, rows of each split so far."""

    position: RestartPosition
    counts: tuple[int, ...]
    encoder: Json
    digests: Sequence[Json]

    @property
    def n_rows(self) -> int:
        """Rows that went on, those left out not counted."""
        return sum(self.counts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Json) -> _Mark:
        return cls(
            RestartPosition(**content["position"]),
            tuple(content["counts"]),
            content["encoder"],
            content["digests"],
        )


class _Conversion:
    """One conversion, from wherever its work directory says it was left."""

    def __init__(
        self,
        work: ConversionWork,
        store: Path,
        source: RowSource,
        config: ConvertConfig,
        recorded: RecordedColumns | None,
        tell: Callable[[ConvertProgress], None],
    ) -> None:
        self.work, self.store, self.source, self.config = work, store, source, config
        self.encoder = RowEncoder.build(source, config, recorded)
        self.digests = SourceDigests(source.files)
        self.keys = RowKeys(self.encoder, config.splits, config.seed, bool(config.shuffle))
        self.counts = np.zeros(len(config.splits), np.int64)
        self._tell = tell
        self._stage: Stage = "read"
        self._stage_began = time.monotonic()
        self._saved_at = time.monotonic()

    def run(self) -> Manifest:
        """Do what is left to do."""
        return self._straight() if self._is_straight() else self._through_spill()

    def _is_straight(self) -> bool:
        """Whether rows can go where they belong as they come, and the store can be gone on with."""
        config = self.config
        return (
            not config.shuffle
            and len(config.splits) == 1
            and config.format == "zarr"
            and config.missing != "mean"
            and self.encoder.is_complete
        )

    # The two ways.

    def _straight(self) -> Manifest:
        (split,) = self.config.splits
        saved = self.work.progress()
        expansion = Expansion.build(self.source, self.encoder)
        with self._writer(expansion, self.source.expected_rows, saved and saved["writer"]) as writer:
            goes_on = saved is not None and writer.rows_written(split) > 0
            marks = deque([_Mark.from_json(saved["read"]) if saved and goes_on else self._mark(START)])
            self._restore(marks[0])
            done = writer.rows_written(split) - marks[0].n_rows
            for rows, mark in self._read(marks[0].position):
                skipped = min(done, len(rows))
                done -= skipped
                writer.append_checked(split, *expansion.expand(rows[skipped:]))
                marks.append(mark)
                while len(marks) > 1 and marks[1].n_rows <= writer.rows_written(split):
                    marks.popleft()
                self._save(writer, marks[0])
            return self._commit(writer)

    def _through_spill(self) -> Manifest:
        config = self.config
        with RowSorter(
            self.work.rows, self.encoder.layout, config.memory_bytes, len(config.splits), bool(config.shuffle)
        ) as sorter:
            last, saved = sorter.restore(), self.work.progress()
            if saved is not None and last is not None and saved["spills"] == sorter.n_spills:
                self._restore(_Mark.from_json(saved["read"]))
            else:
                self.work.start_writing_again()
                saved = None
                begin = _Mark.from_json(last) if last else self._mark(START)
                self._restore(begin)
                for rows, mark in self._read(begin.position):
                    sorter.add(rows, mark.to_json)
                sorter.finish()
            return self._write_sorted(sorter, saved)

    def _write_sorted(self, sorter: RowSorter, saved: Json | None) -> Manifest:
        self._enter("write")
        read = self._mark(START)
        splits = list(self.config.splits)
        expansion = Expansion.build(self.source, self.encoder)
        total = int(self.counts.sum())
        row_bytes = expansion.n_features * np.dtype(self.encoder.layout.dtypes["x"]).itemsize
        with self._writer(expansion, total, saved and saved["writer"]) as writer:
            if sorter.n_spills and saved is None:
                self._save(writer, read, sorter.n_spills, at_once=True)
            done = [writer.rows_written(split) for split in splits]
            first = n_rows = sum(done)
            for split, rows in sorter.blocks(self._write_rows, done):
                writer.append_checked(splits[split], *expansion.expand(rows))
                n_rows += len(rows)
                self._report(n_rows, n_rows / total, (n_rows - first) * row_bytes)
                if sorter.n_spills:
                    self._save(writer, read, sorter.n_spills)
            return self._commit(writer)

    # Reading.

    def _mark(self, position: RestartPosition) -> _Mark:
        return _Mark(position, tuple(self.counts.tolist()), self.encoder.state(), self.digests.state())

    def _restore(self, mark: _Mark) -> None:
        try:
            self.digests.restore(mark.digests)
        except SourceError as error:
            raise InputError(
                f"{error}; restore it, or begin again by --restart (what was done is in {self.work.path})"
            ) from error
        self.encoder.restore(mark.encoder)
        self.counts[:] = mark.counts
        self.keys.skip(mark.n_rows)

    def _read(self, start: RestartPosition) -> Iterator[tuple[Rows, _Mark]]:
        """Every row from `start` on once, in the source's order, with its key; and the mark behind them.

        Raises SourceError, also for what is missing in the end.
        """
        total, first_byte = self.digests.bytes_total, None
        for batch in self.source.batches(min(_MAX_READ_BYTES, self.config.memory_bytes // 16), start):
            rows = self.encoder.encode(batch)
            split_ids = self.keys.assign(rows)
            self.encoder.observe(rows, split_ids)
            self.counts += np.bincount(split_ids, minlength=len(self.counts))
            byte = 0
            if self.source.files:
                self.digests.advance(batch.file_index, batch.end_byte, batch.raw)
                byte = self.digests.bytes_before(batch.file_index) + batch.end_byte
            first_byte = byte if first_byte is None else first_byte
            n_rows, expected_rows = int(self.counts.sum()), self.source.expected_rows
            share = n_rows / expected_rows if expected_rows else byte / max(1, total)
            self._report(n_rows, share, byte - first_byte)
            yield rows, self._mark(batch.next)
        self._require_nothing_missing()

    def _require_nothing_missing(self) -> None:
        name = self.source.name
        self.encoder.require_usable(name)
        for (split, share), count in zip(self.config.splits.items(), self.counts, strict=True):
            if count == 0:
                raise SourceError(
                    f"{name}: split {split} ({share:g} of the rows) got none of the {self.counts.sum()} rows; "
                    "make it larger, leave it out or take another seed"
                )

    # Writing.

    @property
    def _write_rows(self) -> int:
        widest = self.encoder.layout.row_bytes + 4 * sum(map(len, self.encoder.books))
        return max(1, min(_WRITE_BYTES, self.config.memory_bytes // 16) // widest)

    def _writer(self, expansion: Expansion, expected_rows: int | None, state: Json | None) -> StoreWriter:
        """A writer that goes on where `state` was saved, or a new one where that has become damaged."""
        config, target = self.config, self.source.target
        assert config.dtype is not None
        assert config.format is not None
        spec = StoreSpec(
            task=target.task,
            n_features=len(expansion.feature_names),
            n_outputs=len(expansion.class_names or target.names),
            x_dtype=config.dtype,
            feature_names=expansion.feature_names,
            target_names=target.names,
            class_names=expansion.class_names,
            columns=expansion.columns,
            shuffle_seed=config.seed if config.shuffle else None,
            source=(),
            segment_bytes=config.segment_bytes,
            codec=config.codec,
            expected_rows=expected_rows,
        )
        if state is not None:
            try:
                return StoreWriter.resume(self.store, self.work.store, spec, state)
            except DamagedDataError as error:
                _logger.warning("writing the store anew: %s", error)
        return StoreWriter.start(self.store, self.work.store, spec, config.format, keeps_partial=True)

    def _save(self, writer: StoreWriter, read: _Mark, n_spills: int = 0, at_once: bool = False) -> None:
        """Remember what is done, now and then. An HDF5 file cannot be gone on with: it is written anew."""
        if at_once or time.monotonic() - self._saved_at > _PROGRESS_EVERY_S:
            state = writer.state() if self.config.format == "zarr" and not at_once else None
            self.work.set_progress({"read": read.to_json(), "spills": n_spills, "writer": state})
            self._saved_at = time.monotonic()

    def _commit(self, writer: StoreWriter) -> Manifest:
        self._enter("sync")
        n_rows = int(self.counts.sum())
        self._report(n_rows, 0.0, 0)
        source = self.digests.finish() if self.source.files else self.source.described()
        self.work.begin_commit()
        return writer.commit(source, self.encoder.report())

    # Telling.

    def _enter(self, stage: Stage) -> None:
        self._stage, self._stage_began = stage, time.monotonic()

    def _report(self, rows: int, share: float, n_bytes: int) -> None:
        elapsed_s = time.monotonic() - self._stage_began
        self._tell(ConvertProgress(self._stage, rows, min(1.0, share), n_bytes, elapsed_s))


def _format_of(store: Location) -> Format:
    return "hdf5" if store.suffix.lower() in (".h5", ".hdf5") else "zarr"


def _require_space(source: RowSource, store: Path, config: ConvertConfig, work: ConversionWork) -> None:
    """Refuse to start what the disk will not hold, as far as the source's size tells."""
    store_bytes = source.expected_bytes * np.dtype(config.dtype).itemsize // 4
    spill_bytes = store_bytes if config.shuffle and store_bytes > config.memory_bytes // 4 else 0
    needed = store_bytes + spill_bytes - work.size()
    free = shutil.disk_usage(work.path).free
    if needed > free:
        work.remove()
        raise InputError(
            f"{store} needs about {needed} bytes more ({spill_bytes} in all while rows are put in order) "
            f"but {store.parent} has {free} free; free space or choose another disk"
        )
