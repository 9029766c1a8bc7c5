"""Several ridges of one fit: side by side in each step, and chosen by the validations."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_problem import Problem, laplacian, points
from small_stores import plain_config
from test_fit import model_bytes

import ep3stream
from ep3stream import FitConfig
from ep3stream.errors import DamagedDataError, Interrupted
from ep3stream.run.bundle import read_bundle, write_bundle
from ep3stream.run.event_log import read_lines
from ep3stream.run.setup import Setup
from ep3stream.solver.step import Solver, SolverState
from ep3stream.solver.targets import TargetCode
from ep3stream.training.column_kernel import tried_ridges

pytestmark = pytest.mark.usefixtures("quick_columns")

FACTORS = (1.0, 0.25, 4.0, 16.0)


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_ridges_side_by_side_do_what_each_does_alone(task: str) -> None:
    case, c, factors = Problem(laplacian(3), points(40, 3, 0), points(90, 3, 1)), 2, (1.0, 30.0, 4.0)
    weights = torch.tensor([1.0, 3.0]).double()
    code = TargetCode(task == "classification", points(1, c, 5)[0], points(1, c, 6)[0].exp(), weights)
    y = points(30, c, 7) if task == "regression" else torch.arange(30) % c

    def after_steps(factors: tuple[float, ...], ridge: float) -> SolverState:
        whole = case.solver(code)
        targets = replace(code, ridge_factors=factors)
        solver = Solver(
            whole.kernel, whole.centers, whole.projection, targets, 0.9, 3.0, whole.mesh, ridge=ridge
        )
        state = solver.initial_state()
        for _ in range(3):
            solver.step(state, case.x[:30], y, 0.1, score=True)
        return state

    together, ridge = after_steps(factors, 0.02), 0.02
    for number, factor in enumerate(factors):
        alone = after_steps((1.0,), ridge * factor)
        columns = slice(number * c, (number + 1) * c)
        torch.testing.assert_close(together.average[columns], alone.average)
        torch.testing.assert_close(together.velocity[columns], alone.velocity)
    assert not torch.allclose(together.average[:c], together.average[-c:])


def test_the_loss_of_several_ridges_is_their_mean() -> None:
    code = TargetCode(False, torch.zeros(2), torch.tensor([1.0, 10.0]))
    residual = points(6, 9, 0)
    each = [code.mean_squared_error(some) for some in residual.chunk(3)]
    together = replace(code, ridge_factors=(1.0, 2.0, 3.0)).mean_squared_error(residual)
    torch.testing.assert_close(together, torch.stack(each).mean())


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Mostly noise, so that a fit with a small ridge learns much of it."""
    random = np.random.default_rng(0)
    x = random.normal(size=(4000, 4)).astype(np.float32)
    y = (np.sin(2 * x[:, 0]) + 2 * random.normal(size=4000)).astype(np.float32)
    path = tmp_path_factory.mktemp("stores") / "noisy.zarr"
    config = ep3stream.ConvertConfig(splits={"train": 0.5, "validation": 0.5})
    ep3stream.convert((x, y), path, config)
    return path


def settings(**solver) -> FitConfig:
    config = plain_config(
        kernel={"name": "product"},
        solver={"centers": 500, "epochs": 4, "batch_size": 250} | solver,
        data={"validate": "validation"},
    )
    return config.with_settings({"run": {"checkpoint_steps": 2}}, "test")


def validations(run: Path) -> list[dict]:
    return [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "validation"]


@pytest.fixture(scope="module")
def fitted(store, tmp_path_factory) -> Path:
    return ep3stream.fit(store, tmp_path_factory.mktemp("runs") / "run", settings())


def test_the_model_is_that_of_the_ridge_that_validated_best(store, fitted, tmp_path):
    seen, ridge = validations(fitted), Setup.load(fitted / "setup").plan.ridge
    best = min(seen, key=lambda line: line["weighted_error"])
    assert ep3stream.evaluate(fitted, store, "validation")["mse"] == pytest.approx(best["mse"], rel=1e-5)
    assert best["ridge"] in [pytest.approx(ridge * factor) for factor in FACTORS]
    alone = {
        factor: validations(ep3stream.fit(store, tmp_path / str(factor), settings(ridge=ridge * factor)))
        for factor in FACTORS
    }
    errors = {factor: min(line["weighted_error"] for line in lines) for factor, lines in alone.items()}
    # Alone a ridge has a step size and a head start of its own.
    assert best["weighted_error"] == pytest.approx(min(errors.values()), rel=0.01)
    assert best["weighted_error"] < 0.995 * errors[0.25]
    assert "ridge" not in alone[1.0][0]


def test_a_stopped_fit_is_used_with_its_best_ridge_and_ends_with_the_same_bytes(store, fitted, tmp_path):
    def terminate(progress):
        if len(validations(tmp_path / "run")) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        ep3stream.fit(store, tmp_path / "run", settings(), observe=terminate)
    seen = validations(tmp_path / "run")
    if min(seen, key=lambda line: line["weighted_error"]) is seen[-1]:
        scores = ep3stream.evaluate(tmp_path / "run", store, "validation")
        assert scores["mse"] == pytest.approx(seen[-1]["mse"], rel=0.02)
    ep3stream.fit(store, tmp_path / "run", settings())
    assert model_bytes(tmp_path / "run") == model_bytes(fitted)


def test_a_checkpoint_with_an_impossible_ridge_is_damage(store, fitted, tmp_path):
    with pytest.raises(Interrupted):
        ep3stream.fit(
            store,
            tmp_path / "run",
            settings(),
            observe=lambda progress: progress.step >= 8 and os.kill(os.getpid(), signal.SIGTERM),
        )
    (path,) = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1:]
    bundle = read_bundle(path, "checkpoint")
    tensors = {name: tensor.clone() for name, tensor in bundle.tensors.items()}
    best = {**bundle.description["best"], "ridge": len(FACTORS)}
    for old in (tmp_path / "run" / "checkpoints").iterdir():
        if old != path:
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
    write_bundle(path, "checkpoint", tensors, bundle.description | {"best": best})
    with pytest.raises(DamagedDataError, match="as the set-up; remove that checkpoint"):
        ep3stream.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("kernel", "solver", "n_features", "n_outputs", "n_ridges"),
    [
        ("product", {}, 4, 1, 4),
        ("anova", {}, 100, 4, 4),
        ("product", {}, 3, 1, 1),
        ("product", {}, 100, 5, 1),
        ("product", {"ridge": 0.1}, 4, 1, 1),
        ("product", {"projection": "eigenpro"}, 4, 1, 1),
        ("laplacian", {}, 4, 1, 1),
    ],
)
def test_ridges_are_tried_where_learning_finds_one_and_they_are_cheap(
    kernel, solver, n_features, n_outputs, n_ridges
):
    config = plain_config(kernel={"name": kernel}, solver=solver)
    assert len(tried_ridges(config, n_features, n_outputs)) == n_ridges


def test_without_validations_there_is_one_ridge(store, tmp_path):
    config = settings().with_settings({"data": {"validate": "none"}}, "test")
    run = ep3stream.fit(store, tmp_path / "run", config)
    assert Setup.load(run / "setup").plan.ridge_factors == ()
