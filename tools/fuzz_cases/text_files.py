"""CSV, TSV and svmlight, written in ways that are odd but legal."""

from __future__ import annotations

import bz2
import datetime as dt
import gzip
import io
import random
import re
import zipfile
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from fuzz_cases.known_tables import Column, Table
from fuzz_cases.written import SOURCE_KINDS, Written, as_source, choice, cut, seeds

GAP_WORDS = ("", "", "NA", "null", "nan", "N/A", "NaN", "NULL", "n/a", "#N/A")
DATE_FORMATS = ("%d.%m.%Y", "%m/%d/%Y", "%d-%b-%Y", "%Y/%m/%d", "%b %d, %Y", "%Y%m%d")
STRAYS = ("?", "-", "Total", "n.a.", "<0.1", "1,234 kg", "abc", "12:30", "--", "1.2.3")


@dataclass(frozen=True)
class CsvWay:
    """A CSV or TSV file."""

    delimiter: str = ","
    suffix: str = ".csv"
    quoting: str = "minimal"
    line_end: str = "\n"
    bom: bool = False
    final_newline: bool = True
    blank_lines: int = 0
    trailing_delimiter: bool = False
    index_column: bool = False
    decimal_comma: bool = False
    spaces: bool = False
    packing: str = ""
    numbers: str = "plain"
    gap_words: bool = False
    booleans: tuple[str, str] = ("false", "true")
    date_style: str = "T"
    fraction: str = ""
    zone: str = "Z"
    parts: int = 1
    has_stray: bool = False
    source_kind: str = "list"
    gap_marker: str = ""
    date_format: str = ""
    seed: int = 0

    @classmethod
    def drawn(cls) -> st.SearchStrategy[CsvWay]:
        """Any of these ways."""
        return st.builds(
            cls,
            delimiter=choice(",", ";", "\t", "|"),
            suffix=choice(".csv", ".tsv"),
            quoting=choice("minimal", "all", "some", "texts"),
            line_end=choice("\n", "\r\n", "mixed"),
            bom=choice(False, True),
            final_newline=choice(True, False),
            blank_lines=choice(0, 1, 3),
            trailing_delimiter=choice(False, False, True),
            index_column=choice(False, False, True),
            decimal_comma=st.booleans(),
            spaces=choice(False, False, True),
            packing=choice(*[""] * 8, ".gz", ".gz", ".gz, two members", ".zst", ".zip", ".bz2"),
            numbers=choice("plain", "exponent", "plus", "bare point", "mixed", "decimals"),
            gap_words=st.booleans(),
            booleans=st.sampled_from((("false", "true"), ("False", "True"), ("FALSE", "TRUE"), ("0", "1"))),
            date_style=choice("T", " "),
            fraction=choice("", ".3", ".6", ".9", ".7"),
            zone=st.sampled_from(("Z", "+02:00", "-0530", "+00", "mixed")),
            parts=choice(1, 1, 2, 3),
            has_stray=choice(False, False, False, False, False, True),
            source_kind=choice(*SOURCE_KINDS),
            gap_marker=choice("", "", "-999", "?", "no value"),
            date_format=choice("", "", *DATE_FORMATS),
            seed=seeds,
        )

    def write(self, table: Table, folder: Path) -> Written:
        """Writes the table below the folder."""
        rng = random.Random(self.seed)
        delimiter = "\t" if self.suffix == ".tsv" else self.delimiter
        decimal_comma = self.decimal_comma and delimiter == ";"
        # A marker of gaps is no value of the table.
        is_value = any(self.gap_marker in map(str, column.values) for column in table.columns)
        marker = "" if is_value else self.gap_marker
        way = replace(self, delimiter=delimiter, decimal_comma=decimal_comma, gap_marker=marker)
        may_refuse: list[str] = []
        if self.packing == ".bz2":
            may_refuse.append(r"bz2|is none of")
        texts, columns = [], []
        for column in table.columns:
            spelled, values = way._spelled(column, table.is_classification and column in table.targets, rng)
            texts.append(spelled)
            columns.append(replace(column, values=values))
        strays = way._put_stray(columns, texts, rng) if self.has_stray else ()
        n = len(table.features)
        truth = replace(table, features=tuple(columns[:n]), targets=tuple(columns[n:]))
        labels = columns[n:] if table.is_classification else []
        files = []
        (folder / "t").mkdir()
        for number, part in enumerate(cut(table.n_rows, self.parts, rng)):
            order = list(range(len(columns)))
            if number and rng.random() < 0.3:
                rng.shuffle(order)
            # Blanks around a label are part of it.
            are_texts = [c.kind == "category" or (c in labels) for c in (columns[j] for j in order)]
            cells = [texts[j][part] for j in order]
            content = way._text([columns[j].name for j in order], cells, are_texts, rng)
            files.append(way._pack(folder / "t" / f"t{number}{self.suffix}", content))
        stated = [c for c in table.features if c.is_stated]
        options: dict[str, Any] = {"target": [c.name for c in table.targets]}
        if category := [c.name for c in stated if c.kind == "category"]:
            options["category"] = category
        numbers = [c.name for c in columns if c.kind == "number" and strays and c.name == strays[0][0]]
        is_clear = all(self._is_clear(column) for column in columns if column.name in numbers)
        if numbers and (not is_clear or rng.random() < 0.3):
            options["number"] = numbers
        if table.is_classification:
            options["task"] = "classification"
        if marker:
            options["missing_words"] = [marker]
        if dates := {c.name: way._format(c.kind) for c in columns if way._format(c.kind)}:
            options["date"] = dates
        source = as_source(self.source_kind, folder / "t", files)
        return Written(lambda: source, truth, options, may_refuse=tuple(may_refuse), strays=strays)

    def _format(self, kind: str) -> str:
        """The format of strptime in which columns of a kind are written; none for ISO 8601."""
        if kind not in ("date", "timestamp") or not self.date_format:
            return ""
        return self.date_format if kind == "date" else f"{self.date_format} %H:%M:%S"

    def _is_clear(self, column: Column) -> bool:
        """Whether one text beside the column's values does not make it a column of texts.

        In the first file nine in ten must be of a kind.
        """
        return self.parts == 1 and len(column.values) - np.count_nonzero(column.gaps) >= 20

    def _put_stray(
        self, columns: list[Column], texts: list[list[str]], rng: random.Random
    ) -> tuple[tuple[str, int, str], ...]:
        dates = ("date", "timestamp", "zoned")
        places = [
            j
            for j, c in enumerate(columns)
            if c.flavour != "labels" and (c.kind == "number" or (c.kind in dates and self._is_clear(c)))
        ]
        if not places:
            return ()
        j, row = rng.choice(places), rng.randrange(len(texts[0]))
        word = rng.choice([word for word in STRAYS if word != self.gap_marker])
        if self.delimiter == "," and "," in word:
            word = word.replace(",", "")
        texts[j][row] = word
        values = list(columns[j].values)
        values[row] = None
        columns[j] = replace(columns[j], values=tuple(values))
        return ((columns[j].name, row, word),)

    def _spelled(
        self, column: Column, is_label: bool, rng: random.Random
    ) -> tuple[list[str], tuple[Any, ...]]:
        """The texts of a column, and its values as written."""
        texts, values = [], []
        for value in column.values:
            text = self._gap(column, is_label, rng) if value is None else self._value(column, value, rng)
            texts.append(text)
            if column.kind == "number" and value is not None:
                value = _number(text.replace(",", ".") if self.decimal_comma else text)
            elif column.kind in ("timestamp", "zoned") and value is not None:
                digits = 6 if self.fraction and not self._format(column.kind) else 0
                value = value.replace(
                    microsecond=value.microsecond // 10 ** (6 - digits) * 10 ** (6 - digits)
                )
                if self.fraction == ".3":
                    value = value.replace(microsecond=value.microsecond // 1000 * 1000)
            values.append(value)
        return texts, tuple(values)

    def _gap(self, column: Column, is_label: bool, rng: random.Random) -> str:
        if self.gap_marker and rng.random() < 0.7:
            return self.gap_marker
        if column.kind == "category" or not self.gap_words or is_label:
            return ""
        return rng.choice(GAP_WORDS)

    def _value(self, column: Column, value: Any, rng: random.Random) -> str:
        if column.kind == "number":
            plain = column.flavour == "labels" or (self.numbers == "plain")
            text = _plain_number(value) if plain else self._odd_number(value, rng)
            return text.replace(".", ",") if self.decimal_comma else text
        if column.kind == "category":
            return str(value)
        if column.kind == "boolean":
            return self.booleans[value]
        if form := self._format(column.kind):
            return value.strftime(form)
        if column.kind == "date":
            return value.isoformat()
        if column.kind == "time":
            return value.isoformat()
        return self._moment(column.kind, value, rng)

    def _odd_number(self, value: Any, rng: random.Random) -> str:
        style = (
            self.numbers
            if self.numbers != "mixed"
            else rng.choice(("plain", "exponent", "plus", "bare point"))
        )
        plain = _plain_number(value)
        if style == "exponent" and abs(value) < 2**53:
            return rng.choice(
                (
                    f"{value:.6e}",
                    f"{value:.4E}",
                    f"{float(value)!r}e0" if "e" not in f"{float(value)!r}" else plain,
                )
            )
        if style == "plus" and not plain.startswith("-"):
            return "+" + plain
        if style == "bare point" and not self.decimal_comma and "e" not in plain:
            if plain.startswith(("0.", "-0.")):
                return plain.replace("0.", ".", 1)
            return plain + "." if "." not in plain else plain
        if style == "decimals" and abs(value) < 2**53:
            return f"{value:.{rng.choice((0, 1, 3, 12))}f}"
        return plain

    def _moment(self, kind: str, value: dt.datetime, rng: random.Random) -> str:
        offset, tail = dt.timedelta(0), ""
        if kind == "zoned":
            zone = self.zone if self.zone != "mixed" else rng.choice(("Z", "+02:00", "-0530", "+00"))
            tail = zone
            offset = {
                "+02:00": dt.timedelta(hours=2),
                "-0530": -dt.timedelta(hours=5, minutes=30),
            }.get(zone, offset)
        value = value + offset
        text = f"{value.year:04}-{value:%m-%d}{self.date_style}{value:%H:%M:%S}"
        if self.fraction:
            digits = int(self.fraction[1:])
            text += "." + f"{value.microsecond:06}000"[:digits]
        return text + tail

    def _text(
        self, names: list[str], cells: list[list[str]], are_texts: list[bool], rng: random.Random
    ) -> bytes:
        ends = {"mixed": ("\n", "\r\n")}.get(self.line_end, (self.line_end,))
        lines = [self._line(names, rng, [True] * len(names), "")]
        for row, texts in enumerate(zip(*cells, strict=True)):
            lines.append(self._line(texts, rng, are_texts, str(row)))
        text = "".join(line + rng.choice(ends) for line in lines[:-1]) + lines[-1]
        if self.final_newline:
            text += ends[0] * (1 + self.blank_lines)
        return b"\xef\xbb\xbf" * self.bom + text.encode("utf-8")

    def _line(self, texts: Any, rng: random.Random, is_text: list[bool], row_number: str) -> str:
        fields = [self._field(text, rng, is_word) for text, is_word in zip(texts, is_text, strict=True)]
        if self.index_column:
            fields.insert(0, row_number)
        if self.trailing_delimiter:
            fields.append("")
        return self.delimiter.join(fields)

    def _field(self, text: str, rng: random.Random, is_word: bool) -> str:
        quoted = '"' + text.replace('"', '""') + '"'
        if any(letter in text for letter in (self.delimiter, '"', "\n", "\r")):
            return quoted
        if self.quoting == "all" or (self.quoting == "texts" and is_word):
            return quoted
        if self.quoting == "some" and rng.random() < 0.4:
            return quoted
        if self.spaces and not is_word and text and rng.random() < 0.5:
            return rng.choice((f" {text}", f"{text} ", f"  {text} "))
        return text

    def _pack(self, file: Path, content: bytes) -> Path:
        packed = file.with_name(file.name + self.packing[:4].strip(","))
        if self.packing == ".gz":
            packed.write_bytes(gzip.compress(content, 1))
        elif self.packing == ".gz, two members":
            half = len(content) // 2
            packed.write_bytes(gzip.compress(content[:half], 1) + gzip.compress(content[half:], 1))
            packed = packed.rename(file.with_name(file.name + ".gz"))
        elif self.packing == ".zst":
            packed.write_bytes(pa.compress(content, codec="zstd", asbytes=True))
        elif self.packing == ".bz2":
            packed.write_bytes(bz2.compress(content))
        elif self.packing == ".zip":
            packed = file.with_suffix(".zip")
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(file.name, content)
        else:
            packed = file
            packed.write_bytes(content)
        return packed


def _plain_number(value: Any) -> str:
    return repr(value)


def _number(text: str) -> int | float:
    """The number that a text states: whole ones with all their digits."""
    exact = Decimal(text)
    is_long = abs(exact) >= 2**53 and exact == exact.to_integral_value()
    return int(exact) if is_long or (re.fullmatch(r"[-+]?\d+", text) and text != "-0") else float(text)


@dataclass(frozen=True)
class SvmlightWay:
    """svmlight: counting from 0 or 1, comments, query ids, blanks, indices in any order, packing."""

    base: int = 1
    comments: bool = False
    query_ids: bool = False
    trailing_spaces: bool = False
    shuffled: bool = False
    states_zeros: bool = True
    line_end: str = "\n"
    final_newline: bool = True
    states_features: bool = True
    packing: str = ""
    seed: int = 0

    @classmethod
    def drawn(cls) -> st.SearchStrategy[SvmlightWay]:
        """Any of these ways."""
        return st.builds(
            cls,
            base=choice(1, 0),
            comments=st.booleans(),
            query_ids=choice(False, True),
            trailing_spaces=st.booleans(),
            shuffled=choice(False, True),
            states_zeros=st.booleans(),
            line_end=choice("\n", "\r\n"),
            final_newline=choice(True, False),
            states_features=st.booleans(),
            packing=choice("", ".gz", ".zst"),
            seed=seeds,
        )

    def write(self, table: Table, folder: Path) -> Written:
        """Writes the table below the folder."""
        rng, out = random.Random(self.seed), io.StringIO()
        for row in range(table.n_rows):
            label = table.targets[0].values[row]
            pairs = []
            for j, column in enumerate(table.features):
                value = column.values[row]
                if value is None or value != 0 or self.states_zeros:
                    pairs.append(f"{j + self.base}:{'nan' if value is None else _svm(value)}")
            if self.shuffled:
                rng.shuffle(pairs)
            words = ["nan" if label is None else _svm(label), *(["qid:7"] * self.query_ids), *pairs]
            line = (" " if rng.random() < 0.9 else "\t").join(words) + " " * self.trailing_spaces
            if self.comments and rng.random() < 0.3:
                line += rng.choice((" # a comment: 3:4", " #", "#x"))
            if self.comments and rng.random() < 0.1:
                out.write("# a line of its own" + self.line_end)
            out.write(line + (self.line_end if row + 1 < table.n_rows or self.final_newline else ""))
        content = out.getvalue().encode()
        file = folder / f"t.svm{self.packing}"
        if self.packing == ".gz":
            content = gzip.compress(content, 1)
        elif self.packing == ".zst":
            content = pa.compress(content, codec="zstd", asbytes=True)
        file.write_bytes(content)
        last = [value is None or value != 0 or self.states_zeros for value in table.features[-1].values]
        options: dict[str, Any] = {"task": "classification" if table.is_classification else "regression"}
        options["index_base"] = self.base
        if self.states_features or not any(last):
            options["features"] = len(table.features)
        return Written(lambda: [file], table, options)


def _svm(value: Any) -> str:
    return repr(int(value)) if isinstance(value, bool) else repr(value)
