"""Reads svmlight / libsvm text (`label index:value ...`), plain, .gz or .zst, as dense rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.config import ConvertConfig
from ep3stream.errors import SourceError
from ep3stream.formats.array_source import ArrayLayout
from ep3stream.formats.digests import stamps_of
from ep3stream.formats.source import (
    START,
    FeatureColumn,
    RestartPosition,
    SourceBatch,
    TargetColumns,
    reading,
)
from ep3stream.formats.text_blocks import TextFault, text_blocks

SVMLIGHT_SUFFIXES = tuple(
    name + packed for name in (".svm", ".libsvm", ".svmlight") for packed in ("", ".gz", ".zst")
)

_BLOCK_BYTES = 1 << 20

_IGNORED = re.compile(rb"#[^\n]*|(?<=[ \t])qid:\S*")

_SPACE, _TAB, _NEWLINE, _RETURN, _COLON = b" \t\n\r:"


class _LineFault(Exception):
    """What is wrong with the row that follows the first `row` ones of a block."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(reason)
        self.row = row


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Rows of one block: label and line (b,) of each; row, index and value (k,) of each entry, indices from 0."""

    lines: NDArray[np.intp]
    labels: NDArray[np.float64]
    rows: NDArray[np.intp]
    indices: NDArray[np.int64]
    values: NDArray[np.float64]

    def dense(self, begin: int, end: int, n_features: int) -> NDArray[np.float64]:
        """Rows begin to end as (end - begin, d); what is not stated is 0."""
        first, last = np.searchsorted(self.rows, (begin, end))
        x = np.zeros((end - begin, n_features))
        x[self.rows[first:last] - begin, self.indices[first:last]] = self.values[first:last]
        return x


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of a file behind its first `first_row` ones; ends: where each of them ends in the unpacked text."""

    rows: SparseRows
    first_row: int
    ends: NDArray[np.intp]
    end_byte: int


@dataclass(frozen=True, slots=True)
class SvmlightSource:
    """One or several svmlight files. Features are x0, x1, ...: index 1 is x0, or index 0 with `index_base` 0."""

    files: tuple[Path, ...]
    index_base: int
    n_features: int
    layout: ArrayLayout
    expected_rows: int | None

    @classmethod
    def open(cls, files: Sequence[Path], config: ConvertConfig) -> SvmlightSource:
        """Count the features, unless `features` says how many; raises SourceError.

        The labels are classes if all of them are whole numbers, which is found out in the same pass, unless
        `task` is given.
        """
        n_features, is_whole, n_rows = config.features, True, None
        if n_features is None or config.task is None:
            found, is_whole, n_rows = _scan(files, config.index_base)
            n_features = n_features or found
        if not n_features:
            raise SourceError(f"{files[0]}: states no feature; say how many there are with --features")
        name = str(files[0])
        dtype = np.dtype(np.int64 if is_whole else np.float64)
        layout = ArrayLayout.of((name, name), (1, n_features), (1,), dtype, config.task)
        return cls(tuple(files), config.index_base, n_features, layout, n_rows)

    @property
    def name(self) -> str:
        """What messages about the whole source call it."""
        return str(self.files[-1])

    @property
    def columns(self) -> tuple[FeatureColumn, ...]:
        """The feature columns."""
        return self.layout.columns

    @property
    def target(self) -> TargetColumns:
        """What is learned."""
        return self.layout.target

    @property
    def label_values(self) -> None:
        """Known at the end only."""
        return

    @property
    def expected_bytes(self) -> int:
        """Bytes of all rows as float32, where they have been counted."""
        return 4 * (self.expected_rows or 0) * (self.n_features + 1)

    def fingerprint(self) -> list[dict[str, Any]]:
        """Stamps of the files, and how many features they have."""
        return [*stamps_of(self.files), {"features": self.n_features, "index_base": self.index_base}]

    def described(self) -> tuple[dict[str, Any], ...]:
        """Files are described by their digests."""
        return ()

    def batches(self, block_bytes: int, start: RestartPosition = START) -> Iterator[SourceBatch]:
        """All rows from `start` on in order, about `block_bytes` at a time."""
        block_rows = max(1, block_bytes // (8 * self.n_features))
        for number, file in list(enumerate(self.files))[start.file :]:
            begin = start if number == start.file else RestartPosition(number)
            row = begin.row
            for block in _blocks(file, block_bytes, begin, self.index_base):
                self._require_features(file, block)
                row += len(block.rows.labels)
                yield from self._batches_of(block, block_rows, file, number)
            if row == 0:
                raise SourceError(f"{file}: has no rows; leave it out or give a file with data")

    def _batches_of(self, block: _Block, block_rows: int, file: Path, number: int) -> Iterator[SourceBatch]:
        n_rows = len(block.rows.labels)
        for at in range(0, n_rows, block_rows):
            end = min(at + block_rows, n_rows)
            yield SourceBatch(
                file=file,
                target_file=file,
                file_index=number,
                first_row=block.first_row + at,
                n_rows=end - at,
                end_byte=block.end_byte,
                next=RestartPosition(number, block.first_row + end, int(block.ends[end - 1])),
                numeric=(block.rows.dense(at, end, self.n_features),),
                texts=(),
                target=self.layout.targets(block.rows.labels[at:end]),
            )

    def _require_features(self, file: Path, block: _Block) -> None:
        beyond = block.rows.indices >= self.n_features
        if beyond.any():
            entry = int(np.argmax(beyond))
            raise SourceError(
                f"{file}: row {block.first_row + block.rows.rows[entry] + 1}: index "
                f"{block.rows.indices[entry] + self.index_base} is beyond {self.n_features} features; "
                "give more --features"
            )


def _scan(files: Sequence[Path], index_base: int) -> tuple[int, bool, int]:
    """Features, whether all labels are whole numbers, and rows of all files."""
    n_features, is_whole, n_rows = 0, True, 0
    for file in files:
        for block in _blocks(file, _BLOCK_BYTES, START, index_base):
            rows = block.rows
            n_features = max(n_features, int(rows.indices.max(initial=-1)) + 1)
            is_whole = is_whole and bool((rows.labels == np.rint(rows.labels)).all())
            n_rows += len(rows.labels)
    return n_features, is_whole, n_rows


def _blocks(file: Path, block_bytes: int, start: RestartPosition, index_base: int) -> Iterator[_Block]:
    """The rows from `start` on; raises SourceError naming the row of what is no svmlight."""
    row = start.row
    try:
        with reading(file):
            for block in text_blocks(file, min(block_bytes, _BLOCK_BYTES), start.byte):
                rows = parse_svmlight(block.text, index_base)
                breaks = np.flatnonzero(np.frombuffer(block.text + b"\n", np.uint8) == _NEWLINE)
                begin = block.next_byte - len(block.text)
                ends = begin + np.minimum(breaks[rows.lines] + 1, len(block.text))
                yield _Block(rows, row, ends, block.end_byte)
                row += len(rows.labels)
    except TextFault as fault:
        raise SourceError(f"{file}: row {row + 1}: {fault}") from fault
    except _LineFault as fault:
        raise SourceError(f"{file}: row {row + fault.row + 1}: {fault}") from fault


def parse_svmlight(text: bytes, index_base: int) -> SparseRows:
    """Whole lines of text, without comments and qid; raises _LineFault for a line of another form."""
    if b"#" in text or b"qid:" in text:
        text = _IGNORED.sub(b"", text)
    letters = np.frombuffer(text + b"\n", np.uint8)
    is_end = letters == _NEWLINE
    is_gap = is_end | (letters == _SPACE) | (letters == _TAB) | (letters == _RETURN) | (letters == _COLON)
    starts = np.flatnonzero(~is_gap & np.concatenate([[True], is_gap[:-1]]))
    ends = np.flatnonzero(is_gap & np.concatenate([[False], ~is_gap[:-1]]))
    lines = np.searchsorted(np.flatnonzero(is_end), starts)  # the line of each token
    held, firsts, rows = np.unique(lines, return_index=True, return_inverse=True)
    places = np.arange(len(starts)) - firsts[rows]  # of each token in its line
    is_index = places % 2 == 1
    _require_form(letters, starts, ends, is_index, rows)
    values = _numbers(text, rows)
    indices = values[is_index].astype(np.int64) - index_base
    _require_indices(values[is_index], indices, rows[is_index], index_base)
    is_value = (places % 2 == 0) & (places > 0)
    return SparseRows(held, values[places == 0], rows[is_index], indices, values[is_value])


def _require_form(
    letters: NDArray[np.uint8],
    starts: NDArray[np.intp],
    ends: NDArray[np.intp],
    is_index: NDArray[np.bool_],
    rows: NDArray[np.intp],
) -> None:
    """After the label, every other token must be followed by a colon and that by the value."""
    has_colon = letters[ends] == _COLON
    wrong = has_colon != is_index
    following = np.append(starts[1:], len(letters))
    wrong |= has_colon & (following != ends + 1)
    alone = np.setdiff1d(np.flatnonzero(letters == _COLON), ends[has_colon])
    if wrong.any() or len(alone):
        token = np.argmax(wrong) if wrong.any() else np.searchsorted(starts, alone[0]) - 1
        row = int(rows[token]) if len(rows) else 0
        raise _LineFault(row, "is not `label index:value ...`; correct it")


def _numbers(text: bytes, rows: NDArray[np.intp]) -> NDArray[np.float64]:
    """Every token as a number."""
    tokens = text.replace(b":", b" ").split()
    try:
        return np.array(tokens, np.bytes_).astype(np.float64)
    except ValueError:
        for row, token in zip(rows, tokens, strict=True):
            try:
                float(token)
            except ValueError:
                shown = token[:40].decode(errors="replace")
                raise _LineFault(int(row), f"{shown!r} is no number; correct it") from None
        raise


def _require_indices(
    stated: NDArray[np.float64], indices: NDArray[np.int64], rows: NDArray[np.intp], index_base: int
) -> None:
    wrong = (stated != np.rint(stated)) | (indices < 0) | (stated >= 1 << 31)
    if wrong.any():
        entry = int(np.argmax(wrong))
        remedy = "counting from 1; take --index-base 0 if 0 is the first" if index_base else "counting from 0"
        raise _LineFault(int(rows[entry]), f"{stated[entry]:g} is no index {remedy}")
    if (np.diff(indices)[np.diff(rows) == 0] <= 0).any():
        # Not ascending: allowed, unless the same index comes twice.
        order = np.lexsort((indices, rows))
        twice = (np.diff(indices[order]) == 0) & (np.diff(rows[order]) == 0)
        if twice.any():
            row = int(rows[order][np.argmax(twice)])
            raise _LineFault(row, "states the same index twice; correct it")
