"""Centers where a small model is expected to err, and no others."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_stores import plain_config

import ep3stream
from ep3stream.config import ConvertConfig
from ep3stream.solver.column_weights import learnt_weights
from ep3stream.solver.columns import ColumnKernel
from ep3stream.solver.expected_error import ExpectedError, drawn_by
from ep3stream.training.centers import draw_centers

pytestmark = pytest.mark.usefixtures("quick_columns")

CALM = 0.5


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def waves(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x, (n, 2), and y, (n, 1): 0 where the first column is below 0.5, and waves in both columns beyond it."""
    x = uniform(n, 2)
    return x, torch.where(x[:, :1] > CALM, torch.sin(50 * x[:, :1]) * torch.sin(50 * x[:, 1:]), 0.0)


def stored_waves(folder, n: int):
    """A store of n rows with the waves, and noise that is the same everywhere."""
    x, y = waves(n)
    noise = np.random.default_rng(0).normal(size=n) * 0.005
    table = pa.table({"a": x[:, 0].numpy(), "b": x[:, 1].numpy(), "y": y[:, 0].numpy() + noise})
    pq.write_table(table, folder / "rows.parquet")
    ep3stream.convert(folder / "rows.parquet", folder / "store.zarr", ConvertConfig(target="y"))
    return folder / "store.zarr"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stored_waves(tmp_path_factory.mktemp("waves"), 6000)


def fitted_centers(store, folder, kernel: str = "product", **solver) -> np.ndarray:
    """The centers of a fit, (p, 2)."""
    config = plain_config(kernel={"name": kernel}, solver={"centers": 300, "epochs": 0.2} | solver)
    return ep3stream.load(ep3stream.fit(store, folder, config)).centers.numpy()


@pytest.fixture(scope="module")
def centers(store, tmp_path_factory) -> dict[str, np.ndarray]:
    """Those of three fits, (300, 2) each."""
    fits = {"by error": {}, "uniform": {"center_sampling": "uniform"}, "distances": {"kernel": "laplacian"}}
    folder = tmp_path_factory.mktemp("runs")
    return {name: fitted_centers(store, folder / name, **settings) for name, settings in fits.items()}


def share_in_the_waves(centers: np.ndarray) -> float:
    return float((centers[:, 0] > CALM).mean())


def test_a_row_is_drawn_as_often_as_its_expected_error_says():
    expected = torch.tensor([1.0, 2.0, 4.0, 8.0])
    generator = torch.Generator().manual_seed(0)
    drawn = [int(drawn_by(expected, 1, generator)[0]) for _ in range(3000)]
    counts = np.bincount(drawn, minlength=4)
    np.testing.assert_allclose(counts / 3000, expected / 15, atol=0.03)


def test_no_row_is_drawn_twice_and_all_are_drawn_at_last():
    drawn = drawn_by(uniform(50) + 0.01, 50, torch.Generator().manual_seed(1))
    assert sorted(drawn.tolist()) == list(range(50))


def test_errors_are_expected_in_the_waves():
    x, y = waves(4000)
    kernel = ColumnKernel.of("product", torch.tensor([[1.0, 1.0], [0, 0], [1, 1]]))
    errors = learnt_weights(kernel, x, y, 200, torch.Generator().manual_seed(3)).errors
    assert errors is not None
    expected = errors.at(x)
    is_calm = x[:, 0] < CALM
    assert float(expected[~is_calm].mean()) > 1.5 * float(expected[is_calm].mean())


def test_no_place_is_expected_to_have_no_error():
    kernel = ColumnKernel.of("product", torch.tensor([[1.0], [0], [1]]))
    errors = ExpectedError(kernel, torch.zeros(1, 1), torch.full((1, 1), -5.0), mean=1.0)
    assert errors.at(torch.tensor([[0.0], [100.0]])).tolist() == pytest.approx([0.05, 1.0])


def test_where_noise_is_all_there_is_errors_are_the_same_everywhere():
    x = uniform(2000, 2)
    y = torch.randn(2000, 1, generator=torch.Generator().manual_seed(1))
    kernel = ColumnKernel.of("product", torch.tensor([[1.0, 1.0], [0, 0], [1, 1]]))
    errors = learnt_weights(kernel, x, y, 200, torch.Generator().manual_seed(3)).errors
    if errors is not None:
        expected = errors.at(x)
        assert float(expected.max() / expected.min()) < 2


def test_a_fit_has_its_centers_in_the_waves(centers):
    share = {name: share_in_the_waves(each) for name, each in centers.items()}
    assert share["by error"] > 0.7
    assert share["uniform"] == pytest.approx(0.5, abs=0.1)
    assert share["distances"] == pytest.approx(0.5, abs=0.1)


def test_uniform_centers_are_those_of_the_seed(store, centers):
    with ep3stream.open_store(store) as opened:
        split = opened.split("train")
        expected = split.read_rows(draw_centers(split.info, 300, 0))[0] + opened.manifest.offsets.x
    order = [np.lexsort(each.T) for each in (centers["uniform"], expected)]
    np.testing.assert_allclose(centers["uniform"][order[0]], expected[order[1]], rtol=1e-6)


def test_no_center_is_there_twice(centers):
    assert len(np.unique(centers["by error"], axis=0)) == 300


def test_with_few_rows_a_center_there_is_nothing_to_choose(tmp_path):
    store = stored_waves(tmp_path, 1200)
    many, few = (
        fitted_centers(store, tmp_path / kind, centers=500, center_sampling=kind)
        for kind in ("error", "uniform")
    )
    np.testing.assert_array_equal(np.sort(many, axis=0), np.sort(few, axis=0))
