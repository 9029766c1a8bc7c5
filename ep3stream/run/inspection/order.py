"""How well a fit would mix the rows of a store, for `inspect --order`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ep3stream.config import RunConfig
from ep3stream.data.location import ObjectUrl
from ep3stream.data.store import SplitReader, open_store
from ep3stream.data.streaming.order import RowOrder
from ep3stream.data.streaming.order_quality import SHARES, order_quality
from ep3stream.run.preparation.plan import window_segments
from ep3stream.run.preparation.prepare import shape_of

# Of a fit whose memory allows it.
_BATCH_ROWS = 4096


def order_report(
    place: Path | str | ObjectUrl, memory_bytes: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """For each split, the measures of `OrderQuality` for the first epoch of a fit with this memory, as JSON.

    Reads the manifest and no row. Raises InputError where there is no store.
    """
    memory_bytes = memory_bytes or RunConfig().memory_bytes
    with open_store(place) as store:
        is_shuffled = store.manifest.shuffle_seed is not None
        splits = {name: _measured(store.split(name), memory_bytes, seed) for name in store.manifest.splits}
        return {
            "path": str(store.path),
            "is_shuffled": is_shuffled,
            "memory_bytes": memory_bytes,
            "order": splits,
        }


def _measured(reader: SplitReader, memory_bytes: int, seed: int) -> dict[str, Any]:
    info = reader.info
    window = window_segments(shape_of(reader), memory_bytes)
    order = RowOrder(seed, info.n_rows, info.segment_rows, window, _BATCH_ROWS, np.empty(0, np.int64))
    quality = order_quality(order)
    return {**asdict(quality), "shares": list(SHARES), "relative": quality.relative}


def describe_order(report: dict[str, Any]) -> str:
    """The report in words: a table for each split, and what it means."""
    lines = [str(report["path"])]
    for name, split in report["order"].items():
        head = "  ".join(f"{100 * share:>12.0f}%" for share in split["shares"])
        lines += [
            "",
            f"split {name}: {split['n_rows']:,} rows, of which {split['window_rows']:,} are mixed at a time",
            f"neighbours are apart, in rows  {head}",
            _row("in the first epoch", split["distances"]),
            _row("in a perfect shuffle", split["perfect"]),
            f"in the median {100 * split['relative']:.1f}% as far as in a perfect shuffle; "
            f"{100 * split['same_batch']:.2f}% of them meet in a batch of {split['batch_rows']:,} rows, "
            f"{100 * split['perfect_same_batch']:.2f}% there",
        ]
    return "\n".join([*lines, "", _verdict(report)])


def _row(title: str, distances: list[float]) -> str:
    return f"{title:<30} " + "  ".join(f"{distance:>13,.0f}" for distance in distances)


def _verdict(report: dict[str, Any]) -> str:
    if report["is_shuffled"]:
        return "The conversion has shuffled all rows: neighbours in the store are strangers, however near they stay."
    worst = min(split["relative"] for split in report["order"].values())
    if worst > 0.9:
        return "The store is in its source's order, but all of it is mixed in memory: nothing is lost."
    return (
        "The store is in its source's order. If that order says anything about the targets, convert again without "
        "--no-shuffle, or give the fit more --memory, a quarter of which is for mixing."
    )
