"""How well a fit would mix the rows of a store: `inspect --order`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ep3stream.config import FitConfig, RunConfig
from ep3stream.store.files import ObjectUrl
from ep3stream.store.reader import SplitReader, open_store
from ep3stream.stream.order import SHARES, RowOrder, order_quality
from ep3stream.training.plan import window_segments
from ep3stream.training.problem import shape_of

# The batch size of a fit whose memory budget is not the limit.
_BATCH_ROWS = 4096


def order_report(
    place: Path | str | ObjectUrl, memory_bytes: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """The measures of `OrderQuality` for the first epoch of a fit, for each split, as JSON.

    memory_bytes: the budget of the fit; by default that of `RunConfig`. Reads the manifest and no row. Raises
    InputError if there is no store.
    """
    memory_bytes = memory_bytes or RunConfig().memory_bytes
    with open_store(place) as store:
        return {
            "path": str(store.path),
            "is_shuffled": store.manifest.shuffle_seed is not None,
            "memory_bytes": memory_bytes,
            "order": {
                name: _quality(store.split(name), memory_bytes, seed) for name in store.manifest.splits
            },
        }


def _quality(reader: SplitReader, memory_bytes: int, seed: int) -> dict[str, Any]:
    info = reader.info
    window = window_segments(shape_of(reader, FitConfig()), memory_bytes)
    order = RowOrder(seed, info.n_rows, info.segment_rows, window, _BATCH_ROWS, np.empty(0, np.int64))
    quality = order_quality(order)
    return {**asdict(quality), "shares": list(SHARES), "relative": quality.relative}


def describe_order(report: Mapping[str, Any]) -> str:
    """An `order_report` in words: a table for each split, and whether the store should be converted again."""

    def line(title: str, distances: Sequence[float]) -> str:
        return f"{title:<30} " + "  ".join(f"{distance:>13,.0f}" for distance in distances)

    lines = [str(report["path"])]
    for name, split in report["order"].items():
        head = "  ".join(f"{100 * share:>12.0f}%" for share in split["shares"])
        lines += [
            "",
            f"split {name}: {split['n_rows']:,} rows, of which {split['window_rows']:,} are mixed at a time",
            f"neighbours are apart, in rows  {head}",
            line("in the first epoch", split["distances"]),
            line("in a perfect shuffle", split["perfect"]),
            f"in the median {100 * split['relative']:.1f}% as far as in a perfect shuffle; "
            f"{100 * split['same_batch']:.2f}% of them meet in a batch of {split['batch_rows']:,} rows, "
            f"{100 * split['perfect_same_batch']:.2f}% there",
        ]
    if report["is_shuffled"]:
        verdict = "The conversion has shuffled all rows: neighbours in the store are strangers, however near they stay."
    elif min(split["relative"] for split in report["order"].values()) > 0.9:
        verdict = "The store is in its source's order, but all of it is mixed in memory: nothing is lost."
    else:
        verdict = (
            "The store is in its source's order. If that order says anything about the targets, convert again without "
            "--no-shuffle, or give the fit more --memory, a quarter of which is for mixing."
        )
    return "\n".join([*lines, "", verdict])
