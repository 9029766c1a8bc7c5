"""How settings are checked: each refusal names the field, its value and what is allowed.

Texts of the command line as values: bytes, names, and numbers by name.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ep3stream.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """ConfigError unless it holds."""
    if not condition:
        raise ConfigError(message)


def require_distinct(field_name: str, names: Sequence[str]) -> None:
    """No name twice."""
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    require(twice is None, f"{field_name} has {twice!r} twice; give each name once")


def require_choice(field_name: str, value: str, choices: Any) -> None:
    """One of a Literal's."""
    allowed = get_args(choices)
    require(value in allowed, f"{field_name} is {value!r:.80}; choose one of {', '.join(allowed)}")


def require_short_numbers(value: Any, where: str) -> None:
    """Of a hexadecimal number of thousands of digits Python cannot even say in an error what it is."""
    if isinstance(value, int):
        require(abs(value) < 1 << 63, f"{where} has more than 64 bits; use a smaller number")
    elif isinstance(value, list):
        for item in value:
            require_short_numbers(item, where)
    elif isinstance(value, dict):
        for name, item in value.items():
            require_short_numbers(item, f"{where}.{name:.80}")


_type_hints = cache(get_type_hints)


def check_type(table: type, name: str, value: Any, where: str) -> None:
    """A TOML value against the field's annotation; a whole number will do where a float is asked for."""
    hints = _type_hints(table)
    require(name in hints, f"{where:.400} is not a setting; use one of {', '.join(hints)}")
    allowed = _plain_types(hints[name]) - {type(None)}
    if float in allowed:
        allowed |= {int}
    require(
        type(value) in allowed,
        f"{where} is {value!r:.80}; it must be {' or '.join(sorted(kind.__name__ for kind in allowed))}",
    )
    if isinstance(value, int):
        require(abs(value) < 1 << 63, f"{where} has more than 64 bits; use a smaller number")
    if isinstance(value, str):
        require(is_unicode(value), f"{where} is {value!r:.400}, which is not UTF-8; use another name")


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: a file name in another encoding reaches Python with lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _plain_types(hint: Any) -> set[type]:
    if get_origin(hint) is Literal:
        return {type(value) for value in get_args(hint)}
    if get_origin(hint) is Mapping:
        return {dict}
    if get_args(hint):
        return set().union(*(_plain_types(part) for part in get_args(hint)))
    return {hint}


_BYTE_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip


def parse_bytes(text: str | int) -> int:
    """Number of bytes in `512MB`, `8GiB` or a plain number; raises ConfigError on anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _BYTE_UNITS:
        raise ConfigError(f"{text!r} is not a number of bytes; write it like 512MB or 8GiB")
    n_bytes = float(match[1]) * _BYTE_UNITS[match[2].upper()]
    if not 1 <= n_bytes < 1 << 63:
        raise ConfigError(f"{text!r} is {n_bytes:g} bytes; give at least one and fewer than 2^63")
    return int(n_bytes)


def parse_splits(text: str) -> dict[str, float]:
    """`train=0.9,test=0.1` as a mapping of split name to its share of the rows."""
    splits: dict[str, float] = {}
    for part in text.split(","):
        name, _, fraction = (piece.strip() for piece in part.partition("="))
        require(name not in splits, f"split {name!r} is given twice; give each name once")
        try:
            splits[name] = float(fraction)
        except ValueError:
            raise ConfigError(
                f"split {part!r} is not NAME=FRACTION; write it like train=0.9,test=0.1"
            ) from None
    return splits


def parse_names(text: str) -> tuple[str, ...]:
    """`a,b,c` as names; one with a comma in it stands in double quotes, as in CSV."""
    names = tuple(name.strip() for name in next(csv.reader([text], skipinitialspace=True), []))
    require(bool(names) and all(names), f"{text!r} has an empty name; write it like a,b,c")
    return names


def parse_renames(text: str) -> dict[str, str]:
    """`OLD=NEW,...` as a mapping of old name to new name."""
    renames: dict[str, str] = {}
    for part in parse_names(text):
        old, _, new = (name.strip() for name in part.partition("="))
        require(bool(old and new), f"rename {part!r} is not OLD=NEW; write it like dep=departure,arr=arrival")
        require(old not in renames, f"rename has {old!r} twice; give each column one new name")
        renames[old] = new
    return renames


def parse_weights(text: str) -> dict[str, float]:
    """`NAME=WEIGHT,...` as a mapping of name to weight."""
    weights: dict[str, float] = {}
    for part in parse_names(text):
        name, _, weight = (piece.strip() for piece in part.rpartition("="))
        require(name not in weights, f"weight of {name!r} is given twice; give each name once")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise ConfigError(f"weight {part!r} is not NAME=WEIGHT; write it like cat=2,dog=0.5") from None
    return weights
