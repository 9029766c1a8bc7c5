"""Reads a source from front to back as encoded rows that know their split and their place in the random order.

`RowReader.rows` yields each batch with a `ReadState`, from which another process reads on behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ep3stream.config import MIB, ConvertConfig
from ep3stream.conversion.encode import Room, RowEncoder
from ep3stream.conversion.recorded_columns import RecordedColumns
from ep3stream.conversion.rows import EncodedRows
from ep3stream.conversion.shuffle import RowKeys
from ep3stream.conversion.split_sources import SourcePart, SplitSources
from ep3stream.conversion.work import Json
from ep3stream.errors import SourceError
from ep3stream.formats.digests import SourceDigests
from ep3stream.formats.source import START, RestartPosition, SourceBatch

_MAX_READ_BYTES = 8 * MIB

# Is told how many rows are kept so far, the share of the source that is read, and the bytes of it in this process.
Report = Callable[[int, float, int], None]


@dataclass(frozen=True, slots=True)
class ReadState:
    """The state of a `RowReader` after some row, from which another process can go on.

    counts: rows of each split so far; rows that were left out are not counted.
    """

    position: RestartPosition
    counts: tuple[int, ...]
    encoder: Json
    digests: Sequence[Json]

    @property
    def n_rows(self) -> int:
        """Rows of all splits so far."""
        return sum(self.counts)

    def to_json(self) -> dict[str, Any]:
        """The state as JSON, for `from_json`."""
        # Not the whole by `asdict`, which copies every category.
        return {
            "position": asdict(self.position),
            "counts": self.counts,
            "encoder": self.encoder,
            "digests": self.digests,
        }

    @classmethod
    def from_json(cls, content: Json) -> ReadState:
        """The state that `to_json` was called on."""
        return cls(
            RestartPosition(**content["position"]),
            tuple(content["counts"]),
            content["encoder"],
            content["digests"],
        )


class RowReader:
    """Reads a source from front to back as encoded rows that have their keys; digests its files meanwhile."""

    def __init__(self, source: SplitSources, config: ConvertConfig, recorded: RecordedColumns | None) -> None:
        self.encoder = RowEncoder.build(source.first, config, recorded)
        self.digests = SourceDigests(source.files)
        self._source, self._config = source, config
        self._keys = RowKeys(self.encoder, config.splits, config.seed, bool(config.shuffle))
        self._counts = np.zeros(len(config.split_names), np.int64)
        self._ahead: Iterator[SourceBatch] | None = None

    @property
    def counts(self) -> list[int]:
        """Rows of each split so far; rows that were left out are not counted."""
        counts: list[int] = self._counts.tolist()
        return counts

    @property
    def n_rows(self) -> int:
        """Rows read so far; rows that were left out are not counted."""
        return int(self._counts.sum())

    def state(self, position: RestartPosition) -> ReadState:
        """Returns the state after the rows read so far, which end at `position`."""
        return ReadState(position, tuple(self._counts.tolist()), self.encoder.state(), self.digests.state())

    def restore(self, state: ReadState) -> None:
        """Goes on from `state`; raises SourceError if the files are not those of the state."""
        self.digests.restore(state.digests)
        self.encoder.restore(state.encoder)
        self._counts[:] = state.counts
        self._keys.skip(state.n_rows)

    def read_ahead(self) -> None:
        """Reads the first rows, which decide about offsets; `rows` then begins with them."""
        self._ahead = self._first_batches(START)

    @property
    def _block_bytes(self) -> int:
        return min(_MAX_READ_BYTES, self._config.memory_bytes // 16)

    def _first_batches(self, start: RestartPosition) -> Iterator[SourceBatch]:
        """The batches of the first source behind `start`; its first rows alone decide about offsets."""
        first = self._source.parts[0]
        if start.file >= first.n_places:
            return iter(())
        batches, offsets = first.batches(self._block_bytes, start), self.encoder.offsets
        return batches if start != START and offsets.is_decided else offsets.read_ahead(batches)

    def rows(
        self, start: RestartPosition, report: Report, room: Room | None = None
    ) -> Iterator[tuple[EncodedRows, ReadState]]:
        """Yields every row from `start` on once, in the sources' order, in batches; and the state after each batch.

        The rows lie in the memory that `room` gives, as `RowEncoder.encode` says. Raises SourceError for rows that
        cannot be read, and after the last row of a source if a split has no row, or the encoder finds the rows
        unusable.
        """
        ahead, self._ahead = self._ahead, None
        track = _Track(self._source, self.digests, report)
        first = self._source.parts[0]
        for batch in ahead or self._first_batches(start):
            rows = self.encoder.encode(batch, room)
            self._counts += np.bincount(self._keys.assign(rows), minlength=len(self._counts))
            track.advance(first, batch, self.n_rows)
            yield rows, self.state(batch.next)
        if start.file < first.n_places:
            self.encoder.require_usable(first.source.name)
            self._require_rows()
        names = list(self._config.split_names)
        for part, batch in self._source.later_batches(
            self._block_bytes, start, self.encoder.offsets.read_ahead
        ):
            assert part.split is not None
            split = names.index(part.split)
            rows = self.encoder.following(part.split).encode(batch, room)
            self._keys.assign(rows, split)
            self._counts[split] += len(rows)
            track.advance(part, batch, self.n_rows)
            yield rows, self.state(batch.next)
        for part in self._source.parts[1:]:
            if self._counts[names.index(str(part.split))] == 0:
                raise SourceError(
                    f"{part.source.name}: every row of split {part.split} is left out, for missing or unknown values; "
                    "fill some in, or take --missing auto and --unknown ignore"
                )

    def _require_rows(self) -> None:
        """Raises SourceError if a split of the first source has no row."""
        for (split, share), count in zip(self._config.splits.items(), self._counts, strict=False):
            if count == 0:
                raise SourceError(
                    f"{self._source.first.name}: split {split} ({share:g} of the rows) got none of the {self.n_rows} "
                    "rows; make it larger, leave it out or take another seed"
                )


class _Track:
    """Digests the sources' files up to the rows that were read, and reports how far the reading is."""

    def __init__(self, source: SplitSources, digests: SourceDigests, report: Report) -> None:
        self._digests, self._report = digests, report
        self._expected_rows = source.expected_rows
        self._first_byte: int | None = None

    def advance(self, part: SourcePart, batch: SourceBatch, n_rows: int) -> None:
        """Takes note of a batch of the part, after which n rows are kept."""
        byte = 0
        if part.source.files:
            index = part.first_file + batch.file_index
            self._digests.advance(index, batch.end_byte, batch.raw)
            byte = self._digests.bytes_before(index) + batch.end_byte
        self._first_byte = byte if self._first_byte is None else self._first_byte
        share = byte / max(1, self._digests.bytes_total)
        if self._expected_rows:
            share = n_rows / self._expected_rows
        self._report(n_rows, share, max(0, byte - self._first_byte))
