"""What a sitting of a fit tells: lines of metrics.jsonl, curves, and the log; by the leader alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ep3stream.run.files.checkpoint import Progress
from ep3stream.run.records.metrics import Journal

logger = logging.getLogger(__name__)

_WARNINGS = {"rollback", "checkpoint_failed", "no_better"}


class Chronicle:
    """Appends to the metrics at a path. draw: takes each record too."""

    def __init__(self, metrics: Path, is_leader: bool) -> None:
        self.draw: Callable[[Mapping[str, Any]], None] = lambda record: None
        self._journal, self._is_leader = Journal(metrics), is_leader

    def note(self, record: Mapping[str, Any]) -> None:
        """A line of metrics."""
        if self._is_leader:
            self._journal.append(record)
            self.draw(record)

    def event(self, event: str, progress: Progress, message: str) -> None:
        """Something that has happened at this step, in words for the log too."""
        record = {"kind": "event", "event": event, "step": progress.step, "elapsed_s": progress.elapsed_s}
        self.note(record | {"message": message})
        logger.log(logging.WARNING if event in _WARNINGS else logging.INFO, message)
