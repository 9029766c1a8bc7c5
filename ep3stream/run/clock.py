"""How far a fit is, how fast it goes, and where its time goes: for observers and metrics.jsonl."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # The command line knows FitProgress without waiting two seconds for torch.
    from ep3stream.run.checkpoint import Progress
    from ep3stream.stream.batch_slots import Batch
    from ep3stream.stream.order import RowOrder
    from ep3stream.stream.prefetch import StreamTimes


@dataclass(frozen=True, slots=True)
class FitProgress:
    """How far a fit is.

    loss: mean squared error of the model so far on rows before they are used, over the last 128 steps; starved:
    share of the time spent waiting for data, on a GPU without any work.
    """

    step: int
    n_steps: int
    epoch: float
    rows: int
    rows_per_s: float
    loss: float
    starved: float
    eta_s: float


class Clock:
    """Adds the seconds of this process to those that a progress has from earlier processes of the same fit."""

    def __init__(self, progress: Progress) -> None:
        self._began_s, self._before_s = time.perf_counter(), progress.elapsed_s
        self._waited_before_s, self._streamed_before = progress.waited_s, replace(progress.streamed)
        self._rows = self._lap_rows = 0
        self._lap_began_s = self._began_s

    def tick(self, progress: Progress, batch: Batch, streamed: StreamTimes) -> None:
        """Brings the times in `progress` up to date after a step; `streamed` is that of this process."""
        progress.elapsed_s = self._before_s + time.perf_counter() - self._began_s
        progress.waited_s += batch.waited_s
        for item in fields(streamed):
            seconds = getattr(self._streamed_before, item.name) + getattr(streamed, item.name)
            setattr(progress.streamed, item.name, seconds)
        self._rows += len(batch.x)
        self._lap_rows += len(batch.x)

    def lap_rows_per_s(self) -> float:
        """Rows a second since the last call."""
        now_s = time.perf_counter()
        rate = self._lap_rows / max(now_s - self._lap_began_s, 1e-9)
        self._lap_rows, self._lap_began_s = 0, now_s
        return rate

    def report(self, progress: Progress, n_steps: int, order: RowOrder) -> FitProgress:
        """How far a fit of `n_steps` in this order is. Rates are those of this process."""
        here_s = max(progress.elapsed_s - self._before_s, 1e-9)
        rate = self._rows / here_s
        epoch = progress.step / order.steps_per_epoch
        rows = round(epoch * order.epoch_rows)
        rows_left = order.epoch_rows * n_steps / order.steps_per_epoch - rows
        starved = (progress.waited_s - self._waited_before_s) / here_s
        loss = progress.running_score.loss
        return FitProgress(
            progress.step, n_steps, epoch, rows, rate, loss, starved, rows_left / max(rate, 1e-9)
        )


def seconds_spent(progress: Progress) -> dict[str, float]:
    """The fields of metrics.jsonl that say where the time of a fit went, in seconds over all its processes.

    elapsed_s is the sum of wait_s (for data), stalled_s (for checkpoints), validate_s (validations) and compute_s (the
    rest: steps). The fields of StreamTimes, read_s, decode_s, segments_s, gather_s and copy_s, went beside the steps,
    in threads.
    """
    parts = {
        "wait_s": progress.waited_s,
        "stalled_s": progress.stalled_s,
        "validate_s": progress.validated_s,
    }
    compute_s = max(progress.elapsed_s - sum(parts.values()), 0.0)
    streamed = {item.name: getattr(progress.streamed, item.name) for item in fields(progress.streamed)}
    return {"elapsed_s": progress.elapsed_s, "compute_s": compute_s, **parts, **streamed}
