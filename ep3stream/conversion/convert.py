"""Converts a source into a store: encode the rows, put them into splits and into order, write them.

Memory is bounded, and the store appears whole or not at all. Rows go straight from the source into the store if they
may stay in the source's order and everything about the store is known before the first row. Otherwise they go through
a `RowSorter`, which keeps them on the disk. So do rows with a missing number, which becomes its column's mean, known
behind the last row: a conversion that has begun straight begins again at the first one. On both ways the conversion
saves its state now and then. A conversion that was killed goes on from there, and ends with the same bytes as one that
was not.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ep3stream.config import MIB, ConvertConfig, settings_of
from ep3stream.conversion.expand import Expansion
from ep3stream.conversion.numbers import ColumnMeans
from ep3stream.conversion.open_source import open_source
from ep3stream.conversion.recorded_columns import RecordedColumns, take_over
from ep3stream.conversion.row_reader import ReadState, Report, RowReader
from ep3stream.conversion.rows import EncodedRows
from ep3stream.conversion.shuffle import SORTER_SHARE, RowSorter
from ep3stream.conversion.spec import StoreSpec
from ep3stream.conversion.split_sources import SplitSources, tell_same_content
from ep3stream.conversion.upload import Upload, stand_in
from ep3stream.conversion.work import ConversionWork, Json, conversion_work, is_begun, was_committed
from ep3stream.conversion.writer import StoreWriter, refuse_existing
from ep3stream.errors import ConfigError, DamagedDataError, DiskError, InputError, SourceError
from ep3stream.formats.source import START
from ep3stream.store.files import Location, ObjectUrl, location
from ep3stream.store.json_files import created_by
from ep3stream.store.manifest import Manifest, told_two_valued
from ep3stream.store.reader import open_store

_logger = logging.getLogger(__name__)

_PLAN_VERSION = 2

# A block of rows this small stays in the processor's cache on its way into the store.
_WRITE_BYTES = 1 * MIB

# The most work that a kill may cost.
_PROGRESS_EVERY_S = 1.0

# Settings that may change when a conversion goes on: the content of the store does not depend on them.
_FREE_SETTINGS = {each.name for each in settings_of(ConvertConfig) if each.on_resume == "free"}

# Parts of a source's fingerprint that may change: whether a file is the same one, its digest decides.
_STAMPS = ("bytes", "mtime_ns")

Stage = Literal["read", "write", "sync", "upload"]


class _OtherFilesError(InputError):
    """The files of the source are not those with which the conversion began."""


@dataclass(frozen=True, slots=True)
class ConvertProgress:
    """How far a stage is: `rows` have passed it, `share` of it is done, and `n_bytes` of it in this process.

    The bytes are those of the source's files in stage `read`, those of the store's rows in stage `write`, and those
    of the store's files in stage `upload`.
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
    """Reads a source once and commits it as one store at `store`, a path or s3://bucket/key; returns its manifest.

    source: what `open_source` takes. The same source, settings and seed give the same bytes, whatever the memory and
    however often the conversion was killed. The same call goes on with a killed conversion; with `restart`, or of a
    source that can be read only once, it begins again. A store for a bucket is first made whole in a work directory
    and then uploaded; the work directory lies in `work`, or in the current directory.

    Raises SourceError if the source cannot be read as rows, and ConfigError if settings contradict each other or the
    source; nothing is left then. Raises DiskError if the disk is full or fails; the same call then goes on. Raises
    InputError if the destination cannot be used, or if a setting is not the one of the unfinished conversion.
    """
    destination, tell = location(store), progress or (lambda _: None)
    upload = Upload(destination) if isinstance(destination, ObjectUrl) else None
    if upload is None and work is not None:
        raise ConfigError(
            f"work is {str(work)!r}, but {store} is no bucket's; leave it out: it lies beside the store"
        )
    # The path beside which the work directory lies.
    local = (
        destination
        if isinstance(destination, Path)
        else stand_in(destination, Path(work) if work is not None else None)
    )
    is_made = upload is None and not restart and was_committed(local)
    if upload is None and not is_made:
        refuse_existing(local)
    elif upload is not None and not is_begun(local):
        upload.require_free()
    config, recorded = take_over(config or ConvertConfig())
    opened = SplitSources.open(open_source(source, config, x_file, y_file, recorded), config, recorded)
    config = _with_format(config, destination)
    # Of what is read only once, nobody knows whether it is what was read before.
    restart = restart or opened.first.reads_once
    with conversion_work(local, _plan(opened, config), restart) as files:
        if is_made or (upload is not None and upload.is_over(files)):
            files.remove()
            with open_store(destination) as made:
                return made.manifest
        final = local if upload is None else files.finished
        try:
            if upload is None or not final.exists():
                _require_space(opened, final, config, files)
                _Conversion(files, final, opened, config, recorded, tell).run()
        except (InputError, DamagedDataError) as error:
            # What was done stays where the same call can go on: behind a full disk, or with the files of before.
            if not isinstance(error, DiskError | _OtherFilesError):
                files.remove()
            raise
        with open_store(final) as made:
            manifest = made.manifest
        if upload is not None:
            upload.run(files, _upload_reporter(manifest, tell))
        files.remove()
    if config.task is None and (told := told_two_valued(manifest, config.split_names[0])):
        _logger.warning(told)
    return manifest


def _with_format(config: ConvertConfig, destination: Location) -> ConvertConfig:
    """Returns the config with the format that the destination's name asks for, unless it states one."""
    is_hdf5 = destination.suffix.lower() in (".h5", ".hdf5")
    config = replace(config, format=config.format or ("hdf5" if is_hdf5 else "zarr"))
    if config.format == "hdf5" and config.codec in ("lz4", "zstd"):
        raise ConfigError(f"codec is {config.codec} but hdf5 stores are never compressed; leave it out")
    if config.format == "hdf5" and isinstance(destination, ObjectUrl):
        raise ConfigError(
            f"{destination} is in a bucket, where stores are Zarr; use --format zarr, or a path"
        )
    return config


def _plan(source: SplitSources, config: ConvertConfig) -> dict[str, Any]:
    """Returns, as JSON, what must be the same for a process to go on with an unfinished conversion."""
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    settings["split_files"] = list(config.split_files)  # The files themselves are among the sources.
    return {
        "version": _PLAN_VERSION,
        "ep3stream": created_by(),
        "source": [{k: v for k, v in part.items() if k not in _STAMPS} for part in source.fingerprint],
        **{name: _plain(value) for name, value in settings.items() if name not in _FREE_SETTINGS},
    }


def _plain(value: Any) -> Any:
    """Returns the value as it would come back from JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _require_space(source: SplitSources, store: Path, config: ConvertConfig, work: ConversionWork) -> None:
    """Raises InputError, and removes the work directory, if the disk is too small for a source of this size."""
    store_bytes = source.expected_bytes * np.dtype(config.dtype).itemsize // 4
    spill_bytes = store_bytes if config.shuffle and store_bytes > config.memory_bytes * SORTER_SHARE else 0
    needed = store_bytes + spill_bytes - work.size()
    free = shutil.disk_usage(work.path).free
    if needed > free:
        work.remove()
        raise InputError(
            f"{store} needs about {needed} bytes more ({spill_bytes} in all while rows are put in order) "
            f"but {store.parent} has {free} free; free space or choose another disk"
        )


def _reporter(stage: Stage, tell: Callable[[ConvertProgress], None]) -> Report:
    """Returns a function that tells how far a stage is, given rows, share and bytes. The stage begins now."""
    began = time.monotonic()

    def report(rows: int, share: float, n_bytes: int) -> None:
        tell(ConvertProgress(stage, rows, min(1.0, share), n_bytes, time.monotonic() - began))

    return report


def _upload_reporter(
    manifest: Manifest, tell: Callable[[ConvertProgress], None]
) -> Callable[[int, int], None]:
    n_rows = sum(info.n_rows for info in manifest.splits.values())
    report = _reporter("upload", tell)

    def report_bytes(n_bytes: int, total: int) -> None:
        share = n_bytes / max(1, total)
        report(round(share * n_rows), share, n_bytes)

    return report_bytes


class _Conversion:
    """One conversion to a path, from where an earlier process left it to the committed store."""

    def __init__(
        self,
        work: ConversionWork,
        store: Path,
        source: SplitSources,
        config: ConvertConfig,
        recorded: RecordedColumns | None,
        tell: Callable[[ConvertProgress], None],
    ) -> None:
        self.work, self.store, self.source, self.config = work, store, source, config
        self.recorded = recorded
        self._open_reader()
        self._tell = tell
        self._saved_at = time.monotonic()

    def _open_reader(self) -> None:
        self.reader = RowReader(self.source, self.config, self.recorded)
        self.encoder = self.reader.encoder

    def run(self) -> None:
        """Does what is left to do."""
        config = self.config
        # Whether each row can go to its place as it comes, and another process could go on with the unfinished store.
        is_straight = (
            not config.shuffle
            and len(config.split_names) == 1
            and config.format == "zarr"
            and self.encoder.is_complete
            and not (self.source.first.reads_once and self.encoder.may_fill)
            and not self.work.is_sorting
        )
        if is_straight:
            if self._write_straight():
                return
            self.work.start_sorting()
            self._open_reader()
        with RowSorter(
            self.work.rows,
            self.encoder.layout,
            config.memory_bytes,
            len(config.split_names),
            bool(config.shuffle),
        ) as sorter:
            saved = self._read_into(sorter)
            if saved is None:
                self._learn_means(sorter)
            self._write_from(sorter, saved)

    def _write_straight(self) -> bool:
        """Reads the rows and appends them to the store's only split.

        Returns False at a missing number, whose column's mean is known behind the last row alone.
        """
        (split,) = self.config.splits
        saved = self.work.progress()
        report = _reporter("read", self._tell)
        if saved:
            self.encoder.offsets.restore(saved["read"]["encoder"]["offsets"])
        else:
            self.reader.read_ahead()
        expansion = Expansion.build(self.source.first, self.encoder)
        with self._open_writer(expansion, self.source.expected_rows, saved and saved["writer"]) as writer:
            n_written = writer.rows_written(split)
            first = ReadState.from_json(saved["read"]) if saved and n_written else self.reader.state(START)
            self._restore_reader(first)
            to_skip = n_written - first.n_rows
            # States of the reader, oldest first. The first is the newest one whose rows are all written: the writer
            # holds back the rows of an unfinished file.
            states = deque([first])
            for rows, state in self.reader.rows(first.position, report):
                if self.encoder.unknown_means():
                    return False
                n_skipped = min(to_skip, len(rows))
                to_skip -= n_skipped
                _append(writer, split, rows[n_skipped:], expansion)
                states.append(state)
                while len(states) > 1 and states[1].n_rows <= writer.rows_written(split):
                    states.popleft()
                self._save(states[0], 0, writer)
            self._commit(writer, expansion)
        return True

    def _read_into(self, sorter: RowSorter) -> Json | None:
        """Reads all rows into the sorter, except those it has from an earlier process.

        Returns the progress of the writing, if an earlier process has read all rows and begun to write.
        """
        last_read, saved = sorter.restore(), self.work.progress()
        if saved is not None and last_read is not None and saved["spills"] == sorter.n_spills:
            self._restore_reader(ReadState.from_json(saved["read"]))
            return saved
        self.work.start_writing_again()
        state = ReadState.from_json(last_read) if last_read else self.reader.state(START)
        self._restore_reader(state)
        for rows, behind in self.reader.rows(state.position, _reporter("read", self._tell), sorter.room):
            sorter.add(rows, behind.to_json)
        sorter.finish()
        return None

    def _learn_means(self, sorter: RowSorter) -> None:
        """Finds the means, over the first split, of the columns that have gaps.

        In one more pass over the sorted rows, so that rows without gaps cost nothing, and in their final order, so that
        the last bit does not depend on the memory.
        """
        gappy = self.encoder.unknown_means()
        if not gappy:
            return
        means = ColumnMeans(len(gappy))
        for _, rows in sorter.blocks(self._block_rows(), [0, *self.reader.counts[1:]]):
            means.add(rows.x[:, gappy])
        self.encoder.set_means(gappy, means.means())

    def _block_rows(self, row_bytes: int = 0) -> int:
        """Returns how many sorted rows are taken at a time, of which each becomes a row of so many bytes."""
        widest = self.encoder.layout.row_bytes + row_bytes
        return max(1, min(_WRITE_BYTES, self.config.memory_bytes // 16) // widest)

    def _write_from(self, sorter: RowSorter, saved: Json | None) -> None:
        """Writes the sorted rows, except those that the store has from an earlier process."""
        report = _reporter("write", self._tell)
        read = self.reader.state(START)
        splits = self.config.split_names
        expansion = Expansion.build(self.source.first, self.encoder)
        total = self.reader.n_rows
        row_bytes = expansion.n_features * np.dtype(self.encoder.layout.dtypes["x"]).itemsize
        with self._open_writer(expansion, total, saved and saved["writer"]) as writer:
            if sorter.n_spills and saved is None:
                self._save(read, sorter.n_spills)
            done = [writer.rows_written(split) for split in splits]
            first = n_rows = sum(done)
            for split, rows in sorter.blocks(self._block_rows(row_bytes), done):
                _append(writer, splits[split], rows, expansion)
                n_rows += len(rows)
                report(n_rows, n_rows / total, (n_rows - first) * row_bytes)
                # Nothing can go on with an HDF5 file half written: it is written anew from the spilled rows.
                if sorter.n_spills and self.config.format == "zarr":
                    self._save(read, sorter.n_spills, writer)
            self._commit(writer, expansion)

    def _restore_reader(self, state: ReadState) -> None:
        try:
            self.reader.restore(state)
        except SourceError as error:
            raise _OtherFilesError(
                f"{error}; restore it, or begin again by --restart (what was done is in {self.work.path})"
            ) from error

    def _open_writer(
        self, expansion: Expansion, expected_rows: int | None, state: Json | None
    ) -> StoreWriter:
        """Returns a writer that goes on from `state`; a new writer if there is none or the store is damaged."""
        config, target = self.config, self.source.first.target
        assert config.dtype is not None
        assert config.format is not None
        try:
            spec = StoreSpec(
                task=target.task,
                n_features=len(expansion.feature_names),
                n_outputs=len(expansion.class_names or target.names),
                x_dtype=config.dtype,
                feature_names=expansion.feature_names,
                target_names=target.names,
                class_names=expansion.class_names,
                columns=expansion.columns(),
                shuffle_seed=config.seed if config.shuffle else None,
                source=(),
                segment_bytes=config.segment_bytes,
                codec=config.codec,
                expected_rows=expected_rows,
            )
        except InputError as error:
            # No store can hold these rows, so that nothing can go on.
            raise SourceError(f"{self.source.first.name}: {error}") from error
        if state is not None:
            try:
                return StoreWriter.resume(self.store, self.work.store, spec, state)
            except DamagedDataError as error:
                _logger.warning("writing the store anew: %s", error)
        return StoreWriter.start(self.store, self.work.store, spec, config.format, keeps_partial=True)

    def _save(self, read: ReadState, n_spills: int, writer: StoreWriter | None = None) -> None:
        """Saves how far the conversion is: at once without a writer, and with one if the last time is long ago."""
        if writer is None or time.monotonic() - self._saved_at > _PROGRESS_EVERY_S:
            state = None if writer is None else writer.state()
            self.work.set_progress({"read": read.to_json(), "spills": n_spills, "writer": state})
            self._saved_at = time.monotonic()

    def _commit(self, writer: StoreWriter, expansion: Expansion) -> None:
        _reporter("sync", self._tell)(self.reader.n_rows, 0.0, 0)
        files = self.reader.digests.finish()
        tell_same_content(self.source, files, self.config.split_names[0])
        means = writer.feature_means(self.config.split_names[0])
        self.work.begin_commit()
        writer.commit(self.source.described(files), self.encoder.report(), expansion.columns(means))


def _append(writer: StoreWriter, split: str, rows: EncodedRows, expansion: Expansion) -> None:
    """Expands the rows to their place in the store."""
    writer.append_made(split, len(rows), lambda taken, x, y: expansion.expand_into(rows[taken], x, y))
