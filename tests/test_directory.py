"""The run directory: who may write in it, and which settings it holds to."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ep3stream.config import FitConfig
from ep3stream.errors import ConfigError, InputError
from ep3stream.run.bundle import write_bundle
from ep3stream.run.directory import SETUP_KIND, RunDirectory


def settings(**tables) -> FitConfig:
    return FitConfig().with_settings(tables, "test")


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    with directory.locked():
        directory.settle_config(settings(solver={"epochs": 2}))
    return directory


def made(run: RunDirectory, **choices) -> None:
    """Makes a set-up, as far as settings are compared with it."""
    description = {"plan": {"kernel": "laplacian"}, "choices": choices}
    write_bundle(run.setup, SETUP_KIND, {"centers": torch.zeros(1)}, description)


def test_settings_are_kept_as_toml(run):
    assert run.read_config() == settings(solver={"epochs": 2})


def test_until_there_is_a_set_up_any_corrected_settings_replace_the_first(run):
    corrected = settings(solver={"centers": 10, "epochs": 1})
    assert run.settle_config(corrected) == ()
    assert run.read_config() == corrected


def test_once_there_is_a_set_up_settings_it_depends_on_may_not_change(run):
    made(run)
    with pytest.raises(ConfigError, match=r"solver\.centers was 'auto' and is now 10.*use a new RUN"):
        run.settle_config(settings(solver={"centers": 10, "epochs": 2}))
    assert run.read_config() == settings(solver={"epochs": 2})


@pytest.mark.parametrize("override", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"run": {"seed": 1}},
        {"run": {"memory_bytes": 1 << 30}},
        {"kernel": {"bandwidth": 2.0}},
        {"data": {"split": "test"}},
        {"solver": {"ridge": 0.1}},
        {"solver": {"class_weights": "balanced"}},
    ],
)
def test_what_has_gone_into_the_set_up_is_refused_by_name_whatever_is_said(run, change, override):
    made(run)
    ((table, values),) = change.items()
    name = f"{table}.{next(iter(values))}"
    with pytest.raises(ConfigError, match=rf"set-up is built: {name} was .*No --override changes these"):
        run.settle_config(settings(solver={"epochs": 2}).with_settings(change, "test"), override)


def test_an_override_of_what_each_step_reads_is_recorded_before_the_settings_are_replaced(run):
    made(run)
    changed = settings(solver={"epochs": 2, "momentum": 0.5, "patience": 4})
    with pytest.raises(ConfigError, match=r"momentum was 0\.9 and is now 0\.5; .*patience.*by --override"):
        run.settle_config(changed)
    changes = run.settle_config(changed, override=True)
    assert run.read_config().solver.momentum is None
    run.adopt_config(changed, changes, 14)
    assert run.read_config() == changed
    again = settings(solver={"epochs": 2, "momentum": 0.7, "patience": 4})
    run.adopt_config(again, run.settle_config(again, override=True), 21)
    assert run.read_overrides() == [
        {"step": 14, "setting": "solver.momentum", "from": 0.9, "to": 0.5},
        {"step": 14, "setting": "solver.patience", "from": 0, "to": 4},
        {"step": 21, "setting": "solver.momentum", "from": 0.5, "to": 0.7},
    ]


@pytest.mark.parametrize("text", ["", "[", "{}", "[1, null]", "[" * 100_000])
def test_a_damaged_record_of_overrides_is_taken_for_none(run, text):
    run.overrides.write_text(text)
    assert run.read_overrides() == []


@pytest.mark.parametrize(
    "change",
    [
        {"run": {"checkpoint_steps": 5}},
        {"run": {"checkpoint_minutes": 1.0}},
        {"run": {"keep_checkpoints": 7}},
        {"run": {"devices": 1}},
        {"run": {"dask": "tcp://other:8786"}},
        {"solver": {"epochs": 3}},
        {"solver": {"epochs": 1}},
    ],
)
def test_settings_that_do_not_change_the_path_of_the_fit_may_change(run, change):
    made(run)
    changed = settings(solver={"epochs": 2}).with_settings(change, "test")
    assert run.settle_config(changed) == ()
    run.adopt_config(changed, (), 0)
    assert run.read_config() == changed
    assert not run.overrides.exists()


@pytest.mark.parametrize("change", [{"data": {"validate": "other"}}, {"solver": {"validate_every": 0.5}}])
@pytest.mark.parametrize("patience", [0, 3])
def test_the_validations_which_decide_the_model_are_part_of_the_path(run, change, patience):
    started = settings(solver={"epochs": 2, "patience": patience}, data={"validate": "test"})
    run.settle_config(started)
    made(run)
    changed = started.with_settings(change, "test")
    with pytest.raises(ConfigError, match=r"(data\.validate|solver\.validate_every) was .*by --override"):
        run.settle_config(changed)
    assert run.settle_config(changed, override=True)


def test_a_setting_may_be_left_out_where_its_default_was_given_before(run):
    given = {"momentum": 0.9, "averaging": 3.0, "step": "measured"}
    run.settle_config(settings(solver={"epochs": 2, **given}, kernel={"name": "dispersal", "shape": 1.5}))
    made(run)
    run.settle_config(settings(solver={"epochs": 2}, kernel={"name": "dispersal"}))
    with pytest.raises(ConfigError, match=r"solver\.averaging was 3\.0 and is now 0\.0"):
        run.settle_config(settings(solver={"epochs": 2, "averaging": 0.0}, kernel={"name": "dispersal"}))


def test_the_same_settings_write_nothing(run):
    before = run.config.stat()
    run.settle_config(run.read_config())
    assert run.config.stat().st_ino == before.st_ino


def test_a_directory_of_somebody_else_is_left_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with (
        pytest.raises(InputError, match=r"not a run but holds 'thesis\.tex'"),
        RunDirectory(tmp_path).locked(),
    ):
        pass
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_killed_start_leaves_is_no_stranger(tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / ".config.toml.partial").touch()
    with RunDirectory(tmp_path).locked():
        pass


def test_settings_of_another_program_are_refused_by_file(tmp_path):
    (tmp_path / "config.toml").write_text("[server]\nport = 80\n")
    with pytest.raises(ConfigError, match=r"config\.toml has the unknown table \['server'\]"):
        RunDirectory(tmp_path).settle_config(FitConfig())


def test_a_held_directory_is_refused_with_the_holder_named(run):
    holder = rf"in use by process {os.getpid()} on {socket.gethostname()} since 20\d\d-.*\+00:00; wait for it"
    with run.locked(), pytest.raises(InputError, match=holder), run.locked():
        pass
    with run.locked():
        pass  # and free again afterwards
    assert (run.path / "lock").read_bytes() == b""


def test_a_fit_that_ends_by_an_exception_lets_go_too(run, caplog):
    with pytest.raises(ZeroDivisionError), run.locked():
        1 / 0  # noqa: B018
    with run.locked():
        pass
    assert not caplog.records


def test_the_lock_of_a_killed_process_is_taken_over_and_told_even_if_its_number_lives_again(tmp_path, caplog):
    code = (
        "import os, signal, sys; from pathlib import Path; from ep3stream.run.directory import RunDirectory\n"
        "context = RunDirectory(Path(sys.argv[1])).locked(); context.__enter__()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=250).returncode == -9
    lock = tmp_path / "lock"
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"pid": os.getpid()}))
    with RunDirectory(tmp_path).locked():
        pass
    assert f"was held by process {os.getpid()} on {socket.gethostname()}" in caplog.text


@pytest.mark.parametrize("content", [b"", b"process 7 on a", b"{", b"[]", b"\xff" * 5000, b"[" * 5000])
def test_whatever_a_lock_file_says_only_the_lock_counts(tmp_path, content):
    (tmp_path / "lock").write_bytes(content)
    with RunDirectory(tmp_path).locked():
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_directory_that_cannot_be_made_is_named(tmp_path, place):
    (tmp_path / "file").touch()
    path = tmp_path / place
    with pytest.raises(InputError, match=f"{path} cannot be made or written"), RunDirectory(path).locked():
        pass


def test_a_directory_without_settings_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"is no run: it is an empty directory; give the RUN of a fit"):
        RunDirectory(Path(tmp_path)).read_config()
