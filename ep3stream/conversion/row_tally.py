"""What is counted of encoded rows, and told of them: rows left out, missing, invalid and unseen values."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ep3stream.config import Unknown
from ep3stream.store.unseen_values import UnseenValues

_LOGGER = logging.getLogger(__name__)


@dataclass(slots=True)
class RowTally:
    """What was counted and learned from the rows so far.

    kept, dropped: rows kept and left out. missing: missing cells by column; of filled columns those in rows kept.
    without_value: rows left out for a gap in a column under `drop`. means: what the gaps of a numeric column become.
    unseen: unseen values. Of sources with `--split-file`, split_unseen: those of each later split; marked: the columns
    with gaps in the first source, None until it is read.
    """

    kept: int = 0
    dropped: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    without_value: int = 0
    means: dict[str, float] = field(default_factory=dict)
    invalid: Counter[str] = field(default_factory=Counter)
    unseen: UnseenValues = field(default_factory=UnseenValues)
    split_unseen: dict[str, UnseenValues] = field(default_factory=dict)
    marked: tuple[str, ...] | None = None

    def report(self) -> dict[str, Any]:
        """The counts of rows left out and of missing, invalid and unseen values as JSON, for the manifest."""
        report: dict[str, Any] = {}
        if self.dropped:
            report["dropped_rows"] = self.dropped
        if self.missing:
            report["missing"] = dict(sorted(self.missing.items()))
        if self.invalid:
            report["invalid"] = dict(sorted(self.invalid.items()))
        if self.unseen:
            report["unknown"] = self.unseen.to_json()
        by_split = {split: unseen.to_json() for split, unseen in self.split_unseen.items() if unseen}
        return report | ({"unknown_by_split": by_split} if by_split else {})

    def tell_invalid(self) -> None:
        """Warn of the rows left out for a text that is no value of its column's type."""
        for column, count in sorted(self.invalid.items()):
            _LOGGER.warning(
                "column %r: %d rows were left out, whose text is no value of the column's type", column, count
            )

    def tell_unseen(self, unknown: Unknown, split_unknown: Unknown, store: object) -> None:
        """Warn of the values that `store` does not have, if there were any; by split those of later files."""
        if self.unseen:
            _LOGGER.warning("%s", self.unseen.sentence(unknown, store))
        for split, unseen in self.split_unseen.items():
            if unseen:
                _LOGGER.warning("split %s: %s", split, unseen.sentence(split_unknown, store))

    def state(self) -> dict[str, Any]:
        """All counts and means as JSON that holds them exactly, for `restore`."""
        return {
            "kept": self.kept,
            "dropped": self.dropped,
            "missing": dict(self.missing),
            "without_value": self.without_value,
            "means": dict(self.means),
            "invalid": dict(self.invalid),
            "strangers": self.unseen.to_json(),
            "split_strangers": {split: each.to_json() for split, each in self.split_unseen.items()},
            "marked": self.marked,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from an earlier `state`."""
        self.kept, self.dropped = state["kept"], state["dropped"]
        self.missing = Counter(state["missing"])
        self.without_value, self.means = state["without_value"], dict(state["means"])
        self.invalid = Counter(state["invalid"])
        self.unseen = UnseenValues.of(state.get("strangers", {}))
        self.split_unseen = {
            split: UnseenValues.of(values) for split, values in state["split_strangers"].items()
        }
        self.marked = None if state["marked"] is None else tuple(state["marked"])
