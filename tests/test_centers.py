"""Where centers come from: rows, clusters, files and other stores."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_problem import ONE_RANK, generator, laplacian, points
from small_stores import make_store
from test_fit import settings

import ep3stream
from ep3stream.config import SolverConfig
from ep3stream.errors import ConfigError, InputError
from ep3stream.solver.set_up import SolverBuilder
from ep3stream.training.plan import ProblemSize, SizePlan


@pytest.fixture(scope="module", params=["zarr", "h5"])
def store(request, tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / f"smooth.{request.param}")


def with_centers(centers: object, **solver):
    return settings(solver={"centers": str(centers), **solver})


def test_a_split_of_a_store_gives_its_rows_as_centers(store, tmp_path):
    run = ep3stream.fit(store, tmp_path / "run", with_centers(store / "test", tail="none"))
    with ep3stream.open_store(store) as rows:
        reader = rows.split("test")
        x, _ = reader.read_rows(np.arange(reader.info.n_rows))
    assert np.array_equal(ep3stream.load(run).centers.numpy(), x)


def test_a_store_without_that_split_is_named(store, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        ep3stream.fit(store, tmp_path / "run", with_centers(store / "nowhere"))


def test_a_store_with_other_features_is_refused(store, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    np.save(folder / "x.npy", np.zeros((50, 3), np.float32))
    np.save(folder / "y.npy", np.arange(50, dtype=np.float32))
    ep3stream.convert(
        [], folder / "s.zarr", ep3stream.ConvertConfig(), x_file=folder / "x.npy", y_file=folder / "y.npy"
    )
    with pytest.raises(ConfigError, match=r"whose features are not those of .*--like"):
        ep3stream.fit(store, tmp_path / "run", with_centers(folder / "s.zarr" / "train"))


def test_what_is_neither_file_nor_store_is_named(store, tmp_path):
    with pytest.raises(ConfigError, match=r"centers is .*nothing.*no NPY file of \(p, 5\)"):
        ep3stream.fit(store, tmp_path / "run", with_centers(tmp_path / "nothing"))


def test_clusters_lie_closer_to_the_rows_than_rows_do(store, tmp_path):
    with ep3stream.open_store(store) as rows:
        x = torch.from_numpy(rows.split("test").read_rows(np.arange(200))[0])
    distances = {}
    for centers in (40, "kmeans:40"):
        run = ep3stream.fit(store, tmp_path / str(centers)[:3], settings(solver={"centers": centers}))
        distances[centers] = float(torch.cdist(x, ep3stream.load(run).centers).amin(1).square().mean())
    assert distances["kmeans:40"] < 0.95 * distances[40]
    assert ep3stream.evaluate(run, store)["r2"] > 0.5


def test_clusters_keep_a_constant_feature_as_it_is(tmp_path):
    x = np.random.default_rng(0).standard_normal((500, 3)).astype(np.float32)
    x[:, 1] = 7
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", x[:, 0])
    ep3stream.convert(
        [],
        tmp_path / "s.zarr",
        ep3stream.ConvertConfig(),
        x_file=tmp_path / "x.npy",
        y_file=tmp_path / "y.npy",
    )
    centers = ep3stream.load(
        ep3stream.fit(tmp_path / "s.zarr", tmp_path / "run", with_centers("kmeans:20"))
    ).centers.numpy()
    assert np.allclose(centers[:, 1], 7)
    assert np.allclose(centers.std(0)[[0, 2]], 1, atol=0.4)


@pytest.mark.parametrize("centers", ["kmeans:", "kmeans:x", "kmeans:0", "kmeans:100000", "kmeans:-3"])
def test_a_number_of_clusters_that_cannot_be_is_named(store, tmp_path, centers):
    with pytest.raises(
        ConfigError, match=rf"centers is '{centers}'; write kmeans:N with N .* from 1 to the 12"
    ):
        ep3stream.fit(store, tmp_path / "run", with_centers(centers))


def test_clusters_without_scikit_learn_name_the_extra(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ConfigError, match=r"needs scikit-learn; pip install 'ep3stream\[kmeans\]'"):
        ep3stream.fit(store, tmp_path / "run", with_centers("kmeans:10"))


@pytest.mark.parametrize("projection", ["nystrom", "eigenpro", "exact"])
def test_sorted_centers_are_as_good_as_shuffled_ones(store, tmp_path, projection):
    centers = np.random.default_rng(3).standard_normal((300, 5)).astype(np.float32)
    r2 = []
    for name, order in (("shuffled", slice(None)), ("sorted", centers[:, 0].argsort())):
        np.save(tmp_path / f"{name}.npy", centers[order])
        config = with_centers(tmp_path / f"{name}.npy", projection=projection, nystrom_samples=60)
        r2.append(ep3stream.evaluate(ep3stream.fit(store, tmp_path / name, config), store)["r2"])
    assert r2[1] > r2[0] - 0.02


def test_landmarks_are_drawn_from_all_centers_not_from_the_first() -> None:
    """Two far clusters, one behind the other: landmarks of the first alone would know nothing of the second."""
    z = points(200, 2, 0, torch.float32)
    z[100:] += 1000
    settled = SolverConfig(model_rank=10, nystrom_samples=20)
    plan = SizePlan.of(ProblemSize(1000, 2, 1, 1000, 12, True), settled, len(z), 1 << 28)
    assert plan.n_landmarks < 100
    builder = SolverBuilder(laplacian(2), z, z[:50], plan, settled, ONE_RANK, generator())
    basis = builder.projection()[0].tensors()["basis"]
    held = basis.square().sum(1)
    assert float(held[100:].sum()) > 0.2 * float(held[:100].sum())
