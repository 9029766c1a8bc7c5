"""Successive halving: what it finds on targets whose answer is known, when it stops, and the settings it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_stores import make_store

import ep3stream
from ep3stream import cli
from ep3stream.config import DataConfig, FitConfig, KernelConfig, RunConfig, SolverConfig
from ep3stream.errors import ConfigError
from ep3stream.solver.kernels import RadialKernel
from ep3stream.solver.least_squares import RidgePath
from ep3stream.solver.named_kernels import median_bandwidth
from ep3stream.solver.targets import TargetCode
from ep3stream.tuning.halving import Candidate, Deadline, Rung, Sample, Search, Trial
from ep3stream.tuning.tune import default_out, describe_tuning, tune

RUNGS = (Rung(20, 160), Rung(60, 480))
NEVER = float("inf")


def sample_of(function, d: int = 3, noise: float = 0.0) -> Sample:
    """Normal inputs and the standardised values of a function of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, d, generator=generator)
    y = function(x)[:, None]
    y = y / y.std() + noise * torch.randn(y.shape, generator=generator)
    targets = TargetCode(False, y.mean(0), y.std(0))
    return Sample(x[:60], x[60:540], y[60:540], x[540:], y[540:], targets)


def search(sample: Sample, clock=lambda: 0.0, ends_at: float = NEVER, rungs=RUNGS) -> Search:
    return Search(sample, rungs, False, Deadline(ends_at, clock))


class FakeClock:
    """A second goes by at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def dense_grid_best(sample: Sample, name: str) -> float:
    """The bandwidth of the least held-out error among many, with any of many ridges."""
    median = median_bandwidth(sample.x)
    ridges = [0.0, *np.logspace(-8, 0, 17)]

    def error(bandwidth: float) -> float:
        kernel = RadialKernel(name, bandwidth, sample.x.mean(0))
        path = RidgePath.of(kernel, sample.centers, sample.x, sample.y, sample.targets)
        return float(path.held_out(sample.held_x, sample.held_y, ridges)[0].min())

    return min((median * 2**power for power in np.linspace(-4, 4, 33)), key=error)


@pytest.mark.parametrize("frequency", [3.0, 8.0])
def test_the_bandwidth_is_within_a_factor_two_of_the_best_on_a_dense_grid(frequency):
    sample = sample_of(lambda x: torch.sin(frequency * x[:, 0]), d=1, noise=0.1)
    best = search(sample).run(["gaussian"], False)
    ratio = best.kernel.bandwidth / dense_grid_best(sample, "gaussian")
    assert 0.5 <= ratio <= 2


@pytest.mark.parametrize(
    ("function", "side"), [(lambda x: torch.sin(20 * x[:, 0]), -1), (lambda x: x[:, 0], 1)]
)
def test_a_kernel_best_at_the_end_of_the_grid_is_tried_beyond_it(function, side):
    found = search(sample_of(function, d=1), rungs=[Rung(60, 480)])
    best = found.run(["matern52"], False)
    assert best.candidate.doublings * side > 2
    assert not found.is_at_edge(best)


def test_noisy_labels_get_a_ridge_and_more_of_it():
    few, many = (
        search(sample_of(lambda x: x[:, 0].sin(), noise=noise)).run(["laplacian"], False)
        for noise in (0.1, 2.0)
    )
    assert 0 < few.noise < many.noise


def test_learned_factors_all_but_drop_features_that_nothing_depends_on():
    sample = sample_of(lambda x: torch.sin(2 * x[:, 0]), d=8)
    plain = search(sample).run(["laplacian"], False)
    found = search(sample)
    best = found.run(["laplacian"], True)
    assert best.candidate.is_scaled
    assert best.loss < 0.5 * plain.loss
    assert float(found.feature_scale[1:].max()) < 0.2 * float(found.feature_scale[0])


def test_factors_that_do_not_help_are_not_used():
    sample = sample_of(lambda x: (x**2).sum(1), d=3, noise=0.5)
    best = search(sample, rungs=[Rung(60, 480)]).run(["gaussian"], True)
    assert not best.candidate.is_scaled


def test_a_smoother_kernel_has_to_be_better_to_be_chosen():
    def trial(name: str, doublings: float, loss: float) -> Trial:
        candidate = Candidate(name, doublings)
        return Trial(candidate, KernelConfig(name), RUNGS[0], 0.0, loss, loss, None, None, 0.0)

    assert trial("laplacian", 0, 1.0).penalised_loss < trial("gaussian", 0, 0.99).penalised_loss
    assert trial("laplacian", 0, 1.0).penalised_loss > trial("gaussian", 0, 0.9).penalised_loss
    assert trial("laplacian", 0, 1.0).penalised_loss < trial("laplacian", 1, 0.999).penalised_loss


def test_a_search_ends_with_its_time_and_chooses_from_what_it_has():
    sample = sample_of(lambda x: x[:, 0])
    clock = FakeClock()
    found = search(sample, clock, ends_at=10)
    best = found.run(["laplacian", "gaussian"], True)
    assert 1 < len(found.trials) < 5
    assert best in found.trials
    assert found.is_cut_short
    assert clock.now < 20


def test_a_rung_that_is_likely_to_outlast_the_time_is_not_begun():
    deadline = Deadline(100.0, lambda: 50.0)
    deadline.note(Rung(100, 800), 5.0)
    assert deadline.allows(Rung(200, 800))
    assert not deadline.allows(Rung(400, 800))


def test_a_choice_at_the_end_of_what_there_was_time_for_is_noted(store):
    clock = FakeClock()
    result = quick(store, clock=clock, minutes=0.2)
    assert "more --minutes" in result.notes[0]
    assert "the end of those tried" in result.notes[1]


def test_without_any_time_there_is_still_one_trial():
    found = search(sample_of(lambda x: x[:, 0]), ends_at=-1.0)
    assert found.run(["laplacian", "gaussian"], True) == found.trials[0]
    assert len(found.trials) == 1


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("tune") / "rows.zarr", n_rows=1200)


@pytest.fixture(scope="module")
def noisy_store(tmp_path_factory) -> Path:
    """A sine of the first feature below noise of its own size."""
    folder = tmp_path_factory.mktemp("noisy")
    generator = np.random.default_rng(0)
    x = generator.standard_normal((1200, 3)).astype(np.float32)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", np.sin(x[:, 0]) + 0.7 * generator.standard_normal(1200).astype(np.float32))
    store, files = folder / "rows.zarr", {"x_file": folder / "x.npy", "y_file": folder / "y.npy"}
    ep3stream.convert([], store, ep3stream.ConvertConfig(), **files)
    return store


def quick(store: Path, **settings):
    return tune(store, **{"minutes": 5, "kernels": ["laplacian", "gaussian"], **settings})


def test_the_same_seed_gives_the_same_settings_and_another_one_other_trials(store):
    config = FitConfig(run=RunConfig(seed=3))
    one, other = quick(store, config=config), quick(store, config=config)
    assert one.config == other.config
    losses = [[trial.loss for trial in result.table] for result in (one, other, quick(store))]
    assert losses[0] == losses[1] != losses[2]


def test_the_ridge_is_carried_over_to_all_rows_of_the_split(noisy_store):
    result = quick(noisy_store)
    assert result.best.noise > 0
    assert result.config.solver.ridge == pytest.approx(result.best.noise / 1200, rel=1e-2)


def test_the_published_method_gets_no_ridge(noisy_store):
    result = quick(noisy_store, config=FitConfig(solver=SolverConfig(projection="eigenpro")))
    assert result.config.solver.ridge == 0
    assert any("eigenpro" in note for note in result.notes)


@pytest.mark.parametrize(("centers", "each"), [(1000, 4), (100, 12), (10, 32), ("points.npy", 8)])
def test_trials_have_as_many_rows_per_center_as_the_fit_within_limits(noisy_store, centers, each):
    config = FitConfig(solver=SolverConfig(centers=centers))
    rung = quick(noisy_store, config=config, kernels=["laplacian"]).best.rung
    assert rung.n_rows == each * rung.n_centers
    assert rung.n_rows + 3 * rung.n_centers <= 1200


def test_the_largest_trial_has_as_many_centers_as_were_asked_for(noisy_store, tmp_path):
    command = [
        "tune",
        noisy_store,
        "--out",
        tmp_path / "t.toml",
        "--kernels",
        "laplacian",
        "--centers",
        70,
        "--quiet",
    ]
    assert cli.main(list(map(str, command))) == 0
    asked = quick(noisy_store, kernels=["laplacian"], n_centers=70)
    assert max(trial.rung.n_centers for trial in asked.table) == 70
    assert max(trial.rung.n_centers for trial in quick(noisy_store, kernels=["laplacian"]).table) > 70
    assert FitConfig.from_toml((tmp_path / "t.toml").read_text(), "t.toml") == asked.config
    assert asked.config.solver.centers == "auto"


def test_kernels_without_a_bandwidth_and_with_a_shape_are_tried_too(store):
    table = quick(store, kernels=["ntk_relu", "polynomial", "dispersal"]).table
    assert {trial.candidate.name for trial in table} == {"ntk_relu", "polynomial", "dispersal"}
    shapes = {trial.candidate.shape for trial in table if trial.candidate.name == "dispersal"}
    assert shapes == {0.7, 1.0, 1.5}


def test_the_written_settings_are_read_by_fit_and_beat_the_mean(store, tmp_path, capsys):
    out, run = tmp_path / "tuned.toml", tmp_path / "run"
    command = ["tune", str(store), "--out", str(out), "--validate", "test", "--feature-scale", "--json"]
    assert cli.main([*command, "--kernels", "laplacian"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = FitConfig.from_toml(out.read_text(), str(out))
    assert config.kernel.bandwidth == found["best"]["bandwidth"]
    assert config.solver.ridge == found["best"]["ridge"]
    assert np.load(config.data.feature_scale).shape == (5,)
    settings = ["--centers", "100", "--batch-size", "64", "--epochs", "2"]
    assert cli.main(["fit", str(store), str(run), "--config", str(out), *settings]) == 0
    assert ep3stream.evaluate(run, store)["r2"] > 0.5
    factors = torch.from_numpy(np.load(config.data.feature_scale))
    std = torch.tensor(ep3stream.open_store(store).split("train").info.features.std)
    torch.testing.assert_close(ep3stream.load(run).inputs.scale, (factors / std).float())


def test_the_table_fits_eighty_columns_and_marks_the_choice(tmp_path):
    rows = make_store(tmp_path / "rows.zarr", task="classification", n_rows=600)
    result = quick(rows, by="accuracy", kernels=["rational_quadratic"])
    text = describe_tuning(result.as_json())
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["kernel", "bandwidth", "ridge", "scaled", "rows", "mse", "accuracy"]
    assert [line.startswith("*") for line in lines].count(True) == 2
    assert all(f"{value:.4f}" in text for value in (result.best.accuracy, result.table[0].accuracy))


def test_a_file_is_replaced_only_by_force(store, tmp_path):
    out = tmp_path / "tuned.toml"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="exists; give another --out, or --force"):
        quick(store, out=out)
    assert out.read_text() == "mine"
    quick(store, out=out, force=True, kernels=["laplacian"])
    assert FitConfig.from_toml(out.read_text(), "out").kernel.name == "laplacian"


def test_by_default_the_settings_lie_beside_the_store():
    assert default_out(Path("/data/flights.zarr")) == Path("/data/flights.tuned.toml")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"by": "accuracy"}, "by is 'accuracy', but the store's task is regression"),
        ({"by": "auc"}, "use mse or accuracy"),
        ({"kernels": []}, "kernels is empty"),
        ({"kernels": ["sinc"]}, "sinc"),
        ({"minutes": 0}, "minutes is 0"),
        ({"feature_scale": True}, "give out"),
        ({"config": FitConfig(run=RunConfig(memory_bytes=1000))}, "memory is 1000 bytes"),
        ({"n_centers": 20}, "centers of tune is 20, .* use 60 to "),
        ({"n_centers": 500}, "rows, of which each center takes"),
        ({"n_centers": 60, "config": FitConfig(run=RunConfig(memory_bytes=1000))}, "but 60 centers"),
        ({"out": "/nowhere/at/all.toml"}, "is no directory"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_work(store, settings, words):
    with pytest.raises(ConfigError, match=words):
        tune(store, **{"minutes": 1, **settings})


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        (np.ones(4), r"shape \(4,\); it must be \(5,\)"),
        (np.array([1, 1, 0, 1, 1.0]), "is 0.0 for feature 2"),
        (np.array([1, 1, 1, np.nan, 1]), "is nan for feature 3"),
        (np.array([1, 1, 1, 1, 1e300]), "for feature 4"),
    ],
)
def test_feature_factors_of_the_wrong_shape_or_sign_are_refused(store, tmp_path, factors, words):
    np.save(tmp_path / "f.npy", factors)
    config = FitConfig(
        data=DataConfig(feature_scale=str(tmp_path / "f.npy")), solver=SolverConfig(centers=50)
    )
    with pytest.raises(ConfigError, match=words):
        ep3stream.fit(store, tmp_path / "run", config)


def test_a_missing_file_of_feature_factors_is_named(store, tmp_path):
    config = FitConfig(data=DataConfig(feature_scale="none.npy"), solver=SolverConfig(centers=50))
    with pytest.raises(ConfigError, match=r"feature_scale is 'none.npy', which is no NPY file of \(5,\)"):
        ep3stream.fit(store, tmp_path / "run", config)
