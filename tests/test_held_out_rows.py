"""Rows that a fit holds out of its training by itself, to be validated on."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_stores import make_store
from test_fit import Stop, kill_at, model_bytes, settings

import ep3stream
from ep3stream.config import FitConfig
from ep3stream.errors import ConfigError, DamagedDataError
from ep3stream.mesh import Mesh
from ep3stream.run.bundle import read_bundle, write_bundle
from ep3stream.run.directory import SETUP_KIND
from ep3stream.run.event_log import read_lines
from ep3stream.run.setup import Setup
from ep3stream.store.reader import SplitReader, open_store
from ep3stream.stream.order import sample_rows
from ep3stream.training.set_up import set_up_split
from ep3stream.training.validation import ValidationRows

pytestmark = pytest.mark.usefixtures("quick_columns")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "smooth.zarr", split="train=0.8,test=0.2")


def plain(**changes) -> FitConfig:
    return settings(data={"validate": "auto"}).with_settings(changes, "test")


def validations(run: Path) -> list[dict]:
    return [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "validation"]


def held_of(run: Path) -> np.ndarray:
    return Setup.load(run / "setup").tensors["held_rows"].numpy()


@pytest.fixture(scope="module")
def run(store, tmp_path_factory) -> Path:
    return ep3stream.fit(store, tmp_path_factory.mktemp("runs") / "run", plain())


def test_a_tenth_of_the_rows_is_held_out_and_neither_trained_on_nor_drawn(store, run):
    with open_store(store) as rows:
        info = rows.split("train").info
    setup, held = Setup.load(run / "setup"), held_of(run)
    assert len(held) == info.n_rows // 10
    order = setup.order(info, 0)
    segments = order.segments(0)
    seen = [
        window[rows // info.segment_rows] * info.segment_rows + rows % info.segment_rows
        for index in range(order.n_windows)
        for window in [order.window(segments, index)]
        for rows in [order.window_rows(0, index, window)]
    ]
    assert not np.isin(np.concatenate(seen), held).any()
    assert order.epoch_rows == info.n_rows - len(held) - setup.plan.n_centers


@pytest.mark.parametrize("kernel", ["laplacian", "product"])
@pytest.mark.parametrize("centers", [300, "kmeans:40", "auto"])
@pytest.mark.parametrize("keeps_centers", [False, True])
def test_the_set_up_reads_no_row_that_is_held_out(store, monkeypatch, kernel, centers, keeps_centers):
    read, original = [], SplitReader.read_rows

    def noted(reader, rows):
        read.append(rows)
        return original(reader, rows)

    monkeypatch.setattr(SplitReader, "read_rows", noted)
    changes = {"kernel": {"name": kernel}, "data": {"keep_center_rows": keeps_centers}}
    config = plain(solver={"centers": centers}, **changes)
    with open_store(store) as rows:
        chosen, split = ValidationRows.of(config, rows.manifest), rows.split("train")
        held = chosen.held_rows(split.info, config.run.seed)
        mesh = Mesh.of_this_process(torch.device("cpu"))
        setup = set_up_split(split, config, None, mesh, chosen).setup
    assert len(held)
    assert not np.isin(np.concatenate(read), held).any()
    assert np.isin(held, setup.tensors["excluded_rows"].numpy()).all()


def test_the_scores_are_those_of_the_rows_held_out(store, run):
    with open_store(store) as rows:
        x, y = rows.split("train").read_rows(held_of(run))
    expected = float(np.mean((ep3stream.load(run).predict(x) - y) ** 2))
    last = validations(run)[-1]
    assert (last["n"], last["split"]) == (len(x), "train, held out")
    assert last["mse"] == pytest.approx(expected, rel=1e-5)


def test_it_is_told_in_one_line_with_the_remedy_and_recorded(store, run, tmp_path, caplog):
    caplog.set_level(logging.INFO, "ep3stream")
    ep3stream.fit(store, tmp_path / "run", plain())
    n_held = len(held_of(run))
    told = f"{n_held:,} rows of train are held out for validation; --validate none to train on all"
    assert caplog.messages.count(told) == 1
    assert Setup.load(run / "setup").description["validation"] == {"split": "train", "n_held": n_held}
    assert FitConfig.from_toml((run / "config.toml").read_text(), "test").data.validate == "auto"


def test_another_seed_holds_out_other_rows(store, run, tmp_path):
    other = ep3stream.fit(store, tmp_path / "run", plain(run={"seed": 1}))
    shared = np.isin(held_of(other), held_of(run)).mean()
    assert shared < 0.5


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_a_split_that_is_there_for_it_is_validated_instead(tmp_path, name):
    store = make_store(tmp_path / "rows.zarr", split=f"train=0.8,{name}=0.1,test=0.1")
    run = ep3stream.fit(store, tmp_path / "run", plain())
    assert validations(run)[-1]["split"] == name
    assert "held_rows" not in Setup.load(run / "setup").tensors
    named = ep3stream.fit(store, tmp_path / "named", plain(data={"validate": name}))
    assert model_bytes(named)["tensors.safetensors"] == model_bytes(run)["tensors.safetensors"]


@pytest.mark.parametrize(("n_rows", "n_held"), [(999, 0), (1000, 100), (199_999, 19_999), (10**6, 20_000)])
def test_few_rows_are_all_trained_on_and_of_many_20000_are_held_out(store, n_rows, n_held):
    with open_store(store) as rows:
        manifest = rows.manifest
    splits = {"train": replace(manifest.splits["train"], n_rows=n_rows), "test": manifest.splits["test"]}
    chosen = ValidationRows.of(FitConfig(), replace(manifest, splits=splits))
    assert chosen == ValidationRows("train" if n_held else None, n_held)


def test_validate_none_trains_on_all_rows_as_none_did_in_python(store, tmp_path):
    for name, value in (("none", "none"), ("python", None)):
        config = FitConfig(data=ep3stream.DataConfig(validate=value)).with_settings(
            {"solver": {"centers": 100}, "kernel": {"name": "laplacian"}}, "test"
        )
        ep3stream.fit(store, tmp_path / name, config)
        assert not validations(tmp_path / name)
        assert len(Setup.load(tmp_path / name / "setup").tensors["excluded_rows"]) == 100
    assert model_bytes(tmp_path / "none") == model_bytes(tmp_path / "python")


@pytest.mark.parametrize("kills", [(8,), (40,), (8, 24, 48)])
def test_a_killed_fit_goes_on_with_the_same_rows_held_out(store, run, tmp_path, kills):
    for step in kills:
        with pytest.raises(Stop):
            ep3stream.fit(store, tmp_path / "run", plain(), observe=kill_at(step))
    ep3stream.fit(store, tmp_path / "run", plain())
    assert model_bytes(tmp_path / "run") == model_bytes(run)
    assert [line["mse"] for line in validations(tmp_path / "run")] == [
        line["mse"] for line in validations(run)
    ]


def test_other_rows_to_validate_on_need_an_override_and_forget_the_best_of_before(store, tmp_path):
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", plain(), observe=kill_at(48))
    assert len(validations(tmp_path / "run")) == 1
    changed = plain(data={"validate": "test"})
    with pytest.raises(ConfigError, match=r"data\.validate was 'auto' and is now 'test'.*by --override"):
        ep3stream.fit(store, tmp_path / "run", changed)
    ep3stream.fit(store, tmp_path / "run", changed, override=True)
    assert [line["split"] for line in validations(tmp_path / "run")] == ["train, held out", "test"]
    assert ep3stream.evaluate(tmp_path / "run", store)["mse"] == pytest.approx(
        validations(tmp_path / "run")[-1]["mse"], rel=1e-6
    )


@pytest.mark.parametrize("damage", ["beyond", "unsorted", "fewer"])
def test_a_set_up_with_other_rows_held_out_than_it_excludes_is_refused(store, run, tmp_path, damage):
    bundle = read_bundle(run / "setup", SETUP_KIND)
    tensors = {name: tensor.clone() for name, tensor in bundle.tensors.items()}
    held = tensors["held_rows"]
    if damage == "beyond":
        held[-1] = next(row for row in range(1500, 0, -1) if row not in tensors["excluded_rows"])
    elif damage == "unsorted":
        tensors["held_rows"] = held.flip(0)
    else:
        tensors["held_rows"] = held[1:].clone()
    write_bundle(tmp_path / "setup", SETUP_KIND, tensors, bundle.description)
    with pytest.raises(DamagedDataError, match="held"):
        Setup.load(tmp_path / "setup")


def test_rows_without_some_are_as_many_as_asked_for_distinct_and_a_function_of_the_seed(store):
    with open_store(store) as rows:
        info = rows.split("train").info
    without = np.sort(sample_rows(info, info.n_rows - 50, 3, 1))
    drawn = sample_rows(info, 50, 5, 2, without=without)
    assert len(np.unique(drawn)) == 50
    assert not np.isin(drawn, without).any()
    assert np.array_equal(drawn, sample_rows(info, 50, 5, 2, without=without))
    assert not np.array_equal(drawn, sample_rows(info, 50, 6, 2, without=without))
