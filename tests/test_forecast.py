"""`ep3stream plan` tells what a fit will take, and `fit` keeps to it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_stores import make_store, plain_config

import ep3stream
from ep3stream.cli import main
from ep3stream.config import FitConfig
from ep3stream.planning import pilot as pilot_run
from ep3stream.planning.forecast import FitPlan, describe_plan
from ep3stream.training import plan as machine
from ep3stream.training.plan import ProblemSize, SizePlan, largest_model


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("plan") / "smooth.zarr")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot_run, "_STEP_FOR_S", 0.01)


def settings(run: dict[str, Any] | None = None, **solver: Any) -> FitConfig:
    changes = {"solver": {"centers": 100, "batch_size": 64, "epochs": 2} | solver, "run": run or {}}
    return plain_config(**changes)


def test_a_fit_takes_the_steps_and_the_memory_that_were_planned(store: Path, tmp_path: Path) -> None:
    planned = ep3stream.plan(store, settings())
    run = ep3stream.fit(store, tmp_path / "run", settings())
    done = json.loads((run / "run.json").read_text())["plan"]
    assert planned.n_steps == done["n_steps"]
    assert planned.memory == done["memory"]
    assert planned.sizes.batch_size == done["batch_size"]
    assert planned.sizes.model_rank == done["model_rank"]


@pytest.mark.parametrize("projection", ["nystrom", "exact", "eigenpro"])
def test_times_are_told_for_every_projection(store: Path, projection: str) -> None:
    planned = ep3stream.plan(store, settings(projection=projection))
    expected = planned.expected
    assert expected is not None
    assert 0 < expected.setup_s < 60
    assert expected.fit_s == pytest.approx(planned.n_steps * expected.step_s)
    assert 0 <= expected.starved < 1
    assert json.loads(json.dumps(planned.as_json()))["sizes"]["projection"] == projection


def test_a_callable_kernel_and_classes_are_planned_too(tmp_path: Path) -> None:
    classes = make_store(tmp_path / "classes.zarr", task="classification")

    def linear(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return 1 + z @ x.T

    planned = ep3stream.plan(classes, settings(batch_size=0), kernel=linear)
    assert planned.sizes.n_outputs == 3
    assert planned.sizes.batch_size <= 64  # Of 1200 rows, an epoch has 32 steps.


def test_without_measuring_no_row_is_read(store: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.zarr"
    shutil.copytree(store, bare)
    for chunk in (bare / "train" / "x" / "c").iterdir():
        shutil.rmtree(chunk)
    planned = ep3stream.plan(bare, settings(), measure=False)
    assert planned.expected is None
    assert planned.n_steps == ep3stream.plan(store, settings()).n_steps
    with pytest.raises(ep3stream.DamagedDataError):
        ep3stream.plan(bare, settings())


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("projection", ["nystrom", "exact", "eigenpro"])
def test_the_largest_model_fits_and_one_center_more_does_not(projection: Any, devices: int) -> None:
    shape, memory = ProblemSize(10**9, 9, 1, 400_000, 40, True), 10**9
    solver = FitConfig().solver
    solver = replace(solver, projection=projection)
    most = largest_model(shape, solver, memory, devices)
    assert sum(SizePlan.of(shape, solver, most, memory, devices).memory.values()) <= memory
    with pytest.raises(ep3stream.ConfigError, match=f"or use at most {most} centers"):
        SizePlan.of(shape, solver, most + 1, memory, devices)


def test_devices_share_the_basis_and_the_steps_but_not_the_read_ahead(store: Path) -> None:
    one, four = (ep3stream.plan(store, settings(), devices=n, link_bytes_per_s=1e9) for n in (1, 4))
    assert four.memory["Nystrom basis"] == one.memory["Nystrom basis"] // 4
    assert four.memory["read-ahead"] == one.memory["read-ahead"]
    assert four.largest_centers >= one.largest_centers
    assert one.reduced_bytes == 0
    assert four.sizes.group_size == 100  # One group, on all four.
    assert four.reduced_bytes == four.n_steps * 4 * 2 * (64 + 3 * four.sizes.model_rank + 2 * 100)


def test_plan_and_fit_refuse_what_does_not_fit_with_the_same_words(store: Path, tmp_path: Path) -> None:
    small = settings({"memory_bytes": 10**6})
    with pytest.raises(
        ep3stream.ConfigError, match=r"memory is 1\.0 MB but 100 centers .* give --memory"
    ) as plan:
        ep3stream.plan(store, small)
    with pytest.raises(ep3stream.ConfigError) as fit:
        ep3stream.fit(store, tmp_path / "run", small)
    assert str(plan.value) == str(fit.value)


def test_a_machine_smaller_than_the_budget_is_told_with_what_fits_it(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "machine_bytes", lambda device: 400_000)
    message = r"memory allows the 2\.\d MB that 100 centers .* a device has only 0\.4 MB here; use at most \d+ centers"
    for call in (
        lambda: ep3stream.plan(store, settings()),
        lambda: ep3stream.fit(store, tmp_path / "run", settings()),
    ):
        with pytest.raises(ep3stream.ConfigError, match=message):
            call()


def test_the_command_tells_it_in_words_and_as_json(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(store), "--centers", "100", "--batch-size", "64"]
    assert main(command) == 0
    words = capsys.readouterr().out
    for part in (
        "100 centers, projection nystrom",
        "batches of 64 rows",
        "Nystrom basis",
        "the largest model",
    ):
        assert part in words
    assert "is the limit" in words
    assert main([*command, "--json", "--no-measure"]) == 0
    assert json.loads(capsys.readouterr().out)["expected"] is None
    assert main([*command, "--memory", "1MB"]) == 2
    assert "give --memory" in capsys.readouterr().err


def test_words_name_the_limit_and_the_links(store: Path) -> None:
    planned = ep3stream.plan(store, settings(), devices=4)
    assert planned.expected is not None

    def told(**changes: Any) -> str:
        return describe_plan(replace(planned, expected=replace(planned.expected, **changes)))

    assert "memory on each of 4 devices" in told()
    assert "whose --link-gb-per-s is not given" in told()
    assert "not given" not in told(link_bytes_per_s=1e9)
    assert "faster storage or rows of fewer bytes would help" in told(limit="reading", starved=0.6)
    assert "starved 60%" in told(limit="reading", starved=0.6)
    assert isinstance(planned, FitPlan)


def test_words_tell_the_memory_of_the_host_where_the_device_is_a_gpu(store: Path) -> None:
    planned = ep3stream.plan(store, settings(), measure=False)
    assert "host" not in describe_plan(planned)
    on_gpu = replace(planned, host_bytes=40_000_000, host_memory_bytes=10**9)
    told = "rows read ahead take 40.0 MB of the host's memory, of 1.0 GB allowed by --host-memory"
    assert told in describe_plan(on_gpu).splitlines()
    assert "allowed by --memory, in a GPU of" in describe_plan(on_gpu)
