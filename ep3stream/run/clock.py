"""How far a fit is, how fast, and where the time goes: what its observers and metrics.jsonl are told.

What holds a fit back, in a sentence, from the seconds that metrics.jsonl records.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from ep3stream.run.checkpoint import Progress
from ep3stream.stream.batch_slots import Batch
from ep3stream.stream.order import RowOrder
from ep3stream.stream.prefetch import StreamTimes


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
        loss = progress.running_score.loss
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


# Below the first share of waiting, storage does not matter; beyond the second, it matters most.
_LITTLE, _MUCH = 0.05, 0.25

# The thread that makes the batches works all the time where it is the limit. Where it does not for half of it, and the
# waiting was not for segments, as at the start of a fit, it had no core to run on.
_BUSY = 0.5

# A fit that is over sooner is mostly its first reads, for which nothing was there to compute yet.
_SHORTEST_S = 5.0

_REMEDIES = {
    "storage": "faster storage would help, or rows that take fewer bytes (convert with --codec lz4 or --dtype float16)",
    "decoding": "more processors would help, a store that is not packed (convert with --codec none), or workers that "
    "decode elsewhere (--dask)",
    "putting rows into batches": "smaller segments would help (convert with --segment-bytes), which stay in the "
    "processor's cache",
    "other work on the processor": "the threads that read had little to do and still came late; fewer threads "
    "(OMP_NUM_THREADS) or less other work on this machine would help",
    "copying to the device": "rows that take fewer bytes would help (convert with --dtype float16)",
}


def slowest_part(seconds: Mapping[str, float]) -> str | None:
    """The part of the reading that the rest of it waits for, a key of the remedies; None where nothing tells."""
    segments, gather, copy = (seconds.get(name, math.nan) for name in ("segments_s", "gather_s", "copy_s"))
    if not segments + gather + copy > 0:
        return None
    is_busy = segments + gather + copy >= _BUSY * seconds["elapsed_s"]
    if not is_busy and segments < _BUSY * seconds["wait_s"]:
        return "other work on the processor"
    if segments >= max(gather, copy):
        return "storage" if seconds["read_s"] >= seconds["decode_s"] else "decoding"
    return "putting rows into batches" if gather >= copy else "copying to the device"


def bottleneck(seconds: Mapping[str, float]) -> str:
    """A sentence or two from the last `seconds_spent`; empty where they do not tell, as of a fit of a few seconds."""
    waited = seconds.get("wait_s", math.nan) / max(seconds.get("elapsed_s", math.nan), 1e-9)
    if not math.isfinite(waited) or not seconds["elapsed_s"] >= _SHORTEST_S:
        return ""
    waited = min(max(waited, 0.0), 1.0)
    told = f"The solver waited for data during {100 * waited:.1f}% of the fit, so "
    if waited < _LITTLE:
        told += (
            "arithmetic is the limit: a faster device or more of them would help, faster storage would not."
        )
    else:
        told += _of_reading(waited < _MUCH, slowest_part(seconds))
    return told + _of_checkpoints(seconds)


def _of_reading(is_little: bool, part: str | None) -> str:
    main = "arithmetic is the main limit, and reading adds to it" if is_little else "reading is the limit"
    if part is None:
        return f"{main}: faster storage, a larger memory budget or more readers would help."
    return f"{main}, most of all {part}: {_REMEDIES[part]}."


def _of_checkpoints(seconds: Mapping[str, float]) -> str:
    stalled = seconds.get("stalled_s", math.nan) / max(seconds["elapsed_s"], 1e-9)
    if not stalled > _LITTLE:
        return ""
    return (
        f" Checkpoints held it up for {100 * stalled:.1f}%: fewer of them would help (--checkpoint-minutes)."
    )
