"""The run directory: who may write in it, and which settings it holds to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ep3stream.config import FitConfig
from ep3stream.errors import ConfigError, InputError
from ep3stream.run.directory import RunDirectory


def settings(**tables) -> FitConfig:
    return FitConfig().with_settings(tables, "test")


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    with directory.locked():
        directory.settle_config(settings(solver={"epochs": 2}))
    return directory


def test_settings_are_kept_as_toml(run):
    assert run.read_config() == settings(solver={"epochs": 2})


def test_until_there_is_a_set_up_any_corrected_settings_replace_the_first(run):
    corrected = settings(solver={"centers": 10, "epochs": 1})
    assert run.settle_config(corrected) == corrected
    assert run.read_config() == corrected


def test_once_there_is_a_set_up_settings_it_depends_on_may_not_change(run):
    run.setup.mkdir()
    with pytest.raises(ConfigError, match=r"solver\.centers was 'auto' and is now 10.*use a new RUN"):
        run.settle_config(settings(solver={"centers": 10, "epochs": 2}))
    assert run.read_config() == settings(solver={"epochs": 2})


def test_once_there_is_a_set_up_epochs_may_only_grow(run):
    run.setup.mkdir()
    with pytest.raises(ConfigError, match=r"epochs is 1 but .* started with 2; raise it"):
        run.settle_config(settings(solver={"epochs": 1}))
    run.settle_config(settings(solver={"epochs": 3}))
    assert run.read_config().solver.epochs == 3


@pytest.mark.parametrize(
    "change",
    [
        {"run": {"checkpoint_steps": 5}},
        {"run": {"checkpoint_minutes": 1.0}},
        {"run": {"keep_checkpoints": 7}},
        {"run": {"devices": 1}},
        {"run": {"dask": "tcp://other:8786"}},
        {"data": {"validate": "test"}},
        {"solver": {"validate_every": 0.5}},
    ],
)
def test_settings_that_do_not_change_the_path_of_the_fit_may_change(run, change):
    run.setup.mkdir()
    changed = settings(solver={"epochs": 2}).with_settings(change, "test")
    run.settle_config(changed)
    assert run.read_config() == changed


@pytest.mark.parametrize("change", [{"data": {"validate": "other"}}, {"solver": {"validate_every": 0.5}}])
def test_with_patience_the_validations_are_part_of_the_path(run, change):
    started = settings(solver={"epochs": 2, "patience": 3}, data={"validate": "test"})
    run.settle_config(started)
    run.setup.mkdir()
    with pytest.raises(ConfigError, match=r"(data\.validate|solver\.validate_every) was"):
        run.settle_config(started.with_settings(change, "test"))


def test_a_setting_may_be_left_out_where_its_default_was_given_before(run):
    given = {"momentum": 0.9, "averaging": 3.0, "step": "measured"}
    run.settle_config(settings(solver={"epochs": 2, **given}, kernel={"name": "dispersal", "shape": 1.5}))
    run.setup.mkdir()
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
    with run.locked(), pytest.raises(InputError, match=f"in use by process {os.getpid()} on"), run.locked():
        pass
    with run.locked():
        pass  # and free again afterwards


def test_the_lock_ends_with_the_process_that_held_it(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from ep3stream.run.directory import RunDirectory\n"
        "context = RunDirectory(Path(sys.argv[1])).locked(); context.__enter__(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == 9
    with RunDirectory(tmp_path).locked():
        pass


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_directory_that_cannot_be_made_is_named(tmp_path, place):
    (tmp_path / "file").touch()
    path = tmp_path / place
    with pytest.raises(InputError, match=f"{path} cannot be made or written"), RunDirectory(path).locked():
        pass


def test_a_directory_without_settings_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"not a run directory .*give the RUN of a fit"):
        RunDirectory(Path(tmp_path)).read_config()
