"""What a manifest's record of the columns says of the features, for those who read rows and convert nothing.

The record is written by `conversion/recorded_columns.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ep3stream.store.manifest import Manifest


def columns_of(manifest: Manifest) -> dict[str, Any]:
    """The JSON that a model keeps of its store, for `RecordedColumns.read`; `columns` has its own version."""
    return {"columns": dict(manifest.columns), "x_dtype": manifest.x_dtype}


class KnownFeatures(Protocol):
    """Features and the record of the columns that they are made of, as a manifest has them."""

    @property
    def columns(self) -> Mapping[str, Any]:
        """The record of the columns."""
        ...

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names of the columns of x."""
        ...


def code_features(known: KnownFeatures) -> dict[int, int]:
    """Features that hold the codes of a category each, by their numbers, and how many codes each has."""
    values = code_values(known.columns)
    numbered = enumerate(known.feature_names)
    return {number: len(values[name]) for number, name in numbered if values.get(name)}


def zero_one_features(known: KnownFeatures) -> tuple[int, ...]:
    """Numbers of the features that are 1 or 0 for a category, as `--categories onehot` stores it, or for a gap."""
    names = set()
    for one in known.columns.get("columns", ()):
        if one.get("kind") == "indicator":
            names.add(one["name"])
        elif one.get("kind") == "category" and one.get("encoding", "onehot") == "onehot":
            names |= {f"{one['name']}={value}" for value in one["values"]}
    return tuple(number for number, name in enumerate(known.feature_names) if name in names)


def code_values(columns: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The values of each category that is stored as codes, in the order of the codes, by the name of its feature.

    columns: the record in a manifest.
    """
    return {
        one["name"]: tuple(one["values"])
        for one in columns.get("columns", ())
        if one.get("kind") == "category" and one.get("encoding") == "codes"
    }
