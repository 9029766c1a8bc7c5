"""A fit starts at the ridge regression of its sample on the basis: the right one, where it is honest to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_problem import Problem, k, laplacian, points
from small_stores import make_store
from test_fit import Stop, kill_at, model_bytes, settings
from torch import Tensor

import ep3stream
from ep3stream.run.setup import Setup
from ep3stream.solver.least_squares import HeadStart, head_start
from ep3stream.solver.targets import TargetCode

D, S = 3, 60
CASE = Problem(laplacian(D), points(70, D, 0), points(S, D, 1), n_samples=S)
PROJECTION = CASE.projection()[0]


def classes(weights: Tensor | None = None) -> tuple[TargetCode, Tensor]:
    y = (CASE.x[:, 0] > 0.2).long()
    return TargetCode(True, torch.tensor([0.5, 0.5]).double(), torch.ones(2).double(), weights), y


def numbers() -> tuple[TargetCode, Tensor]:
    y = torch.stack([CASE.x[:, 0].sin(), CASE.x[:, 1] * 2 + 1], 1)
    return TargetCode(False, torch.tensor([0.0, 1.0]).double(), torch.tensor([1.0, 2.0]).double()), y


def started(targets: TargetCode, y: Tensor, ridge: float = 0.0) -> HeadStart | None:
    assert PROJECTION.sample_features is not None
    return head_start(PROJECTION.sample_features, PROJECTION.half, y, targets, ridge)


def coded(targets: TargetCode, y: Tensor) -> Tensor:
    zero = torch.zeros(targets.n_outputs, len(y), dtype=torch.float64)
    targets.subtract_(zero, y)
    return -zero


def regression(features: Tensor, y: Tensor, weights: Tensor, rho: float) -> Tensor:
    """b, (r, c), by normal equations; y is (c, s)."""
    moments = (features * weights) @ features.T / features.shape[1]
    eye = torch.eye(len(moments), dtype=torch.float64)
    return torch.linalg.solve(moments + rho * eye, (features * weights) @ y.T / features.shape[1])


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 5.0])])
def test_the_start_is_the_ridge_regression_of_the_sample_in_the_basis(weights):
    targets, y = classes(weights)
    found = started(targets, y)
    assert found is not None
    assert found.n_rows == S
    each = torch.ones(S).double() if weights is None else weights.double()[y]
    features = PROJECTION.half.T @ (PROJECTION.basis.T @ k(CASE.kernel, CASE.z, CASE.x))
    b = regression(features, coded(targets, y), each, found.rho)
    torch.testing.assert_close(found.coefficients, PROJECTION.half @ b)


def test_no_other_penalty_leaves_rows_left_out_a_smaller_error():
    targets, y = numbers()
    found, features = started(targets, y), PROJECTION.sample_features
    assert found is not None
    assert features is not None
    target, ones = coded(targets, y), torch.ones(S - 1).double()

    def error(rho: float) -> float:
        total = 0.0
        for i in range(S):
            others = torch.arange(S) != i
            b = regression(features[:, others], target[:, others], ones * (S - 1) / S, rho)
            total += float((target[:, i] - b.T @ features[:, i]).square().sum())
        return total

    least = error(found.rho)
    assert least < error(found.rho * 10**0.5)
    assert least < error(found.rho / 10**0.5)
    assert least < float(target.square().sum())


def test_a_ridge_holds_for_the_start_too():
    targets, y = numbers()
    free, held = started(targets, y), started(targets, y, ridge=0.01)
    assert free is not None
    assert held is not None
    assert free.rho < 0.01
    features = PROJECTION.sample_features
    b = regression(features, coded(targets, y), torch.ones(S).double(), max(held.rho, 0.01))
    torch.testing.assert_close(held.coefficients, PROJECTION.half @ b)


def test_where_zero_is_as_good_there_is_no_head_start():
    targets, _ = numbers()
    assert started(targets, targets.offset.expand(S, 2)) is None
    assert started(*numbers(), ridge=1e9) is None


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "smooth.zarr")


SAMPLED = {"solver": {"nystrom_samples": 100, "epochs": 1}}


def test_a_fit_starts_there_counts_it_in_its_average_and_says_so(store, tmp_path):
    fresh, none = (
        ep3stream.fit(store, tmp_path / name, settings(**SAMPLED).with_settings({"solver": more}, "test"))
        for name, more in (("fresh", {}), ("none", {"nystrom_samples": 400}))
    )
    setup = Setup.load(fresh / "setup")
    assert setup.tensors["start"].shape == (40, 2)
    assert setup.plan.start_rows == 100
    # A third of the rows would spoil the running loss.
    assert "start" not in Setup.load(none / "setup").tensors
    first = [json.loads((run / "metrics.jsonl").read_text().splitlines()[1]) for run in (fresh, none)]
    assert first[0]["step"] == first[1]["step"] == 8
    assert first[0]["batch_loss"] < first[1]["batch_loss"]


def test_a_fit_with_a_head_start_ends_with_the_same_bytes_however_often_it_is_killed(store, tmp_path):
    whole = ep3stream.fit(store, tmp_path / "whole", settings(**SAMPLED))
    for step in (1, 8, 20):
        with pytest.raises(Stop):
            ep3stream.fit(store, tmp_path / "run", settings(**SAMPLED), observe=kill_at(step))
    assert model_bytes(ep3stream.fit(store, tmp_path / "run", settings(**SAMPLED))) == model_bytes(whole)


def test_two_devices_start_where_one_does(store, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    weights = []
    for devices in (1, 2):
        run = ep3stream.fit(store, tmp_path / f"{devices}", settings(**SAMPLED), devices=devices)
        weights.append(ep3stream.load(run).weights)
    assert np.linalg.norm(weights[0] - weights[1]) < 1e-3 * np.linalg.norm(weights[0])
