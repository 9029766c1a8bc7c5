"""Validations, early stopping and parts of epochs, in whole runs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from small_stores import make_store
from test_fit import Stop, kill_at, model_bytes, settings

import ep3stream
from ep3stream.errors import ConfigError, Interrupted
from ep3stream.run.checkpoint import Best
from ep3stream.run.event_log import read_lines
from ep3stream.run.state import list_checkpoints
from ep3stream.training import validation


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "smooth.zarr")


def records(run: Path, kind: str) -> list[dict]:
    return [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == kind]


def impatient(**solver):
    """A fit that stops early: its step is so small a part of an epoch that some validation is not better."""
    values = {"patience": 2, "validate_every": 0.1, "epochs": 40, **solver}
    return settings(solver=values, data={"validate": "test"}, run={"checkpoint_steps": 5})


@pytest.fixture(scope="module")
def stopped(store, tmp_path_factory) -> Path:
    return ep3stream.fit(store, tmp_path_factory.mktemp("runs") / "stopped", impatient())


def test_a_fit_without_patience_left_stops_with_its_best_model(store, stopped):
    errors = [line["weighted_error"] for line in records(stopped, "validation")]
    plan = json.loads((stopped / "run.json").read_text())["plan"]
    assert len(errors) < plan["n_steps"] // max(1, round(0.1 * plan["steps_per_epoch"]))
    best = int(np.argmin(errors))
    assert best == len(errors) - 3  # two without a better one, which were the end
    scores = ep3stream.evaluate(stopped, store)
    validated = records(stopped, "validation")[best]
    assert scores["mse"] == pytest.approx(validated["mse"], rel=1e-6)
    assert scores["mse"] != pytest.approx(records(stopped, "validation")[-1]["mse"], rel=1e-6)


def test_an_early_stop_is_told_in_the_events_and_on_the_report(stopped):
    finish = records(stopped, "event")[-1]
    step = records(stopped, "validation")[-3]["step"]
    words = f"stopped early: 2 validations without a better one; finished after {finish['step']} steps"
    assert words in finish["message"]
    assert f"with the model of step {step}," in finish["message"]
    assert words in (stopped / "report.html").read_text()


@pytest.mark.parametrize("kill", [8, 16])
def test_a_killed_fit_stops_at_the_same_step_with_the_same_bytes(store, stopped, tmp_path, kill):
    end = records(stopped, "event")[-1]["step"]
    assert kill < end
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", impatient(), observe=kill_at(kill))
    ep3stream.fit(store, tmp_path / "run", impatient())
    assert model_bytes(tmp_path / "run") == model_bytes(stopped)
    assert records(tmp_path / "run", "event")[-1]["step"] == end


def test_a_stopped_fit_called_again_changes_nothing(store, stopped):
    before = model_bytes(stopped), len(read_lines(stopped / "metrics.jsonl"))
    ep3stream.fit(store, stopped, impatient(epochs=50))
    assert (model_bytes(stopped), len(read_lines(stopped / "metrics.jsonl"))) == before


def test_killed_between_the_stop_and_the_model_it_only_writes_the_model(
    store, tmp_path, stopped, monkeypatch
):
    def killed(*_):
        raise Stop

    monkeypatch.setattr("ep3stream.training.fit.save_model", killed)
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", impatient())
    monkeypatch.undo()
    ep3stream.fit(store, tmp_path / "run", impatient())
    assert model_bytes(tmp_path / "run") == model_bytes(stopped)
    ends = [records(run, "event")[-1]["step"] for run in (tmp_path / "run", stopped)]
    assert ends[0] == ends[1]


def test_an_unfinished_run_with_patience_is_used_with_its_best_model(store, tmp_path):
    def validations():
        seen = records(tmp_path / "run", "validation")
        return seen, min(seen, key=lambda line: line["weighted_error"], default=None)

    def terminate(progress):
        seen, best = validations()
        if seen and best is not seen[-1] and progress.step % seen[0]["step"]:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        ep3stream.fit(store, tmp_path / "run", impatient(patience=100), observe=terminate)
    seen, best = validations()
    assert best is not seen[-1]
    assert ep3stream.evaluate(tmp_path / "run", store)["mse"] == pytest.approx(best["mse"], rel=1e-6)


def test_patience_without_rows_to_validate_is_refused(store, tmp_path):
    patient = settings(solver={"patience": 3}, data={"validate": "none"})
    with pytest.raises(ConfigError, match="patience is 3 but no rows are validated; give a split"):
        ep3stream.fit(store, tmp_path / "run", patient)
    few = make_store(tmp_path / "few.zarr", n_rows=900)
    with pytest.raises(ConfigError, match="no rows are validated: there are too few rows to hold some out"):
        ep3stream.fit(few, tmp_path / "run", settings(solver={"patience": 3}, data={"validate": "auto"}))
    assert not (tmp_path / "run").exists()


def test_without_patience_the_best_model_is_kept_too(store, stopped, tmp_path):
    plan = json.loads((stopped / "run.json").read_text())["plan"]
    worse = records(stopped, "validation")[-2]  # The one before it was better.
    epochs = worse["step"] / plan["steps_per_epoch"]
    run = ep3stream.fit(store, tmp_path / "run", impatient(patience=0, epochs=epochs))
    best = records(run, "validation")[-2]
    assert best["weighted_error"] < records(run, "validation")[-1]["weighted_error"]
    assert ep3stream.evaluate(run, store)["mse"] == pytest.approx(best["mse"], rel=1e-6)
    assert f"with the model of step {best['step']}," in records(run, "event")[-1]["message"]
    unwatched = impatient(patience=0, epochs=epochs).with_settings({"data": {"validate": "none"}}, "test")
    last = ep3stream.fit(store, tmp_path / "unwatched", unwatched)
    assert ep3stream.evaluate(last, store)["mse"] == pytest.approx(worse["mse"], rel=1e-6)


def test_what_an_early_stop_depends_on_may_not_change(store, tmp_path):
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", impatient(patience=50), observe=kill_at(8))
    with pytest.raises(ConfigError, match=r"solver\.validate_every was 0\.1 and is now 0\.5"):
        ep3stream.fit(store, tmp_path / "run", impatient(patience=50, validate_every=0.5))


def test_the_best_is_the_one_with_the_least_error_and_takes_the_place_of_none():
    import torch

    def after(best, error, step):
        scores = {"weighted_error": error}
        return validation.after_validation(best, scores, torch.tensor([error]), step, "rows")

    first = after(None, float("nan"), 1)
    second = after(first, 0.5, 2)
    third = after(after(second, 0.5, 3), 0.7, 4)
    assert (second.error, second.step, second.n_since) == (0.5, 2, 0)
    assert third == Best(second.weights, 0.5, 2, 2, "rows")
    assert after(third, 0.4, 5).n_since == 0


def test_a_validation_reads_a_bounded_number_of_rows_the_same_each_time(store, tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "_MAX_ROWS", 50)
    config = settings(solver={"validate_every": 0.5}, data={"validate": "test"})
    lines = records(ep3stream.fit(store, tmp_path / "run", config), "validation")
    assert [line["n"] for line in lines] == [50] * 4
    assert [line["epoch"] for line in lines] == pytest.approx([0.5, 1, 1.5, 2], abs=0.02)
    assert lines[-1]["mse"] != ep3stream.evaluate(tmp_path / "run", store)["mse"]


@pytest.mark.parametrize("epochs", [0.5, 1.5, 1e-6])
def test_a_part_of_an_epoch_has_that_part_of_its_steps(store, tmp_path, epochs):
    config = settings(solver={"epochs": epochs}, data={"validate": "test"})
    run = ep3stream.fit(store, tmp_path / "run", config)
    plan = json.loads((run / "run.json").read_text())["plan"]
    n_steps = max(1, round(epochs * plan["steps_per_epoch"]))
    assert plan["n_steps"] == n_steps == list_checkpoints(run / "checkpoints")[0][0]
    assert records(run, "validation")[-1]["step"] == n_steps


def test_a_part_of_an_epoch_goes_on_to_the_whole_with_the_same_bytes(store, tmp_path):
    whole = ep3stream.fit(store, tmp_path / "whole", settings())
    for epochs in (0.3, 1, 1.7, 2):
        ep3stream.fit(store, tmp_path / "run", settings(solver={"epochs": epochs}))
    assert model_bytes(tmp_path / "run") == model_bytes(whole)
