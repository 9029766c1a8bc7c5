"""Fits on several devices, by the real launcher: what one device gives, whatever happens to the processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rank_kernels import deadly_once, endless, not_finite_on_one, rational
from small_stores import make_store, plain_config

import ep3stream
from ep3stream.config import FitConfig
from ep3stream.errors import ConfigError
from ep3stream.mesh.join import RENDEZVOUS
from ep3stream.run.event_log import read_lines
from ep3stream.run.launch import JOB, LOST_RANK, PIPE, Job
from ep3stream.run.signals import HANDLED, hold_signals
from ep3stream.run.state import list_checkpoints

SMALL = {
    "solver": {"centers": 101, "model_rank": 30, "tail": 16, "batch_size": 64, "epochs": 2},
    "run": {"checkpoint_steps": 5, "max_restarts": 1},
}


def settings(**changes) -> FitConfig:
    return plain_config(**SMALL).with_settings(changes, "test")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "smooth.zarr")


@pytest.fixture(autouse=True)
def _threads(monkeypatch):
    """Ranks find this folder's modules, and do not fight for the cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def difference(run: Path, other: Path) -> float:
    """Of the weights, relative."""
    mine, theirs = (ep3stream.load(path).weights for path in (run, other))
    return float((mine - theirs).norm() / theirs.norm())


def model_bytes(run: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in sorted((run / "model").iterdir())}


def events(run: Path) -> list[str]:
    """But for checkpoints, which come as the disk allows."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "event"]
    return [line["event"] for line in lines if line["event"] != "checkpoint"]


def command(store: Path, run: Path, config: FitConfig) -> list[str]:
    (run.parent / "fit.toml").write_text(config.to_toml())
    fit = [sys.executable, "-m", "ep3stream", "fit", str(store), str(run)]
    return [*fit, "--config", str(run.parent / "fit.toml")]


@pytest.mark.parametrize(
    "projection", ["nystrom", *(pytest.param(p, marks=pytest.mark.slow) for p in ("exact", "eigenpro"))]
)
def test_three_ranks_give_the_weights_of_one(store, tmp_path, projection):
    tail = 16 if projection == "nystrom" else "none"
    config = settings(solver={"projection": projection, "tail": tail}, data={"validate": "auto"})
    alone = ep3stream.fit(store, tmp_path / "alone", config)
    done = subprocess.run(
        [*command(store, tmp_path / "three", config), "--devices", "3"], capture_output=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert difference(tmp_path / "three", alone) < 1e-5
    assert events(tmp_path / "three") == events(alone)
    # Each line once, though three processes might have spoken.
    lines = done.stderr.decode().splitlines()
    assert len([line for line in lines if line.startswith("started")]) == 1
    scores = [
        [line["r2"] for line in read_lines(run / "metrics.jsonl") if line["kind"] == "validation"]
        for run in (tmp_path / "three", alone)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert len(scores[0]) == 2


def test_a_rank_killed_in_mid_epoch_costs_a_restart_and_nothing_else(store, tmp_path, monkeypatch, caplog):
    """The whole one has a kill mark from the start, so that both take the same kernel."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    (tmp_path / "whole" / "killed").touch()
    config = settings(solver={"epochs": 4}, run={"checkpoint_steps": 3})
    seen = []
    for name in ("whole", "killed"):
        run = tmp_path / name / "run"
        monkeypatch.setenv("EP3STREAM_TEST_RUN", str(run))
        ep3stream.fit(store, run, config, kernel=deadly_once, devices=2, observe=seen.append)
    assert (tmp_path / "killed" / "killed").exists()
    assert "a rank died; all have started again from the last checkpoint (1 of 1 restarts)" in caplog.text
    assert "resume" in events(tmp_path / "killed" / "run")
    assert model_bytes(tmp_path / "killed" / "run") == model_bytes(tmp_path / "whole" / "run")
    assert seen[-1].n_steps == seen[0].n_steps > 60
    assert seen[-1].step > 60


def test_stopped_on_three_ranks_it_goes_on_with_one_and_with_two(store, tmp_path):
    run, config = tmp_path / "three", settings(run={"checkpoint_steps": 0})
    endless = settings(solver={"epochs": 1000}, run={"checkpoint_steps": 0})
    process = subprocess.Popen([*command(store, run, endless), "--devices", "3"], stderr=subprocess.PIPE)
    wait_for_a_step(run)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=250)[1].decode()
    assert process.returncode == 75, stderr
    assert stderr.count("SIGTERM: stopped at step") == 1
    ((step, _),) = list_checkpoints(run / "checkpoints")
    config = settings(solver={"epochs": step // 15 + 2}, run={"checkpoint_steps": 0})
    alone = ep3stream.fit(store, tmp_path / "alone", config)
    for devices in (1, 2):
        resumed = Path(shutil.copytree(run, tmp_path / f"resumed-{devices}"))
        ep3stream.fit(store, resumed, config, devices=devices)
        assert events(resumed) == ["start", "resume", "finish"]
        assert difference(resumed, alone) < 1e-5


def wait_for_a_step(run: Path) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if any(line["kind"] == "step" for line in read_lines(run / "metrics.jsonl")):
            return
        time.sleep(0.05)


def test_ranks_whose_command_was_killed_before_they_met_end(store, tmp_path):
    """The first waits for nobody to read what it tells, the second not for the first."""
    arguments = {"config": settings().to_toml(), "store": str(store), "run": str(tmp_path / "run")}
    Job("fit", arguments | {"override": False}).write(tmp_path)
    described = json.loads((tmp_path / JOB).read_text())
    (tmp_path / JOB).write_text(json.dumps(described | {"parent": 1 << 30}))
    os.mkfifo(tmp_path / PIPE)
    meeting = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", RENDEZVOUS: f"file://{tmp_path}/meeting"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "ep3stream.rank", str(tmp_path)],
            env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            preexec_fn=lambda: hold_signals(*HANDLED),
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(100) for rank in ranks] == [LOST_RANK] * 2
    finally:
        for rank in ranks:
            rank.kill()


def test_an_error_of_one_rank_ends_all_with_its_own_message_once(store, tmp_path, capfd):
    with pytest.raises(ConfigError, match="kernel 'callable' returned a value that is not finite"):
        ep3stream.fit(store, tmp_path / "run", settings(), kernel=not_finite_on_one, devices=2)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_what_an_observer_raises_ends_the_ranks(store, tmp_path):
    class Stop(Exception):
        pass

    def stop(progress):
        raise Stop

    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", settings(), observe=stop, devices=2)
    assert not (tmp_path / "run" / "model").exists()


def test_a_kernel_that_other_processes_cannot_find_is_refused(store, tmp_path):
    with pytest.raises(ConfigError, match=r"<lambda>.* cannot be found by the processes of other devices"):
        ep3stream.fit(store, tmp_path / "run", settings(), kernel=lambda z, x: rational(z, x), devices=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks_each", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ranks_of_two_machines_started_by_torchrun_give_the_weights_of_one(store, tmp_path, ranks_each):
    """By what torchrun tells its processes; only the first machine has the run."""
    config = settings(data={"validate": "test"})
    alone = ep3stream.fit(store, tmp_path / "alone", config)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2 * ranks_each):
        machine, local_rank = divmod(rank, ranks_each)
        places = {"RANK": rank, "WORLD_SIZE": 2 * ranks_each, "LOCAL_RANK": local_rank}
        places |= {"LOCAL_WORLD_SIZE": ranks_each, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in places.items()}
        (tmp_path / str(machine)).mkdir(exist_ok=True)
        processes.append(
            subprocess.Popen(
                command(store, tmp_path / str(machine) / "run", config),
                env=environment,
                stderr=subprocess.PIPE,
            )
        )
    said = [process.communicate(timeout=200)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    assert said[0].count("finished after") == 1
    assert said[1:] == [""] * (len(processes) - 1)
    assert difference(tmp_path / "0" / "run", alone) < 1e-5
    assert not (tmp_path / "1" / "run").exists()


def test_scores_by_two_ranks_are_those_of_one(store, tmp_path):
    run = ep3stream.fit(store, tmp_path / "run", settings(solver={"epochs": 1}))
    scores = ep3stream.evaluate(run, store)
    assert ep3stream.evaluate(run, store, devices=2) == pytest.approx(scores, rel=1e-5)
    mine, theirs = (json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines())
    assert mine.keys() == theirs.keys()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_evaluation_on_two_ranks_at_once(store, tmp_path, monkeypatch, number):
    run = ep3stream.fit(store, tmp_path / "run", settings(solver={"epochs": 1}), kernel=endless)
    monkeypatch.setenv("EP3STREAM_TEST_RUN", str(run))
    program = (
        "import sys, ep3stream; from rank_kernels import endless\n"
        "try: ep3stream.evaluate(*sys.argv[1:], kernel=endless, devices=2)\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, run, store], cwd=Path(__file__).parent)
    deadline = time.monotonic() + 200
    while not (run / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(250) == 130
    assert time.monotonic() - began < 40  # Less than a block takes.


@pytest.mark.slow
def test_predictions_by_two_ranks_are_those_of_one(store, tmp_path):
    run = ep3stream.fit(store, tmp_path / "run", settings(solver={"epochs": 1}))
    n_rows = ep3stream.predict(run, store, tmp_path / "one.npy")
    done = subprocess.run(
        [sys.executable, "-m", "ep3stream", "predict", run, store, tmp_path / "two.npy", "--devices", "2"],
        capture_output=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert f"{n_rows} predictions in" in done.stderr.decode()
    one, two = (np.load(tmp_path / name) for name in ("one.npy", "two.npy"))
    assert np.abs(one - two).max() < 1e-4 * np.abs(one).max()
