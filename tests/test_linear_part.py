"""The linear part of a model, and the screening of columns: their oracles, and fits, by every way in, that have one."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from small_stores import plain_config

import ep3stream
from ep3stream import (
    ConvertConfig,
    FitConfig,
    KernelClassifier,
    KernelConfig,
    KernelModel,
    KernelRegressor,
)
from ep3stream.errors import ConfigError, DamagedDataError
from ep3stream.inspection.describe import describe_path
from ep3stream.run.bundle import read_bundle, write_bundle
from ep3stream.solver.column_screen import telling_columns
from ep3stream.solver.column_weights import learnt_weights
from ep3stream.solver.linear_part import LinearFit, LinearPart, _Moments, fitted_linear
from ep3stream.training.column_kernel import plain_kernel, pool_rows, wants_linear
from ep3stream.training.defaults import MOST_COLUMNS, with_kernel

pytestmark = pytest.mark.usefixtures("quick_columns")


def linear_rows(n: int, d: int, seed: int = 0, n_outputs: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """x, (n, d), of many means and scales, and y, (n, c), linear in all of them, and noise of a tenth."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, d)) * np.linspace(0.1, 5, d) + np.linspace(-3, 3, d)
    weights = np.random.default_rng(1).normal(size=(d, n_outputs)) / np.linspace(0.1, 5, d)[:, None]
    y = x @ weights / math.sqrt(d) + 0.1 * random.normal(size=(n, n_outputs))
    return torch.from_numpy(x).float(), torch.from_numpy(y).float()


def fit_of(x: torch.Tensor, y: torch.Tensor, categories: tuple[int, ...] = (), **more) -> LinearFit | None:
    is_category = torch.zeros(x.shape[1], dtype=torch.bool)
    is_category[list(categories)] = True
    return fitted_linear(x, y, is_category, len(x) // 5, torch.Generator().manual_seed(0), **more)


# The ridge regression.


def test_it_is_the_ridge_regression_on_standardised_inputs():
    x, y = linear_rows(3000, 40, n_outputs=2)
    fit = fit_of(x, y)
    assert fit.explained == pytest.approx(1 - 0.01 / float(y.var(0).mean()), abs=0.01)
    scaled = (x - x.mean(0)) / x.std(0, unbiased=False)
    found = [Ridge(len(x) * ridge).fit(scaled, y).predict(scaled) for ridge in (1e-5, 1e-4, 1e-3, 1e-2)]
    errors = [np.abs(each - fit.part(x).numpy()).max() for each in found]
    assert min(errors) < 1e-4
    assert torch.allclose(fit.sizes.float(), (fit.part.weights * x.std(0)[:, None]).norm(dim=1), rtol=1e-3)


def test_what_tells_nothing_has_none():
    x, y = linear_rows(3000, 10)
    assert fit_of(x, torch.randn(3000, 1, generator=torch.Generator().manual_seed(3))) is None
    assert fit_of(x[:2], y[:2]) is None
    assert fit_of(x, y, categories=tuple(range(10))) is None


def test_codes_of_categories_and_constant_columns_have_no_weight():
    x, y = linear_rows(2000, 6)
    x[:, 2] = 7.0
    weights = fit_of(x, y, categories=(1, 4)).part.weights[:, 0]
    assert (weights == 0).tolist() == [False, True, True, False, True, False]


def test_of_many_columns_that_tell_nothing_it_leaves_out_those():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 600, generator=random)
    y = x[:, :3].sum(1, keepdim=True) + 0.3 * torch.randn(1500, 1, generator=random)
    fit = fit_of(x, y)
    assert (fit.part.weights[:, 0] != 0).nonzero()[:, 0].tolist() == [0, 1, 2]
    assert fit.explained > 0.95


def test_a_category_that_few_rows_have_is_held_back_by_the_ridge():
    """As 0 and 1 (or any two values), not in standard deviations: 500 levels of 2 rows each, and y without them."""
    x, y = linear_rows(1000, 5)
    levels = torch.eye(500).repeat(2, 1)[torch.randperm(1000, generator=torch.Generator().manual_seed(1))]
    y = y + 0.5 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(2))
    both = torch.cat([x, 0.3 + 4 * levels], 1)
    moments = _Moments.of(both, y, both.mean(0))
    everything = torch.ones(505, dtype=torch.bool)
    (part,) = moments.solved(everything, [0.01])
    mean, spread = both.double().mean(0), both[:, :5].double().std(0, correction=0)
    coded = torch.cat([(both[:, :5] - mean[:5]) / spread, levels - levels.mean(0)], 1)
    system = coded.T @ coded / 1000 + 0.01 * torch.eye(505)
    expected = torch.linalg.solve(system, coded.T @ (y - y.mean()).double() / 1000)
    torch.testing.assert_close(part.weights[5:] * 4, expected[5:].float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        part.weights[:5] * spread[:, None].float(), expected[:5].float(), rtol=1e-3, atol=1e-4
    )


def test_of_more_inputs_than_it_solves_for_it_takes_those_that_correlate(monkeypatch):
    most = 400
    monkeypatch.setattr("ep3stream.solver.linear_part.MOST_INPUTS", most)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1000, most + 500, generator=random)
    x[:, 7] = 3.0
    y = x[:, -3:].sum(1, keepdim=True) + 0.3 * torch.randn(1000, 1, generator=random)
    category = most + 400
    fit = fit_of(x, y, categories=(category,), checked=(x[:200], y[:200]))
    assert fit.explained > 0.8
    assert (fit.part.weights[-3:] > 0.5).all()
    assert not fit.part.weights[[7, category]].any()
    weights, tensors = fit.part.weights, fit.part.tensors()
    assert weights.shape == (most + 500, 1)
    described = LinearPart.described(tensors, fit.part.description(), len(weights), 1)
    assert torch.equal(described(x[:5]), fit.part(x[:5]))


def test_another_split_decides_where_there_is_one():
    x, y = linear_rows(2000, 5)
    assert fit_of(x, y, checked=(x[:500], y[:500])) is not None
    assert fit_of(x, y, checked=(x[:500], -y[:500])) is None


def test_values_far_beyond_the_rows_are_taken_for_the_last_near_them():
    x, y = linear_rows(2000, 4)
    part = fit_of(x, y).part
    low, high = x.amin(0), x.amax(0)
    far, last = x[:2].clone(), x[:2].clone()
    far[0, 1], last[0, 1] = 1e9, 2 * high[1] - low[1]
    far[1, 2], last[1, 2] = -1e9, 2 * low[2] - high[2]
    assert torch.equal(part(far), part(last))
    a_bit_beyond = x[:1].clone()
    a_bit_beyond[0, 1] = high[1] + 0.5 * (high[1] - low[1])
    expected = part.constant + a_bit_beyond @ part.weights
    assert torch.allclose(part(a_bit_beyond), expected, atol=1e-4)


def test_predictions_of_each_ridge_get_it():
    x, y = linear_rows(500, 3, n_outputs=2)
    part, predictions = fit_of(x, y).part, torch.zeros(6, 500)
    part.add_(predictions, x)
    assert torch.equal(predictions, part(x).T.repeat(3, 1))


def test_a_kernel_on_columns_has_it_only_where_that_errs_less():
    """Two curves of two columns are half linear, but the kernel learns them better by itself; 30 lines it does not."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 30, generator=random)
    curves = (x[:, 0].exp() + torch.sin(2 * x[:, 1]))[:, None] + 0.1 * torch.randn(3000, 1, generator=random)
    lines = x.sum(1, keepdim=True) / 5 + 0.1 * torch.randn(3000, 1, generator=random)
    for inputs, y, is_kept in ((x[:, :2], curves, False), (x, lines, True)):
        kernel = plain_kernel(KernelConfig("product"), inputs.shape[1], ())
        assert fit_of(inputs, y) is not None
        learnt = learnt_weights(kernel, inputs, y, 400, torch.Generator().manual_seed(0), tries_linear=True)
        assert (learnt.linear is not None) == is_kept
        assert learnt_weights(kernel, inputs, y, 400, torch.Generator().manual_seed(0)).linear is None


# The screening.


def test_columns_that_act_in_pairs_alone_are_seen_among_hundreds():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 300, generator=random)
    y = x[:, 5] * x[:, 70] + x[:, 100] * x[:, 200].square() + torch.sin(2 * x[:, 7])
    y = (y + 0.5 * torch.randn(3000, generator=random))[:, None]
    none = torch.zeros(300, dtype=torch.bool)
    found = telling_columns(x, y, none, torch.Generator().manual_seed(0))
    assert found.nonzero()[:, 0].tolist() == [5, 7, 70, 100, 200]
    noise = torch.randn(3000, 1, generator=random).exp()
    assert int(telling_columns(x, noise, none, torch.Generator().manual_seed(0)).sum()) == 0


def test_categories_are_taken_to_tell():
    x, y = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(500, 1)
    y[:, 0] = x[:, 0]
    is_category = torch.tensor([False, True, False, False])
    assert telling_columns(x, y, is_category, torch.Generator()).tolist() == [True, True, False, False]


# Fits.


def curved(n: int, seed: int = 0, d: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """x, (n, d), and y, linear in all columns, curved in one of them."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, d)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=d) / math.sqrt(d)
    return x, (x @ weights + 0.5 * np.sin(2 * x[:, 0]) + 0.1 * random.normal(size=n)).astype(np.float32)


def curved_store(path: Path, n: int) -> Path:
    config = ConvertConfig(splits={"train": 0.8, "test": 0.2}, segment_bytes=1 << 14)
    ep3stream.convert(curved(n), path, config)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return curved_store(tmp_path_factory.mktemp("stores") / "rows.zarr", 3000)


def settings(kernel: str = "product", **solver) -> FitConfig:
    return plain_config(kernel={"name": kernel}, solver={"centers": 150, "epochs": 2} | solver)


@pytest.fixture(scope="module")
def fitted(store, tmp_path_factory) -> Path:
    return ep3stream.fit(store, tmp_path_factory.mktemp("runs") / "run", settings(epochs=1))


def r2(run: Path, store: Path) -> float:
    return ep3stream.evaluate(run, store, "test")["r2"]


@pytest.mark.parametrize(("kernel", "least"), [("product", 0.98), ("laplacian", 0.8)])
def test_a_fit_learns_what_the_linear_part_leaves(store, tmp_path, kernel, least):
    scores = {}
    for linear in ("tried", "none"):
        run = ep3stream.fit(store, tmp_path / linear, settings(kernel, linear=linear))
        scores[linear] = r2(run, store)
        assert (ep3stream.load(run).linear is None) == (linear == "none")
    assert scores["tried"] > max(least, scores["none"] + 0.01)
    told = ep3stream.inspect(tmp_path / "tried")["linear"]
    assert 0.5 < told["explained"] < 0.99
    assert len(told["columns"]) == 20
    assert "linear part" in " ".join(describe_path(tmp_path / "tried").split())
    assert "Linear part" in (tmp_path / "tried" / "report.html").read_text()
    assert "Linear part" not in (tmp_path / "none" / "report.html").read_text()


def test_a_fit_that_goes_on_has_the_bytes_of_one_that_did_not_stop(store, fitted, tmp_path):
    once = ep3stream.fit(store, tmp_path / "once", settings(epochs=2))
    run = shutil.copytree(fitted, tmp_path / "run")
    ep3stream.fit(store, run, settings(epochs=2), override=True)
    weights = [read_bundle(each / "model", "model").tensors["weights"] for each in (once, run)]
    assert torch.equal(*weights)


def test_two_ranks_have_the_linear_part_of_one(tmp_path):
    store = curved_store(tmp_path / "rows.zarr", 1000)
    runs = [
        ep3stream.fit(store, tmp_path / f"run-{devices}", settings(epochs=1), devices=devices)
        for devices in (1, 2)
    ]
    one, two = (ep3stream.load(each).linear for each in runs)
    assert all(torch.equal(one.tensors()[name], two.tensors()[name]) for name in one.tensors())
    assert r2(runs[1], store) == pytest.approx(r2(runs[0], store), abs=0.01)


def test_an_export_has_it(store, fitted, tmp_path):
    folder = ep3stream.export(fitted, tmp_path / "out")
    described = json.loads((folder / "model.json").read_text())
    assert described["format_version"] == 6
    assert described["linear"] == {"version": 1}
    x = torch.from_numpy(curved(50, 5)[0])
    program = torch.export.load(folder / "program.pt2").module()
    torch.testing.assert_close(program(x), ep3stream.load(fitted).outputs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear_weights", "linear_constant", "linear_range"])
@pytest.mark.parametrize("part", ["model", "setup"])
def test_a_linear_part_that_cannot_be_is_damage(store, fitted, tmp_path, name, part):
    run = shutil.copytree(fitted, tmp_path / "run")
    path, kind = (run / "model", "model") if part == "model" else (run / "setup", "set-up")
    bundle = read_bundle(path, kind)
    for damaged in (bundle.tensors[name][..., :-1].contiguous(), bundle.tensors[name].double()):
        write_bundle(path, kind, dict(bundle.tensors) | {name: damaged}, bundle.description)
        with pytest.raises(DamagedDataError):
            ep3stream.load(run) if part == "model" else ep3stream.fit(
                store, run, settings(epochs=2), override=True
            )


def test_kernels_that_are_named_and_weighted_classes_have_none_unless_asked_for():
    assert wants_linear(settings("anova"))
    assert not wants_linear(settings("laplacian"))
    assert wants_linear(settings("laplacian", linear="tried"))
    assert not wants_linear(settings("product", class_weights="balanced"))
    wide = with_kernel(FitConfig(), MOST_COLUMNS + 1, 5000)
    assert (wide.kernel.name, wants_linear(wide)) == ("laplacian", True)
    metric = FitConfig().with_settings({"data": {"metric": "diagonal"}}, "test")
    assert not wants_linear(with_kernel(metric, 7, 5000))
    assert pool_rows(settings("laplacian"), 10**6, 10, 1) == 0
    assert pool_rows(settings("laplacian", linear="tried"), 10**6, 10, 1) == 1 << 15


def test_a_state_of_a_kernel_model_goes_on_with_the_same_bits():
    x, y = curved(3000)
    made = [KernelModel(x[:100], "product", nystrom_samples=500) for _ in range(2)]
    made[0].fit((x, y))
    assert made[0].predictor().linear is not None
    state = made[0].state_dict()
    assert state["version"] == 8
    made[1].load_state_dict(state)
    for each in made:
        each.fit_epoch((x, y))
    assert torch.equal(made[0].outputs(x[:99]), made[1].outputs(x[:99]))
    # Of a version that knew no linear part.
    before = KernelModel(x[:100], "product", nystrom_samples=500, linear="none")
    before.fit((x, y))
    state = before.state_dict()
    assert state["version"] == 4
    del state["settings"]["linear"]
    again = KernelModel(x[:100], "product", nystrom_samples=500)
    again.load_state_dict(state)
    assert torch.equal(again.outputs(x[:99]), before.outputs(x[:99]))


def test_estimators_have_it_and_keep_it_in_a_file(tmp_path):
    (x, y), (x_test, y_test) = curved(3000), curved(1000, 1)
    small = {"n_centers": 150, "epochs": 2, "random_state": 0, "effects": "none"}
    model, without = (KernelRegressor(linear=linear, **small).fit(x, y) for linear in ("auto", "none"))
    assert model.score(x_test, y_test) > without.score(x_test, y_test) + 0.02
    model.save(tmp_path / "saved")
    again = KernelRegressor.load(tmp_path / "saved")
    for each in (model, again):
        each.partial_fit(x[:500], y[:500])
    assert np.array_equal(again.predict(x_test), model.predict(x_test))
    classes = KernelClassifier(**small).fit(x, y > 0)
    assert classes.model_.linear is not None
    assert classes.score(x_test, y_test > 0) > 0.9
    with pytest.raises(ConfigError, match="linear is 'always'; choose one of auto, tried, none"):
        KernelRegressor(linear="always", **small).fit(x, y)


def test_tune_goes_on_with_it(store):
    result = ep3stream.tune(
        store, settings(linear="tried"), kernels=["laplacian"], n_centers=100, minutes=0.3
    )
    assert result.default.r2 > 0.9
    others = [trial for trial in result.table if trial.candidate.kernel.name == "laplacian"]
    assert max(trial.r2 for trial in others) > 0.85  # Without a linear part .6.


def test_a_part_is_described_as_it_is():
    x, y = linear_rows(500, 3)
    part = fit_of(x, y).part
    again = LinearPart.described(part.tensors(), part.description(), 3, 1)
    assert torch.equal(again(x), part(x))
    assert LinearPart.described({}, None, 3, 1) is None
    with pytest.raises(ValueError, match="linear has version 2, not 1"):
        LinearPart.described(part.tensors(), {"version": 2}, 3, 1)
    with pytest.raises(ValueError, match=r"linear_weights is torch.float32 \(3, 1\), not float32 \(4, 1\)"):
        LinearPart.described(part.tensors(), part.description(), 4, 1)
