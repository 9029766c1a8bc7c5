"""Texts of the command line, and of Python's `memory="8GiB"`, read as values: bytes, names, numbers by name."""

from __future__ import annotations

import csv
import re

from ep3stream.errors import ConfigError

MIB = 1 << 20

# Stands for all columns that a setting by column does not name.
OTHER_COLUMNS = "*"

_BYTE_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": MIB, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip


def parse_bytes(text: str | int) -> int:
    """The number of bytes that `512MB`, `8GiB` or a plain number stands for; ConfigError on any other text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _BYTE_UNITS:
        raise ConfigError(f"{text!r} is not a number of bytes; write it like 512MB or 8GiB")
    n_bytes = float(match[1]) * _BYTE_UNITS[match[2].upper()]
    if not 1 <= n_bytes < 1 << 63:
        raise ConfigError(f"{text!r} is {n_bytes:g} bytes; give at least one and fewer than 2^63")
    return int(n_bytes)


def bytes_text(n_bytes: int) -> str:
    """`2GiB` for 2 << 30: the number with the largest binary unit that divides it, as `parse_bytes` reads it."""
    unit = next(
        unit for unit in ("TiB", "GiB", "MiB", "KiB", "B") if n_bytes % _BYTE_UNITS[unit.upper()] == 0
    )
    return f"{n_bytes // _BYTE_UNITS[unit.upper()]}{unit}"


def parse_names(text: str) -> tuple[str, ...]:
    """The names in `a,b,c`; a name with a comma in it stands in double quotes, as in CSV."""
    # The reader ends a row at a line break, which may be a letter of a name.
    line = text.replace("\n", "\0").replace("\r", "\1")
    fields = next(csv.reader([line], skipinitialspace=True), [])
    names = tuple(name.replace("\0", "\n").replace("\1", "\r").strip() for name in fields)
    if not names or not all(names):
        raise ConfigError(f"{text!r} has an empty name; write it like a,b,c")
    return names


def parse_renames(text: str) -> dict[str, str]:
    """`OLD=NEW,...` as a mapping of old name to new name."""
    renames: dict[str, str] = {}
    for part in parse_names(text):
        old, _, new = (name.strip() for name in part.partition("="))
        if not old or not new:
            raise ConfigError(f"rename {part!r} is not OLD=NEW; write it like dep=departure,arr=arrival")
        if old in renames:
            raise ConfigError(f"rename has {old!r} twice; give each column one new name")
        renames[old] = new
    return renames


def parse_missing(text: str) -> str | dict[str, str]:
    """A policy as it stands; `COL=POLICY,...` by column, where a policy alone is that of all other columns."""
    policies: dict[str, str] = {}
    for part in parse_names(text):
        column, equals, policy = (piece.strip() for piece in part.rpartition("="))
        if equals and not column:
            raise ConfigError(f"missing {part!r} names no column; write it like age=drop")
        column = column or OTHER_COLUMNS
        if column in policies:
            whose = "of the other columns" if column == OTHER_COLUMNS else f"of {column!r}"
            raise ConfigError(f"missing {whose} is given twice; give it once")
        policies[column] = policy
    return policies[OTHER_COLUMNS] if policies.keys() == {OTHER_COLUMNS} else policies


def parse_date_formats(text: str) -> dict[str, str]:
    """`COL=FORMAT,...` as a mapping; a comma belongs to the format unless COL= follows it."""
    formats: dict[str, str] = {}
    for part in re.split(r",(?=[^,=%]+=)", text):
        name, equals, text_format = part.partition("=")
        name = name.strip().strip('"')
        if not equals or not name or not text_format.strip():
            raise ConfigError(f"date {part!r} is not COL=FORMAT; write it like due=%d.%m.%Y")
        if name in formats:
            raise ConfigError(f"date has {name!r} twice; give each column one format")
        formats[name] = text_format.strip()
    return formats


def parse_split_file(text: str) -> dict[str, list[str]]:
    """`NAME=PATH` as the name of a split and a list of its path."""
    name, _, path = (piece.strip() for piece in text.partition("="))
    if not name or not path:
        raise ConfigError(f"split file {text!r} is not NAME=PATH; write it like test=test.csv")
    return {name: [path]}


def parse_splits(text: str) -> dict[str, float]:
    """`train=0.9,test=0.1` as a mapping of split name to the split's share of the rows."""
    splits: dict[str, float] = {}
    for part in text.split(","):
        name, _, fraction = (piece.strip() for piece in part.partition("="))
        if name in splits:
            raise ConfigError(f"split {name!r} is given twice; give each name once")
        try:
            splits[name] = float(fraction)
        except ValueError:
            raise ConfigError(
                f"split {part!r} is not NAME=FRACTION; write it like train=0.9,test=0.1"
            ) from None
    return splits


def parse_weights(text: str) -> dict[str, float]:
    """`NAME=WEIGHT,...` as a mapping of name to weight; the last `=` ends the name."""
    weights: dict[str, float] = {}
    for part in parse_names(text):
        name, _, weight = (piece.strip() for piece in part.rpartition("="))
        if name in weights:
            raise ConfigError(f"weight of {name!r} is given twice; give each name once")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise ConfigError(f"weight {part!r} is not NAME=WEIGHT; write it like cat=2,dog=0.5") from None
    return weights


def parse_class_weights(text: str) -> str | dict[str, float]:
    """`none` and `balanced` as they stand; any other text as `parse_weights` reads it."""
    return text if text in ("none", "balanced") else parse_weights(text)


def parse_epochs(text: str) -> float | str:
    """A number of epochs, as an int where it is whole, so that TOML says `epochs = 2`; or `auto`, as it stands."""
    if text == "auto":
        return text
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is no number; write it like 2 or 0.5") from None
    return int(number) if number.is_integer() else number


def parse_number_or_word(text: str) -> int | str:
    """A number where the text is one; else the text as it stands, such as `auto` or `none`."""
    return int(text) if text.isdigit() else text


def parse_minutes(text: str) -> float:
    """A number of minutes; 0 for `none`."""
    try:
        return 0.0 if text == "none" else float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is no number; write it like 5, or none") from None


def parse_centers(text: str) -> int | str:
    """A number where the text is one; else `auto`, `kmeans:N`, the path of a file, or `STORE/split`, as it stands."""
    return int(text) if text.lstrip("-").isdigit() else text
