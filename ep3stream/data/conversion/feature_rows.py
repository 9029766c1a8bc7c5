"""Tables without a target, turned into features as those of a store were, in the rows' own order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.config import ConvertConfig, Unknown
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
    def open(
        cls,
        files: Sequence[Path],
        recorded: Recorded,
        unknown: Unknown = "error",
        rename: Mapping[str, str] | None = None,
    ) -> FeatureRows:
        """Reads the first rows of each; raises SourceError for columns that do not match, by name.

        unknown: what becomes of categories that `recorded` does not have; rename: what the files call a column ->
        what the store does; both as in `ConvertConfig`.
        """
        like = recorded.without_target()
        source = TableSource.like(files, like, rename)
        settings = ConvertConfig(dtype=like.dtype, missing=like.missing, like=like.store, unknown=unknown)
        encoder = RowEncoder.build(source, settings, like)
        return cls(source, encoder, Expansion.build(source, encoder))

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Of x, in order."""
        return self.expansion.feature_names

    def batches(self) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
        """x, (k, d), of the usable rows of each batch, and which of its rows these are, (b,).

        A row with a missing value is unusable where the store's conversion dropped such rows, and else filled or
        a SourceError; one with a category that the store does not have is as `unknown` says. Of these a warning
        tells behind the last row.
        """
        for batch in self.source.batches(_BLOCK_BYTES):
            rows, kept = self.encoder.encode_kept(batch)
            usable = np.full(batch.n_rows, kept is None)
            if kept is not None:
                usable[kept] = True
            yield self.expansion.expand(rows)[0], usable
        self.encoder.tell_strangers()
