"""Effects of cells: the oracle of their search, kernel ridge regression, and fits that end with them."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import csv

import ep3stream
from ep3stream import ConvertConfig, FitConfig
from ep3stream.errors import ConfigError, DamagedDataError
from ep3stream.inspection.describe import describe_path
from ep3stream.prediction.predict import predict_tables
from ep3stream.reporting.quantities import TIMES
from ep3stream.solver.cell_effects import CellEffects, Factor, code_factor, number_factors
from ep3stream.solver.effect_search import (
    CellRows,
    Choice,
    SearchLimits,
    cells_of,
    chosen_crosses,
    fitted_effects,
)
from ep3stream.training.budget import SizeLimits, sizes_for
from ep3stream.training.effects import most_rows, wants_effects

# Factors.


def test_levels_count_the_edges_below_and_unknown_codes_have_one_of_their_own():
    number = Factor(1, torch.tensor([0.5, 2.0]))
    x = torch.tensor([[0.0, -1.0], [0.0, 0.5], [0.0, 0.6], [0.0, 2.0], [0.0, 9.0]])
    assert number.levels(x).tolist() == [0, 0, 1, 1, 2]
    assert code_factor(0, 3).levels(torch.tensor([[-1.0], [0.0], [2.0]])).tolist() == [0, 1, 3]


def test_a_number_of_few_values_has_one_factor_and_of_many_one_for_each_number_of_bins():
    few = number_factors(0, np.array([3.0, 1.0, 1.0, 2.0], np.float32), (16, 256))
    assert [factor.edges.tolist() for factor in few] == [[1.5, 2.5]]
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    coarse, fine = number_factors(0, values, (16, 256))
    assert (coarse.n_levels, fine.n_levels) == (16, 256)
    rows = np.bincount(coarse.levels(torch.from_numpy(values)[:, None]).numpy())
    assert abs(rows - 5000 / 16).max() < 3
    assert number_factors(0, np.full(9, 7.0, np.float32), (16, 256)) == []


# The search.


def noise_and_a_cross(n: int = 6000, seed: int = 0) -> tuple[list[Factor], CellRows]:
    """Five categories of 12 values; the residual has an effect for each combination of the first three, and noise."""
    random = np.random.default_rng(seed)
    codes = random.integers(12, size=(5, n))
    planted = np.random.default_rng(7).normal(size=(12, 12, 12))[tuple(codes[:3])]
    factors = [code_factor(feature, 12) for feature in range(5)]
    return factors, CellRows((codes + 1).astype(np.uint16), (planted + 0.3 * random.normal(size=n))[None])


def test_the_gain_of_a_cross_is_that_of_leaving_out_each_row_in_turn():
    factors, rows = noise_and_a_cross(300)
    limits = SearchLimits(width=1)
    residual = rows.residual + rows.levels[0] % 3
    rows = CellRows(rows.levels[:1], residual)
    (choice,) = chosen_crosses(factors[:1], rows, residual, limits)
    cells = cells_of(factors, rows.levels, choice.cross)
    r, gain = residual[0], 0.0
    for i in range(len(r)):
        others = (cells == cells[i]) & (np.arange(len(r)) != i)
        gain += r[i] ** 2 - (r[i] - r[others].sum() / (others.sum() + choice.shrinkage)) ** 2
    assert choice.gain == pytest.approx(gain / (r @ r), rel=1e-9)


def test_the_planted_cross_is_found_among_all_and_noise_is_not_taken_for_one():
    factors, rows = noise_and_a_cross()
    chosen = chosen_crosses(factors, rows, rows.residual, SearchLimits())
    assert max(chosen, key=lambda choice: choice.gain).cross == (0, 1, 2)
    _, held_out = noise_and_a_cross(2000, seed=1)
    fitted = fitted_effects(factors, chosen, rows, held_out, 6)
    assert fitted.is_better()
    assert fitted.after.mean() < 0.4 * fitted.before.mean()
    random = np.random.default_rng(2)
    noise, more = (
        CellRows(each.levels, random.normal(size=each.residual.shape)) for each in (rows, held_out)
    )
    chosen = chosen_crosses(factors, noise, noise.residual, SearchLimits())
    assert not fitted_effects(factors, chosen, noise, more, 6).is_better()


def test_nothing_is_crossed_where_nothing_is_left():
    factors, rows = noise_and_a_cross(500)
    none = CellRows(rows.levels, np.zeros_like(rows.residual))
    assert chosen_crosses(factors, none, rows.residual, SearchLimits()) == []


def test_limits_bound_the_search():
    factors, rows = noise_and_a_cross()

    def crosses(**limits) -> list[tuple[int, ...]]:
        return [
            choice.cross for choice in chosen_crosses(factors, rows, rows.residual, SearchLimits(**limits))
        ]

    assert max(map(len, crosses(width=2))) == 2
    assert max(map(len, crosses(cells=13 * 13))) == 2
    assert len(crosses(crosses=1)) == 1
    assert sum(13 ** len(cross) for cross in crosses(all_cells=13**3)) <= 13**3
    assert crosses(evaluations=0) == []


def test_effects_of_a_cross_are_ridge_regression_with_the_kernel_of_equal_cells():
    factors, rows = noise_and_a_cross(400)
    choice = Choice((0, 3), 2.5, 0.0)
    held_out = CellRows(rows.levels, rows.residual)
    fitted = fitted_effects(factors, [choice], rows, held_out, 1)
    cells = cells_of(factors, rows.levels, choice.cross)
    k = (cells[:, None] == cells).astype(np.float64)
    expected = k @ np.linalg.solve(k + 2.5 * np.eye(400), rows.residual[0])
    effects = CellEffects(tuple(factors), (choice.cross,), torch.from_numpy(fitted.effects))
    found = effects(torch.from_numpy(rows.levels.astype(np.float32) - 1).T)
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-6)


def test_backfitting_ends_at_ridge_regression_with_the_sum_of_the_kernels():
    factors, rows = noise_and_a_cross(400)
    chosen = [Choice((0,), 1.0, 0.0), Choice((0, 1), 4.0, 0.0), Choice((2,), 2.0, 0.0)]
    # A cross with the shrinkage s is the kernel [same cell] / s with a ridge of 1.
    k = np.zeros((400, 400))
    for choice in chosen:
        cells = cells_of(factors, rows.levels, choice.cross)
        k += (cells[:, None] == cells) / choice.shrinkage
    expected = k @ np.linalg.solve(k + np.eye(400), rows.residual[0])
    fitted = fitted_effects(factors, chosen, rows, rows, 500)
    effects = CellEffects(tuple(factors), tuple(c.cross for c in chosen), torch.from_numpy(fitted.effects))
    found = effects(torch.from_numpy(rows.levels.astype(np.float32) - 1).T)
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-3)


def test_a_cross_that_only_fits_its_own_rows_is_left_out():
    factors, rows = noise_and_a_cross()
    random = np.random.default_rng(3)
    # The fourth column stands for a time: its effects are other ones on the held-out rows.
    shifted = CellRows(rows.levels, rows.residual + 3 * np.sin(rows.levels[3]))
    _, held_out = noise_and_a_cross(2000, seed=1)
    held_out = CellRows(held_out.levels, held_out.residual - 3 * np.sin(held_out.levels[3] + random.normal()))
    chosen = [Choice((3,), 1.0, 0.5), Choice((0, 1, 2), 1.0, 0.5)]
    fitted = fitted_effects(factors, chosen, shifted, held_out, 6)
    assert [choice.cross for choice in fitted.chosen] == [(0, 1, 2)]


# Models.


def effects_of_two_crosses() -> CellEffects:
    factors = (code_factor(0, 3), Factor(2, torch.tensor([0.5])))
    values = torch.arange(4 * 2 + 2, dtype=torch.float32)[:, None] * torch.tensor([1.0, -1.0])
    return CellEffects(factors, ((0, 1), (1,)), values)


def test_effects_come_back_from_tensors_and_description():
    effects = effects_of_two_crosses()
    x = torch.tensor([[-1.0, 9.0, 0.0], [2.0, 9.0, 1.0]])
    assert effects(x)[:, 0].tolist() == [0 + 8, 7 + 9]
    back = CellEffects.described(effects.tensors(), effects.description(), 3, 2)
    assert torch.equal(back(x), effects(x))
    assert len(back.tensors()["effect_cells"]) == 9  # The first cell has no effect.


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t, d: d.update(version=2), "version"),
        (lambda t, d: d["factors"][0].update(feature=3), "factors of features"),
        (lambda t, d: d["factors"][0].update(n_levels=1), "factors of features"),
        (lambda t, d: d["factors"][0].update(n_levels=9), "edges"),
        (lambda t, d: d["crosses"].append([2]), "cross the factors"),
        (lambda t, d: d["crosses"].append([-1]), "cross the factors"),
        (lambda t, d: d["crosses"].append([]), "cross the factors"),
        (lambda t, d: d["crosses"].extend([[0, 1] * 30]), "cells, not 1 to"),
        (lambda t, d: t["effect_cells"].add_(1), "cells"),
        (lambda t, d: t["effect_cells"].sub_(2), "cells"),
        (lambda t, d: t.update(effect_values=t["effect_values"][:, :1]), "values"),
        (lambda t, d: t.update(effect_values=t["effect_values"].double()), "values"),
    ],
)
def test_impossible_effects_are_refused(spoil, words):
    effects = effects_of_two_crosses()
    tensors, description = effects.tensors(), effects.description()
    spoil(tensors, description)
    with pytest.raises(ValueError, match=words):
        CellEffects.described(tensors, description, 3, 2)


# Fits.

PLACES = [f"place {number}" for number in range(25)]


def table(n: int, seed: int) -> pa.Table:
    """Numbers and categories; each place has an effect of its own on each day, which a smooth kernel does not see."""
    random = np.random.default_rng(seed)
    place, day = random.integers(25, size=n), random.integers(40, size=n)
    size, noise = random.normal(size=(2, n))
    planted = np.random.default_rng(11).normal(size=(25, 40))[place, day]
    y = size + 2 * planted + 0.1 * random.normal(size=n)
    columns = {"day": day, "place": np.array(PLACES)[place], "size": size, "noise": noise}
    return pa.table(columns | {"y": 1e6 + y, "label": np.where(y > 0, "up", "down")})


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stores")
    found = {}
    for task, target, other in (("regression", "y", "label"), ("classification", "label", "y")):
        files = {}
        for split, (n, seed) in {"train": (8000, 0), "validation": (1500, 1), "test": (1500, 2)}.items():
            files[split] = folder / f"{task}-{split}.parquet"
            pq.write_table(table(n, seed).drop([other]), files[split])
        split_files = {name: [files[name]] for name in ("validation", "test")}
        found[task] = folder / f"{task}.zarr"
        ep3stream.convert(files["train"], found[task], ConvertConfig(target=target, split_files=split_files))
    return found


def settings(**solver) -> FitConfig:
    given = {"centers": 200, "epochs": 1} | solver
    return FitConfig().with_settings({"solver": given, "kernel": {"name": "product"}}, "test")


@pytest.fixture(scope="module")
def fitted(stores, tmp_path_factory, quick_columns) -> Path:
    return ep3stream.fit(stores["regression"], tmp_path_factory.mktemp("runs") / "run", settings())


def model_bytes(run: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in sorted((run / "model").iterdir())}


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_effects_make_a_fit_better_where_columns_act_together(stores, tmp_path, task, quick_columns):
    scores = {}
    for effects in ("none", "auto"):
        run = ep3stream.fit(stores[task], tmp_path / effects, settings(effects=effects))
        found = ep3stream.evaluate(run, stores[task], "test")
        scores[effects] = found.get("r2", found.get("accuracy"))
        told = ep3stream.inspect(run)["effects"]
        assert (told is None) == (effects == "none")
    assert scores["auto"] > scores["none"] + 0.1
    assert set(told["crosses"][0]["columns"]) == {"day", "place"}


def test_they_are_told_in_report_and_status(fitted):
    html = (fitted / "report.html").read_text()
    assert "Columns crossed" in html
    assert {f"day {TIMES} place", f"place {TIMES} day"} & set(re.findall(">([^<]*)<", html))
    assert "columns crossed" in describe_path(fitted)


def test_a_model_with_effects_predicts_the_same_by_every_way(stores, fitted, tmp_path):
    rows = table(60, seed=5).drop(["y", "label"])
    pq.write_table(rows, tmp_path / "new.parquet")
    predict_tables(fitted, tmp_path / "new.parquet", tmp_path / "out.csv")
    of_table = csv.read_csv(tmp_path / "out.csv").column("y").to_numpy()
    model = ep3stream.load(fitted)
    of_frame = model.predict(rows.to_pandas())
    np.testing.assert_allclose(of_table, of_frame, atol=1e-3)
    assert np.ptp(of_frame - 1e6) > 3
    exported = ep3stream.export(fitted, tmp_path / "exported")
    program = torch.export.load(exported / "program.pt2").module()
    with ep3stream.open_store(stores["regression"]) as store:
        x, _ = store.split("test").read_segment(0)
    stored = torch.from_numpy(np.asarray(x[:100], np.float32))
    expected = model.outputs(stored).numpy() + model.offsets.y
    given = stored.double() + torch.from_numpy(model.offsets.x)
    np.testing.assert_allclose(program(given).numpy(), expected, atol=1e-3)


def test_an_unknown_category_has_no_effect(fitted):
    model = ep3stream.load(fitted)
    at = model.feature_names.index("place")
    x = torch.zeros(1, 4)
    x[0, at] = -1
    assert model.effects(x).item() == pytest.approx(sum_without(model.effects, at, x))


def sum_without(effects: CellEffects, feature: int, x: torch.Tensor) -> float:
    """The effects of the crosses without a feature."""
    kept, first, total = [], 0, 0.0
    for cross in effects.crosses:
        size = int(np.prod([effects.factors[f].n_levels for f in cross]))
        if feature not in [effects.factors[f].feature for f in cross]:
            kept.append(cross)
            total += CellEffects(effects.factors, (cross,), effects.values[first : first + size])(x).item()
        first += size
    return total


def test_a_damaged_effect_is_found(fitted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(fitted, run)
    file = run / "model" / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedDataError):
        ep3stream.load(run)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
def test_a_fit_that_ends_while_it_learns_effects_goes_on_to_the_same_bytes(stores, fitted, tmp_path, blow):
    run = tmp_path / "run"
    lines = (
        "import os, ep3stream.training.fit as fit, ep3stream\n"
        "whole = fit.learn_effects\n"
        f"fit.learn_effects = lambda rows, *rest: (os.kill(os.getpid(), {int(blow)}), whole(rows, *rest))\n"
        "from ep3stream import FitConfig\n"
        f"ep3stream.fit({str(stores['regression'])!r}, {str(run)!r}, FitConfig.from_toml({settings().to_toml()!r}, ''))"
    )
    shutil.copytree(fitted, run, ignore=shutil.ignore_patterns("model", "checkpoints"))
    ended = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=120)
    if blow == signal.SIGKILL:
        assert ended.returncode == -blow, ended.stderr
    else:
        assert "Interrupted: SIGTERM" in ended.stderr
    assert not (run / "model").exists()
    ep3stream.fit(stores["regression"], run, settings())
    assert model_bytes(run) == model_bytes(fitted)


def test_ranks_learn_the_effects_of_one_process(stores, fitted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(fitted, run, ignore=shutil.ignore_patterns("model", "checkpoints"))
    ep3stream.fit(stores["regression"], run, settings(), devices=2)
    one, two = (ep3stream.load(each) for each in (fitted, run))
    assert two.effects.crosses == one.effects.crosses
    np.testing.assert_allclose(two.effects.values, one.effects.values, atol=1e-3)
    scores = ep3stream.evaluate(run, stores["regression"], "test", devices=2)
    assert scores["mse"] == pytest.approx(
        ep3stream.evaluate(fitted, stores["regression"], "test")["mse"], rel=1e-3
    )


# Plans.


def test_only_kernels_on_columns_with_few_outputs_have_effects():
    assert wants_effects(settings(), 8)
    assert not wants_effects(settings(), 9)
    assert not wants_effects(settings(effects="none"), 1)
    assert not wants_effects(settings(class_weights="balanced"), 2)
    assert not wants_effects(FitConfig().with_settings({"kernel": {"name": "laplacian"}}, "test"), 1)


def test_rows_and_minutes_are_counted():
    assert most_rows(0, 10, 1) == 0
    assert most_rows(1 << 40, 10, 1) == 1 << 22
    assert 10 * most_rows(1 << 24, 100, 1) > most_rows(1 << 24, 10, 1) > 5 * most_rows(1 << 24, 100, 1)
    plain, scored = (SizeLimits(10_000, 10**6, n_for_effects=n) for n in (0, 10_000))
    assert scored.rows_per_center(2) - plain.rows_per_center(2) == pytest.approx(7000)
    assert scored.rows_per_center(0.5) - plain.rows_per_center(0.5) == pytest.approx(3500)
    for n_for_effects in (0, 10**5, 10**7):
        limits = SizeLimits(10**7, 2000, n_for_effects=n_for_effects)
        sizes = sizes_for(limits, 2000 * 3e6)
        assert sizes.n_centers == 2000
        assert 2.8e6 < limits.rows_per_center(sizes.epochs) <= 3e6


# Arrays, loaders and estimators.


def arrays(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x, (n, 3), two codes and a number, and y with an effect for each pair of codes."""
    random = np.random.default_rng(seed)
    first, second = random.integers(25, size=n), random.integers(40, size=n)
    size = random.normal(size=n)
    planted = np.random.default_rng(11).normal(size=(25, 40))[first, second]
    x = np.stack([first, second, size], 1).astype(np.float32)
    return x, (size + 2 * planted + 0.1 * random.normal(size=n)).astype(np.float32)


def test_kernel_models_learn_effects_from_arrays_and_loaders_and_drop_them_when_trained_on(
    quick_columns, tmp_path
):
    (x, y), (x_test, y_test) = arrays(6000, 0), arrays(1000, 1)
    model = ep3stream.KernelModel(x[:150], "product", categories={0: 25, 1: 40}, nystrom_samples=500)
    loader = [(x[rows : rows + 500], y[rows : rows + 500]) for rows in range(0, 6000, 500)]
    model.fit(loader)

    def error() -> float:
        return float(np.mean((model.predict(x_test).numpy() - y_test) ** 2))

    before = error()
    assert model.learn_effects(loader)
    from_loader = error()
    assert from_loader < 0.6 * before
    model.save(tmp_path / "saved")
    loaded = ep3stream.load(tmp_path / "saved").predict(x_test)
    np.testing.assert_allclose(loaded, model.predict(x_test).numpy(), atol=1e-5)
    assert model.learn_effects((x, y))
    assert error() < 0.6 * before
    model.fit_batch(x[:500], y[:500])
    assert model.predictor().effects is None


def test_kernel_models_with_other_kernels_have_no_effects():
    x, y = arrays(2000, 0)
    model = ep3stream.KernelModel(x[:50], "laplacian", nystrom_samples=200)
    model.fit((x, y))
    assert not model.learn_effects((x, y))
    assert model.predictor().effects is None


def test_estimators_end_with_effects_unless_told_not_to(quick_columns, tmp_path):
    frame, other = (table(n, seed).to_pandas() for n, seed in ((5000, 0), (1000, 1)))
    x, x_test = (each.drop(columns=["y", "label"]) for each in (frame, other))
    small = {"n_centers": 150, "epochs": 2, "random_state": 0}
    scores = {}
    for effects in ("auto", "none"):
        model = ep3stream.KernelRegressor("product", effects=effects, **small).fit(x, frame.y)
        scores[effects] = model.score(x_test, other.y)
        assert (model.model_.effects is None) == (effects == "none")
    assert scores["auto"] > scores["none"] + 0.1
    ep3stream.KernelRegressor("product", **small).fit(x, frame.y).save(tmp_path / "saved")
    again = ep3stream.KernelRegressor.load(tmp_path / "saved")
    assert again.score(x_test, other.y) == pytest.approx(scores["auto"], abs=1e-6)
    classes = ep3stream.KernelClassifier("product", **small).fit(x, frame.label)
    plain = ep3stream.KernelClassifier("product", effects="none", **small).fit(x, frame.label)
    assert classes.score(x_test, other.label) > plain.score(x_test, other.label) + 0.05
    with pytest.raises(ConfigError, match="effects is 'always'"):
        ep3stream.KernelRegressor("product", effects="always", **small).fit(x, frame.y)
