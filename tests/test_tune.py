"""`tune`: what is compared with what, when it stops, what it keeps, and the settings it writes."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_stores import make_store, smooth_rows

import ep3stream
from ep3stream import cli
from ep3stream.config import DataConfig, FitConfig, KernelConfig, RunConfig, SolverConfig
from ep3stream.errors import ConfigError, DivergedError
from ep3stream.tuning.search import Costs, Search, first_candidates, rungs
from ep3stream.tuning.trials import Candidate, Size, Trial, TrialFits, paired
from ep3stream.tuning.tune import default_out, describe_tuning, tune

DEFAULT = Candidate(KernelConfig("laplacian"))
NEVER = float("inf")
RUNGS = (Size(100, 1000), Size(200, 2000), Size(400, 4000))


class FakeFits:
    """Trials of known losses: loss(candidate) on average, a common part and one of the candidate's own in each row.

    A fit takes `seconds(size)` of the clock that the search reads.
    """

    def __init__(self, loss, own=0.1, n_held=2000, seconds=lambda size: 1.0, fails=()) -> None:
        self.loss, self.own, self.seconds, self.fails, self.now = loss, own, seconds, fails, 0.0
        self.common = torch.randn(n_held, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def fit(self, candidate: Candidate, size: Size) -> Trial:
        if candidate in self.fails:
            raise DivergedError("the loss blew up")
        self.now += self.seconds(size)
        generator = torch.Generator().manual_seed(zlib.crc32(repr(candidate).encode()))
        own = torch.randn(len(self.common), generator=generator, dtype=torch.float64)
        losses = self.loss(candidate) + 3 * self.common + self.own * (own - own.mean())
        return Trial(candidate, size, losses, 1.0, 0.0, None, self.seconds(size))

    def search(self, ends_at: float = NEVER, sizes=RUNGS, **settings) -> Search:
        return Search(
            fit=self.fit,
            learning_seconds=lambda kernel: 0.0,
            bandwidth=lambda kernel: 4.0 if kernel.bandwidth == "median" else kernel.bandwidth,
            sizes=sizes,
            ends_at=ends_at,
            clock=lambda: self.now,
            **settings,
        )


def by_kernel(**losses):
    return lambda candidate: losses[candidate.kernel.name]


def named(*names):
    return [DEFAULT, *(Candidate(KernelConfig(name)) for name in names)]


def tried(search: Search, name: str) -> set[Size]:
    return {trial.size for trial in search.trials if trial.candidate.kernel.name == name}


def test_losses_are_compared_row_by_row():
    # Rows differ by 3, the two candidates by 0.02 +- 0.003: only paired losses can tell.
    fits = FakeFits(by_kernel(laplacian=1.0, gaussian=0.98))
    one, other = (fits.fit(candidate, RUNGS[0]) for candidate in named("gaussian"))
    excess, error = one.excess(other)
    assert excess == pytest.approx(0.02, abs=0.001)
    assert error == pytest.approx(0.1 * math.sqrt(2 / 2000), rel=0.1)
    assert paired(torch.zeros(4), torch.tensor([1.0, 1, 3, 3])) == (-2, pytest.approx(2 / math.sqrt(12)))


def test_only_what_is_worse_by_two_standard_errors_is_left_out():
    fits = FakeFits(by_kernel(laplacian=0.9, gaussian=0.904, matern32=0.91))
    search = fits.search(has_one_ridge=lambda _: False)
    search.run(named("gaussian", "matern32"))
    assert tried(search, "gaussian") == set(RUNGS)
    assert tried(search, "matern32") == {RUNGS[0]}


def test_the_default_is_fitted_on_every_rung_however_bad_it_is():
    fits = FakeFits(by_kernel(laplacian=2.0, gaussian=0.5))
    search = fits.search()
    verdict = search.run(named("gaussian"))
    assert {trial.size for trial in search.trials if trial.candidate == DEFAULT} == set(RUNGS)
    assert verdict.best.candidate.kernel.name == "gaussian"
    assert verdict.best.size == verdict.default.size == RUNGS[-1]


@pytest.mark.parametrize(("gain", "is_kept"), [(0.0, True), (0.001, True), (0.005, True), (0.02, False)])
def test_the_default_is_kept_unless_another_is_better_by_two_standard_errors(gain, is_kept):
    fits = FakeFits(by_kernel(laplacian=1.0, gaussian=1 - gain))
    verdict = fits.search(has_one_ridge=lambda _: False).run(named("gaussian"))
    assert verdict.is_default == is_kept
    assert (verdict.best.candidate == DEFAULT) == is_kept


def test_no_model_is_favoured_for_its_bandwidth():
    # Narrow kernels predict nothing: their loss is that of the mean, which must not be taken for a good one.
    def loss(candidate: Candidate) -> float:
        bandwidth = candidate.kernel.bandwidth
        return 0.97 if bandwidth == "median" else 0.98 if bandwidth > 4 else 1.0

    search = FakeFits(loss).search(has_one_ridge=lambda _: False)
    verdict = search.run(first_candidates(DEFAULT, ["laplacian"], search.bandwidth))
    assert verdict.is_default


def test_a_kernel_best_at_the_end_of_the_grid_is_tried_beyond_it():
    def loss(candidate: Candidate) -> float:
        bandwidth = candidate.kernel.bandwidth
        return 1 + 0.1 * abs(math.log2((4.0 if bandwidth == "median" else bandwidth) / 64))

    search = FakeFits(loss).search(has_one_ridge=lambda _: False)
    best = search.run(first_candidates(DEFAULT, ["laplacian"], search.bandwidth)).best
    assert best.candidate.kernel.bandwidth == pytest.approx(64, rel=0.1)


def test_sharpness_powers_and_ridges_of_the_best_are_tried():
    def loss(candidate: Candidate) -> float:
        kernel = candidate.kernel
        sharpness, power = abs(math.log2(kernel.sharpness / 2)), abs(kernel.parameters()["power"] - 1.4)
        return 1 + 0.1 * sharpness + 0.1 * power + 0.1 * abs((candidate.noise or 0.0) - 1)

    best = FakeFits(loss).search().run([Candidate(KernelConfig("product"))]).best
    assert best.candidate == Candidate(KernelConfig("product", power=1.4, sharpness=2.0), 1.0)


def test_candidates_that_fail_are_left_out_but_the_default_is_not():
    gaussian = Candidate(KernelConfig("gaussian"))
    verdict = (
        FakeFits(by_kernel(laplacian=1.0), fails=[gaussian])
        .search(has_one_ridge=lambda _: False)
        .run([DEFAULT, gaussian])
    )
    assert verdict.is_default
    with pytest.raises(DivergedError):
        FakeFits(by_kernel(gaussian=1.0), fails=[DEFAULT]).search().run([DEFAULT, gaussian])


@pytest.mark.parametrize("seconds_of_a_fit", [20, 100, 2000])
def test_the_time_is_used_and_never_exceeded(seconds_of_a_fit):
    sizes = rungs(200_000, 8000)
    full = sizes[-1].n_centers * sizes[-1].n_rows

    def seconds(size: Size) -> float:
        return 0.1 + seconds_of_a_fit * size.n_centers * size.n_rows / full

    fits = FakeFits(by_kernel(laplacian=1.0, gaussian=0.9), seconds=seconds)
    search = fits.search(ends_at=300, sizes=sizes)
    verdict = search.run(named("gaussian"))
    assert fits.now <= 300
    assert fits.now > 200 or verdict.best.size == sizes[-1]
    assert verdict.default.size.n_centers >= 0.5 * 8000 * min(1, math.sqrt(150 / seconds_of_a_fit))


def test_a_rung_on_which_only_the_default_could_be_fitted_decides_nothing():
    slow = lambda size: 1.0 if size == RUNGS[0] else 60.0  # noqa: E731
    fits = FakeFits(by_kernel(laplacian=1.0, gaussian=0.5), seconds=slow)
    verdict = fits.search(ends_at=65, has_one_ridge=lambda _: False).run(named("gaussian"))
    assert verdict.best.candidate.kernel.name == "gaussian"
    assert verdict.best.size == RUNGS[0]


def test_without_any_time_there_is_still_the_default():
    search = FakeFits(by_kernel(laplacian=1.0)).search(ends_at=-1.0)
    verdict = search.run(named("gaussian"))
    assert verdict.is_default
    assert len(search.trials) == 1
    assert (named("gaussian")[1], RUNGS[0]) in search.late


def test_costs_follow_what_was_measured_at_several_sizes():
    costs = Costs()
    assert costs.seconds(DEFAULT, RUNGS[0]) == 0
    costs.note(DEFAULT, RUNGS[0], 2 + 1e-5 * 100 * 1000)
    assert costs.seconds(DEFAULT, RUNGS[1]) == pytest.approx(4 * 3.0)
    costs.note(DEFAULT, RUNGS[1], 2 + 1e-5 * 200 * 2000)
    assert costs.seconds(DEFAULT, RUNGS[2]) == pytest.approx(2 + 1e-5 * 400 * 4000)
    assert costs.seconds(named("gaussian")[1], RUNGS[2]) == costs.seconds(DEFAULT, RUNGS[2])


def test_rungs_grow_to_the_size_of_the_fit():
    assert rungs(900, 180) == [Size(180, 900)]
    sizes = rungs(10**8, 20_000)
    assert sizes[-1] == Size(20_000, 10**8)
    assert all(size.n_rows == 64 * size.n_centers for size in sizes[:-1])
    assert 250 <= sizes[0].n_centers < 500


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("tune") / "rows.zarr", n_rows=1200)


def store_of(folder: Path, target) -> Path:
    """1200 rows of five features whose target is `target` of them and of a random generator; no other split."""
    x, generator = smooth_rows(1200)[0], np.random.default_rng(1)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", target(x, generator).astype(np.float32))
    files = {"x_file": folder / "x.npy", "y_file": folder / "y.npy"}
    ep3stream.convert([], folder / "rows.zarr", ep3stream.ConvertConfig(), **files)
    return folder / "rows.zarr"


@pytest.fixture(scope="module")
def noisy_store(tmp_path_factory) -> Path:
    """A sine of the first feature below noise of its own size."""
    folder = tmp_path_factory.mktemp("noisy")
    return store_of(folder, lambda x, random: np.sin(x[:, 0]) + 0.7 * random.standard_normal(1200))


@pytest.fixture(scope="module")
def pure_noise(tmp_path_factory) -> Path:
    """A target that no feature tells anything of."""
    return store_of(tmp_path_factory.mktemp("noise"), lambda x, random: random.standard_normal(1200))


LAPLACIAN = FitConfig(kernel=KernelConfig("laplacian"))


def quick(store: Path, **settings):
    given = {"config": LAPLACIAN, "minutes": 5, "kernels": ["laplacian", "gaussian"], "n_centers": 60}
    return tune(store, **given | settings)


def test_the_same_seed_gives_the_same_settings_and_another_one_other_trials(store):
    config = replace(LAPLACIAN, run=RunConfig(seed=3))
    one, other, third = (
        quick(store, config=each, kernels=["laplacian"]) for each in (config, config, LAPLACIAN)
    )
    assert one.config == other.config
    losses = [[trial.loss for trial in result.table] for result in (one, other, third)]
    assert losses[0] == losses[1] != losses[2]


def test_where_nothing_is_better_the_settings_are_those_that_were_given(pure_noise, tmp_path):
    config = FitConfig(kernel=KernelConfig("laplacian", bandwidth=1e4), solver=SolverConfig(ridge=1e3))
    result = quick(pure_noise, config=config, kernels=["laplacian"], out=tmp_path / "t.toml")
    assert result.best is result.default
    assert result.config == config == FitConfig.from_toml((tmp_path / "t.toml").read_text(), "t.toml")
    assert "keep the default" in result.notes[0]
    assert any("the mean of the targets" in note for note in result.notes)


def test_what_beats_the_mean_has_no_such_warning(noisy_store):
    result = quick(noisy_store)
    assert not any("the mean of the targets" in note for note in result.notes)


def test_a_far_too_narrow_bandwidth_is_replaced_by_what_is_better(store):
    config = FitConfig(kernel=KernelConfig("laplacian", bandwidth=0.02))
    result = quick(store, config=config, kernels=["laplacian"])
    assert "better than the default by" in result.notes[0]
    assert result.config.kernel != config.kernel
    assert result.best.r2 > result.default.r2 + 0.5


def test_the_ridge_is_carried_over_to_all_rows_of_the_split(noisy_store):
    result = quick(
        noisy_store, config=replace(LAPLACIAN, solver=SolverConfig(ridge=1.0)), kernels=["laplacian"]
    )
    assert result.best.candidate.noise > 0
    assert result.config.solver.ridge == pytest.approx(result.best.candidate.noise / 1200, rel=1e-2)


def test_the_published_method_gets_no_ridge(noisy_store):
    result = quick(noisy_store, config=replace(LAPLACIAN, solver=SolverConfig(projection="eigenpro")))
    assert {trial.candidate.noise for trial in result.table} == {0.0}


def test_a_trial_of_the_size_of_the_fit_scores_as_the_fit_does(store, tmp_path):
    config = FitConfig(DataConfig(validate="test"), LAPLACIAN.kernel, SolverConfig(centers=200, epochs=4))
    result = quick(store, config=config, kernels=["laplacian"], n_centers=None, minutes=0.01)
    run = ep3stream.fit(store, tmp_path / "run", config)
    assert result.default.size.n_centers == 200
    assert result.default.r2 == pytest.approx(ep3stream.evaluate(run, store, "test")["r2"], abs=0.05)


def test_the_largest_trial_has_as_many_centers_as_were_asked_for(noisy_store, tmp_path):
    out = tmp_path / "t.toml"
    (tmp_path / "fit.toml").write_text(LAPLACIAN.to_toml())
    command = ["tune", noisy_store, "--config", tmp_path / "fit.toml", "--out", out]
    command += ["--kernels", "laplacian", "--centers", 70, "--quiet"]
    assert cli.main(list(map(str, command))) == 0
    asked = quick(noisy_store, kernels=["laplacian"], n_centers=70)
    untimed = replace(LAPLACIAN, run=RunConfig(minutes=0))
    default = quick(noisy_store, config=untimed, kernels=["laplacian"], minutes=0.01, n_centers=None)
    assert {trial.size.n_centers for trial in default.table} == {216}
    assert {trial.size.n_centers for trial in asked.table} == {70}
    assert FitConfig.from_toml(out.read_text(), "t.toml") == asked.config
    assert asked.config.solver.centers == "auto"


def test_kernels_without_a_bandwidth_and_with_a_shape_are_tried_too(store):
    table = quick(store, kernels=["ntk_relu", "polynomial", "dispersal"]).table
    kernels = {trial.candidate.kernel.name for trial in table}
    assert kernels == {"laplacian", "ntk_relu", "polynomial", "dispersal"}
    shapes = {trial.candidate.kernel.shape for trial in table if trial.candidate.kernel.name == "dispersal"}
    assert shapes == {0.7, 1.0, 1.5}


@pytest.mark.usefixtures("quick_columns")
def test_a_kernel_on_columns_is_found_and_the_written_settings_are_read_by_fit(tmp_path, capsys):
    # Of four features two matter; a kernel of distances counts all alike.
    x = np.random.default_rng(0).standard_normal((1500, 4)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=x, y=(np.sin(2 * x[:, 0]) + 0.5 * x[:, 1]).astype(np.float32))
    store, out, run = tmp_path / "rows.zarr", tmp_path / "tuned.toml", tmp_path / "run"
    ep3stream.convert(
        tmp_path / "rows.npz", store, ep3stream.ConvertConfig(splits={"train": 0.7, "test": 0.3})
    )
    (tmp_path / "fit.toml").write_text(LAPLACIAN.to_toml())
    command = ["tune", str(store), "--config", str(tmp_path / "fit.toml"), "--out", str(out)]
    command += ["--validate", "test", "--json"]
    assert cli.main([*command, "--kernels", "product", "--centers", "100"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = FitConfig.from_toml(out.read_text(), str(out))
    assert config.kernel.name == found["best"]["kernel"] == "product"
    assert config.kernel.sharpness == found["best"]["sharpness"]
    assert found["best"]["better_by"] > 2 * found["best"]["standard_error"]
    settings = ["--centers", "100", "--epochs", "2", "--validate", "none"]
    assert cli.main(["fit", str(store), str(run), "--config", str(out), *settings]) == 0
    assert ep3stream.evaluate(run, store)["r2"] > found["default"]["r2"] + 0.05


def test_the_table_fits_eighty_columns_and_marks_the_choice(tmp_path):
    rows = make_store(tmp_path / "rows.zarr", task="classification", n_rows=600)
    config = FitConfig(kernel=KernelConfig("rational_quadratic", bandwidth=0.01))
    result = quick(rows, config=config, by="accuracy", kernels=["rational_quadratic"])
    text = describe_tuning(result.as_json())
    lines = text.splitlines()
    assert max(len(line) for line in lines if not line.startswith("note:")) <= 80
    assert lines[0].split() == [
        "kernel", "width", "ridge", "centers", "rows", "accuracy", "better", "by",
    ]  # fmt: skip
    assert sum(line.startswith("*") for line in lines) == 2
    assert sum(line.startswith("d") for line in lines) == 1
    assert all(f"{value:.4f}" in text for value in (result.best.accuracy, result.table[0].accuracy))
    assert "in the accuracy on" in text


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
        ({"config": FitConfig(run=RunConfig(memory_bytes=1000))}, "memory is"),
        ({"n_centers": 5}, "centers of tune is 5, .* use 10 to "),
        ({"n_centers": 500}, "rows of split train to fit; use 10 to 393"),
        ({"out": "/nowhere/at/all.toml"}, "is no directory"),
    ],
)
def test_settings_that_cannot_be_are_refused(store, settings, words):
    with pytest.raises(ConfigError, match=words):
        tune(store, **{"minutes": 1, **settings})


def test_sharpness_is_for_kernels_on_columns_alone():
    with pytest.raises(ConfigError, match="sharpness is 2, which the laplacian kernel does not have"):
        KernelConfig("laplacian", sharpness=2)
    assert KernelConfig("anova", sharpness=2).parameters() == {"power": 1.0}


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


def test_learning_is_reckoned_by_what_was_learnt_before():
    fits = TrialFits(None, np.arange(1), (torch.zeros(1, 1), torch.zeros(1)), FitConfig(), False, 1)
    assert fits.learning_seconds(KernelConfig("product")) == 0
    fits.learning_s = 10.0
    assert fits.learning_seconds(KernelConfig("anova")) == 20
    assert fits.learning_seconds(KernelConfig("product", power=0.7)) == 40
    assert fits.learning_seconds(KernelConfig("gaussian")) == 0


def test_a_trial_leaves_the_rows_of_the_sample_in_their_order(store):
    with ep3stream.open_store(store) as rows:
        reader = rows.split("train")
        held = tuple(map(torch.from_numpy, reader.read_rows(np.arange(50))))
        config = replace(
            LAPLACIAN, solver=SolverConfig(tail=32)
        )  # Which puts centers next to their neighbours.
        fits = TrialFits(reader, np.arange(50, 800), held, config, False, 300)
        first = fits.fit(DEFAULT, Size(200, 700))
        known = reader.read_rows(np.arange(50, 800))[0]
        assert np.array_equal(fits._rows[0].numpy(), known[: len(fits._rows[0])])
        assert torch.equal(fits.fit(DEFAULT, Size(200, 700)).losses, first.losses)


def test_what_the_first_rung_had_no_time_for_is_tried_at_the_end():
    fits = FakeFits(by_kernel(laplacian=1.0, gaussian=0.9, anova=0.5))
    learning = {"anova": 40.0}
    search = fits.search(ends_at=100, has_one_ridge=lambda _: False)
    search.learning_seconds = lambda kernel: learning.get(kernel.name, 0.0)
    verdict = search.run(named("gaussian", "anova"))
    assert tried(search, "anova") == {RUNGS[-1]}
    assert verdict.best.candidate.kernel.name == "anova"
