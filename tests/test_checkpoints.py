"""The life of a checkpoint: written in the background, on disks that refuse it, on request, and at every kill."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_problem import ONE_RANK
from small_stores import PLAIN_OPTIONS, make_store, plain_config

import ep3stream
from ep3stream import cli, disk
from ep3stream.config import FitConfig, RunConfig
from ep3stream.errors import ConfigError, DamagedDataError, DiskError, InputError, Interrupted
from ep3stream.run.checkpoint import Progress, load_checkpoint, load_newest_checkpoint
from ep3stream.run.checkpoint import save_checkpoint as save
from ep3stream.run.event_log import read_lines
from ep3stream.run.state import list_checkpoints
from ep3stream.solver.guard import Guard
from ep3stream.solver.step import SolverState
from ep3stream.training.checkpoint_saver import CheckpointSaver

CPU = torch.device("cpu")
SMALL = {
    "solver": {"centers": 100, "model_rank": 30, "batch_size": 32, "epochs": 2},
    "run": {"checkpoint_steps": 7},
}


def settings(**changes) -> FitConfig:
    return plain_config(**SMALL).with_settings(changes, "test")


def progress_at(step: int, value: float = 1.0, shape: tuple[int, int] = (2, 3)) -> Progress:
    state = SolverState(*(torch.full(shape, value + k) for k in range(3)), averaged=step)
    return Progress(step, state, Guard.start(state, 0.5), [0.1])


def steps(directory: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(directory)]


def events(run: Path, name: str) -> list[dict]:
    return [line for line in read_lines(run / "metrics.jsonl") if line.get("event") == name]


def model_bytes(run: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in sorted((run / "model").iterdir())}


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "smooth.zarr")


@pytest.fixture(scope="module")
def reference(store, tmp_path_factory) -> Path:
    return ep3stream.fit(store, tmp_path_factory.mktemp("runs") / "reference", settings())


@pytest.fixture
def told() -> list[tuple[str, int]]:
    return []


@pytest.fixture
def saver(tmp_path, told) -> CheckpointSaver:
    def tell(event, progress, message):
        told.append((event, progress.step))

    return CheckpointSaver(tmp_path, "digest", RunConfig(checkpoint_steps=5), 0, tell, 3, ONE_RANK)


class SlowDisk:
    """Waits in every `sync` until it is let go."""

    def __init__(self, monkeypatch) -> None:
        self.is_entered, self.may_go = threading.Event(), threading.Event()
        sound = disk.sync

        def sync(path):
            self.is_entered.set()
            assert self.may_go.wait(30)
            sound(path)

        monkeypatch.setattr(disk, "sync", sync)


def test_a_snapshot_keeps_what_the_next_steps_change():
    progress = progress_at(7)
    snapshot = progress.snapshot()
    for tensor in progress.state.tensors().values():
        tensor.zero_()
    progress.unseen_losses.append(9.0)
    progress.guard.step_size /= 2
    progress.state.averaged = progress.step = 8
    assert (snapshot.step, snapshot.state.averaged, snapshot.unseen_losses) == (7, 7, [0.1])
    assert snapshot.guard.step_size == 0.5
    assert [float(tensor[0, 0]) for tensor in snapshot.state.tensors().values()] == [1.0, 2.0, 3.0]


def test_a_slow_disk_holds_up_no_step_and_has_one_checkpoint_at_a_time(saver, told, tmp_path, monkeypatch):
    slow = SlowDisk(monkeypatch)
    with saver:
        progress = progress_at(5)
        began = time.perf_counter()
        saver.begin(progress)
        begun_s = time.perf_counter() - began
        assert slow.is_entered.wait(30)
        progress.state.weights.fill_(99)  # The fit steps on.
        assert not saver.is_idle()
        assert told == []
        slow.may_go.set()
        while not saver.is_idle():
            time.sleep(0.001)
    assert told == [("checkpoint", 5)]
    assert float(load_newest_checkpoint(tmp_path, "digest", CPU).state.weights[0, 0]) == 1.0
    assert 0 < progress.stalled_s <= begun_s


def test_a_checkpoint_is_due_so_many_steps_after_the_last_try(saver, monkeypatch):
    monkeypatch.setattr(disk, "write", refuse(errno.ENOSPC))
    with saver:
        assert not saver.is_due(4)
        assert saver.is_due(5)
        saver.begin(progress_at(6))
        assert not saver.is_due(10)
        assert saver.is_due(11)


def test_leaving_waits_for_the_checkpoint_under_way_and_leaves_no_thread(saver, told, tmp_path):
    with saver:
        saver.begin(progress_at(5))
    assert told == [("checkpoint", 5)]
    assert steps(tmp_path) == [5]
    assert not [thread for thread in threading.enumerate() if thread.name == "ep3stream-checkpoint"]


def test_one_who_wants_to_leave_at_once_does_not_wait_for_it(saver, told, monkeypatch):
    slow = SlowDisk(monkeypatch)
    saver.begin(progress_at(5))
    saver.__exit__(KeyboardInterrupt)
    assert told == []
    slow.may_go.set()


def test_a_bug_in_the_writing_thread_is_raised_and_not_taken_for_the_disk(saver, monkeypatch):
    monkeypatch.setattr(disk, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), saver:
        saver.save(progress_at(5))


def refuse(number: int):
    def operation(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return operation


@pytest.mark.parametrize("name", [name for name in disk.OPERATIONS if name != "remove"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_costs_that_checkpoint_and_never_the_last_one(
    saver, told, tmp_path, name, number
):
    with saver:
        saver.save(progress_at(5))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(disk, name, refuse(number))
            message = rf"step-000000000006 .*{os.strerror(number)}.*needs 0\.0 MB.*the same command goes on from step 5"
            with pytest.raises(DiskError, match=message):
                saver.save(progress_at(6))
        assert load_newest_checkpoint(tmp_path, "digest", CPU).step == 5 or name == "sync"
        saver.save(progress_at(7))
    assert told == [("checkpoint", 5), ("checkpoint_failed", 6), ("checkpoint", 7)]
    assert steps(tmp_path)[0] == 7
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_that_does_not_read_back_is_removed_and_those_before_it_stay(
    saver, told, tmp_path, monkeypatch
):
    with saver:
        saver.save(progress_at(5))
        saver.save(progress_at(6))
        sound = disk.rename

        def rename(source, target):
            sound(source, target)
            if target.name == "step-000000000007":
                damage(target / "tensors.safetensors")

        monkeypatch.setattr(disk, "rename", rename)
        with pytest.raises(DamagedDataError, match=r"step-000000000007.*damaged.*goes on from step 6"):
            saver.save(progress_at(7))
    assert steps(tmp_path) == [6, 5]
    assert told[-1] == ("checkpoint_failed", 7)


def test_the_bytes_needed_are_named_before_any_is_written(saver, tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    monkeypatch.setattr(disk, "write", lambda *_: pytest.fail("written"))
    with saver, pytest.raises(DiskError, match=r"1\.0 MB are free.*it needs 2\.0 MB: free space"):
        saver.save(progress_at(5, shape=(100, 1000)))


def test_damaged_checkpoints_beyond_the_sound_one_never_push_it_out(tmp_path):
    for step in (7, 14, 21):
        save(tmp_path, progress_at(step), "digest", 3)
    for step, path in list_checkpoints(tmp_path):
        if step > 7:
            damage(path / "tensors.safetensors")
    assert load_newest_checkpoint(tmp_path, "digest", CPU).step == 7
    save(tmp_path, progress_at(9), "digest", 2)
    assert steps(tmp_path) == [9, 7]


def test_a_checkpoint_removed_while_it_is_read_is_passed_over_for_the_newer_one(
    tmp_path, monkeypatch, caplog
):
    save(tmp_path, progress_at(7), "digest", 1)

    def overtaken(path, *arguments):
        if path.name == "step-000000000007":
            save(tmp_path, progress_at(14), "digest", 1)
        return load_checkpoint(path, *arguments)

    monkeypatch.setattr("ep3stream.run.checkpoint.load_checkpoint", overtaken)
    assert load_newest_checkpoint(tmp_path, "digest", CPU).step == 14
    assert not caplog.records


def test_a_fit_on_a_disk_full_for_a_while_goes_on_says_so_and_ends_the_same(
    store, reference, tmp_path, caplog, monkeypatch
):
    run = tmp_path / "run"

    def observe(progress):
        if progress.step == 16:
            wait_for(lambda: steps(run / "checkpoints"))
            monkeypatch.setattr(disk, "write", refuse(errno.ENOSPC))
            monkeypatch.setattr("ep3stream.run.event_log.open", refuse(errno.ENOSPC), raising=False)
        wait_for(lambda: not any(thread.name == "ep3stream-checkpoint" for thread in threading.enumerate()))
        if progress.step >= 48 and "no checkpoint of step" in caplog.text:
            monkeypatch.undo()

    ep3stream.fit(store, run, settings(), observe=observe)
    assert model_bytes(run) == model_bytes(reference)
    assert "No space left on device" in caplog.text
    assert caplog.text.count("lines are missing from now on") == 1
    assert "no checkpoint of step" in caplog.text


def test_when_the_last_checkpoint_cannot_be_written_the_error_says_from_where_the_run_goes_on(
    store, reference, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(disk, "write", until(72, run, disk.write))
        with pytest.raises(
            DiskError, match=r"step-000000000072 .*needs.*; the same command goes on from step \d+"
        ) as raised:
            ep3stream.fit(store, run, settings())
    assert raised.value.exit_code == 2
    assert not (run / "model").exists()
    failed = events(run, "checkpoint_failed")
    assert [line["step"] for line in failed] == [72]
    ep3stream.fit(store, run, settings())
    assert model_bytes(run) == model_bytes(reference)


def until(step: int, run: Path, sound):
    """An operation that the disk refuses once it is about the checkpoint of `step`."""

    def operation(path, *arguments):
        if f"step-{step:012d}" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return sound(path, *arguments)

    return operation


def test_a_signal_on_a_full_disk_is_an_error_and_no_promise(store, tmp_path, monkeypatch):
    def observe(progress):
        if progress.step == 16:
            monkeypatch.setattr(disk, "write", refuse(errno.ENOSPC))
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(DiskError, match="goes on from step"):
        ep3stream.fit(store, tmp_path / "run", settings(), observe=observe)


def test_sigusr1_saves_a_checkpoint_and_the_fit_goes_on(store, reference, tmp_path):
    def observe(progress):
        if progress.step == 16:
            os.kill(os.getpid(), signal.SIGUSR1)

    run = ep3stream.fit(store, tmp_path / "run", settings(run={"checkpoint_steps": 0}), observe=observe)
    assert [line["step"] for line in events(run, "checkpoint")] == [16, 72]
    assert model_bytes(run) == model_bytes(reference)


def test_a_second_sigint_stops_at_once_and_saves_nothing(store, reference, tmp_path):
    def observe(progress):
        if progress.step == 16:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    config = settings(run={"checkpoint_steps": 0})
    with pytest.raises(
        KeyboardInterrupt, match="nothing was saved since the last checkpoint; the same command"
    ):
        ep3stream.fit(store, tmp_path / "run", config, observe=observe)
    assert steps(tmp_path / "run/checkpoints") == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    ep3stream.fit(store, tmp_path / "run", config)
    assert model_bytes(tmp_path / "run") == model_bytes(reference)


def test_two_signals_do_not_save_twice_and_sigterm_never_interrupts_a_save(store, tmp_path):
    def observe(progress):
        if progress.step == 16:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match="SIGTERM: stopped at step 16"):
        ep3stream.fit(store, tmp_path / "run", settings(run={"checkpoint_steps": 0}), observe=observe)
    assert steps(tmp_path / "run/checkpoints") == [16]


def stopped_at(step: int, store: Path, run: Path, config: FitConfig, **options) -> None:
    def observe(progress):
        if progress.step >= step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        ep3stream.fit(store, run, config, observe=observe, **options)


def test_an_override_is_recorded_shown_and_resumed_from_without_another_word(store, tmp_path, capsys):
    changed = settings(solver={"momentum": 0.5})
    for kills in ((), (40,)):
        run = tmp_path / f"run{len(kills)}"
        stopped_at(16, store, run, settings())
        with pytest.raises(ConfigError, match=r"momentum was 0\.9 and is now 0\.5.*--override"):
            ep3stream.fit(store, run, changed)
        for number, step in enumerate(kills):
            stopped_at(step, store, run, changed, override=number == 0)
        ep3stream.fit(store, run, changed, override=not kills)
        assert ep3stream.inspect(run)["overrides"] == [
            {"step": 16, "setting": "solver.momentum", "from": 0.9, "to": 0.5}
        ]
    assert model_bytes(tmp_path / "run0") == model_bytes(tmp_path / "run1")
    assert [line["step"] for line in events(run, "override")] == [16]
    assert cli.main(["inspect", str(run)]) == 0
    assert "override at step 16: solver.momentum from 0.9 to 0.5" in capsys.readouterr().out


def test_validations_taken_back_give_the_model_of_the_end_again(store, reference, tmp_path):
    run = tmp_path / "run"
    patient = settings(data={"validate": "test"}, solver={"patience": 5, "validate_every": 0.25})
    stopped_at(24, store, run, patient)
    ep3stream.fit(store, run, settings(), override=True)
    assert model_bytes(run)["tensors.safetensors"] == model_bytes(reference)["tensors.safetensors"]


def test_changed_data_is_refused_whatever_is_overridden(store, tmp_path):
    stopped_at(16, store, tmp_path / "run", settings())
    other = make_store(tmp_path / "other.zarr", n_rows=1400)
    with pytest.raises(InputError, match=r"is not the store .*no --override changes the data"):
        ep3stream.fit(other, tmp_path / "run", settings(solver={"momentum": 0.5}), override=True)
    assert not (tmp_path / "run/overrides.json").exists()


def test_inspect_tells_the_state_of_each_checkpoint_and_verify_exits_with_3(store, tmp_path, capsys):
    run = tmp_path / "run"
    stopped_at(16, store, run, settings())
    stopped_at(40, store, run, settings())
    newest, before = list_checkpoints(run / "checkpoints")
    damage(newest[1] / "tensors.safetensors")
    found = ep3stream.inspect(run)["checkpoints"]
    assert [(item["step"], item["state"][:9]) for item in found] == [
        (40, "damaged: "),
        (before[0], "verified"),
    ]
    assert cli.main(["inspect", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"checkpoint at step {before[0]}, " in out
    assert f"damaged: {newest[1]}/tensors.safetensors is damaged" in out
    assert cli.main(["verify", str(run)]) == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{newest[1]}/tensors.safetensors is damaged")


def test_a_running_fit_is_inspected_verified_and_used_without_its_lock(store, tmp_path):
    run, seen = tmp_path / "run", []

    def observe(progress):
        wait_for(lambda: steps(run / "checkpoints"))
        if progress.step == 40:
            seen.append(ep3stream.inspect(run))
            assert ep3stream.verify(run) == []
            assert ep3stream.evaluate(run, store)["r2"] > 0

    ep3stream.fit(store, run, settings(), observe=observe)
    (content,) = seen
    assert not content["finished"]
    assert {item["state"] for item in content["checkpoints"]} == {"verified"}
    assert content["last_step"]["stalled_s"] > 0


def test_a_checkpoint_that_a_running_fit_removes_meanwhile_is_neither_listed_nor_damaged(
    store, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    stopped_at(16, store, run, settings())
    stopped_at(40, store, run, settings())
    newest, before = list_checkpoints(run / "checkpoints")

    def overtaken(path, *arguments):
        shutil.rmtree(before[1], ignore_errors=True)
        return load_checkpoint(path, *arguments)

    monkeypatch.setattr("ep3stream.run.checkpoint.load_checkpoint", overtaken)
    assert [item["step"] for item in ep3stream.inspect(run)["checkpoints"]] == [newest[0]]
    before[1].mkdir()
    assert ep3stream.verify(run) == []


# Kills the process before its nth operation on the disk, or on a checkpoint if `only` says so.
KILLER = """
import os, signal, sys
from ep3stream import cli
from ep3stream import disk

left = int(sys.argv[1])

def mortal(operation):
    def operate(path, *arguments):
        global left
        left -= "checkpoints" in str(path)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(path, *arguments)
    return operate

for name in disk.OPERATIONS:
    setattr(disk, name, mortal(getattr(disk, name)))
sys.exit(cli.main(sys.argv[2:]))
"""


def test_fits_killed_between_operations_of_the_protocol_end_with_the_same_bytes(store, reference, tmp_path):
    (tmp_path / "settings.toml").write_text(settings().to_toml())
    fit = ["--quiet", "fit", str(store), str(tmp_path / "run"), "--config", str(tmp_path / "settings.toml")]
    for left in (9, 14):
        command = [sys.executable, "-c", KILLER, str(left), *fit]
        assert subprocess.run(command, timeout=250).returncode == -signal.SIGKILL
        assert not (tmp_path / "run/model").exists()
    ep3stream.fit(store, tmp_path / "run", settings())
    assert model_bytes(tmp_path / "run") == model_bytes(reference)
    assert ep3stream.verify(tmp_path / "run") == []


def test_kills_at_every_operation_of_one_save_leave_a_sound_checkpoint(tmp_path):
    class Killed(BaseException):
        pass

    def killing(left):
        def mortal(operation):
            def operate(*arguments):
                nonlocal left
                left -= 1
                if left == 0:
                    raise Killed
                return operation(*arguments)

            return operate

        return mortal

    sound = {name: getattr(disk, name) for name in disk.OPERATIONS}
    found, left, is_done = [], 0, False
    while not is_done:
        left += 1
        directory = tmp_path / str(left)
        save(directory, progress_at(7), "digest", 1)
        mortal = killing(left)
        with pytest.MonkeyPatch.context() as patched:
            for name, operation in sound.items():
                patched.setattr(disk, name, mortal(operation))
            try:
                save(directory, progress_at(14), "digest", 1)
                is_done = True
            except Killed:
                pass
        found.append(load_newest_checkpoint(directory, "digest", CPU).step)
        assert all(load_checkpoint(path, "digest", CPU) for _, path in list_checkpoints(directory))
        save(directory, progress_at(21), "digest", 1)
        assert [item.name for item in directory.iterdir()] == ["step-000000000021"]
    assert found == sorted(found)
    assert set(found) == {7, 14}
    assert len(found) > 12


# Its disk hangs as soon as there is a checkpoint to write.
HANGING = """
import sys, time
from ep3stream import cli
from ep3stream import disk

def write(path, pieces):
    if "checkpoints" in str(path):
        print("hangs", flush=True)
        time.sleep(1000)
    sound(path, pieces)

sound, disk.write = disk.write, write
sys.exit(cli.main(sys.argv[1:]))
"""


def test_the_second_ctrl_c_ends_the_command_at_once_with_130_even_if_the_disk_hangs(store, tmp_path):
    options = ["--centers", "100", "--batch-size", "32", "--epochs", "100000", "--checkpoint-minutes", "0"]
    fit = ["--quiet", "fit", str(store), str(tmp_path / "run"), *PLAIN_OPTIONS, *options]
    process = subprocess.Popen([sys.executable, "-c", HANGING, *fit], stdout=-1, stderr=-1, text=True)
    wait_for(lambda: read_lines(tmp_path / "run/metrics.jsonl"))
    holder = json.loads((tmp_path / "run/lock").read_text())
    assert (holder["pid"], holder["host"]) == (process.pid, socket.gethostname())
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "hangs\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=250)
    assert process.returncode == 130
    assert err.splitlines() == [
        "ep3stream: interrupted; nothing was saved since the last checkpoint; the same command goes on from it"
    ]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 200
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()
