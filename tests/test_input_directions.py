"""Leading directions of wide inputs: how many, how long, and fits, models and programs that have them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_stores import plain_config
from test_fit import Stop, kill_at, model_bytes

import ep3stream
from ep3stream import FitConfig, KernelRegressor, load, open_store
from ep3stream.errors import ConfigError, DamagedDataError
from ep3stream.run.bundle import read_bundle, write_bundle
from ep3stream.run.directory import SETUP_KIND
from ep3stream.run.setup import Setup
from ep3stream.solver.export import exported_program
from ep3stream.solver.input_directions import PAIR_ERROR, leading, narrowing
from ep3stream.solver.input_scaling import InputScaling
from ep3stream.solver.kernels import RadialKernel
from ep3stream.solver.named_kernels import median_bandwidth


def wide_rows(n: int, d: int = 96, rank: int = 10, noise: float = 0.02, seed: int = 0) -> torch.Tensor:
    """Rows of few directions, and a little of all others."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, d, generator=torch.Generator().manual_seed(9))
    inner = torch.randn(n, rank, generator=generator)
    return 3 + inner @ basis + noise * torch.randn(n, d, generator=generator)


def laplacian(points: torch.Tensor) -> RadialKernel:
    return RadialKernel("laplacian", median_bandwidth(points), points.mean(0))


@pytest.mark.parametrize("n", [300, 60])
def test_directions_are_those_of_most_variance_and_keep_the_mean_of_squared_distances(n):
    x = wide_rows(n, noise=0.5)
    found = leading(x, 10)
    centred = (x - x.mean(0)).double()
    basis = torch.linalg.svd(centred)[2][:10].T
    assert found.basis.shape == (96, 10)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(10), atol=1e-4, rtol=0)
    inside = basis @ (basis.T @ found.basis.double())
    torch.testing.assert_close(inside, found.basis.double(), atol=1e-4, rtol=0)
    assert float(found(x).var(0).sum() / x.var(0).sum()) == pytest.approx(1, rel=1e-4)
    rest = (centred - centred @ basis @ basis.T).norm(dim=1) * found.stretch
    torch.testing.assert_close(found(x)[:, 10], rest.float(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found(x[0]), found(x)[0])


def test_rows_that_lie_far_from_the_directions_are_far_from_rows_near_them():
    x = wide_rows(1000)
    beyond = torch.linalg.svd(x - x.mean(0))[2][-1]
    found = leading(x, 10)
    near, far = found(x[:1]), found(x[:1] + 5 * beyond)
    assert float((near - far).norm()) == pytest.approx(5 * found.stretch, rel=0.05)


def test_as_many_directions_are_taken_as_the_error_on_new_pairs_asks_for():
    x, new = wide_rows(1000, seed=1), wide_rows(600, seed=2)
    found = narrowing(x, x[:, :2] - x[:, :2].mean(0), laplacian)
    assert found.basis.shape[1] == 10
    kernel, narrow = laplacian(x), laplacian(found(x))
    blocks = [
        each.block(each.left(rows[:300]), each.right(rows[300:]))
        for each, rows in ((kernel, new), (narrow, found(new)))
    ]
    assert float((blocks[0] - blocks[1]).square().mean().sqrt()) < PAIR_ERROR
    fewer = leading(x, 9)(x)
    few = laplacian(fewer).block(laplacian(fewer).left(fewer[:300]), laplacian(fewer).right(fewer[300:600]))
    assert float((few - kernel.block(kernel.left(x[:300]), kernel.right(x[300:600]))).std()) > PAIR_ERROR


@pytest.mark.parametrize("x", [torch.randn(1000, 96), wide_rows(1000, d=60), wide_rows(40)])
def test_nothing_is_left_out_where_it_would_show_or_save_nothing_or_cannot_be_known(x):
    assert narrowing(x, x[:, :1], laplacian) is None


def test_nothing_is_left_out_that_tells_of_the_targets():
    x = wide_rows(3000, noise=0.15)
    beyond = torch.linalg.svd(x - x.mean(0))[2][-1]
    inner = narrowing(x, torch.sin(x[:, :1]), laplacian)
    assert inner is not None
    y = (x - x.mean(0)) @ beyond[:, None]
    assert narrowing(x, y / y.std(), laplacian) is None


def test_a_number_of_directions_is_taken_as_it_is_given():
    x = wide_rows(300, d=20)
    assert leading(x, 5).basis.shape == (20, 5)
    assert leading(x, 20) is None


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "wide.zarr"
    x = wide_rows(1500, seed=1)
    y = torch.sin(x[:, 0]) + x[:, 1] / 3
    config = ep3stream.ConvertConfig(splits={"train": 0.8, "test": 0.2}, segment_bytes=1 << 16)
    ep3stream.convert((x.numpy(), y.numpy()), path, config)
    return path


def settings(rank: object, kernel: str = "laplacian", **solver: object) -> FitConfig:
    sizes = {"centers": 120, "model_rank": 30, "batch_size": 32, "epochs": 2}
    data = {"inputs_rank": rank, "validate": "none"}
    return plain_config(
        data=data, kernel={"name": kernel}, solver=sizes | solver, run={"checkpoint_steps": 7}
    )


@pytest.fixture(scope="module")
def run(store, tmp_path_factory) -> Path:
    return ep3stream.fit(store, tmp_path_factory.mktemp("runs") / "run", settings("auto"))


def test_a_fit_a_saved_model_and_a_program_have_the_directions(store, run, tmp_path):
    model = ep3stream.load(run)
    assert model.inputs.leading.basis.shape == (96, 10)
    assert model.centers.shape == (120, 96)
    assert ep3stream.inspect(run)["plan"]["n_directions"] == 10
    full = ep3stream.fit(store, tmp_path / "full", settings("full"))
    assert ep3stream.load(full).inputs.leading is None
    r2, of_full = (ep3stream.evaluate(each, store)["r2"] for each in (run, full))
    assert r2 > of_full - 0.02 > 0.5
    rows = wide_rows(50, seed=3)
    points = model.inputs(rows)
    by_hand = model.kernel.block(model.kernel.left(model.inputs(model.centers)), model.kernel.right(points))
    outputs = model.targets.decode((by_hand.T @ model.weights).T)[:, 0]
    np.testing.assert_allclose(model.predict(rows), outputs, rtol=1e-4, atol=1e-4)
    program = exported_program(model).module()(rows)[:, 0]
    np.testing.assert_allclose(program, outputs, rtol=1e-3, atol=1e-3)


def test_killed_it_ends_with_the_same_bytes(store, run, tmp_path):
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", settings("auto"), observe=kill_at(24))
    ep3stream.fit(store, tmp_path / "run", settings("auto"))
    assert model_bytes(tmp_path / "run") == model_bytes(run)


@pytest.mark.parametrize("projection", ["exact", "eigenpro"])
@pytest.mark.parametrize("centers", ["120", "kmeans:120"])
def test_other_projections_and_centers_take_directions(store, tmp_path, projection, centers):
    given = {
        "centers": centers if ":" in centers else int(centers),
        "projection": projection,
        "model_rank": 0,
    }
    run = ep3stream.fit(store, tmp_path / "run", settings(10, **given))
    assert ep3stream.load(run).inputs.n_inputs == 11
    assert ep3stream.evaluate(run, store)["r2"] > 0.3


def test_kernels_without_distances_have_no_directions(store, tmp_path):
    with pytest.raises(ConfigError, match="inputs_rank is 5, but the polynomial kernel takes no distances"):
        ep3stream.fit(store, tmp_path / "polynomial", settings(5, "polynomial"))
    run = ep3stream.fit(store, tmp_path / "auto", settings("auto", "polynomial"))
    assert ep3stream.load(run).inputs.leading is None


def test_impossible_directions_are_damage(run, tmp_path):
    bundle = read_bundle(run / "setup", SETUP_KIND)
    wrong: dict[str, torch.Tensor]
    for wrong in (
        {"input_leading": torch.ones(95, 10)},
        {"input_leading": torch.ones(96, 9)},
        {"input_origin": torch.ones(95)},
    ):
        write_bundle(tmp_path / "setup", SETUP_KIND, bundle.tensors | wrong, bundle.description)
        with pytest.raises(DamagedDataError, match="inputs has leading directions"):
            Setup.load(tmp_path / "setup")
    description = deepcopy(bundle.description)
    description["inputs"]["leading"]["stretch"] = 0.0
    write_bundle(tmp_path / "setup", SETUP_KIND, bundle.tensors, description)
    with pytest.raises(DamagedDataError, match=r"inputs has the stretch 0\.0"):
        Setup.load(tmp_path / "setup")


def test_a_vector_scales_each_feature_and_a_matrix_mixes_them():
    scaling = InputScaling(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0]), (0, 2))
    x = torch.tensor([[2.0, 1.0], [0.0, 0.0]])
    vector, matrix = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([[1.0], [5.0], [7.0]])
    assert scaling.along(vector)(x).tolist() == [[6, 0, 2], [-6, 1, 0]]
    assert scaling.along(matrix)(x).tolist() == [[9], [3]]
    assert scaling.along(matrix).of_mean(torch.tensor([2.0, 1.0])).tolist() == [2]
    for given in (vector, matrix):
        one = scaling.along(given)
        assert torch.equal(InputScaling.described(one.tensors(), one.description())(x), one(x))


def test_leading_directions_come_after_a_metric_and_are_described():
    x = wide_rows(50, d=6, rank=3)
    scaling = InputScaling.identity(6).along(torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 3.0]))
    narrow = replace(scaling, leading=leading(scaling(x), 2))
    assert torch.equal(narrow(x), narrow.leading(scaling(x)))
    assert narrow.n_inputs == 3
    assert (
        InputScaling.described(narrow.tensors(), narrow.description()).description() == narrow.description()
    )
    assert torch.equal(InputScaling.described(narrow.tensors(), narrow.description())(x), narrow(x))
    assert narrow.along(None)(x).tolist() == x.tolist()
    assert len(narrow.main_columns) == 3


def wide_arrays(n: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    x = wide_rows(n, seed=1).numpy()
    return x, np.sin(x[:, 0])


def regressor(**settings: object) -> KernelRegressor:
    given = {"kernel": "laplacian", "n_centers": 100, "epochs": 2, "scale": "none", "random_state": 0}
    return KernelRegressor(**given | settings)


def test_an_estimator_takes_directions_and_goes_on_with_them_after_it_was_saved(tmp_path):
    x, y = wide_arrays()
    model = regressor().fit(x, y)
    full = regressor(inputs_rank="full").fit(x, y)
    assert model.model_.inputs.n_inputs < 20
    assert full.model_.inputs.n_inputs == 96
    assert model.score(x, y) > full.score(x, y) - 0.02
    model.save(tmp_path / "saved")
    loaded = KernelRegressor.load(tmp_path / "saved")
    assert np.array_equal(loaded.predict(x), model.predict(x))
    again, more = (each.partial_fit(x[:700], y[:700]).predict(x) for each in (loaded, model))
    assert np.array_equal(again, more)


def test_an_estimator_takes_a_given_number_of_directions_also_in_partial_fit():
    x, y = wide_arrays(1000)
    assert regressor(inputs_rank=12).fit(x, y).model_.inputs.n_inputs == 13
    assert regressor(inputs_rank=12).partial_fit(x, y).model_.inputs.n_inputs == 13


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"inputs_rank": 0}, "inputs_rank is 0"),
        ({"inputs_rank": "some"}, "inputs_rank is 'some'"),
        ({"inputs_rank": 5, "kernel": "product"}, "the product kernel takes no distances"),
    ],
)
def test_an_estimator_refuses_an_impossible_number_of_directions(settings, words):
    with pytest.raises(ConfigError, match=words):
        regressor(**settings).fit(*wide_arrays(300))


def test_an_estimator_of_a_split_has_the_directions_of_a_fit(store, run):
    with open_store(store) as rows:
        found = regressor(scale="standard", validation_fraction=0).fit(rows.split("train"))
    assert torch.equal(found.model_.inputs.leading.basis, load(run).inputs.leading.basis)
