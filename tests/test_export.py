"""Exported models: the program and the documented layout give the model's predictions, where ep3stream is not there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_stores import make_store, plain_config, smooth_rows

import ep3stream
from ep3stream import InputError, KernelConfig, KernelModel
from ep3stream.config import KERNEL_DEFAULTS
from ep3stream.solver import export

DOCS = Path(__file__).parents[1] / "docs" / "formats.md"
X, TARGETS = smooth_rows(300)
# Rows of zeros and centers themselves are where formulas break.
ROWS = np.concatenate([X[:40], np.zeros((1, 5), np.float32)])


def fitted(kernel=None, n_outputs: int = 1, task: str = "regression") -> KernelModel:
    kernel = kernel or KernelConfig("laplacian")
    model = KernelModel(X[:60], kernel, n_outputs, task=task, nystrom_samples=100)
    ids = (TARGETS[:, 0] > 10).astype(np.int64)
    model.fit((X, ids if task == "classification" else TARGETS[:, :n_outputs]))
    return model


def program(folder: Path) -> torch.nn.Module:
    return torch.export.load(folder / "program.pt2").module()


@pytest.mark.parametrize("name", KERNEL_DEFAULTS)
def test_the_formulas_of_a_program_are_the_kernels(name):
    shape = {"dispersal": {"shape": 0.7}, "ntk_relu": {"depth": 3}}.get(name, {})
    model = fitted(KernelConfig(name, **shape), 2).predictor()
    expected = model.decision_function(ROWS)
    found = export.ServedModel(model)(torch.from_numpy(ROWS)).numpy()
    assert np.abs(found - expected).max() < 2e-4 * np.abs(TARGETS).max()


def test_a_large_model_is_taken_tile_by_tile(monkeypatch):
    monkeypatch.setattr(export, "_TILE_CENTERS", 7)
    model = fitted().predictor()
    found = export.exported_program(model).module()(torch.from_numpy(ROWS)).numpy()
    assert np.allclose(found, model.decision_function(ROWS), atol=1e-3)


@pytest.mark.parametrize("n_rows", [0, 1, 2, 41])
def test_a_program_takes_any_number_of_rows(n_rows, tmp_path):
    model = fitted(n_outputs=2, task="classification")
    model.save(tmp_path / "run")
    folder = ep3stream.export(tmp_path / "run", tmp_path / "out")
    outputs = program(folder)(torch.from_numpy(ROWS[:n_rows])).numpy()
    assert outputs.shape == (n_rows, 2)
    assert np.allclose(outputs, model.predictor().decision_function(ROWS[:n_rows]), atol=1e-4)


def test_a_process_without_ep3stream_makes_the_same_predictions_in_both_documented_ways(tmp_path):
    store = make_store(tmp_path / "rows.zarr")
    run = ep3stream.fit(store, tmp_path / "run", plain_config(solver={"centers": 50}))
    ep3stream.export(run, tmp_path / "flights-model")
    np.save(tmp_path / "rows.npy", ROWS)
    hidden = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ep3stream":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
"""
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)):
        code = f"{hidden}\n{snippet}\nnp.save('served-{number}.npy', outputs)"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    expected = ep3stream.load(run).decision_function(ROWS)
    for number in (0, 1):
        assert np.allclose(np.load(tmp_path / f"served-{number}.npy"), expected, atol=1e-3)


def test_the_description_says_what_the_document_says(tmp_path):
    store = make_store(tmp_path / "rows.zarr", "classification")
    run = ep3stream.fit(store, tmp_path / "run", plain_config(solver={"centers": 50}))
    described = json.loads((ep3stream.export(run, tmp_path / "out") / "model.json").read_text())
    listed = set(re.findall(r"`([a-z_]+)`", DOCS.read_text().split("`model.json`:")[1].split("\n\nIn ")[0]))
    assert set(described) - {"created_by"} <= listed
    assert described["conversion"]["columns"]["version"] == 3  # The lowest that says what these columns are.
    assert (described["n_centers"], described["n_features"], described["n_outputs"]) == (50, 5, 3)


def test_a_callable_kernel_is_in_the_program_and_one_that_branches_on_values_is_refused(tmp_path):
    def plain(z, x):
        return (-torch.cdist(z, x)).exp()

    def branching(z, x):
        k = (-torch.cdist(z, x)).exp()
        return k if float(k.sum()) > 0 else k * 2

    for kernel in (plain, branching):
        fitted(kernel).save(tmp_path / kernel.__name__)
    folder = ep3stream.export(tmp_path / "plain", tmp_path / "out", kernel=plain)
    expected = ep3stream.load(tmp_path / "plain", kernel=plain).decision_function(ROWS)
    assert np.allclose(program(folder)(torch.from_numpy(ROWS)).numpy(), expected, atol=1e-3)
    with pytest.raises(InputError, match="cannot be exported as a program"):
        ep3stream.export(tmp_path / "branching", tmp_path / "never", kernel=branching)
    assert not (tmp_path / "never").exists()


def test_bent_numbers_are_bent_by_the_program_and_named_in_the_description(tmp_path):
    x = X.copy()
    x[:, 1] = np.exp(3 * np.random.default_rng(0).normal(size=len(x)))
    ep3stream.convert((x, TARGETS[:, 0]), tmp_path / "s.zarr")
    run = ep3stream.fit(tmp_path / "s.zarr", tmp_path / "run", plain_config(solver={"centers": 60}))
    folder = ep3stream.export(run, tmp_path / "out")
    described = json.loads((folder / "model.json").read_text())
    assert described["format_version"] == 3
    assert [one["feature"] for one in described["inputs"]["bent"]] == [1]
    rows = x[:40].astype(np.float32)
    expected = ep3stream.load(run).predict(rows)
    np.testing.assert_allclose(
        program(folder)(torch.from_numpy(rows)).numpy()[:, 0], expected, rtol=1e-3, atol=1e-3
    )


def test_an_export_replaces_nothing(tmp_path):
    fitted().save(tmp_path / "run")
    ep3stream.export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(InputError, match="exists"):
        ep3stream.export(tmp_path / "run", tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "model.json", "model.safetensors", "program.pt2",
    ]  # fmt: skip
