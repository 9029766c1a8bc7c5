"""Curves for TensorBoard: read back as TensorBoard reads them, beside metrics.jsonl, after kills and resumes too."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_stores import make_store, plain_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ep3stream
from ep3stream.config import FitConfig
from ep3stream.run.event_log import read_lines
from ep3stream.run.state import list_checkpoints


class Stop(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "smooth.zarr", n_rows=2000)


def settings(**run) -> FitConfig:
    changes = {
        "data": {"validate": "train"},
        "solver": {"centers": 50, "model_rank": 20, "batch_size": 16, "epochs": 2, "validate_every": 0.5},
        "run": {"checkpoint_steps": 40, "tensorboard": True} | run,
    }
    return plain_config(**changes)


def drawn(directory: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(directory))
    events.Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def recorded(run: Path, kind: str, field: str) -> list[tuple[int, float]]:
    return [
        (record["step"], record[field])
        for record in read_lines(run / "metrics.jsonl")
        if record["kind"] == kind
    ]


def assert_drawn_as_recorded(run: Path, directory: Path) -> None:
    curves = drawn(directory)
    for tag, kind, field in (
        ("loss/running", "step", "loss"),
        ("loss/batch", "step", "batch_loss"),
        ("solver/step_size", "step", "step_size"),
        ("speed/rows_per_s", "step", "rows_per_s"),
        ("train/mse", "validation", "mse"),
        ("train/r2", "validation", "r2"),
    ):
        expected = recorded(run, kind, field)
        assert len(expected) > 2
        assert [step for step, _ in curves[tag]] == [step for step, _ in expected], tag
        assert [value for _, value in curves[tag]] == pytest.approx([v for _, v in expected], rel=1e-6), tag
    assert all(0 <= share <= 1 for _, share in curves["speed/starved"])


def test_the_curves_are_those_of_metrics_jsonl(store, tmp_path):
    run = ep3stream.fit(store, tmp_path / "run", settings())
    assert_drawn_as_recorded(run, run / "tensorboard")


def test_a_killed_and_resumed_fit_goes_on_in_the_same_curves_without_a_point_twice(store, tmp_path):
    def kill(progress):
        saved = [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")]
        if (
            saved and progress.step >= saved[0] + 24
        ):  # So that steps are drawn which the resumed fit does again.
            raise Stop

    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", settings(), observe=kill)
    before = drawn(tmp_path / "run" / "tensorboard")["loss/running"]
    for step, checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints"):
        if step >= before[-1][0]:  # Written in the background while the fit was stopped.
            shutil.rmtree(checkpoint)
    run = ep3stream.fit(store, tmp_path / "run", settings())
    resumed = next(r["step"] for r in read_lines(run / "metrics.jsonl") if r.get("event") == "resume")
    assert before[-1][0] > resumed
    assert len(list((run / "tensorboard").iterdir())) == 2
    assert_drawn_as_recorded(run, run / "tensorboard")


def test_another_directory_may_be_named_and_the_setting_changed_on_resuming(store, tmp_path):
    run = ep3stream.fit(store, tmp_path / "run", settings(tensorboard=str(tmp_path / "curves")))
    assert_drawn_as_recorded(run, tmp_path / "curves")
    ep3stream.fit(store, run, settings(tensorboard=False))
    assert not (run / "tensorboard").exists()


def test_curves_that_cannot_be_written_cost_no_fit(store, tmp_path, caplog):
    (tmp_path / "file").touch()
    run = ep3stream.fit(store, tmp_path / "run", settings(tensorboard=str(tmp_path / "file" / "below")))
    assert (run / "model").exists()
    assert caplog.text.count("TensorBoard's curves end here, the fit goes on") == 1


def test_a_disk_that_fills_up_ends_the_curves_and_not_the_fit(store, tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    assert (ep3stream.fit(store, tmp_path / "run", settings()) / "model").exists()
    assert caplog.text.count("No space left on device") == 1


@pytest.mark.slow
def test_several_devices_draw_one_curve(store, tmp_path):
    run = ep3stream.fit(store, tmp_path / "run", settings(), devices=2)
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert_drawn_as_recorded(run, run / "tensorboard")
