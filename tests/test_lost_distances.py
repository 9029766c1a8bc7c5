"""Distances between near rows that float32 loses, because the rows lie far from the mean, are told at the set-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import ep3stream
from ep3stream import (
    ConvertConfig,
    DataConfig,
    FitConfig,
    KernelConfig,
    KernelModel,
    KernelRegressor,
    SolverConfig,
)
from ep3stream.solver.kernels import RadialKernel

N = 1200
RNG = np.random.default_rng(1)
INNER = RNG.integers(-96, 97, (N, 2)) / 32.0
Y = np.sin(INNER[:, 0]) * np.cos(INNER[:, 1])
TOLD = "float32 makes one point of rows nearer"


def rows(gap: float, share: float = 0.5) -> NDArray[np.float64]:
    """Two clusters; the far one has this share of the rows."""
    return INNER + np.where(RNG.random(N) < share, gap, 0)[:, None]


def fit(x: Any, **settings: Any) -> None:
    KernelRegressor(
        **{"bandwidth": 2.0, "n_centers": 200, "epochs": 1, "scale": "none", "random_state": 0} | settings
    ).fit(x, Y)


@pytest.mark.parametrize("kernel", ["laplacian", "gaussian", "matern32", "matern52"])
def test_clusters_far_apart_are_told(kernel: str, caplog: pytest.LogCaptureFixture) -> None:
    fit(rows(3000), kernel=kernel)
    assert TOLD in caplog.text
    assert "'x0'" in caplog.text or "'x1'" in caplog.text


@pytest.mark.parametrize("gap", [0, 30, 300])
def test_clusters_that_float32_can_part_are_not_told(gap: float, caplog: pytest.LogCaptureFixture) -> None:
    fit(rows(gap))
    assert TOLD not in caplog.text


def test_the_scaling_of_inputs_does_not_hide_it(caplog: pytest.LogCaptureFixture) -> None:
    x = rows(3000)
    fit(x, scale="standard", bandwidth=2 / x.std(0)[0])
    assert TOLD in caplog.text


def test_a_small_far_cluster_is_told_and_a_single_far_row_is_not(caplog: pytest.LogCaptureFixture) -> None:
    fit(rows(30_000, share=0.05))
    assert TOLD in caplog.text
    caplog.clear()
    x = rows(0)
    x[0] = 30_000
    fit(x)
    assert TOLD not in caplog.text


def test_a_wide_bandwidth_has_nothing_to_lose(caplog: pytest.LogCaptureFixture) -> None:
    fit(rows(3000), bandwidth=100.0)
    fit(rows(3000), bandwidth="median")
    assert TOLD not in caplog.text


def test_the_column_that_parts_the_rows_is_named(caplog: pytest.LogCaptureFixture) -> None:
    x = rows(0)
    x[:, 1] += np.where(RNG.random(N) < 0.5, 5000, 0)
    fit(x)
    assert "'x1'" in caplog.text


def test_a_fit_to_a_store_and_a_kernel_model_tell_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x = rows(3000)
    ep3stream.convert((x, Y), tmp_path / "s.zarr", ConvertConfig())
    ep3stream.fit(
        tmp_path / "s.zarr",
        tmp_path / "run",
        FitConfig(
            kernel=KernelConfig("laplacian", bandwidth=2.0),
            solver=SolverConfig(centers=200, epochs=1),
            data=DataConfig(scale="none", validate="none"),
        ),
    )
    assert TOLD in caplog.text
    caplog.clear()
    KernelModel(x[:200], "laplacian", bandwidth=2.0).fit_epoch((x, Y))
    assert TOLD in caplog.text


def test_the_resolution_is_where_float32_parts_points() -> None:
    """Pairs nearer than the resolution have a distance of 0, pairs a few times as far apart have about their own."""
    kernel = RadialKernel("laplacian", 1.0, torch.zeros(2))
    place = torch.tensor([[600.0, 800.0]])
    resolution = float(kernel.resolution(place)[0])
    for share, low, high in ((0.5, 0.0, 1e-6), (8.0, 0.9, 1.1)):
        other = place + torch.tensor([[share * resolution, 0.0]])
        value = float(kernel.block(kernel.left(place), kernel.right(other))[0, 0])
        assert low <= -np.log(value) / (share * resolution) <= high
