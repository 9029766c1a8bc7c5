"""What a fit does where its settings say nothing: kernel, centers, epochs and patience."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_stores import make_store
from test_fit import Stop, kill_at, model_bytes

import ep3stream
from ep3stream.config import FitConfig, KernelConfig, RunConfig, SolverConfig
from ep3stream.errors import ConfigError
from ep3stream.mesh import Mesh
from ep3stream.run.event_log import read_lines
from ep3stream.run.setup import Setup
from ep3stream.store.reader import open_store
from ep3stream.training.defaults import late_text, with_kernel
from ep3stream.training.set_up import set_up_split

pytestmark = pytest.mark.usefixtures("quick_columns")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """960 rows to train on: none are held out, and they are too few for time to matter."""
    return make_store(tmp_path_factory.mktemp("stores") / "rows.zarr", n_rows=1200, split="train=0.8,val=0.2")


@pytest.fixture(scope="module")
def run(store, tmp_path_factory) -> Path:
    return ep3stream.fit(store, tmp_path_factory.mktemp("runs") / "run")


def summary(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def test_with_no_option_kernel_centers_epochs_and_patience_are_chosen_and_recorded(store, run):
    choices = summary(run)["choices"]
    assert {name: choices[name] for name in ("kernel", "centers", "patience")} == {
        "kernel": "product",
        "centers": 200,
        "patience": 3,
    }
    assert 2 <= choices["epochs"] <= 10
    assert Setup.load(run / "setup").description["choices"] == choices
    assert FitConfig.from_toml((run / "config.toml").read_text(), "test") == FitConfig()
    assert ep3stream.evaluate(run, store, split="val")["r2"] > 0.95


def test_the_options_that_are_told_repeat_the_fit_to_the_byte(store, run, tmp_path):
    choices = summary(run)["choices"]
    solver = SolverConfig(centers=choices["centers"], epochs=choices["epochs"], patience=choices["patience"])
    again = ep3stream.fit(store, tmp_path / "run", FitConfig(solver=solver, run=RunConfig(minutes=0)))
    assert model_bytes(again)["tensors.safetensors"] == model_bytes(run)["tensors.safetensors"]


def test_a_killed_fit_goes_on_with_what_was_chosen_and_ends_with_the_same_bytes(
    store, run, tmp_path, monkeypatch
):
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", observe=kill_at(16))

    def never(*_, **__):
        raise AssertionError("the set-up was made again")

    monkeypatch.setattr("ep3stream.training.fit.write_setup", never)
    ep3stream.fit(store, tmp_path / "run")
    assert model_bytes(tmp_path / "run")["tensors.safetensors"] == model_bytes(run)["tensors.safetensors"]


def test_a_resumed_fit_may_say_what_was_chosen_and_goes_on_for_more_epochs(store, run, tmp_path):
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", observe=kill_at(16))
    choices = summary(tmp_path / "run")["choices"]
    said = FitConfig(kernel=KernelConfig("product"), solver=SolverConfig(centers=200, epochs=1))
    ep3stream.fit(store, tmp_path / "run", said)
    assert summary(tmp_path / "run")["choices"] == choices
    with pytest.raises(ConfigError, match=r"solver\.centers was 200 and is now 100"):
        ep3stream.fit(store, tmp_path / "run", replace(said, solver=replace(said.solver, centers=100)))
    with pytest.raises(ConfigError, match=r"run\.minutes was 2\.0 and is now 10"):
        ep3stream.fit(store, tmp_path / "run", FitConfig(run=RunConfig(minutes=10)))


def test_without_minutes_there_are_5000_centers_or_a_fifth_and_one_epoch(store, tmp_path):
    run = ep3stream.fit(store, tmp_path / "run", FitConfig(run=RunConfig(minutes=0)))
    with open_store(store) as rows:
        fifth = rows.split("train").info.n_rows // 5
    assert summary(run)["choices"] == {"kernel": "product", "centers": fifth, "epochs": 1, "patience": 0}


def set_up_by(clock, store, **solver) -> dict:
    config = FitConfig(kernel=KernelConfig("laplacian"), solver=SolverConfig(**solver))
    with open_store(store) as rows:
        mesh = Mesh.of_this_process(torch.device("cpu"))
        found = set_up_split(rows.split("train"), config, None, mesh, clock=clock).setup
    return found.description["choices"] | {"n_centers": found.plan.n_centers}


def ticking(seconds: float):
    """A clock that goes on by so many seconds whenever it is read."""
    return itertools.count(0, seconds).__next__


def test_a_slow_device_has_fewer_epochs_and_given_sizes_are_kept(store):
    # A step of 4 million evaluations takes as long as the clock ticks.
    assert set_up_by(ticking(0.001), store)["epochs"] == 10
    slow = set_up_by(ticking(10.0), store)
    assert (slow["n_centers"], slow["epochs"]) == (200, 10) or slow["epochs"] < 10
    very_slow = set_up_by(ticking(600.0), store)
    assert very_slow["epochs"] < 1
    given = set_up_by(ticking(60.0), store, centers=50)
    assert given["n_centers"] == 50
    assert "centers" not in given
    both = set_up_by(ticking(60.0), store, centers=50, epochs=3)
    assert "epochs" not in both
    assert "seconds_per_evaluation" not in both


def test_the_choice_is_told_in_one_line_with_the_options_that_repeat_it(store, run, tmp_path, caplog):
    caplog.set_level(logging.INFO, "ep3stream")
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", observe=kill_at(8))
    told = [line for line in caplog.messages if "minutes at most" in line]
    epochs = summary(tmp_path / "run")["choices"]["epochs"]
    assert len(told) == 1
    assert told[0].startswith(
        f"2 minutes at most: 200 centers, {epochs} epochs (--centers 200 --epochs {epochs} --patience 3 repeats it)"
    )


def test_validations_without_a_better_model_end_a_fit_whose_epochs_were_chosen(tmp_path):
    store = make_store(tmp_path / "rows.zarr", n_rows=1200, split="train=0.8,val=0.2")
    run = ep3stream.fit(store, tmp_path / "run")
    errors = [
        line["weighted_error"] for line in read_lines(run / "metrics.jsonl") if line["kind"] == "validation"
    ]
    assert len(errors) == summary(run)["choices"]["epochs"] or min(errors) == errors[-4]


@pytest.mark.parametrize(
    ("n_columns", "kernel", "precision", "name"),
    [
        (1000, KernelConfig(), "float32", "product"),
        (1001, KernelConfig(), "float32", "laplacian"),
        (7, KernelConfig(bandwidth=3.0), "float32", "laplacian"),
        (1200, KernelConfig(power=2.0), "float32", "product"),
        (7, KernelConfig(), "bfloat16", "laplacian"),
        (1001, KernelConfig(), "bfloat16", "laplacian"),
        (7, KernelConfig(bandwidth=3.0), "bfloat16", "laplacian"),
        (7, KernelConfig("gaussian"), "float32", "gaussian"),
    ],
)
def test_the_kernel_that_is_taken_by_default(n_columns, kernel, precision, name, caplog):
    config = FitConfig(kernel=kernel, solver=SolverConfig(precision=precision))
    settled = with_kernel(config, n_columns, 5000).kernel
    assert settled == replace(kernel, name=name)
    # Only a precision that takes the better kernel away by itself is told.
    is_told = "precision is bfloat16, which is for kernels of distances" in caplog.text
    assert is_told == (n_columns == 7 and precision == "bfloat16" and kernel == KernelConfig())


def test_of_few_rows_no_weights_are_learnt_by_default():
    assert with_kernel(FitConfig(), 7, 99).kernel.name == "laplacian"


def test_auto_takes_no_parameter_of_another_kernel():
    with pytest.raises(ConfigError, match="degree is 3, which the auto kernel does not have"):
        KernelConfig(degree=3)


def test_a_plan_shows_the_same_sizes(store, run):
    plan = ep3stream.plan(store)
    choices = summary(run)["choices"]
    assert plan.sizes.n_centers == choices["centers"]
    assert 1 <= plan.epochs <= 10


@pytest.mark.parametrize("kernel", ["auto", KernelConfig()])
def test_models_that_know_no_columns_want_a_kernel_by_name(kernel):
    with pytest.raises(ConfigError, match="kernel is 'auto', which `fit` and the estimators choose"):
        ep3stream.KernelModel(torch.zeros(5, 3), kernel)


@pytest.mark.parametrize(
    ("spent_s", "told"), [(20, None), (90, None), (110, "some 158 s"), (400, "some 448 s")]
)
def test_a_set_up_that_leaves_no_chance_to_end_in_time_is_told(spent_s, told):
    found = late_text(FitConfig(), spent_s)
    assert (found is None) == (told is None)
    if found is not None:
        assert f"takes {spent_s} s of the 120 s" in found
        assert told in found
