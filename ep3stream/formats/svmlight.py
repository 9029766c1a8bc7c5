"""svmlight / libsvm text (`label index:value ...`), plain or packed, read as dense rows.

A feature that a row does not state is 0, not missing; a stated NaN is a missing value. Comments behind `#` and
`qid:` are ignored. A line of another form is a SourceError that names the row.

scikit-learn's load_svmlight_file takes as long (25 MiB: 1.0 s of processor time, here 0.9 s), but is an optional
dependency, refuses indices that do not ascend, and names no row in its errors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ep3stream.config import ConvertConfig
from ep3stream.errors import ConfigError, SourceError
from ep3stream.formats.array_source import ArrayLayout
from ep3stream.formats.digests import stamps_of
from ep3stream.formats.source import START, RestartPosition, RowSource, SourceBatch, reading
from ep3stream.formats.text_blocks import STREAM_SUFFIXES, TextFault, text_blocks

SVMLIGHT_SUFFIXES = tuple(
    name + packed for name in (".svm", ".libsvm", ".svmlight") for packed in ("", *STREAM_SUFFIXES)
)

_BLOCK_BYTES = 1 << 20

# Parts without rows that a message names.
_MAX_NAMED = 5
_LOGGER = logging.getLogger(__name__)
_IGNORED = re.compile(rb"#[^\n]*|(?<=[ \t])qid:\S*")
_SPACE, _TAB, _NEWLINE, _RETURN, _COLON = b" \t\n\r:"


class _LineFault(Exception):
    """Says in words what is wrong with the row that follows the first `row` ones of a block."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(reason)
        self.row = row


@dataclass(frozen=True, slots=True)
class SparseRows:
    """b rows of a text with k entries.

    lines, labels: the line and the label of each row, (b,).
    rows, indices, values: row, feature and value of each entry, (k,); features are counted from 0.
    """

    lines: NDArray[np.intp]
    labels: NDArray[np.float64]
    rows: NDArray[np.intp]
    indices: NDArray[np.int64]
    values: NDArray[np.float64]

    def dense(self, begin: int, end: int, n_features: int) -> NDArray[np.float64]:
        """Rows begin to end as (end - begin, n_features), with 0 for a feature that is not stated."""
        first, last = np.searchsorted(self.rows, (begin, end))
        x = np.zeros((end - begin, n_features))
        x[self.rows[first:last] - begin, self.indices[first:last]] = self.values[first:last]
        return x


@dataclass(frozen=True, slots=True)
class SparseLayout:
    """What earlier files say of later ones: the number of features, and the index of the first, None if unknown.

    where: the store that was made of the earlier files.
    """

    where: Path
    n_features: int
    index_base: int | None


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of a file behind its first `first_row` ones; ends: where each of them ends in the unpacked text."""

    rows: SparseRows
    first_row: int
    ends: NDArray[np.intp]
    end_byte: int


def svmlight_source(
    files: Sequence[Path], config: ConvertConfig, like: SparseLayout | None = None
) -> RowSource:
    """One or several svmlight files. Features are x0, x1, ...: index 1 is x0, or index 0 with `index_base` 0.

    Without `features` or `task` in the config, one pass over the files counts the features and finds out
    whether all labels are whole numbers; if so, they are classes. like: the layout of earlier files, which these
    have too. Files without rows are passed over. Raises SourceError.
    """
    index_base = _index_base(config, like)
    n_features = config.features or (None if like is None else like.n_features)
    found, is_whole, n_rows = 0, True, None
    is_guess = like is not None and like.index_base is None and config.index_base is None
    if n_features is None or config.task is None or is_guess:
        found, is_whole, n_rows = _scan(files, index_base)
    if like is not None and is_guess and found != n_features:
        raise SourceError(
            f"{files[0]}: states {found} features if its indices count from 1, but {like.where} has {n_features}; "
            "say from where they count with `convert --like --index-base` 0 or 1"
        )
    n_features = n_features or found
    if not n_features:
        raise SourceError(f"{files[0]}: states no feature; say how many there are with --features")
    name = str(files[0])
    dtype = np.dtype(np.int64 if is_whole else np.float64)
    layout = ArrayLayout.of((name, name), (1, n_features), (1,), dtype, config.task)
    remedy = "give more --features" if like is None else f"so many has {like.where}: leave the index out"

    def read(block_bytes: int, start: RestartPosition) -> Iterator[SourceBatch]:
        block_rows = max(1, block_bytes // (8 * n_features))
        without_rows = []
        for number, file in list(enumerate(files))[start.file :]:
            begin = start if number == start.file else RestartPosition(number)
            row = begin.row
            for block in _blocks(file, block_bytes, begin, index_base):
                _require_features(file, block, n_features, index_base, remedy)
                row += len(block.rows.labels)
                yield from _batches(block, block_rows, file, number, layout)
            without_rows += [file] * (row == 0)
        if len(without_rows) == len(files):
            raise SourceError(f"{files[0]}: has no rows; give a file with data")
        if without_rows:
            _LOGGER.info("%s", passed_over_words(without_rows))

    return RowSource(
        name=str(files[-1]),
        columns=layout.columns,
        target=layout.target,
        read=read,
        fingerprint=(*stamps_of(files), {"features": n_features, "index_base": index_base}),
        files=tuple(files),
        expected_rows=n_rows,
        expected_bytes=4 * (n_rows or 0) * (n_features + 1),
        recorded={"index_base": index_base},
    )


def passed_over_words(files: Sequence[object]) -> str:
    """Says that these parts of a source have no rows."""
    more = ", ..." * (len(files) > _MAX_NAMED)
    named = ", ".join(map(str, files[:_MAX_NAMED]))
    return f"{len(files)} part(s) without rows are passed over: {named}{more}"


def _index_base(config: ConvertConfig, like: SparseLayout | None) -> int:
    """The index of the first feature; raises ConfigError if the config contradicts the earlier files."""
    if like is None:
        return 1 if config.index_base is None else config.index_base
    stated = (
        ("index_base", config.index_base, like.index_base),
        ("features", config.features, like.n_features),
    )
    for name, given, recorded in stated:
        if None not in (given, recorded) and given != recorded:
            raise ConfigError(
                f"{name} {given} contradicts like, whose store {like.where} has {recorded}; leave {name} out"
            )
    known = config.index_base if like.index_base is None else like.index_base
    return 1 if known is None else known


def _batches(
    block: _Block, block_rows: int, file: Path, number: int, layout: ArrayLayout
) -> Iterator[SourceBatch]:
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
            numeric=(block.rows.dense(at, end, len(layout.columns)),),
            texts=(),
            target=layout.targets(block.rows.labels[at:end]),
        )


def _require_features(file: Path, block: _Block, n_features: int, index_base: int, remedy: str) -> None:
    beyond = block.rows.indices >= n_features
    if beyond.any():
        entry = int(np.argmax(beyond))
        raise SourceError(
            f"{file}: row {block.first_row + block.rows.rows[entry] + 1}: index "
            f"{block.rows.indices[entry] + index_base} is beyond {n_features} features; {remedy}"
        )


def _scan(files: Sequence[Path], index_base: int) -> tuple[int, bool, int]:
    """The number of features, whether all labels are whole numbers, and the number of rows, of all files."""
    n_features, is_whole, n_rows = 0, True, 0
    for file in files:
        for block in _blocks(file, _BLOCK_BYTES, START, index_base):
            rows = block.rows
            n_features = max(n_features, int(rows.indices.max(initial=-1)) + 1)
            is_whole = is_whole and bool((rows.labels == np.rint(rows.labels)).all())
            n_rows += len(rows.labels)
    return n_features, is_whole, n_rows


def _blocks(file: Path, block_bytes: int, start: RestartPosition, index_base: int) -> Iterator[_Block]:
    """The rows from `start` on; raises SourceError, which names the row of a line of another form."""
    row = start.row
    with reading(file):
        try:
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
    """The rows of whole lines of text; raises _LineFault for a line of another form.

    The text is cut into tokens between blanks, colons and line breaks: a label, then indices and values.
    """
    if b"#" in text or b"qid:" in text:
        text = _IGNORED.sub(b"", text)
    letters = np.frombuffer(text + b"\n", np.uint8)
    is_end = letters == _NEWLINE
    is_gap = is_end | (letters == _SPACE) | (letters == _TAB) | (letters == _RETURN) | (letters == _COLON)
    starts = np.flatnonzero(~is_gap & np.concatenate([[True], is_gap[:-1]]))
    ends = np.flatnonzero(is_gap & np.concatenate([[False], ~is_gap[:-1]]))
    lines = np.searchsorted(np.flatnonzero(is_end), starts)  # the line of each token
    is_label = np.concatenate([[True], np.diff(lines) > 0])[: len(lines)]
    rows = np.cumsum(is_label) - 1  # the row of each token; empty lines are no rows
    places = np.arange(len(starts)) - np.flatnonzero(is_label)[rows]  # of each token in its line
    is_index = places % 2 == 1
    _require_form(letters, starts, ends, is_index, rows)
    values = _numbers(text, rows)
    indices = values[is_index].astype(np.int64) - index_base
    _require_indices(values[is_index], indices, rows[is_index], index_base)
    return SparseRows(
        lines[is_label], values[is_label], rows[is_index], indices, values[~is_index & ~is_label]
    )


def _require_form(
    letters: NDArray[np.uint8],
    starts: NDArray[np.intp],
    ends: NDArray[np.intp],
    is_index: NDArray[np.bool_],
    rows: NDArray[np.intp],
) -> None:
    """Raises _LineFault unless each index is followed at once by a colon, and the colon at once by a value."""
    has_colon = letters[ends] == _COLON
    wrong = has_colon != is_index
    following = np.append(starts[1:], len(letters))
    wrong |= has_colon & (following != ends + 1)
    colons = np.flatnonzero(letters == _COLON)
    if wrong.any() or len(colons) > np.count_nonzero(has_colon):
        stray = np.setdiff1d(colons, ends[has_colon])
        token = np.argmax(wrong) if wrong.any() else np.searchsorted(starts, stray[0]) - 1
        row = int(rows[token]) if len(rows) else 0
        raise _LineFault(row, "is not `label index:value ...`; correct it")


def _numbers(text: bytes, rows: NDArray[np.intp]) -> NDArray[np.float64]:
    """Every token as a number, (tokens,); `rows` are the tokens' rows. Raises _LineFault."""
    tokens = text.replace(b":", b" ").split()
    try:
        # Three times as fast as NumPy and the same bits, except that nan(...) is taken too.
        numbers: NDArray[np.float64] = pa.array(tokens, pa.string()).cast(pa.float64()).to_numpy()
        if not np.isnan(numbers).any():
            return numbers
    except pa.ArrowInvalid:
        pass
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
    """Raises _LineFault for an index that is no whole number from `index_base` on, or twice in its row."""
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
