"""The records of a fit as curves in TensorBoard, beside metrics.jsonl, which has all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ep3stream.config import FitConfig
from ep3stream.errors import ConfigError
from ep3stream.run.directory import RunDirectory
from ep3stream.run.event_log import read_lines, starved_between

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]

# Field of a step's record -> the curve's name; the part before the slash is a group of curves.
_STEP_CURVES = {
    "loss": "loss/running",
    "batch_loss": "loss/batch",
    "step_size": "solver/step_size",
    "projection_error": "solver/projection_error",
    "rows_per_s": "speed/rows_per_s",
}

_NOT_SCORES = {"kind", "step", "epoch", "rows", "elapsed_s", "split", "n"}
_FLUSH_S = 10


def require_tensorboard(config: FitConfig) -> None:
    """Raises ConfigError where the settings ask for TensorBoard and it is not installed."""
    if config.run.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError(
            "tensorboard is asked for but not installed; pip install 'ep3stream[tensorboard]', or leave it out"
        )


@contextmanager
def curves(directory: RunDirectory, place: bool | str, step: int) -> Iterator[Callable[[Record], None]]:
    """Gives a function that draws a record; it does nothing if `place`, the setting `tensorboard`, is false or empty.

    The fit goes on after `step`. A resumed fit goes on in the same curves: TensorBoard is told to forget the points
    after `step`. A disk that takes no more costs curves, never the fit.
    """
    if not place:
        yield lambda record: None
        return
    steps = [record for record in read_lines(directory.metrics) if record.get("kind") == "step"]
    curves = _Curves(steps[-1] if steps else {})
    curves.open(directory.tensorboard if place is True else Path(place), step)
    try:
        yield curves.draw
    finally:
        curves.close()


class _Curves:
    """A writer of TensorBoard's. last: the last step's record that was drawn, from which waiting is counted."""

    def __init__(self, last: Record) -> None:
        self._last = last
        self._writer: Any = None

    def open(self, place: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        def make() -> None:
            self._writer = SummaryWriter(str(place), purge_step=step + 1, flush_secs=_FLUSH_S)

        self._attempt(make)

    def draw(self, record: Record) -> None:
        if self._writer is not None:
            self._attempt(lambda: self._add(record))

    def close(self) -> None:
        if self._writer is not None:
            self._attempt(self._writer.close)

    def _add(self, record: Record) -> None:
        points: dict[str, float] = {}
        if record["kind"] == "step":
            points = {curve: record[field] for field, curve in _STEP_CURVES.items() if field in record}
            if (starved := starved_between(self._last, record)) is not None:
                points["speed/starved"] = starved
            self._last = record
        elif record["kind"] == "validation":
            scores = {name: value for name, value in record.items() if name not in _NOT_SCORES}
            points = {f"{record['split']}/{name}": value for name, value in scores.items()}
        for name, value in points.items():
            self._writer.add_scalar(name, value, record["step"])

    def _attempt(self, write: Callable[[], object]) -> None:
        # The writer's own thread writes to the disk; an error there is raised by the next call.
        try:
            write()
        except OSError as error:
            logger.warning("TensorBoard's curves end here, the fit goes on: %s", error)
            self._writer = None
