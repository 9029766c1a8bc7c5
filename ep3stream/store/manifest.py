"""The manifest of a store: columns, splits, statistics and the digest of every segment, checked field by field.

A directory without a manifest is no store, because the manifest is written last. Its field `digest` is the xxh3_128 of
the canonical JSON (sorted keys, no spaces, ASCII) of all the other fields.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from ep3stream.config import MIB, Task, XDtype
from ep3stream.errors import DamagedDataError, InputError
from ep3stream.store.json_files import JsonObject, json_digest, signed_bytes, signed_object
from ep3stream.values.offsets import Offsets

# 2: what the conversion has counted. 3: numbers are stored less an offset; an older reader refuses such a store.
STORE_FORMAT_VERSION = 3
_WITHOUT_OFFSETS = 2
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 64 * MIB

# HDF5 cannot hold a chunk of 4 GiB.
MAX_SEGMENT_BYTES = (1 << 32) - 1

YDtype = Literal["int32", "float32"]

Codec = Literal["none", "lz4", "zstd"]

# By how much, relatively, the variance of two values may differ from what it is, for rounding.
_TWO_VALUED = 1e-8
_FEW_ROWS = 20

_SPLIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{32}")


def segment_digest(x: NDArray[Any], y: NDArray[Any]) -> str:
    """The xxh3_128 of the decoded bytes of a segment's x, then of its y (both C-contiguous), in 32 hex digits."""
    state = xxhash.xxh3_128()
    for array in (x, y):
        state.update(array.reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def is_split_name(name: str) -> bool:
    """Whether `name` may name a split: up to 64 letters, digits, _ and -, so no path leaves the store."""
    return _SPLIT_NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class ColumnStatistics:
    """For each column: mean, population standard deviation, range, and the number of cells without a value."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    missing: tuple[int, ...]


def column_statistics(
    names: tuple[str, ...], statistics: ColumnStatistics, offsets: NDArray[np.float64]
) -> list[dict[str, Any]]:
    """Mean, std, min, max and missing cells of each column, as JSON, with the columns' offsets, (columns,), added."""
    values = zip(
        names,
        (offsets + statistics.mean).tolist(),
        statistics.std,
        (offsets + statistics.minimum).tolist(),
        (offsets + statistics.maximum).tolist(),
        statistics.missing,
        strict=True,
    )
    keys = ("name", "mean", "std", "min", "max", "missing")
    return [dict(zip(keys, column, strict=True)) for column in values]


def told_two_valued(manifest: Manifest, split: str) -> str:
    """A line on targets of this split that have two values, as classes would, with the remedy; empty where none has.

    Values in [a, b] with the mean m have the variance (m - a) (b - m) if all of them are a or b, and less otherwise. Of
    a handful of rows nothing is told.
    """
    found = manifest.splits[split].targets
    if found is None or manifest.splits[split].n_rows < _FEW_ROWS:
        return ""
    named = []
    columns = zip(manifest.target_names, found.mean, found.std, found.minimum, found.maximum, strict=True)
    for at, (name, mean, std, low, high) in enumerate(columns):
        widest = (mean - low) * (high - mean)
        if low < high and abs(std**2 - widest) <= _TWO_VALUED * widest:
            offset = float(manifest.offsets.y[at])
            digits = 15 if offset else 7  # Without an offset they are float32.
            values = (f"{value + offset:.{digits}g}" for value in (low, high))
            named.append(f"{name!r} has two values, {' and '.join(values)}")
    if not named:
        return ""
    return (
        f"target {' and '.join(named)}, and is fitted as a number; for classes, with accuracy and probabilities, "
        "convert with --task classification"
    )


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """One split: its rows, how they are cut into segments and files, and each segment's digest."""

    name: str
    n_rows: int
    segment_rows: int
    segments_per_file: int
    digests: tuple[str, ...]
    features: ColumnStatistics
    targets: ColumnStatistics | None
    class_counts: tuple[int, ...] | None

    @property
    def n_segments(self) -> int:
        """The number of segments, ceil(n_rows / segment_rows)."""
        return -(-self.n_rows // self.segment_rows)

    def rows_of_segment(self, index: int) -> int:
        """Rows of segment `index`: segment_rows, or what is left for the last one."""
        if not 0 <= index < self.n_segments:
            raise InputError(
                f"segment {index} of split {self.name} does not exist; use 0 to {self.n_segments - 1}"
            )
        return min(self.segment_rows, self.n_rows - index * self.segment_rows)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a reader must know about a store; equal manifests have equal fingerprints.

    conversion: notes of the conversion for people, in any form. Format 1 has no such field; it is read as empty.
    """

    format_version: int
    created_by: str
    task: Task
    n_features: int
    n_outputs: int
    x_dtype: XDtype
    y_dtype: YDtype
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]
    class_names: tuple[str, ...] | None
    columns: Mapping[str, Any]
    shuffle_seed: int | None
    source: tuple[Mapping[str, Any], ...]
    conversion: Mapping[str, Any]
    codec: Codec
    splits: Mapping[str, SplitInfo]

    @property
    def offsets(self) -> Offsets:
        """What was subtracted before features and targets were stored: a value is the stored number plus its offset."""
        names = self.target_names if self.class_names is None else self.class_names
        return Offsets.recorded(self.columns, self.feature_names, names)

    @staticmethod
    def format_of(columns: Mapping[str, Any]) -> int:
        """The lowest format version that can say what these columns are."""
        described = (*columns.get("columns", ()), *columns.get("targets", ()))
        return STORE_FORMAT_VERSION if any("offset" in one for one in described) else _WITHOUT_OFFSETS

    @property
    def fingerprint(self) -> str:
        """The xxh3_128 of the canonical JSON, in 32 hex digits: a name of the store's content."""
        return json_digest(self._content())

    def to_json(self) -> bytes:
        """The manifest with its digest, in canonical JSON."""
        return signed_bytes(self._content())

    def _content(self) -> dict[str, Any]:
        content = _object_of(self) | {"splits": {name: _object_of(one) for name, one in self.splits.items()}}
        if self.format_version == 1:
            del content["conversion"]
        return content

    @classmethod
    def from_json(cls, data: bytes, origin: str) -> Manifest:
        """The manifest in `data`, checked; `origin` is its path, for messages.

        Raises DamagedDataError for anything that a finished store cannot hold, InputError for a newer format.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise DamagedDataError(
                f"{origin} has {len(data)} bytes; a manifest has at most {MAX_MANIFEST_BYTES}"
            )
        content = signed_object(data, origin)
        version = content.get("format_version")
        if isinstance(version, int) and version > STORE_FORMAT_VERSION:
            raise InputError(
                f"{origin} has store format {version} but this version reads up to {STORE_FORMAT_VERSION}; "
                "upgrade ep3stream or convert again"
            )
        if version == 1:
            if "conversion" in content:
                raise DamagedDataError(f"{origin} has a field that format 1 has not: conversion")
            content["conversion"] = {}
        manifest = _read_manifest(JsonObject(content, origin, Manifest))
        for problem in _problems(manifest):
            raise DamagedDataError(f"{origin}: {problem}")
        return manifest


def _object_of(record: Manifest | SplitInfo | ColumnStatistics) -> dict[str, Any]:
    """The fields of a record and of the records in it. `dataclasses.asdict` copies every number of them all."""
    values = {each.name: getattr(record, each.name) for each in fields(record)}
    return {
        name: _object_of(value) if isinstance(value, ColumnStatistics) else value
        for name, value in values.items()
    }


def naming_problems(
    task: Task,
    n_features: int,
    n_outputs: int,
    feature_names: tuple[str, ...],
    target_names: tuple[str, ...],
    class_names: tuple[str, ...] | None,
) -> Iterator[str]:
    """Yield a sentence for each contradiction between the shapes and the names of a store."""
    if len(feature_names) != n_features:
        yield f"feature_names has {len(feature_names)} names but n_features is {n_features}"
    n_targets = n_outputs if task == "regression" else 1
    if len(target_names) != n_targets:
        yield f"target_names has {len(target_names)} names but {task} needs {n_targets}"
    if class_names is not None and (task == "regression" or len(class_names) != n_outputs):
        yield f"class_names has {len(class_names)} names but task is {task} with {n_outputs} outputs"


def _read_manifest(top: JsonObject) -> Manifest:
    splits = top.mapping("splits")
    return Manifest(
        format_version=top.integer("format_version", 1),
        created_by=top.text("created_by"),
        task=top.choice("task", Task),
        n_features=top.integer("n_features", 1),
        n_outputs=top.integer("n_outputs", 1),
        x_dtype=top.choice("x_dtype", XDtype),
        y_dtype=top.choice("y_dtype", YDtype),
        feature_names=top.sequence("feature_names", str),
        target_names=top.sequence("target_names", str),
        class_names=top.optional("class_names", lambda: top.sequence("class_names", str)),
        columns=top.mapping("columns"),
        shuffle_seed=top.optional("shuffle_seed", lambda: top.integer("shuffle_seed", 0)),
        source=top.sequence("source", dict),
        conversion=top.mapping("conversion"),
        codec=top.choice("codec", Codec),
        splits={
            name: _read_split(JsonObject(split, f"{top.where}: split {name!r:.70}", SplitInfo))
            for name, split in splits.items()
        },
    )


def _read_split(split: JsonObject) -> SplitInfo:
    return SplitInfo(
        name=split.text("name"),
        n_rows=split.integer("n_rows", 1),
        segment_rows=split.integer("segment_rows", 1),
        segments_per_file=split.integer("segments_per_file", 1),
        digests=split.sequence("digests", str),
        features=_read_statistics(split.inner("features", ColumnStatistics)),
        targets=split.optional("targets", lambda: _read_statistics(split.inner("targets", ColumnStatistics))),
        class_counts=split.optional("class_counts", lambda: split.sequence("class_counts", int)),
    )


def _read_statistics(columns: JsonObject) -> ColumnStatistics:
    return ColumnStatistics(
        mean=columns.sequence("mean", float),
        std=columns.sequence("std", float),
        minimum=columns.sequence("minimum", float),
        maximum=columns.sequence("maximum", float),
        missing=columns.sequence("missing", int),
    )


def _problems(manifest: Manifest) -> Iterator[str]:
    yield from naming_problems(
        manifest.task,
        manifest.n_features,
        manifest.n_outputs,
        manifest.feature_names,
        manifest.target_names,
        manifest.class_names,
    )
    if (manifest.task == "classification") != (manifest.y_dtype == "int32"):
        yield f"y_dtype is {manifest.y_dtype} but task is {manifest.task}"
    if not manifest.splits:
        yield "there is no split"
    for name, info in manifest.splits.items():
        yield from (f"split {name!r:.70}: {problem}" for problem in _split_problems(manifest, name, info))


def _split_problems(manifest: Manifest, name: str, info: SplitInfo) -> Iterator[str]:
    if not is_split_name(name) or info.name != name:
        yield f"its name {info.name!r:.70} is not one a split may have"
    x_bytes = info.segment_rows * manifest.n_features * np.dtype(manifest.x_dtype).itemsize
    y_bytes = min(info.segment_rows, info.n_rows) * manifest.n_outputs * np.dtype(manifest.y_dtype).itemsize
    if x_bytes > MAX_SEGMENT_BYTES or (manifest.task == "regression" and y_bytes > MAX_SEGMENT_BYTES):
        yield f"segment_rows is {info.segment_rows}; segments have at most {MAX_SEGMENT_BYTES} bytes"
    if info.segments_per_file > info.n_segments:
        yield f"segments_per_file is {info.segments_per_file} but there are {info.n_segments} segments"
    if len(info.digests) != info.n_segments:
        yield f"it has {len(info.digests)} digests for {info.n_segments} segments"
    if not all(_DIGEST.fullmatch(digest) for digest in info.digests):
        yield "a digest is not 32 hex digits"
    yield from _statistics_problems("features", info.features, manifest.n_features, info.n_rows)
    if manifest.task == "regression":
        if info.targets is None or info.class_counts is not None:
            yield "regression needs targets and no class_counts"
        else:
            yield from _statistics_problems("targets", info.targets, manifest.n_outputs, info.n_rows)
    elif info.class_counts is None or info.targets is not None:
        yield "classification needs class_counts and no targets"
    elif len(info.class_counts) != manifest.n_outputs or min(info.class_counts) < 0:
        yield f"class_counts must be {manifest.n_outputs} counts"
    elif sum(info.class_counts) != info.n_rows:
        yield f"class_counts sum to {sum(info.class_counts)} but there are {info.n_rows} rows"


def _statistics_problems(what: str, columns: ColumnStatistics, n_columns: int, n_rows: int) -> Iterator[str]:
    for field in fields(columns):
        values = getattr(columns, field.name)
        if len(values) != n_columns:
            yield f"{what}.{field.name} has {len(values)} values for {n_columns} columns"
        elif not all(math.isfinite(value) for value in values):
            yield f"{what}.{field.name} is not finite"
    if any(std < 0 for std in columns.std):
        yield f"{what}.std is negative"
    if any(low > high for low, high in zip(columns.minimum, columns.maximum, strict=False)):
        yield f"{what}.minimum is above {what}.maximum"
    if not all(0 <= missing <= n_rows for missing in columns.missing):
        yield f"{what}.missing is not between 0 and {n_rows}"
