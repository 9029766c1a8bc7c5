"""The published EigenPro3 step against dense float64 algebra, on several ranks, and in whole runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from kernel_problem import ONE_RANK, generator, k, laplacian, points, unit_targets
from small_stores import make_store, plain_config
from torch import Tensor

import ep3stream
from ep3stream.config import FitConfig, SolverConfig
from ep3stream.errors import ConfigError, DivergedError
from ep3stream.mesh import Mesh
from ep3stream.run.event_log import read_lines
from ep3stream.run.state import list_checkpoints
from ep3stream.solver import eigenpro
from ep3stream.solver.eigenpro import EigenProProjection, build_eigenpro
from ep3stream.solver.projection import Spectra
from ep3stream.solver.step import Solver
from ep3stream.solver.step_size import PublishedStep, limiting_leverage, measure_stability

D, P, S, Q, R = 3, 60, 50, 8, 3
KERNEL = laplacian(D)


def build(
    passes: int = 2,
    tolerance: float = 0.0,
    z: Tensor | None = None,
    x: Tensor | None = None,
    n_landmarks: int = 40,
    model_rank: int = R,
    mesh: Mesh = ONE_RANK,
) -> tuple[EigenProProjection, Spectra]:
    z = points(P, D, 0) if z is None else z
    x = points(S, D, 1) if x is None else x
    rows, ranks = mesh.shard_range(len(z)), (Q, model_rank)
    shard = z[rows.start : rows.stop]
    return build_eigenpro(
        KERNEL, shard, z[:n_landmarks], x, len(z), ranks, (passes, tolerance), mesh, generator(5)
    )


def solver_of(projection: EigenProProjection, n_outputs: int = 2) -> Solver:
    targets = unit_targets(n_outputs, projection.basis.dtype)
    return Solver(KERNEL, projection.rows, projection, targets, 0.0, 0.0, projection.mesh)


def eigensystem(x: Tensor, rank: int, exponent: float) -> tuple[Tensor, Tensor]:
    """E, D of K(X, X) / n by the dense solver."""
    values, vectors = torch.linalg.eigh(k(KERNEL, x, x) / len(x))
    values, vectors = values.flip(0), vectors.flip(1)[:, :rank]
    return vectors, (1 - (values[rank] / values[:rank]) ** exponent) / (values[:rank] * len(x))


def preconditioned(z: Tensor, x_s: Tensor, x_b: Tensor, g: Tensor) -> Tensor:
    """h of algorithm 2, (p, c), for g of (m, c)."""
    e, d = eigensystem(x_s, Q, 1.0)
    return k(KERNEL, z, x_b) @ g - k(KERNEL, z, x_s) @ (e * d) @ e.T @ k(KERNEL, x_s, x_b) @ g


def test_one_step_with_many_passes_is_the_published_one_with_the_exact_projection() -> None:
    z, x_s, x_b, y = points(P, D, 0), points(S, D, 1), points(20, D, 2), points(20, 2, 3)
    solver = solver_of(build(passes=1000)[0])
    state = solver.initial_state()
    state.weights = points(2, P, 4)
    alpha = state.weights.clone()
    g = k(KERNEL, x_b, z) @ alpha.T - y
    theta = torch.linalg.solve(k(KERNEL, z, z), preconditioned(z, x_s, x_b, g))
    errors = solver.step(state, x_b, y, 0.3, score=True)
    torch.testing.assert_close(state.weights, alpha - 0.3 * theta.T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(state.average, state.weights)
    torch.testing.assert_close(errors.loss, g.square().mean())
    assert float(errors.inexactness) < 1e-10


def test_two_passes_are_the_formula_batch_by_batch() -> None:
    z, n_landmarks, h = points(P, D, 0), 40, points(2, P, 6)
    projection, _ = build(passes=2)
    e, d = eigensystem(z[:n_landmarks], R, 0.95)
    k_zz, theta, eta = k(KERNEL, z, z), torch.zeros(P, 2).double(), projection.passes.step_size
    for batch in 2 * projection.stored.center_order.split(projection.passes.batch_size):
        error = k_zz[batch] @ theta - h.T[batch]
        theta[batch] -= eta * error
        theta[:n_landmarks] += eta * e @ (d[:, None] * (e.T @ k_zz[:n_landmarks, batch] @ error))
    assert 2 < len(projection.batches) < P
    torch.testing.assert_close(projection.direction(h), theta.T)
    inexactness = (k_zz @ theta - h.T).norm() / h.norm()
    torch.testing.assert_close(projection.inexactness(theta.T.contiguous(), h), inexactness)


def test_the_data_preconditioner_shrinks_the_leading_directions_to_the_next_one() -> None:
    x = points(S, D, 1)
    projection, spectra = build(z=x, x=x)
    k_xx = k(KERNEL, x, x)
    operator = projection.preconditioned(k_xx, x, torch.eye(S, dtype=x.dtype)) / S
    leading = torch.linalg.eigvalsh((operator + operator.T) / 2).flip(0)
    before = torch.linalg.eigvalsh(k_xx / S).flip(0)
    torch.testing.assert_close(leading[: Q + 1], before[Q].expand(Q + 1))
    torch.testing.assert_close(leading[Q:], before[Q:])
    assert spectra.data == pytest.approx(before[: Q + 1].tolist())


def test_the_model_preconditioner_shrinks_them_to_nearly_that() -> None:
    z = points(P, D, 0)
    projection, _ = build(n_landmarks=P)
    k_zz, e = k(KERNEL, z, z) / P, projection.model_vectors
    operator = k_zz - k_zz @ (e * (projection.model_weights * P)) @ e.T @ k_zz
    leading = torch.linalg.eigvalsh(operator).flip(0)
    before = torch.linalg.eigvalsh(k_zz).flip(0)
    torch.testing.assert_close(leading[0], before[0] ** 0.05 * before[R] ** 0.95)
    assert projection.passes.batch_size == int(1 / float(leading[0]))


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-4])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_tolerance_is_relative_and_ends_the_passes(tolerance: float, scale: float) -> None:
    gradient = k(KERNEL, points(P, D, 0), points(5, D, 7)).T.contiguous()
    projection, _ = build(passes=10_000, tolerance=tolerance)
    theta = projection.direction(scale * gradient)
    assert float(projection.inexactness(theta, scale * gradient)) < tolerance
    torch.testing.assert_close(theta / scale, projection.direction(gradient))
    longer, _ = build(passes=200)
    more = longer.direction(gradient)
    assert longer.inexactness(more, gradient) < 0.3 * projection.inexactness(theta / scale, gradient)


@pytest.mark.parametrize("tolerance", [0.0, 0.3, 0.9])
def test_a_pass_queued_before_it_is_known_to_be_needed_changes_nothing(
    tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    projection, _ = build(passes=6, tolerance=tolerance)
    gradient = points(2, P, 3)
    at_once = projection.direction(gradient)
    monkeypatch.setitem(eigenpro._KNOWN_AFTER, "cpu", 2)
    assert torch.equal(projection.direction(gradient), at_once)


def test_a_zero_gradient_has_a_zero_direction() -> None:
    projection, _ = build()
    zero = torch.zeros(2, P, dtype=torch.float64)
    assert torch.equal(projection.direction(zero), zero)
    assert float(projection.inexactness(zero, zero)) == 0


def test_the_step_can_be_measured_too() -> None:
    z, x_s, x_b = points(P, D, 0), points(S, D, 1), points(30, D, 2)
    projection, _ = build(passes=1000, tolerance=1e-6, n_landmarks=P, model_rank=P - 1)
    h = preconditioned(z, x_s, x_b, torch.eye(30).double())
    operator = k(KERNEL, x_b, z) @ torch.linalg.solve(k(KERNEL, z, z), h)
    found = measure_stability(solver_of(projection).block, [x_b], projection, ONE_RANK, generator(6))
    assert found.kappa_max == pytest.approx(limiting_leverage(operator.diagonal()), rel=1e-4)
    assert found.lambda_max == pytest.approx(float(torch.linalg.eigvals(operator).abs().max()), rel=0.1)


def test_the_published_rule_takes_its_half_step_up_to_the_critical_batch() -> None:
    rule = PublishedStep(2.0, 0.03)
    assert rule.critical_batch_size == 66
    assert [rule.step_size(m) for m in (1, 66, 67)] == [0.25, 0.25, 0.25]
    assert rule.step_size(68) == pytest.approx(0.99 / (2 + 67 * 0.03))
    assert PublishedStep(1.0, 5.0).critical_batch_size == 1


def test_many_steps_go_to_the_least_squares_solution() -> None:
    z, x = points(30, D, 0), points(200, D, 1)
    y = torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], 1)
    k_xz = k(KERNEL, x, z)
    expected = k_xz @ torch.linalg.lstsq(k_xz, y).solution
    projection, spectra = build(2, 1e-3, z, x, n_landmarks=30)
    solver, rule = solver_of(projection), PublishedStep.of(KERNEL, x, spectra.data[-1])
    state, m = solver.initial_state(), min(rule.critical_batch_size, 100)
    for _ in range(200):
        for rows in torch.arange(200).split(m):
            solver.step(state, x[rows], y[rows], rule.step_size(len(rows)))
    fitted = k_xz @ state.weights.T
    assert (fitted - y).square().mean() < 1.05 * (expected - y).square().mean()


def weights_after_five_steps(mesh: Mesh, p: int) -> Tensor:
    """Of the whole model, (p, 2), on every rank; S lies on some of the ranks only."""
    z, x, y = (points(n, d, seed, torch.float32) for n, d, seed in ((p, D, 0), (120, D, 1), (120, 2, 2)))
    projection, spectra = build(3, 1e-3, z, x[:41], n_landmarks=min(p, 30), mesh=mesh)
    solver, rule = solver_of(projection), PublishedStep.of(KERNEL, x[:41], spectra.data[-1])
    state = solver.initial_state()
    for step in range(5):
        rows = slice(20 * step, 20 * step + 40)
        solver.step(state, x[rows], y[rows], rule.step_size(40), score=True)
    return mesh.all_gather_rows(state.weights.T.contiguous(), p)


def run_rank(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        mesh = Mesh.of_this_process(torch.device("cpu"))
        for p in (50, 1):
            np.save(f"{folder}/{p}-{rank}.npy", weights_after_five_steps(mesh, p).numpy())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_ranks_give_the_weights_of_one(size: int, tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(size), str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=250
    )
    assert done.returncode == 0, done.stderr.decode()
    for p in (50, 1):
        alone = weights_after_five_steps(ONE_RANK, p)
        ranks = [torch.from_numpy(np.load(tmp_path / f"{p}-{rank}.npy")) for rank in range(size)]
        assert all(torch.equal(ranks[0], other) for other in ranks[1:])
        assert (ranks[0] - alone).norm() < 1e-5 * alone.norm()


def settings(**solver: object) -> FitConfig:
    own = {"centers": 150, "projection": "eigenpro", "batch_size": 32, "data_rank": 20, "epochs": 2}
    return plain_config(solver=own | solver, run={"checkpoint_steps": 7})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "smooth.zarr")


@pytest.fixture(scope="module")
def reference(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ep3stream.fit(store, tmp_path_factory.mktemp("runs") / "reference", settings())


def test_a_fit_learns_and_reports_the_error_of_its_projections(store: Path, reference: Path) -> None:
    assert ep3stream.evaluate(reference, store)["r2"] > 0.8
    steps = [line for line in read_lines(reference / "metrics.jsonl") if line["kind"] == "step"]
    assert len(steps) > 4
    assert all(0 < line["projection_error"] < 0.5 for line in steps)


class Stop(Exception):
    """Stands for a kill."""


def kill_at(step: int) -> Callable[[ep3stream.FitProgress], None]:
    def observe(progress: ep3stream.FitProgress) -> None:
        if progress.step >= step:
            raise Stop

    return observe


@pytest.mark.parametrize("kills", [(8,), (24, 40)])
def test_a_killed_fit_ends_with_the_same_bytes(
    store: Path, reference: Path, tmp_path: Path, kills: tuple[int, ...]
) -> None:
    for step in kills:
        with pytest.raises(Stop):
            ep3stream.fit(store, tmp_path / "run", settings(), observe=kill_at(step))
        assert list_checkpoints(tmp_path / "run" / "checkpoints")
    ep3stream.fit(store, tmp_path / "run", settings())
    for file in (reference / "model").iterdir():
        assert (tmp_path / "run" / "model" / file.name).read_bytes() == file.read_bytes()


def test_batches_are_as_large_as_the_rule_and_the_rows_allow(store: Path, tmp_path: Path) -> None:
    run = ep3stream.fit(store, tmp_path / "run", settings(batch_size=0, data_rank=5, epochs=1))
    plan = ep3stream.inspect(run)["plan"]
    assert plan["step_rule"] == "published"
    assert 10 < plan["batch_size"] < 1000
    assert plan["step_size"] == pytest.approx(0.5, rel=1e-5)
    assert plan["momentum"] == 0


def test_the_step_may_be_measured_instead(store: Path, tmp_path: Path) -> None:
    run = ep3stream.fit(store, tmp_path / "run", settings(step="measured"))
    assert ep3stream.inspect(run)["plan"]["step_rule"] == "measured"
    assert ep3stream.evaluate(run, store)["r2"] > 0.8


def test_a_published_step_that_diverges_is_cut_and_then_given_up(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PublishedStep, "step_size", lambda rule, m: 1e3 / rule.beta)
    with pytest.raises(DivergedError, match="after 3 cuts"):
        ep3stream.fit(store, tmp_path / "run", settings(epochs=6))
    events = [line["event"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "event" in line]
    assert events.count("rollback") == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"momentum": 0.9}, "momentum is 0.9, but projection is 'eigenpro', .* leave momentum out"),
        ({"averaging": 3.0}, "averaging is 3.0, but projection is 'eigenpro'"),
        ({"step": "guessed"}, "step is 'guessed'; choose one of measured, published"),
        ({"projection": "nystrom", "step": "published"}, "projection is 'nystrom'.* use --step measured or"),
        ({"projection": "exact", "step": "published"}, "projection is 'exact'"),
        ({"projection_passes": 0}, "projection_passes is 0; use at least 1"),
        ({"projection_tolerance": 1.0}, r"projection_tolerance is 1.0; use a number in \[0, 1\)"),
    ],
)
def test_what_the_published_method_has_not_is_refused_by_name(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(**changes)


def test_settings_left_out_are_the_projections_own() -> None:
    published, default = SolverConfig(projection="eigenpro"), SolverConfig()
    used = [(c.used_momentum, c.used_averaging, c.used_step) for c in (published, default)]
    assert used == [(0.0, 0.0, "published"), (0.9, 2.0, "measured")]
    assert SolverConfig(projection="eigenpro", momentum=0.0, averaging=0.0, step="measured")


if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        run_rank, (int(sys.argv[1]), sys.argv[2]), nprocs=int(sys.argv[1]), start_method="fork"
    )
