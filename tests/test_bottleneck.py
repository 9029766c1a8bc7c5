"""What holds a fit back is told in a sentence, from the seconds that the fit itself recorded."""

from __future__ import annotations

import logging
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from small_stores import make_store, plain_config

import ep3stream
from ep3stream.config import FitConfig
from ep3stream.errors import Interrupted
from ep3stream.reporting.records import SECONDS_FIELDS
from ep3stream.run.bottleneck import bottleneck
from ep3stream.run.event_log import read_lines

PARTS = ("compute_s", "wait_s", "stalled_s", "validate_s")


def seconds(**changes: float) -> dict[str, float]:
    return dict.fromkeys(SECONDS_FIELDS, 0.0) | {"elapsed_s": 100.0} | changes


@pytest.mark.parametrize(
    ("spent", "verdict"),
    [
        ({"wait_s": 1, "segments_s": 90, "read_s": 90}, "1.0% of the fit, so arithmetic is the limit"),
        ({"wait_s": 10, "segments_s": 60, "read_s": 90, "decode_s": 20}, "adds to it, most of all storage"),
        ({"wait_s": 60, "segments_s": 60, "read_s": 90, "decode_s": 20}, "the limit, most of all storage"),
        ({"wait_s": 60, "segments_s": 60, "read_s": 20, "decode_s": 90}, "most of all decoding"),
        ({"wait_s": 60, "segments_s": 10, "read_s": 90, "gather_s": 60}, "putting rows into batches"),
        ({"wait_s": 60, "segments_s": 10, "gather_s": 20, "copy_s": 40}, "copying to the device"),
        ({"wait_s": 8, "segments_s": 1, "gather_s": 5}, "most of all other work on the processor"),
        ({"wait_s": 8, "segments_s": 7, "gather_s": 5, "read_s": 9}, "most of all storage"),
        ({"wait_s": 60}, "reading is the limit: faster storage"),
        ({"wait_s": 1, "stalled_s": 20}, "Checkpoints held it up for 20.0%"),
    ],
)
def test_the_part_that_all_else_waits_for_is_named(spent: dict[str, float], verdict: str) -> None:
    assert verdict in bottleneck(seconds(**spent))


def test_nothing_is_said_of_a_fit_that_recorded_nothing() -> None:
    assert bottleneck({}) == ""
    assert bottleneck(dict.fromkeys(SECONDS_FIELDS, float("nan"))) == ""


def test_nothing_is_said_of_a_fit_too_short_to_judge() -> None:
    waiting = {"wait_s": 0.6, "segments_s": 0.6, "read_s": 0.9}
    assert bottleneck(seconds(elapsed_s=1.0, **waiting)) == ""
    assert "reading is the limit" in bottleneck(
        {name: 10 * s for name, s in seconds(elapsed_s=1.0, **waiting).items()}
    )


def settings(**run: Any) -> FitConfig:
    solver = {"centers": 60, "batch_size": 32, "epochs": 2, "validate_every": 1}
    changes = {"solver": solver, "data": {"validate": "test"}, "run": {"checkpoint_steps": 16} | run}
    return plain_config(**changes)


def step_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "step"]


def require_growing(lines: list[dict[str, Any]]) -> None:
    for before, after in pairwise(lines):
        assert all(before[name] <= after[name] for name in SECONDS_FIELDS if name != "compute_s")


def test_every_second_of_a_fit_is_recorded_under_what_it_went_into(
    tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ep3stream.run.bottleneck._SHORTEST_S", 0.0)
    store = make_store(tmp_path / "smooth.zarr")
    with caplog.at_level(logging.INFO, "ep3stream"):
        run = ep3stream.fit(store, tmp_path / "run", settings())
    lines = step_lines(run)
    for line in lines:
        assert sum(line[name] for name in PARTS) == pytest.approx(line["elapsed_s"])
        assert all(line[name] >= 0 for name in SECONDS_FIELDS)
    require_growing(lines)
    last = lines[-1]
    assert all(last[name] > 0 for name in SECONDS_FIELDS if name != "copy_s")
    assert caplog.messages[-1].startswith("The solver waited for data during ")
    assert "The solver waited for data during " in (run / "report.html").read_text()


def test_a_resumed_fit_goes_on_counting_its_seconds(tmp_path: Path) -> None:
    store, run = make_store(tmp_path / "smooth.zarr"), tmp_path / "run"

    def stop(progress: ep3stream.FitProgress) -> None:
        if progress.step == 56:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        ep3stream.fit(store, run, settings(), observe=stop)
    ep3stream.fit(store, run, settings())
    (resumed,) = (line["step"] for line in read_lines(run / "metrics.jsonl") if line.get("event") == "resume")
    assert resumed == 56
    require_growing(step_lines(run))
