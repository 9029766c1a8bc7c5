"""Residuals, confusions and calibration summed over batches are those of all rows at once."""

from __future__ import annotations

import json

import numpy as np
import pytest
from small_stores import make_store, plain_config
from test_scores import summed

import ep3stream
from ep3stream.prediction.diagnosis import QUANTILES, ClassDiagnosis, RegressionDiagnosis
from ep3stream.run.event_log import read_lines


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def skewed(generator, n_rows=20_000):
    """Predictions far from zero whose residuals are wider and more skewed the larger they are."""
    predicted = 1000 + 5 * generator.standard_normal((n_rows, 1))
    residual = np.exp((predicted - 1000) / 10) * (generator.gamma(2, 1, predicted.shape) - 2)
    return predicted, predicted + residual


def test_the_histogram_counts_every_residual_once_where_numpy_does(generator):
    predicted, y = skewed(generator)
    y[0] += 1e5
    (found,) = summed(RegressionDiagnosis(["t"], np.array([1000.0]), np.array([5.0])), predicted, y)[
        "residuals"
    ]
    bars, residual = found["histogram"], (y - predicted)[:, 0]
    assert sum(bars["counts"]) + bars["below"] + bars["above"] == len(y)
    rmse = np.sqrt(np.mean(residual**2))
    assert bars["high"] == pytest.approx(3.5 * rmse)
    assert bars["above"] == 1

    (found,) = summed(RegressionDiagnosis(["t"], np.array([1000.0]), np.array([5.0])), predicted[1:], y[1:])[
        "residuals"
    ]
    bars = found["histogram"]
    expected, _ = np.histogram(residual[1:], 41, (bars["low"], bars["high"]))
    # Cells are 0.5% wide, so a few residuals next to an edge are counted beyond it.
    assert np.abs(np.cumsum(expected) - np.cumsum(bars["counts"])).max() < 0.004 * len(y)


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_bands_are_the_quantiles_of_the_residuals_by_prediction(generator, unit):
    predicted, y = skewed(generator)
    diagnosis = RegressionDiagnosis(["t"], np.array([1000.0]) * unit, np.array([5.0]) * unit)
    (found,) = summed(diagnosis, predicted * unit, y * unit)["residuals"]
    bands = found["bands"]
    assert 15 <= len(bands) <= 21
    assert sum(band["rows"] for band in bands) == len(y)
    order = np.argsort(predicted[:, 0], kind="stable")
    first = 0
    for band in bands:
        rows = order[first : first + band["rows"]]
        first += band["rows"]
        assert band["predicted"] / unit == pytest.approx(predicted[rows].mean(), abs=0.01)
        expected = np.quantile((y - predicted)[rows], QUANTILES)
        assert band["quantiles"] == pytest.approx(expected * unit, rel=0.12, abs=0.06 * unit)


def test_only_the_first_targets_are_looked_at(generator):
    y = generator.standard_normal((50, 6))
    names = list("abcdef")
    found = summed(RegressionDiagnosis(names, np.zeros(6), np.ones(6)), y, y)["residuals"]
    assert [one["target"] for one in found] == names[:4]


def test_confusion_and_mistakes_are_counts_of_class_and_predicted_class(generator):
    y = generator.integers(3, size=4000)
    outputs = np.eye(3)[y] + generator.standard_normal((4000, 3)) * [0.2, 0.5, 0.9]
    found = summed(ClassDiagnosis(("a", "b", "c")), outputs, y)
    expected = np.zeros((3, 3), int)
    np.add.at(expected, (y, outputs.argmax(1)), 1)
    assert found["confusion"] == {"classes": ["a", "b", "c"], "counts": expected.tolist()}
    worst = found["mistakes"][0]
    off = expected - np.diag(np.diag(expected))
    assert worst["rows"] == off.max()
    assert worst["of"] == (y == "abc".index(worst["class"])).sum()
    assert len(found["mistakes"]) == 6


@pytest.mark.parametrize(("n_classes", "has_matrix", "has_pairs"), [(25, 1, 1), (26, 0, 1), (600, 0, 0)])
def test_many_classes_are_told_by_their_mistakes_or_not_at_all(generator, n_classes, has_matrix, has_pairs):
    y = generator.integers(n_classes, size=3000)
    found = summed(ClassDiagnosis([str(i) for i in range(n_classes)]), generator.random((3000, n_classes)), y)
    assert (found["confusion"] is not None) == has_matrix
    assert bool(found["mistakes"]) == has_pairs


def test_confidences_that_are_true_lie_on_the_diagonal(generator):
    p = generator.random(200_000)
    y = (generator.random(200_000) < p).astype(int)
    found = summed(ClassDiagnosis(("no", "yes")), np.stack([1 - p, p], 1), y)["calibration"]
    assert sum(one["rows"] for one in found) == 200_000
    assert min(one["confidence"] for one in found) >= 0.5
    assert [one["accuracy"] for one in found] == pytest.approx([one["confidence"] for one in found], abs=0.02)


def test_outputs_without_a_positive_one_are_a_guess_among_all_classes():
    found = summed(ClassDiagnosis(list("abcd")), -np.ones((10, 4)), np.zeros(10, int), n_parts=1)
    assert found["calibration"] == [{"rows": 10, "confidence": 0.25, "accuracy": 1.0}]


@pytest.mark.parametrize(("task", "key"), [("regression", "residuals"), ("classification", "confusion")])
def test_evaluate_keeps_the_diagnosis_with_the_run_and_inspect_leaves_it_there(tmp_path, task, key):
    store = make_store(tmp_path / "s.zarr", task)
    run = tmp_path / "run"
    config = plain_config(solver={"centers": 60})
    ep3stream.fit(store, run, config)
    scores = ep3stream.evaluate(run, store)
    (record,) = read_lines(run / "evaluations.jsonl")
    assert key in record["diagnosis"]
    assert len(json.dumps(record)) < 20_000
    counted = record["diagnosis"]
    if task == "regression":
        assert sum(band["rows"] for band in counted["residuals"][0]["bands"]) == scores["n"]
    else:
        counts = np.array(counted["confusion"]["counts"])
        assert np.trace(counts) / counts.sum() == scores["accuracy"]
    assert "diagnosis" not in scores
    assert "diagnosis" not in ep3stream.inspect(run)["evaluations"][0]
