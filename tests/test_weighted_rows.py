"""sample_weight: what rows count, against the dense solution of the weighted problem and against repeated rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_stores import smooth_rows

from ep3stream.estimator import KernelClassifier, KernelRegressor
from ep3stream.estimator.row_sets import WeightedRows

RIDGE = 0.02
X, TARGETS = smooth_rows(150)
# Noise makes the weights matter: the best fit to noiseless rows is the same for all weights.
Y = TARGETS[:, 0] + 8 * np.random.default_rng(5).standard_normal(150)
WEIGHTS = np.random.default_rng(6).integers(0, 6, 150)
SETTINGS = {"kernel": "laplacian", "bandwidth": 4.0, "scale": "none", "ridge": RIDGE, "random_state": 0,
            "n_centers": 200, "projection": "exact", "epochs": 150}  # fmt: skip


def dense(x, y, weights, at):
    """argmin 1/(2 sum w) sum_i w_i |f(x_i) - y_i|^2 + lambda/2 |f|^2 over scaled y, at some points, in float64."""
    x, y, weights = x[weights > 0].astype(float), y[weights > 0], weights[weights > 0].astype(float)
    mean = np.average(y, weights=weights)
    spread = np.average((y - mean) ** 2, weights=weights) ** 0.5
    kernel = lambda a, b: np.exp(-np.linalg.norm(a[:, None] - b[None], axis=2) / 4)  # noqa: E731
    gram = kernel(x, x) + RIDGE * weights.sum() * np.diag(1 / weights)
    return mean + spread * kernel(at.astype(float), x) @ np.linalg.solve(gram, (y - mean) / spread)


def off(found, expected) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())


# Of weights that are no counts each epoch is rounded anew, which is noise that only more rows would average out.
@pytest.mark.parametrize(("unit", "nearness"), [(1.0, 0.03), (0.37, 0.1)])
def test_a_weighted_fit_is_the_dense_solution_of_the_weighted_problem(unit, nearness):
    found = KernelRegressor(**SETTINGS).fit(X, Y, WEIGHTS * unit).predict(X)
    expected, unweighted = dense(X, Y, WEIGHTS, X), dense(X, Y, np.ones(150), X)
    assert off(found, expected) < nearness
    assert off(unweighted, expected) > 0.2


def test_weights_are_repeated_rows():
    of_all = SETTINGS | {"n_centers": 2000, "epochs": 75}
    repeated = KernelRegressor(**of_all).fit(X.repeat(WEIGHTS, 0), Y.repeat(WEIGHTS))
    expected = dense(X, Y, WEIGHTS, X)
    assert off(repeated.predict(X), expected) < 0.03


def test_a_row_of_weight_zero_has_no_influence_at_all():
    x, y = np.concatenate([X, X[:20] * 1e6]), np.concatenate([Y, np.full(20, 1e9)])
    weights = np.concatenate([np.ones(150), np.zeros(20)])
    few = SETTINGS | {"epochs": 3, "scale": "standard"}
    with_them = KernelRegressor(**few).fit(x, y, weights).predict(X)
    np.testing.assert_array_equal(with_them, KernelRegressor(**few).fit(X, Y, np.ones(150)).predict(X))
    labels = np.array(["a", "b", "never"])[np.where(weights > 0, np.arange(170) % 2, 2)]
    assert list(KernelClassifier(random_state=0, epochs=1).fit(x, labels, weights).classes_) == ["a", "b"]


def test_a_single_row_that_outweighs_all_others_is_fitted_and_does_not_diverge():
    weights = np.ones(150)
    weights[7] = 1e5
    model = KernelRegressor(**SETTINGS | {"projection": "nystrom"}).fit(X, Y, weights)
    assert model.predict(X[7:8])[0] == pytest.approx(Y[7], abs=0.2 * Y.std())


def test_a_class_that_weighs_more_is_predicted_more_often():
    labels = (np.median(Y) < Y).astype(int)
    mean = [
        KernelClassifier(random_state=0, n_centers=50, epochs=5, ridge=0.1)
        .fit(X, labels, np.where(labels == 1, weight, 1.0))
        .predict(X)
        .mean()
        for weight in (0.2, 1.0, 5.0)
    ]
    assert mean[0] < mean[1] < mean[2]


def test_partial_fit_takes_weights_and_a_saved_model_goes_on_with_them(tmp_path):
    model = KernelRegressor(**SETTINGS).partial_fit(X, Y, WEIGHTS)
    model.save(tmp_path / "model")
    both = [
        each.partial_fit(X, Y, WEIGHTS).predict(X)
        for each in (KernelRegressor.load(tmp_path / "model"), model)
    ]
    np.testing.assert_array_equal(*both)


@settings(max_examples=50)
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=40), st.integers(0, 10))
def test_an_epoch_has_each_row_as_often_as_its_weight_says_rounded_up_or_down(weights, seed):
    x = np.arange(len(weights), dtype=np.float32)[:, None]
    weighted = WeightedRows.of(x, np.zeros(len(weights)), np.array(weights))
    met = np.concatenate([x[:, 0] for x, _ in weighted.epoch(seed, 0)] or [np.empty(0)]).astype(int)
    counts = np.bincount(met, minlength=len(weights))
    assert (np.abs(counts - weighted.copies) < 1 + 1e-6).all()
    assert abs(counts.sum() - weighted.copies.sum()) < 1 + 1e-6
    assert len(set(weighted.draw_centers(len(weights), seed).tolist())) == len(weights)


def test_statistics_and_draws_follow_the_weights():
    rows = WeightedRows.of(X, Y, WEIGHTS + 1.0)
    repeated = X.astype(float).repeat(WEIGHTS + 1, 0)
    np.testing.assert_allclose(rows.statistics().mean, repeated.mean(0), rtol=1e-6)
    np.testing.assert_allclose(rows.statistics().std, repeated.std(0), rtol=1e-6)
    first = [int(rows.draw_centers(1, seed)[0]) for seed in range(2000)]
    heavy = np.mean(WEIGHTS[first] + 1)
    assert heavy == pytest.approx(np.square(WEIGHTS + 1.0).mean() / np.mean(WEIGHTS + 1), rel=0.05)
