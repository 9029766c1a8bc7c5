"""What holds a fit back, in a sentence or two, from the seconds that metrics.jsonl records."""

from __future__ import annotations

import math
from collections.abc import Mapping

# Waiting for less than the first share of the time does not matter; for more than the second, it matters most.
_LITTLE, _MUCH = 0.05, 0.25

# The thread that makes batches is busy for nearly all of the time where it is the limit. Where it is busy for less
# than this share, and the waiting was not for segments, as at the start of a fit, it had no core to run on.
_BUSY = 0.5

# The time of a shorter fit goes mostly into its first reads, when there is nothing to compute yet.
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


def bottleneck(seconds: Mapping[str, float]) -> str:
    """What limits the speed of a fit and what would help, from the last values of `seconds_spent`.

    Empty where they do not tell: fields are missing, or the fit took less than 5 s.
    """
    waited = seconds.get("wait_s", math.nan) / max(seconds.get("elapsed_s", math.nan), 1e-9)
    if not math.isfinite(waited) or not seconds["elapsed_s"] >= _SHORTEST_S:
        return ""
    waited = min(max(waited, 0.0), 1.0)
    sentences = f"The solver waited for data during {100 * waited:.1f}% of the fit, so "
    if waited < _LITTLE:
        sentences += (
            "arithmetic is the limit: a faster device or more of them would help, faster storage would not."
        )
    else:
        is_minor, part = waited < _MUCH, _slowest_part(seconds)
        sentences += (
            "arithmetic is the main limit, and reading adds to it" if is_minor else "reading is the limit"
        )
        if part is None:
            sentences += ": faster storage, a larger memory budget or more readers would help."
        else:
            sentences += f", most of all {part}: {_REMEDIES[part]}."
    stalled = seconds.get("stalled_s", math.nan) / max(seconds["elapsed_s"], 1e-9)
    if stalled > _LITTLE:
        remedy = "fewer of them would help (--checkpoint-minutes)"
        sentences += f" Checkpoints held it up for {100 * stalled:.1f}%: {remedy}."
    return sentences


def _slowest_part(seconds: Mapping[str, float]) -> str | None:
    """The part of reading that the other parts wait for, a key of _REMEDIES; None if the seconds do not tell."""
    segments, gather, copy = (seconds.get(name, math.nan) for name in ("segments_s", "gather_s", "copy_s"))
    if not segments + gather + copy > 0:
        return None
    is_busy = segments + gather + copy >= _BUSY * seconds["elapsed_s"]
    if not is_busy and segments < _BUSY * seconds["wait_s"]:
        return "other work on the processor"
    if segments >= max(gather, copy):
        return "storage" if seconds["read_s"] >= seconds["decode_s"] else "decoding"
    return "putting rows into batches" if gather >= copy else "copying to the device"
