"""Scores summed over batches are those of scikit-learn over all rows at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics

from ep3stream.prediction.scores import ClassScores, RegressionScores


def summed(totals, outputs, y, n_parts=7):
    for part in np.array_split(np.arange(len(y)), n_parts):
        totals.add(outputs[part], y[part])
    return totals.result()


@pytest.fixture
def generator():
    return np.random.default_rng(0)


@pytest.mark.parametrize("offset", [0, 1e5])
@pytest.mark.parametrize("n_targets", [1, 3])
def test_regression_scores_are_those_of_scikit_learn(generator, n_targets, offset):
    y = (offset + generator.standard_normal((1000, n_targets)) * [5, 1, 2][:n_targets]).astype(np.float32)
    outputs = y + generator.standard_normal(y.shape)
    scores = summed(RegressionScores(), outputs, y)
    assert scores["n"] == 1000
    assert scores["mse"] == pytest.approx(metrics.mean_squared_error(y, outputs), rel=1e-9)
    assert scores["rmse"] == pytest.approx(math.sqrt(scores["mse"]))
    assert scores["r2"] == pytest.approx(metrics.r2_score(y, outputs), rel=1e-6)


@pytest.mark.parametrize("constant", [0.1, 1e9, -3.7])
def test_r2_of_a_constant_target_is_undefined(constant):
    y = np.full((999, 1), constant, np.float32)
    assert math.isnan(summed(RegressionScores(), y + 0.5, y)["r2"])


@pytest.mark.parametrize("n_classes", [3, 6, 10])
def test_class_scores_are_those_of_scikit_learn(generator, n_classes):
    y = generator.integers(n_classes, size=2000).astype(np.int32)
    onehot = np.eye(n_classes)[y]
    outputs = onehot + generator.standard_normal(onehot.shape)
    scores = summed(ClassScores(tuple(map(str, range(n_classes)))), outputs, y)
    assert scores["n"] == 2000
    assert scores["mse"] == pytest.approx(np.square(outputs - onehot).mean())
    assert scores["accuracy"] == metrics.accuracy_score(y, outputs.argmax(1))
    expected = metrics.top_k_accuracy_score(y, outputs, k=5) if n_classes > 5 else 1.0
    assert scores["top5"] == expected
    assert "auc" not in scores


@pytest.mark.parametrize("spread", [1e-6, 1, 1e6])
def test_auc_is_that_of_scikit_learn(generator, spread):
    y = generator.integers(2, size=5000)
    margin = spread * (y + 1.5 * generator.standard_normal(5000))
    auc = summed(ClassScores(("no", "yes")), np.stack([-margin / 2, margin / 2], 1), y)["auc"]
    assert auc == pytest.approx(metrics.roc_auc_score(y, margin), abs=1e-4)


def test_tied_scores_count_half_and_zero_has_no_sign(generator):
    y = generator.integers(2, size=500)
    margin = generator.integers(-2, 3, size=500).astype(float)
    outputs = np.stack([np.zeros(500), np.where(margin == 0, -0.0, margin)], 1)
    outputs[::2] *= -1
    margin = outputs[:, 1] - outputs[:, 0]
    scores = summed(ClassScores(("no", "yes")), outputs, y)
    assert scores["auc"] == pytest.approx(metrics.roc_auc_score(y, margin), abs=1e-12)


def test_auc_of_rows_of_one_class_is_undefined():
    scores = summed(ClassScores(("no", "yes")), np.ones((10, 2)), np.ones(10, np.int64))
    assert math.isnan(scores["auc"])
    assert scores["accuracy"] == 0.0
