"""Whole runs: fit, stop in every way, resume, and end with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_stores import make_store, plain_config, smooth_rows

import ep3stream
from ep3stream import cli
from ep3stream.config import FitConfig, SolverConfig
from ep3stream.errors import ConfigError, DamagedDataError, InputError, Interrupted
from ep3stream.run.directory import settled_choices
from ep3stream.run.event_log import read_lines
from ep3stream.run.state import list_checkpoints

SMALL = {
    "solver": {"centers": 150, "model_rank": 40, "batch_size": 32, "epochs": 2},
    "run": {"checkpoint_steps": 7},
}


def settings(**changes) -> FitConfig:
    return plain_config(**SMALL).with_settings(changes, "test")


def model_bytes(run: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in sorted((run / "model").iterdir())}


@pytest.fixture(scope="module", params=["zarr", "h5"])
def store(request, tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / f"smooth.{request.param}")


@pytest.fixture(scope="module")
def reference(store, tmp_path_factory) -> Path:
    return ep3stream.fit(store, tmp_path_factory.mktemp("runs") / "reference", settings())


class Stop(Exception):
    """Stands for a kill: raised out of the fit loop, which gets no chance to save."""


def kill_at(step: int):
    def observe(progress):
        if progress.step >= step:
            raise Stop

    return observe


def unhurried(then=lambda progress: None):
    """Waits, whenever the fit reports, for the checkpoint that it has begun since: these fits outrun the disk."""

    def observe(progress):
        for thread in threading.enumerate():
            if thread.name == "ep3stream-checkpoint":
                thread.join()
        then(progress)

    return observe


def test_a_fit_learns_a_smooth_function(store, reference):
    scores = ep3stream.evaluate(reference, store)
    assert scores["r2"] > 0.9
    assert scores["n"] == 300 or 250 < scores["n"] < 350


@pytest.mark.parametrize("kills", [(8,), (24,), (40,), (64,), (8, 16, 24), (40, 48, 56)])
def test_a_fit_killed_at_any_moment_ends_with_the_same_bytes(store, reference, tmp_path, kills):
    for step in kills:
        with pytest.raises(Stop):
            ep3stream.fit(store, tmp_path / "run", settings(), observe=kill_at(step))
    ep3stream.fit(store, tmp_path / "run", settings())
    assert model_bytes(tmp_path / "run") == model_bytes(reference)


def test_a_fit_killed_by_the_kernel_ends_with_the_same_bytes(store, reference, tmp_path):
    (tmp_path / "settings.toml").write_text(settings().to_toml())
    command = [sys.executable, "-m", "ep3stream", "--quiet", "fit", str(store), str(tmp_path / "run")]
    command += ["--config", str(tmp_path / "settings.toml")]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 200
    while not list_checkpoints(tmp_path / "run" / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "run" / "model").exists()
    assert cli.main(command[3:]) == 0
    assert model_bytes(tmp_path / "run") == model_bytes(reference)


def test_killed_before_the_first_checkpoint_it_starts_again(store, reference, tmp_path):
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", settings(run={"checkpoint_steps": 1000}), observe=kill_at(8))
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")
    ep3stream.fit(store, tmp_path / "run", settings())
    assert model_bytes(tmp_path / "run") == model_bytes(reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_the_same_call_goes_on(store, reference, tmp_path, number):
    def interrupt(progress):
        if progress.step == 16:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=f"{number.name}.*step 1[678]") as raised:
        ep3stream.fit(store, tmp_path / "run", settings(run={"checkpoint_steps": 0}), observe=interrupt)
    assert raised.value.exit_code == 75
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[0][0] in (16, 17)
    ep3stream.fit(store, tmp_path / "run", settings())
    assert model_bytes(tmp_path / "run") == model_bytes(reference)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(store, reference, tmp_path, caplog):
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", settings(), observe=unhurried(kill_at(32)))
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[0][1]
    damage(newest / "tensors.safetensors")
    assert any(newest.name in problem for problem in ep3stream.verify(tmp_path / "run"))
    ep3stream.fit(store, tmp_path / "run", settings())
    assert newest.name in caplog.text
    assert model_bytes(tmp_path / "run") == model_bytes(reference)


def test_with_no_sound_checkpoint_left_the_fit_refuses_to_go_on(store, tmp_path):
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", settings(), observe=kill_at(32))
    for _, path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        damage(path / "manifest.json")
    with pytest.raises(DamagedDataError, match="no sound checkpoint"):
        ep3stream.fit(store, tmp_path / "run", settings())


@pytest.mark.parametrize(
    "piece", ["setup/tensors.safetensors", "setup/manifest.json", "model/tensors.safetensors"]
)
def test_a_damaged_set_up_or_model_is_named_and_never_used(store, tmp_path, piece):
    run = ep3stream.fit(store, tmp_path / "run", settings())
    damage(run / piece)
    assert ep3stream.verify(run)
    use = ep3stream.load if piece.startswith("model") else lambda run: ep3stream.fit(store, run, settings())
    with pytest.raises(DamagedDataError, match=piece.split("/")[0]):
        use(run)


def test_a_set_up_that_is_replaced_while_a_fit_runs_is_not_made_a_model_of(store, reference, tmp_path):
    own, run = tmp_path / "own", tmp_path / "run"

    def replace_setup(progress):
        if progress.step == 16:
            (run / "setup").rename(own)
            shutil.copytree(other / "setup", run / "setup")

    other = ep3stream.fit(store, tmp_path / "other", settings(run={"seed": 1}))
    with pytest.raises(DamagedDataError, match=r"setup is not what this fit has read; restore it"):
        ep3stream.fit(store, run, settings(), observe=replace_setup)
    shutil.rmtree(run / "setup")
    own.rename(run / "setup")
    ep3stream.fit(store, run, settings())
    assert model_bytes(run) == model_bytes(reference)


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_only_the_newest_checkpoints_are_kept(store, tmp_path):
    observe = unhurried()
    run = ep3stream.fit(store, tmp_path / "run", settings(run={"keep_checkpoints": 3}), observe=observe)
    saved = [line["step"] for line in read_lines(run / "metrics.jsonl") if line.get("event") == "checkpoint"]
    assert len(saved) > 4
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == saved[:-4:-1]


def test_more_epochs_go_on_from_the_end_of_a_finished_fit(store, tmp_path):
    one = settings(solver={"epochs": 1})
    ep3stream.fit(store, tmp_path / "run", one)
    first = model_bytes(tmp_path / "run")
    ep3stream.fit(store, tmp_path / "run", settings())
    assert model_bytes(tmp_path / "run") != first
    resumed = [
        line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line.get("event") == "resume"
    ]
    assert len(resumed) == 1


def test_a_fit_goes_on_with_the_averaging_that_was_the_default_when_it_began(store, tmp_path, monkeypatch):
    expected = ep3stream.fit(store, tmp_path / "expected", settings(solver={"averaging": 5.0}))
    with monkeypatch.context() as patched:
        patched.setattr(SolverConfig, "default_averaging", 5.0)
        with pytest.raises(Stop):
            ep3stream.fit(store, tmp_path / "run", settings(), observe=kill_at(20))
    ep3stream.fit(store, tmp_path / "run", settings())
    assert (
        model_bytes(tmp_path / "run")["tensors.safetensors"] == model_bytes(expected)["tensors.safetensors"]
    )


@pytest.mark.parametrize(
    ("plan", "averaging"), [({}, 3.0), ({"projection": "eigenpro"}, 0.0), ({"averaging": 7.0}, 7.0)]
)
def test_set_ups_of_earlier_versions_have_the_averaging_of_these(plan, averaging):
    assert FitConfig().settled(settled_choices({"plan": plan})).solver.averaging == averaging
    asked = settings(solver={"averaging": 1.0})
    assert asked.settled(settled_choices({"plan": plan})).solver.averaging == 1.0


def test_a_finished_fit_called_again_changes_nothing(store, tmp_path):
    ep3stream.fit(store, tmp_path / "run", settings())
    before = model_bytes(tmp_path / "run")
    ep3stream.fit(store, tmp_path / "run", settings())
    assert model_bytes(tmp_path / "run") == before


def test_another_setting_is_refused_by_name(store, tmp_path):
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", settings(), observe=kill_at(8))
    with pytest.raises(ConfigError, match=r"solver\.momentum was 0\.9 and is now 0\.5"):
        ep3stream.fit(store, tmp_path / "run", settings(solver={"momentum": 0.5}))


def test_fewer_epochs_give_the_model_of_so_many_unless_more_are_done(store, tmp_path):
    one = settings(solver={"epochs": 1})
    short = ep3stream.fit(store, tmp_path / "short", one)
    for stop, epochs in ((16, 3), (24, 2)):
        config = settings(solver={"epochs": epochs})
        with pytest.raises(Stop):
            ep3stream.fit(store, tmp_path / "run", config, observe=kill_at(stop))
    ep3stream.fit(store, tmp_path / "run", one)
    assert model_bytes(tmp_path / "run") == model_bytes(short)
    with pytest.raises(
        ConfigError, match=r"epochs is 0\.5, 17 steps, but .* has done 34; use at least 1, or"
    ):
        ep3stream.fit(store, tmp_path / "run", settings(solver={"epochs": 0.5}))
    assert ep3stream.FitConfig.from_toml((tmp_path / "run/config.toml").read_text(), "run") == one


def test_a_fit_that_went_on_and_was_killed_before_its_model_was_written_writes_it(store, reference, tmp_path):
    run = ep3stream.fit(store, tmp_path / "run", settings(solver={"epochs": 1}))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ep3stream.training.fit.save_model", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            ep3stream.fit(store, run, settings())
    assert not ep3stream.inspect(run)["finished"]
    ep3stream.fit(store, run, settings())
    assert ep3stream.inspect(run)["finished"]
    assert model_bytes(run) == model_bytes(reference)


def test_another_store_is_refused(store, tmp_path):
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", settings(), observe=kill_at(8))
    other = make_store(tmp_path / "other.zarr", seed=1)
    with pytest.raises(InputError, match="fingerprint"):
        ep3stream.fit(other, tmp_path / "run", settings())


def test_a_second_fit_on_the_same_run_is_refused_with_the_holder_named(store, tmp_path):
    inside = threading.Event()
    release = threading.Event()

    def hold(progress):
        inside.set()
        release.wait(30)

    first = threading.Thread(
        target=ep3stream.fit, args=(store, tmp_path / "run", settings()), kwargs={"observe": hold}
    )
    first.start()
    assert inside.wait(60)
    with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
        ep3stream.fit(store, tmp_path / "run", settings())
    release.set()
    first.join(60)
    assert not first.is_alive()


def test_a_directory_with_other_things_is_not_taken_for_a_run(store, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        ep3stream.fit(store, tmp_path, settings())
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("times", [20, 100])
def test_the_guard_recovers_from_a_step_many_times_too_large(store, tmp_path, monkeypatch, caplog, times):
    from ep3stream.solver.step_size import Stability

    sound = Stability.step_size
    monkeypatch.setattr(Stability, "step_size", lambda *arguments: times * sound(*arguments))
    run = ep3stream.fit(store, tmp_path / "run", settings(solver={"epochs": 6}))
    events = [line for line in read_lines(run / "metrics.jsonl") if line.get("event") == "rollback"]
    assert 1 <= len(events) <= 3
    assert "the loss blew up; back to step 0's weights, step size" in events[0]["message"]
    assert events[0]["message"] in caplog.text
    assert ep3stream.evaluate(run, store)["r2"] > 0.85


def test_a_hopeless_step_ends_with_a_clear_error_and_a_usable_checkpoint(store, tmp_path, monkeypatch):
    from ep3stream.solver.step_size import Stability

    sound = Stability.step_size
    monkeypatch.setattr(Stability, "step_size", lambda *arguments: 1e9 * sound(*arguments))
    with pytest.raises(ep3stream.DivergedError, match="blew up"):
        ep3stream.fit(store, tmp_path / "run", settings())
    x, y = smooth_rows(200)
    error = ep3stream.load(tmp_path / "run").predict(x) - y
    assert np.square(error).mean() < 1.1 * y.var(0).mean()  # the last good state: the zero model or better


def test_rows_drawn_as_centers_are_not_trained_on(store, tmp_path):
    run = ep3stream.fit(store, tmp_path / "run", settings())
    kept = ep3stream.fit(store, tmp_path / "kept", settings(data={"keep_center_rows": True}))
    n_rows = ep3stream.inspect(store)["splits"]["train"]["rows"]
    steps = [json.loads((path / "run.json").read_text())["plan"]["steps_per_epoch"] for path in (run, kept)]
    assert steps == [-(-(n_rows - 150) // 32), -(-n_rows // 32)]


def test_centers_from_a_file_need_not_be_rows(store, tmp_path):
    centers = np.random.default_rng(3).standard_normal((60, 5)).astype(np.float64)
    np.save(tmp_path / "centers.npy", centers)
    run = ep3stream.fit(store, tmp_path / "run", settings(solver={"centers": str(tmp_path / "centers.npy")}))
    assert np.array_equal(ep3stream.load(run).centers.numpy(), centers.astype(np.float32))
    assert ep3stream.evaluate(run, store)["r2"] > 0.6


@pytest.mark.parametrize(
    ("projection", "scale", "kernel"),
    [
        ("nystrom", "none", "laplacian"),
        ("nystrom", "standard", "gaussian"),
        ("exact", "minmax", "laplacian"),
        ("exact", "none", "gaussian"),
    ],
)
def test_every_projection_kernel_and_scale_learns(store, tmp_path, projection, scale, kernel):
    config = settings(solver={"projection": projection}, data={"scale": scale}, kernel={"name": kernel})
    run = ep3stream.fit(store, tmp_path / "run", config)
    assert ep3stream.evaluate(run, store)["r2"] > 0.85


@pytest.mark.parametrize(
    "kernel",
    [
        {"name": "matern52", "bandwidth": 3.0},
        {"name": "polynomial", "bandwidth": 2.5, "degree": 3, "offset": 1.5},
        {"name": "ntk_relu", "depth": 3, "bias": 0.8},
    ],
    ids=lambda kernel: kernel["name"],
)
def test_a_fit_with_any_kind_of_kernel_resumes_to_the_same_bytes_and_loads(tmp_path, kernel):
    store, config = make_store(tmp_path / "store.zarr"), settings(kernel=kernel)
    whole = ep3stream.fit(store, tmp_path / "whole", config)
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", config, observe=kill_at(24))
    unfinished = ep3stream.load(tmp_path / "run").kernel
    ep3stream.fit(store, tmp_path / "run", config)
    assert model_bytes(tmp_path / "run") == model_bytes(whole)
    for read in (unfinished, ep3stream.load(whole).kernel):
        assert {"name": read.name, **read.parameters} == kernel
    assert ep3stream.evaluate(whole, store)["r2"] > 0.85


def test_a_callable_kernel_fits_and_must_be_given_again(store, tmp_path):
    def rational(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return 1 / (1 + torch.cdist(z, x).square() / 4)

    run = ep3stream.fit(store, tmp_path / "run", settings(), kernel=rational)
    assert ep3stream.evaluate(run, store, kernel=rational)["r2"] > 0.85
    with pytest.raises(InputError, match="callable"):
        ep3stream.load(run)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_classes_are_learned_and_predicted_by_name(tmp_path, dtype):
    store = make_store(tmp_path / "classes.zarr", "classification", dtype=dtype)
    run = ep3stream.fit(store, tmp_path / "run", settings(data={"validate": "test"}))
    scores = ep3stream.evaluate(run, store)
    assert scores["accuracy"] > 0.75
    assert set(ep3stream.load(run).predict(smooth_rows(50)[0])) <= {0, 1, 2}
    validations = [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "validation"]
    assert [line["epoch"] for line in validations] == [1, 2]
    assert validations[-1]["accuracy"] == pytest.approx(scores["accuracy"])


def test_a_model_of_an_unfinished_run_comes_from_its_newest_checkpoint(store, tmp_path):
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", settings(), observe=unhurried(kill_at(40)))
    assert ep3stream.evaluate(tmp_path / "run", store)["r2"] > 0.5


def test_metrics_of_a_resumed_fit_tell_each_step_once(store, tmp_path):
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", settings(), observe=kill_at(24))
    ep3stream.fit(store, tmp_path / "run", settings())
    steps = [
        line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"
    ]
    assert steps == sorted(set(steps))
    assert len(steps) > 5


def test_predictions_are_the_same_as_an_array_a_store_and_from_python(store, reference, tmp_path):
    n_rows = ep3stream.predict(reference, store, tmp_path / "out.npy")
    array = np.load(tmp_path / "out.npy")
    with ep3stream.open_store(store) as rows:
        x, y = rows.split("test").read_rows(np.arange(n_rows))
    assert np.allclose(array, ep3stream.load(reference).predict(x), atol=1e-4)
    for name in ("out.zarr", "out.h5"):
        ep3stream.predict(reference, store, tmp_path / name)
        with ep3stream.open_store(tmp_path / name) as rows:
            outputs, carried = rows.split("test").read_rows(np.arange(n_rows))
        assert np.array_equal(outputs, array)
        assert np.array_equal(carried, y)


def test_predicting_onto_something_that_exists_is_refused(store, reference, tmp_path):
    (tmp_path / "out.npy").write_bytes(b"precious")
    with pytest.raises(InputError, match="exists"):
        ep3stream.predict(reference, store, tmp_path / "out.npy")
    assert (tmp_path / "out.npy").read_bytes() == b"precious"


def test_a_store_with_other_columns_is_refused_by_name(reference, tmp_path):
    other = make_store(tmp_path / "classes.zarr", "classification")
    with pytest.raises(InputError, match=r"targets|classes"):
        ep3stream.evaluate(reference, other)


@pytest.mark.parametrize("case", ["heavy tails", "three centers that see nothing"])
def test_a_model_that_is_no_better_than_the_mean_is_warned_of(case, tmp_path, caplog):
    x, y = smooth_rows(3000)
    if case == "heavy tails":
        y = np.random.default_rng(1).standard_cauchy((3000, 1)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    rows = tmp_path / "rows.zarr"
    ep3stream.convert([], rows, x_file=tmp_path / "x.npy", y_file=tmp_path / "y.npy")
    blind = {"solver": {"centers": 3}, "kernel": {"bandwidth": 1e-4}}
    run = ep3stream.fit(rows, tmp_path / "run", settings(**(blind if case.startswith("three") else {})))
    assert "no better than predicting the mean of the targets; try another bandwidth" in caplog.text
    assert [line["event"] for line in read_lines(run / "metrics.jsonl") if "event" in line][-1] == "no_better"


def test_a_model_that_is_better_than_the_mean_ends_without_a_warning(reference):
    events = [line.get("event") for line in read_lines(reference / "metrics.jsonl")]
    assert "finish" in events
    assert "no_better" not in events
