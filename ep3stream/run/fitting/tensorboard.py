"""A fit's records as curves in TensorBoard, beside metrics.jsonl, which has them all anyway."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ep3stream.config import FitConfig
from ep3stream.errors import ConfigError
from ep3stream.run.files.directory import RunDirectory
from ep3stream.run.records.metrics import read_lines, starved_between

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]

# Field of a step's record -> the curve's name; what stands before the slash is a group of curves.
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
    """ConfigError where it is asked for but not installed: before anything else is done."""
    if config.run.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError(
            "tensorboard is asked for but not installed; pip install 'ep3stream[tensorboard]', or leave it out"
        )


@contextmanager
def curves(directory: RunDirectory, place: bool | str, step: int) -> Iterator[Callable[[Record], None]]:
    """What takes each record of a sitting that begins after `step`, and draws its numbers at `place`, if there is one.

    place: as the setting `tensorboard`.
    A resumed fit goes on in the same curves: TensorBoard is told to forget what an earlier sitting wrote after `step`.
    A disk that takes no more costs curves, never the fit.
    """
    if not place:
        yield lambda record: None
        return
    steps = [record for record in read_lines(directory.metrics) if record.get("kind") == "step"]
    path = directory.tensorboard if place is True else Path(place)
    with _Writer(path, step, steps[-1] if steps else {}) as writer:
        yield writer.add


class _Writer:
    """`before`: the last record of the sitting before, since when the time is counted."""

    def __init__(self, place: Path, step: int, before: Record) -> None:
        self._place, self._step, self._before = place, step, before
        self._writer: Any = None

    def __enter__(self) -> _Writer:
        from torch.utils.tensorboard import SummaryWriter

        self._attempt(lambda: self._open(SummaryWriter))
        return self

    def _open(self, make: Any) -> None:
        self._writer = make(str(self._place), purge_step=self._step + 1, flush_secs=_FLUSH_S)

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._attempt(self._writer.close)

    def add(self, record: Record) -> None:
        if self._writer is not None:
            self._attempt(lambda: self._write(record))

    def _write(self, record: Record) -> None:
        for name, value in self._values(record):
            self._writer.add_scalar(name, value, record["step"])

    def _values(self, record: Record) -> Iterator[tuple[str, float]]:
        if record["kind"] == "step":
            yield from ((curve, record[field]) for field, curve in _STEP_CURVES.items() if field in record)
            if (starved := starved_between(self._before, record)) is not None:
                yield "speed/starved", starved
            self._before = record
        elif record["kind"] == "validation":
            scores = ((name, value) for name, value in record.items() if name not in _NOT_SCORES)
            yield from ((f"{record['split']}/{name}", value) for name, value in scores)

    def _attempt(self, write: Callable[[], object]) -> None:
        """The writer's own thread meets the disk; what it met is raised by the next call."""
        try:
            write()
        except OSError as error:
            logger.warning("TensorBoard's curves end here, the fit goes on: %s", error)
            self._writer = None
