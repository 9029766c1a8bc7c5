"""How far a fit is, how fast, and where the time goes: what its observers and metrics.jsonl are told."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace

from ep3stream.data.streaming.order import RowOrder
from ep3stream.data.streaming.prefetch import Batch, StreamTimes
from ep3stream.run.files.checkpoint import Progress


@dataclass(frozen=True, slots=True)
class FitProgress:
    """How far a fit is.

    loss: mean squared error of the model so far on rows before they are used, over the last 128 steps; starved:
    share of the time spent waiting for data.
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
    """Times of this sitting, added to those of the sittings before."""

    def __init__(self, progress: Progress) -> None:
        self.began, self.before_s = time.perf_counter(), progress.elapsed_s
        self.waited_before_s, self.streamed_before = progress.waited_s, replace(progress.streamed)
        self.rows = self.lap_rows = 0
        self.lap_began = self.began

    def tick(self, progress: Progress, batch: Batch, streamed: StreamTimes) -> None:
        """After each step; `streamed` is of this sitting."""
        progress.elapsed_s = self.before_s + time.perf_counter() - self.began
        progress.waited_s += batch.waited_s
        for item in fields(StreamTimes):
            seconds = getattr(self.streamed_before, item.name) + getattr(streamed, item.name)
            setattr(progress.streamed, item.name, seconds)
        self.rows += len(batch.x)
        self.lap_rows += len(batch.x)

    def lap_rows_per_s(self, progress: Progress) -> float:
        """Since it was last asked."""
        now = time.perf_counter()
        rate = self.lap_rows / max(now - self.lap_began, 1e-9)
        self.lap_rows, self.lap_began = 0, now
        return rate

    def report(self, progress: Progress, n_steps: int, order: RowOrder) -> FitProgress:
        """How far the fit is."""
        here_s = max(progress.elapsed_s - self.before_s, 1e-9)
        rate = self.rows / here_s
        epoch = progress.step / order.steps_per_epoch
        rows = round(epoch * order.epoch_rows)
        to_go = order.epoch_rows * n_steps / order.steps_per_epoch - rows
        starved = (progress.waited_s - self.waited_before_s) / here_s
        loss = progress.scored.loss
        return FitProgress(progress.step, n_steps, epoch, rows, rate, loss, starved, to_go / max(rate, 1e-9))


def seconds_spent(progress: Progress) -> dict[str, float]:
    """The fields of metrics.jsonl that say where the time of a fit went, in seconds over all sittings.

    Of elapsed_s: wait_s for data, stalled_s for checkpoints, validate_s for validations, and the rest, compute_s, for
    steps. Beside the steps, at the same time, went what `StreamTimes` has: read_s, decode_s, segments_s, gather_s,
    copy_s.
    """
    parts = {
        "wait_s": progress.waited_s,
        "stalled_s": progress.stalled_s,
        "validate_s": progress.validated_s,
    }
    compute_s = max(progress.elapsed_s - sum(parts.values()), 0.0)
    streamed = {item.name: getattr(progress.streamed, item.name) for item in fields(StreamTimes)}
    return {"elapsed_s": progress.elapsed_s, "compute_s": compute_s, **parts, **streamed}
