"""Learning the weights of a kernel on columns: right slopes, the right columns, and nothing where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ep3stream.solver import column_weights
from ep3stream.solver.column_weights import Adam, learnt_weights, ridge_of
from ep3stream.solver.columns import COLUMN_KERNELS, ColumnKernel
from ep3stream.solver.small_regression import gradients_of


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(column_weights, "_ROWS", 500)
    monkeypatch.setattr(column_weights, "_CENTERS", 80)
    monkeypatch.setattr(column_weights, "_LARGE_ROWS", 500)
    monkeypatch.setattr(column_weights, "_LARGE_CENTERS", 80)
    monkeypatch.setattr(column_weights, "_NEAR_ROWS", 500)
    monkeypatch.setattr(column_weights, "_FEWEST_NEAR_ROWS", 200)
    monkeypatch.setattr(column_weights, "_NEAR_CENTERS", 100)
    monkeypatch.setattr(column_weights, "_SHARP_ROWS", 1500)
    monkeypatch.setattr(column_weights, "_SHARP_CENTERS", 200)


def plain(name: str, d: int, power: float = 1.0, categories: tuple[int, ...] = ()) -> ColumnKernel:
    metric = torch.ones(3, d)
    metric[0], metric[1] = 1 / d, 0
    metric[1, list(categories)] = 1
    return ColumnKernel.of(name, metric, power)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learn(kernel: ColumnKernel, x: torch.Tensor, y: torch.Tensor, n_centers: int = 200):
    return learnt_weights(kernel, x, y.float(), n_centers, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("power", [1.0, 1.5])
@pytest.mark.parametrize("name", COLUMN_KERNELS)
def test_slopes_of_the_held_out_error_are_finite_differences(name, power):
    kernel = plain(name, 4, power, categories=(2,))
    x, y = normal(120, 4).double(), normal(120, 2, seed=1).double()
    x[:, 2] = (x[:, 2] > 0).double()
    y[:, 0] += x[:, 0] + x[:, 2]
    log_rho = torch.tensor(-4.0, dtype=torch.float64)

    def loss(weights: torch.Tensor, shares: torch.Tensor, log_rho: torch.Tensor) -> float:
        moved = ColumnKernel(name, weights, kernel.is_category, shares, power)
        return gradients_of(moved, log_rho, x, y, 15)[0]

    weights, shares = kernel.weights.double(), kernel.shares.double()
    _, of_weights, of_shares, of_rho = gradients_of(
        ColumnKernel(name, weights, kernel.is_category, shares, power), log_rho, x, y, 15
    )
    step = 1e-4
    for j in range(4):
        factor = torch.ones(4, dtype=torch.float64)
        factor[j] = np.exp(step)
        numeric = (loss(weights * factor, shares, log_rho) - loss(weights / factor, shares, log_rho)) / (
            2 * step
        )
        assert float(of_weights[j]) == pytest.approx(numeric, rel=1e-4, abs=1e-7)
        numeric = (loss(weights, shares * factor, log_rho) - loss(weights, shares / factor, log_rho)) / (
            2 * step
        )
        assert float(of_shares[j]) == pytest.approx(numeric, rel=1e-4, abs=1e-7)
    numeric = (loss(weights, shares, log_rho + step) - loss(weights, shares, log_rho - step)) / (2 * step)
    assert float(of_rho) == pytest.approx(numeric, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", COLUMN_KERNELS)
def test_slopes_of_many_rows_in_float32_are_those_in_float64(name):
    kernel = plain(name, 4, categories=(2,))
    x, y = normal(5002, 4), normal(5002, 3, seed=1)
    x[:, 2] = (x[:, 2] > 0).float()
    y[:, 0] += x[:, 0] + x[:, 2]
    log_rho, room = torch.tensor(-6.0, dtype=torch.float64), torch.full((5002, 41), torch.nan)
    loss, *slopes = gradients_of(kernel, log_rho, x, y, 41, room)
    exact, *expected = gradients_of(kernel, log_rho, x.double(), y.double(), 41)
    assert loss == pytest.approx(exact, rel=1e-5)
    for mine, theirs in zip(slopes, expected, strict=True):
        assert float((mine - theirs).abs().max()) <= 2e-3 * float(theirs.abs().max())


@pytest.mark.parametrize("name", COLUMN_KERNELS)
def test_the_same_generator_gives_the_same_weights(name):
    x = normal(800, 3)
    found = [learn(plain(name, 3), x, x[:, :1].sin()).kernel.metric for _ in range(2)]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", COLUMN_KERNELS)
def test_one_column_of_many_is_found(name):
    x = normal(2000, 60)
    learnt = learn(plain(name, 60), x, torch.sin(2 * x[:, 17:18]))
    assert int(learnt.importance.argmax()) == 17
    assert learnt.explained > 0.8
    others = torch.arange(60) != 17
    assert float(learnt.kernel.weights[17]) > 10 * float(learnt.kernel.weights[others].max())


def test_columns_that_act_only_together_are_found():
    x = normal(3000, 8)
    learnt = learn(plain("product", 8), x, torch.sign(x[:, 2:3] * x[:, 5:6]))
    assert set(torch.argsort(learnt.importance, descending=True)[:2].tolist()) == {2, 5}


@pytest.mark.parametrize("n_rows", [100, 300, 1000])
@pytest.mark.parametrize("d", [1, 12])
def test_few_rows_do(n_rows, d):
    x = normal(n_rows, d)
    learnt = learn(plain("product", d), x, x[:, :1])
    assert int(learnt.importance.argmax()) == 0
    assert bool(learnt.kernel.weights.isfinite().all())
    assert float(learnt.kernel.weights[0]) > 0


@pytest.mark.parametrize("name", COLUMN_KERNELS)
@pytest.mark.parametrize("what", ["noise", "constant"])
def test_where_there_is_nothing_to_learn_the_kernel_stays_one(name, what):
    x = normal(1000, 5)
    y = normal(1000, 1, seed=9) if what == "noise" else torch.zeros(1000, 1)
    learnt = learn(plain(name, 5), x, y)
    assert len(learnt.kernel.used)
    assert bool(learnt.kernel.metric.isfinite().all())
    assert abs(learnt.explained) < 0.1
    assert bool(learnt.importance.isfinite().all())


def test_a_constant_column_has_no_say():
    x = normal(800, 4)
    x[:, 2] = 3
    learnt = learn(plain("product", 4), x, x[:, :1])
    assert 2 not in learnt.kernel.used.tolist()


def test_heavy_tails_leave_the_weights_finite():
    x = normal(2000, 4)
    y = x[:, :1] + 0.1 * torch.from_numpy(np.random.default_rng(0).standard_cauchy((2000, 1)))
    learnt = learn(plain("product", 4), x, y)
    assert bool(learnt.kernel.metric.isfinite().all())


def test_of_many_outputs_random_combinations_are_learnt_on():
    x = normal(1500, 6)
    classes = torch.bucketize(x[:, 3].contiguous(), torch.linspace(-2, 2, 39))
    y = torch.nn.functional.one_hot(classes, 40).float()
    learnt = learn(plain("product", 6), x, y - y.mean(0))
    assert int(learnt.importance.argmax()) == 3


def test_sizes_of_a_step_are_bounded_where_columns_are_many(monkeypatch):
    monkeypatch.undo()
    for d in (1, 25, 784, 20_000):
        n_rows, n_centers = column_weights._Sizes(8000, 640, 4e8).among(d, 60_000)
        assert 2 * n_rows * n_centers * d <= 1.01 * 4e8
        assert n_centers >= 1


def test_more_effort_is_larger_problems_and_more_of_them(monkeypatch):
    monkeypatch.undo()
    n_small = []
    for effort in (0.5, 1.0, 2.0, 3.0):
        sizes = column_weights._pool_sizes(effort, 25)
        n_small.append(sizes.count(sizes[0]))
        assert len(sizes) == column_weights._STEPS
        assert sizes == sorted(sizes)
    assert n_small == sorted(n_small, reverse=True)
    works = [column_weights.evaluations_of_learning(25, effort) for effort in (0.5, 1.0, 2.0, 3.0)]
    assert works == sorted(set(works))


def test_many_columns_are_learnt_from_more_rows(monkeypatch):
    monkeypatch.undo()
    last = [column_weights._pool_sizes(1.0, d)[-1].rows for d in (2, 40, 60, 120, 1000)]
    assert last == [4000, 4000, 6000, 12_000, 12_000]
    works = [column_weights.evaluations_of_learning(d) * d for d in (2, 25, 124)]
    assert works == sorted(set(works))


def test_more_centers_never_ask_for_blunter_weights():
    x = normal(3000, 2)
    y = torch.sin(6 * x[:, :1])
    few, many = (learn(plain("product", 2), x, y, n_centers).kernel.weights for n_centers in (200, 20_000))
    assert float(many[0]) > 0.8 * float(few[0])  # What is learnt from other rows differs by a few percent.


def test_noisier_targets_ask_for_more_ridge():
    x = normal(3000, 3)
    signal, noise = torch.sin(2 * x[:, :1]), normal(3000, 1, seed=1)
    quiet, loud = (learn(plain("product", 3), x, signal + size * noise).noise for size in (0.03, 2.0))
    assert quiet < 0.3 <= loud
    assert ridge_of(loud, 2_000_000) == pytest.approx(ridge_of(loud, 1_000_000) / 2, rel=0.01)


def in_days(n: int, n_days: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x, (n, 2): a day and a number; y follows the number and an effect of the day that no other day tells."""
    day = torch.randint(n_days, (n,), generator=torch.Generator().manual_seed(seed))
    effects, number = normal(n_days, seed=seed + 1), normal(n, seed=seed + 2)
    x = torch.stack([(day + 0.5 * seed) / n_days, number], 1)
    return x, (torch.sin(number) + effects[day])[:, None]


@pytest.mark.parametrize(("seed", "are_the_same_days"), [(0, True), (1, False)])
def test_weights_that_tell_days_apart_are_for_rows_of_the_same_days(seed, are_the_same_days):
    pool, checked = in_days(3000, 60, seed=0), in_days(1000, 60, seed)
    kernels = [
        ColumnKernel.of("product", torch.tensor([[of_day, 1.0], [0, 0], [1, 1]])) for of_day in (0.01, 200.0)
    ]
    generator = torch.Generator().manual_seed(0)
    assert column_weights._prefers_last(kernels, pool, checked, (400, 100), generator) == are_the_same_days


@pytest.mark.parametrize(
    ("n", "mean", "is_clear"), [(30, 0.0, False), (30, 2.0, True), (30, -2.0, True), (7, 2.0, False)]
)
def test_checks_end_when_the_difference_is_beyond_its_error(n, mean, is_clear):
    gains = normal(n).double()
    assert column_weights._is_clear(gains - gains.mean() + mean) == is_clear


def test_clear_differences_take_fewer_checks(monkeypatch):
    pool, checked = in_days(3000, 60, seed=0), in_days(1000, 60, seed=1)
    kernels = [
        ColumnKernel.of("product", torch.tensor([[of_day, 1.0], [0, 0], [1, 1]])) for of_day in (0.01, 200.0)
    ]
    searched: list[int] = []
    nearest = column_weights._nearest

    def counted(kernel, row, x, n):
        searched.append(len(x))
        return nearest(kernel, row, x, n)

    monkeypatch.setattr(column_weights, "_nearest", counted)
    generator = torch.Generator().manual_seed(0)
    assert not column_weights._prefers_last(kernels, pool, checked, (400, 100), generator)
    assert column_weights._FEWEST_CHECKS <= searched.count(3000) < column_weights._CHECKS


def test_weights_grow_with_the_centers_as_they_grew_while_they_were_learnt():
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    plain = ColumnKernel.of("product", torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]), 1.0)
    descent = column_weights._Descent.of(plain, x, 1.0)
    few, sharper = (plain, 400), (plain.scaled(2.0), 6400)
    assert descent.growth(few, sharper) == pytest.approx(0.25, abs=1e-6)
    assert descent.growth(few, (plain.scaled(9.0), 6400)) == 0.4
    assert descent.growth(few, (plain.scaled(0.5), 6400)) == 0.0
    assert descent.growth(few, (plain.scaled(2.0), 400)) == 0.0
    found = column_weights.grown(*sharper, 0.25, 16 * 6400)
    assert found.weights.tolist() == pytest.approx([4.0, 4.0])
    assert column_weights.grown(plain, 0, 0.4, 10**6) is plain
    assert column_weights.grown(plain, 400, 0.4, 10**9).weights.tolist() == pytest.approx([4.0, 4.0])


def test_adam_takes_the_steps_of_torchs():
    random = torch.Generator().manual_seed(0)
    ours = [torch.randn(3, generator=random, dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    theirs = [each.clone() for each in ours]
    adam, reference = Adam(ours), torch.optim.Adam(theirs, betas=(0.9, 0.95))
    for step in range(5):
        gradients = [torch.randn(each.shape, generator=random, dtype=torch.float64) for each in ours]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        reference.param_groups[0]["lr"] = 0.2 / (step + 1)
        reference.step()
        adam.step(0.2 / (step + 1), gradients)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=0)
