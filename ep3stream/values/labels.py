"""The labels of classes as they were in the data: whole numbers, booleans or texts.

A manifest and a model keep the names of classes as texts; what these were, the record of the columns says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

LabelType = Literal["text", "integer", "boolean"]
_BOOLEANS = {"false", "true"}


def recorded_label_type(columns: Mapping[str, Any], class_names: Sequence[str] | None) -> LabelType:
    """What the labels of a store were, by the record of its columns; texts where it does not say."""
    targets = columns.get("targets")
    is_boolean = isinstance(targets, list) and [target.get("type") for target in targets] == ["boolean"]
    if is_boolean and set(class_names or ()) <= _BOOLEANS:
        return "boolean"
    return "integer" if columns.get("kind") == "integer" else "text"


def as_labels(class_names: Sequence[str], label_type: LabelType) -> NDArray[Any]:
    """The labels in the order of the class ids, (c,): int64, bool or text.

    Texts too for whole numbers that no type of NumPy holds together.
    """
    if label_type == "boolean":
        return np.array([name == "true" for name in class_names])
    if label_type == "integer":
        try:
            numbers = np.array([int(name) for name in class_names])
        except ValueError:
            return np.array(class_names)
        if numbers.dtype.kind in "iu":
            return numbers
    return np.array(class_names)


def label_type_of(labels: NDArray[Any]) -> LabelType:
    """The type of an array of labels."""
    if labels.dtype.kind == "b":
        return "boolean"
    return "integer" if labels.dtype.kind in "iu" else "text"


def names_of(labels: NDArray[Any]) -> tuple[str, ...]:
    """The names of classes for these labels, from which `as_labels` makes the same labels again."""
    if labels.dtype.kind == "b":
        return tuple(str(label).lower() for label in labels.tolist())
    # Dates as NumPy writes them, not as numbers of nanoseconds.
    return tuple(map(str, labels if labels.dtype.kind in "mM" else labels.tolist()))
