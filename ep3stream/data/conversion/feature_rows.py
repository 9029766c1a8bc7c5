"""Tables without a target, turned into features as those of a store were, in the rows' own order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.config import ConvertConfig
from ep3stream.data.conversion.batch import Batch
from ep3stream.data.conversion.encode import RowEncoder
from ep3stream.data.conversion.expand import Expansion
from ep3stream.data.conversion.recorded import Recorded
from ep3stream.data.conversion.tables import TableSource

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """The rows of tables with the columns of `recorded`; no column needs to be the target."""

    source: TableSource
    encoder: RowEncoder
    expansion: Expansion

    @classmethod
    def open(cls, files: Sequence[Path], recorded: Recorded) -> FeatureRows:
        """Reads the first rows of each; raises SourceError for columns that do not match, by name."""
        like = recorded.without_target()
        source = TableSource.like(files, like)
        encoder = RowEncoder.build(source, ConvertConfig(dtype=like.dtype, missing=like.missing), like)
        return cls(source, encoder, Expansion.build(source, encoder))

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Of x, in order."""
        return self.expansion.feature_names

    def batches(self) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
        """x, (k, d), of the usable rows of each batch, and which of its rows these are, (b,).

        A row with a missing value is unusable where the store's conversion dropped such rows, and else filled or
        a SourceError, which also names a category that the store does not have.
        """
        for batch in self.source.batches(_BLOCK_BYTES):
            usable = (
                ~_incomplete(batch) if self.encoder.missing == "drop" else np.ones(batch.n_rows, np.bool_)
            )
            x, _, _ = self.expansion.expand(self.encoder.encode(batch))
            yield x, usable


def _incomplete(batch: Batch) -> NDArray[np.bool_]:
    """Rows with a missing value, (b,)."""
    missing = np.zeros(batch.n_rows, np.bool_)
    for piece in batch.numeric:
        missing |= np.isnan(piece).reshape(batch.n_rows, -1).any(1)
    for cells in batch.texts:
        missing |= cells.is_null().to_numpy(zero_copy_only=False)
    return missing
