"""Texts of the command line as values: bytes, names, and numbers by name."""

from __future__ import annotations

import csv
import re

from ep3stream.config.checks import require
from ep3stream.errors import ConfigError

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
