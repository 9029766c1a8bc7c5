"""Columns that folders name: `year=2020/month=1/part.parquet` has the columns year and month.

A value is typed over all folders of a key together: whole numbers, numbers, dates, times, else texts. `007`
beside `7` makes texts of all, for a number would not tell the two apart, and so do `1.1` and `1.10`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from ep3stream.errors import SourceError

_LOGGER = logging.getLogger(__name__)

_MISSING = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = re.compile(r"0|-?[1-9]\d*")
_DECIMAL = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}[ T]\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?")
_OTHER_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")

# The first form that all values of a key have decides.
_FORMS: tuple[tuple[re.Pattern[str], pa.DataType], ...] = (
    (_INTEGER, pa.int64()),
    (_DECIMAL, pa.float64()),
    (_DATE, pa.date32()),
    (_TIME, pa.timestamp("us")),
)


@dataclass(frozen=True, slots=True, eq=False)
class PartitionedFile:
    """A file of a table, and the columns that the folders above it name.

    texts: what the folders say, None for a gap. types: as which type that is read. Both by the columns' names.
    """

    file: Path
    texts: Mapping[str, str | None]
    types: Mapping[str, pa.DataType]

    def __str__(self) -> str:
        return str(self.file)

    def scalar(self, name: str) -> pa.Scalar:
        """The value of a column in all rows; raises SourceError if the folder does not say one of its type."""
        try:
            return pa.scalar(self.texts[name], pa.string()).cast(self.types[name])
        except pa.ArrowInvalid:
            raise SourceError(
                f"{self.file}: the folder {name}={self.texts[name]} does not say a value of {self.types[name]}; "
                "rename the folder"
            ) from None

    def schema(self, stored: pa.Schema) -> pa.Schema:
        """The columns of the file, and behind them those that only the folders name."""
        for name, dtype in self.types.items():
            if name not in stored.names:
                stored = stored.append(pa.field(name, dtype))
        return stored

    def with_folders(
        self, batches: Iterator[tuple[pa.RecordBatch, Any]], names: Sequence[str]
    ) -> Iterator[tuple[pa.RecordBatch, Any]]:
        """The rows with the columns `names`; raises SourceError where a column of the file says other than the folder.

        batches: rows of the file, each with what is passed on beside them.
        """
        scalars = {name: self.scalar(name) for name in names if name in self.texts}
        for rows, beside in batches:
            stored = set(rows.schema.names)
            for name in scalars.keys() & stored:
                self._require_same(name, rows.column(name))
            columns = [
                rows.column(name) if name in stored else pa.repeat(scalars[name], rows.num_rows)
                for name in names
            ]
            yield pa.record_batch(columns, names=list(names)), beside

    def _require_same(self, name: str, values: pa.Array) -> None:
        text = self.texts[name]
        for value in values.unique().to_pylist():
            if not _says_the_same(value, text):
                raise SourceError(
                    f"{self.file}: holds {value!r} in its column {name!r}, but lies in the folder {name}={text}; "
                    "move it, or name the files one by one to take the column of the files"
                )


def _says_the_same(value: Any, text: str | None) -> bool:
    if value is None or value != value or value == "" or text is None:
        return text is None and (value is None or value != value or value == "")
    if str(value) == text or str(value).lower() == text.lower():
        return True
    try:
        return float(value) == float(text)
    except (ValueError, TypeError):
        return str(value).replace(" ", "T").removesuffix("T00:00:00") == text.replace(" ", "T").removesuffix(
            "T00:00:00"
        )


def folder_texts(file: Path, below: Path | None, with_above: bool) -> dict[str, str | None]:
    """What the key=value folders say of a file, outermost first; None for a gap.

    Folders between the directory `below` and the file count; with `with_above` also those right above it. Raises
    SourceError for a key that comes twice.
    """
    inner = list(file.relative_to(below).parts[:-1]) if below is not None else []
    names = [name for name in inner if "=" in name]
    if with_above:
        above = below.absolute() if below is not None else file.absolute().parent
        while "=" in above.name:
            names.insert(0, above.name)
            above = above.parent
    texts: dict[str, str | None] = {}
    for name in names:
        key, _, text = (unquote(part) for part in name.partition("="))
        if key in texts:
            raise SourceError(f"{file}: lies in two folders of {key!r}; rename one")
        if key:
            texts[key] = None if text in ("", _MISSING) else text
    return texts


def partition_types(
    texts: Mapping[str, Sequence[str | None]], as_text: Sequence[str]
) -> dict[str, pa.DataType]:
    """The type of each key by all its values; the keys of `as_text` stay texts, and gaps alone are null."""
    return {key: pa.string() if key in as_text else _type_of(key, values) for key, values in texts.items()}


def _type_of(key: str, values: Sequence[str | None]) -> pa.DataType:
    known = list(dict.fromkeys(value for value in values if value is not None))
    if not known:
        return pa.null()
    for form, dtype in _FORMS:
        if all(form.fullmatch(text) for text in known) and _holds(dtype, known):
            return dtype
    if all(_OTHER_NUMBER.fullmatch(text) or _DECIMAL.fullmatch(text) for text in known):
        odd = next((text for text in known if _DECIMAL.fullmatch(text) is None), _twins(known) or known[0])
        _LOGGER.warning("folders %s=...: values such as %s are taken as texts, not as numbers", key, odd)
    return pa.string()


def _twins(texts: Sequence[str]) -> str | None:
    """Two texts that are the same number, in words."""
    seen: dict[float, str] = {}
    for text in texts:
        if (other := seen.setdefault(float(text), text)) != text:
            return f"{other} and {text}"
    return None


def _holds(dtype: pa.DataType, texts: Sequence[str]) -> bool:
    """Whether the type holds the values without a loss."""
    try:
        pa.array(texts, pa.string()).cast(dtype)
    except pa.ArrowInvalid:
        return False
    if dtype != pa.float64():
        return True
    # 1.1 and 1.10, or 1e5 and 100000, are two folders, so that they are two values.
    are_apart = len(set(map(float, texts))) == len(texts)
    return are_apart and all(_INTEGER.fullmatch(text) is None or abs(int(text)) < 1 << 63 for text in texts)
