"""Turns source files into a store: encode, split, order, write; in bounded memory, and all or nothing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ep3stream.config import MIB, ConvertConfig, Format
from ep3stream.data.batch import Source
from ep3stream.data.encode import Expansion, RowEncoder, Rows
from ep3stream.data.manifest import Manifest
from ep3stream.data.shuffle import KeyOrder, RowKeys, rows_by_split
from ep3stream.data.sources import SourceDigests, open_source
from ep3stream.data.spec import StoreSpec
from ep3stream.data.writer import create_store
from ep3stream.errors import InputError, SourceError

_MAX_BLOCK_BYTES = 8 * MIB


@dataclass(frozen=True, slots=True)
class ConvertProgress:
    """How far a conversion is. `rows`: those that passed the stage; bytes are those of the source files."""

    stage: Literal["read", "shuffle"]
    rows: int
    bytes_read: int
    bytes_total: int
    elapsed_s: float


def convert(
    sources: Sequence[Path | str],
    store: Path | str,
    config: ConvertConfig,
    *,
    x_file: Path | str | None = None,
    y_file: Path | str | None = None,
    progress: Callable[[ConvertProgress], None] | None = None,
) -> Manifest:
    """Read tables, or a pair of .npy files, once, and commit them as one store at `store`.

    The same source, settings and seed give the same content, whatever the memory. Raises SourceError for
    what cannot be read as rows, InputError for the destination and the disk; after an error nothing is left.
    """
    store = Path(store).absolute()
    if store.exists() or store.is_symlink():
        raise InputError(f"{store} exists; remove it or choose another name")
    paths = [Path(source) for source in sources]
    x_path, y_path = (None if file is None else Path(file) for file in (x_file, y_file))
    source = open_source(paths, x_path, y_path, config.target, config.task)
    _require_space(source, store, config)
    reader = _Reader(source, config, progress or (lambda _: None))
    if not config.shuffle and reader.encoder.is_complete:
        # Nothing has to wait for the last row, except the digests, which the store wants first.
        digests = reader.digests.finish()
        return _write(store, reader, reader.rows(), digests, source.expected_rows)
    with _spill_directory(store) as directory:
        order = KeyOrder(directory, reader.encoder.dtype, config.memory_bytes, config.shuffle)
        for rows in reader.rows():
            order.add(rows, reader.share_read)
        blocks = reader.telling(order.blocks(reader.block_rows))
        return _write(store, reader, blocks, reader.digests.finish(), reader.n_rows)


class _Reader:
    """Reads the source's rows with their keys, counts them, and tells how far it is."""

    def __init__(
        self, source: Source, config: ConvertConfig, tell: Callable[[ConvertProgress], None]
    ) -> None:
        self.source = source
        self.config = config
        self.encoder = RowEncoder.build(source, config.dtype)
        self.digests = SourceDigests(source.files)
        self._counts = np.zeros(len(config.splits), np.int64)
        self._block_bytes = min(_MAX_BLOCK_BYTES, config.memory_bytes // 16)
        self._bytes_read = 0
        self._tell = tell
        self._started = time.monotonic()

    @property
    def n_rows(self) -> int:
        """Rows read so far."""
        return int(self._counts.sum())

    @property
    def share_read(self) -> float:
        """The share of the source's bytes read so far, in (0, 1]."""
        return min(1.0, max(1, self._bytes_read) / self.digests.bytes_total)

    @property
    def block_rows(self) -> int:
        """How many rows to handle at once on their way into the store."""
        widest = self.encoder.dtype.itemsize + 4 * sum(map(len, self.encoder.books))
        return max(1, self._block_bytes // widest)

    def rows(self) -> Iterator[Rows]:
        """Every row once, in the source's order; raises SourceError, also for what is missing in the end."""
        keys = RowKeys(self.encoder, self.config.splits, self.config.seed, self.config.shuffle)
        for batch in self.source.batches(self._block_bytes):
            rows = self.encoder.encode(batch)
            self._counts += np.bincount(keys.assign(rows), minlength=len(self._counts))
            self.digests.advance(batch.file_index, batch.end_byte)
            self._bytes_read = self.digests.bytes_before(batch.file_index) + batch.end_byte
            self._report("read", self.n_rows)
            yield rows
        self._require_nothing_missing()

    def telling(self, blocks: Iterator[Rows]) -> Iterator[Rows]:
        """The same blocks, each told as progress when the caller is done with it."""
        done = 0
        for rows in blocks:
            yield rows
            done += len(rows)
            self._report("shuffle", done)

    def _report(self, stage: Literal["read", "shuffle"], rows: int) -> None:
        elapsed_s = time.monotonic() - self._started
        self._tell(ConvertProgress(stage, rows, self._bytes_read, self.digests.bytes_total, elapsed_s))

    def _require_nothing_missing(self) -> None:
        labels, file = self.encoder.labels, self.source.files[-1]
        if labels is not None and len(labels) < 2:
            raise SourceError(
                f"{file}: every row has the label {labels.sorted_values()[0]!r} in {labels.column!r}; "
                "classification needs at least two classes"
            )
        for (name, share), count in zip(self.config.splits.items(), self._counts, strict=True):
            if count == 0:
                raise SourceError(
                    f"{file}: split {name} ({share:g} of the rows) got none of the {self.n_rows} rows; "
                    "make it larger, leave it out or take another seed"
                )


def _write(
    store: Path,
    reader: _Reader,
    blocks: Iterator[Rows],
    digests: tuple[Mapping[str, object], ...],
    expected_rows: int | None,
) -> Manifest:
    """Expand the rows and commit them as a store; the encoder must know every category and label."""
    config, target = reader.config, reader.source.target
    expansion = Expansion.build(reader.source, reader.encoder)
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
        source=digests,
        segment_bytes=config.segment_bytes,
        expected_rows=expected_rows,
    )
    names = list(config.splits)
    with create_store(store, spec, config.format or _format_of(store)) as writer:
        for block in blocks:
            for split, rows in rows_by_split(block):
                writer.append(names[split], *expansion.expand(rows))
        return writer.commit()


def _format_of(store: Path) -> Format:
    return "hdf5" if store.suffix.lower() in (".h5", ".hdf5") else "zarr"


def _require_space(source: Source, store: Path, config: ConvertConfig) -> None:
    """Refuse to start what the disk will not hold, as far as the source's size tells."""
    store_bytes = source.expected_bytes * np.dtype(config.dtype).itemsize // 4
    spill_bytes = store_bytes if config.shuffle and store_bytes > config.memory_bytes // 2 else 0
    there = next(parent for parent in store.parents if parent.exists())
    free = shutil.disk_usage(there).free
    if store_bytes + spill_bytes > free:
        raise InputError(
            f"{store} needs about {store_bytes + spill_bytes} bytes ({spill_bytes} of them while rows "
            f"are put in order) but {there} has {free} free; free space or choose another disk"
        )


@contextmanager
def _spill_directory(store: Path) -> Iterator[Path]:
    """A new directory beside the store removed in the end; one left by a killed conversion is replaced."""
    directory = store.with_name(f".{store.name}.spill")
    try:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be made ({error.strerror}); put the store elsewhere"
        ) from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
