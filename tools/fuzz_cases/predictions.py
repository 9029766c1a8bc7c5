"""The features that `predict` makes of the rows of a table, against those of the store that was made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import ep3stream
from ep3stream.config import ConvertConfig
from ep3stream.conversion.expand import FeatureRows
from ep3stream.conversion.open_source import open_features
from ep3stream.conversion.recorded_columns import RecordedColumns
from ep3stream.conversion.table_source import open_tables_like
from ep3stream.formats.python_objects import PythonTable
from fuzz_cases.written import Written


def differences(written: Written, store: Path, kept: np.ndarray, is_unusable: np.ndarray) -> str:
    """What is wrong with the features of the rows, in words; nothing if they are those of the store.

    kept: which rows of the table the store has, in order. is_unusable: which rows have no prediction.
    """
    recorded, source = RecordedColumns.of(store), written.source()
    if isinstance(source, str | Path | list):
        opened = open_features(
            [Path(file) for file in (source if isinstance(source, list) else [source])],
            recorded,
            ConvertConfig(partitions=written.options.get("partitions", False)),
        )
    else:
        table = PythonTable.of(source)
        assert table is not None
        opened = open_tables_like([table], recorded.without_target())
    if opened is None:
        return "no rows"
    batches = list(FeatureRows.open(opened, recorded, "ignore").batches())
    usable = np.concatenate([flags for _, flags in batches])
    made: Any = np.full((len(usable), batches[0][0].shape[1]), np.nan, np.float32)
    made[usable] = np.concatenate([x for x, _ in batches])
    if len(usable) != len(is_unusable):
        return f"{len(usable)} rows for {len(is_unusable)}"
    if (wrong := np.flatnonzero(usable == is_unusable)).size:
        return f"row {wrong[0]} is {'' if usable[wrong[0]] else 'not '}usable"
    with ep3stream.open_store(store) as opened_store:
        reader = opened_store.split("train")
        x, _ = reader.read_rows(np.arange(reader.info.n_rows))
    if (differs := np.argwhere(made[kept] != x)).size:
        row, column = differs[0]
        return f"feature {column} of row {kept[row]} is {made[kept][row, column]}, and {x[row, column]} in the store"
    return ""
