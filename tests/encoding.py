"""Tables encoded and expanded in memory, and stores that are nothing but what `like` reads of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ep3stream.config import ConvertConfig
from ep3stream.conversion import recorded_columns
from ep3stream.conversion.encode import RowEncoder
from ep3stream.conversion.expand import Expansion
from ep3stream.conversion.numbers import ColumnMeans
from ep3stream.conversion.recorded_columns import take_over
from ep3stream.conversion.rows import EncodedRows
from ep3stream.conversion.table_source import open_tables
from ep3stream.formats.source import RowSource


class Encoded(NamedTuple):
    """What a conversion would store."""

    expansion: Expansion
    encoder: RowEncoder
    source: RowSource
    x: np.ndarray
    y: np.ndarray

    @property
    def columns(self) -> dict[str, Any]:
        """The record of the columns in the store's manifest."""
        return self.expansion.columns(self.x.mean(axis=0, dtype=np.float64))

    @property
    def names(self) -> list[str]:
        return list(self.expansion.feature_names)


def write(path: Path, table: str | dict[str, Any]) -> Path:
    """CSV text or the columns of a Parquet file."""
    if isinstance(table, str):
        path = path.with_suffix(".csv")
        path.write_text(table)
    else:
        path = path.with_suffix(".parquet")
        pq.write_table(pa.table(table), path)
    return path


def encode_source(source: RowSource, config: ConvertConfig, block_bytes: int = 1 << 20) -> Encoded:
    config, like = take_over(config)
    encoder = RowEncoder.build(source, config, like)
    parts = [encoder.encode(batch) for batch in source.batches(block_bytes)]
    learn_means(encoder, parts)
    encoder.require_usable(Path("last.csv"))
    expansion = Expansion.build(source, encoder)
    expanded = [expansion.expand(rows) for rows in parts]
    x, y = (np.concatenate([part[i] for part in expanded]) for i in (0, 1))
    return Encoded(expansion, encoder, source, x, y)


def learn_means(encoder: RowEncoder, parts: Sequence[EncodedRows]) -> None:
    """As a conversion does it behind the last row; the parts are those of the first split."""
    means = ColumnMeans(len(gappy := encoder.unknown_means()))
    for rows in parts:
        means.add(rows.x[:, gappy])
    encoder.set_means(gappy, means.means())


def encode(path: Path, table: str | dict[str, Any], **settings: Any) -> Encoded:
    """What a conversion would store, with 0/1 features of categories unless the settings say otherwise."""
    if "like" not in settings:
        settings = {"categories": "onehot"} | settings
    config = ConvertConfig(**{"target": "y", **settings})
    return encode_source(open_tables([write(path, table)], take_over(config)[0]), config)


def pretend_store(monkeypatch: pytest.MonkeyPatch, encoded: Encoded, **changes: Any) -> Path:
    """A path whose store says it was made of what was encoded."""
    manifest = SimpleNamespace(
        task=encoded.source.target.task,
        x_dtype=encoded.encoder.layout.dtypes["x"],
        columns=json.loads(json.dumps(encoded.columns)),
        target_names=encoded.source.target.names,
        class_names=encoded.expansion.class_names,
    )
    vars(manifest).update(changes)

    @contextmanager
    def open_store(_: Path) -> Any:
        yield SimpleNamespace(manifest=manifest)

    monkeypatch.setattr(recorded_columns, "open_store", open_store)
    return Path("first.zarr")
