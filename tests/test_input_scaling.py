"""The transform from stored rows to the points of a kernel: numbers scaled, codes of categories as 0/1 features."""

from __future__ import annotations

import math

import pytest
import torch

from ep3stream.solver.input_scaling import InputScaling

SHIFT, SCALE = torch.tensor([1.0, 0.0, -2.0, 0.0]), torch.tensor([2.0, 1.0, 0.5, 3.0])
CODED = InputScaling(SHIFT, SCALE, (0, 3, 0, 2))


def test_a_number_is_scaled_and_a_code_becomes_as_many_features_as_there_are_codes():
    found = CODED(torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 2.0, -2.0, 1.0]]))
    expected = [[2.0, 0, 1, 0, 1.0, 3, 0], [-2.0, 0, 0, 1, 0.0, 0, 3]]
    assert found.tolist() == expected
    assert CODED.n_inputs == 7
    assert CODED.columns.tolist() == [0, 1, 1, 1, 2, 3, 3]


@pytest.mark.parametrize("value", [-1.0, 3.0, 0.5, 1e30])
def test_what_is_no_code_becomes_zeros(value):
    found = CODED(torch.tensor([[1.0, value, -2.0, 0.0]]))
    assert found.tolist() == [[0, 0, 0, 0, 0, 3, 0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("feature", range(4))
def test_what_is_not_finite_does_not_become_a_point(value, feature):
    row = torch.zeros(1, 4)
    row[0, feature] = value
    assert not CODED(row).isfinite().all()


def test_a_typical_row_of_means_has_scaled_back_numbers_and_the_most_frequent_codes():
    rows = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 2.0, -2.0, 1.0], [4.0, 1.0, 2.0, 1.0]])
    torch.testing.assert_close(CODED.typical_rows(CODED(rows)), rows)
    mean = CODED(rows).mean(0, keepdim=True)
    torch.testing.assert_close(CODED.typical_rows(mean), torch.tensor([[2.0, 1.0, 0.0, 1.0]]))


def test_the_mean_of_codes_says_nothing_of_their_features():
    found = CODED.of_mean(torch.tensor([2.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    assert found.tolist() == [2, 0, 0, 0, 1, 0, 0]


def test_a_description_brings_the_codes_back():
    again = InputScaling.described(CODED.tensors(), CODED.description())
    x = torch.tensor([[2.0, 1.0, 0.0, 1.0]])
    assert torch.equal(again(x), CODED(x))
    assert InputScaling.described(CODED.tensors(), {}).n_codes == ()
    assert InputScaling(SHIFT, SCALE).description() == {}


@pytest.mark.parametrize(
    "inputs",
    [
        {"version": 99, "codes": []},
        {"version": 1, "codes": [{"feature": 4, "n_codes": 2}]},
        {"version": 1, "codes": [{"feature": -1, "n_codes": 2}]},
        {"version": 1, "codes": [{"feature": 1, "n_codes": 0}]},
        {"version": 1, "codes": [{"feature": 1, "n_codes": 1 << 30}]},
        {"version": 1, "codes": [{"feature": 1, "n_codes": "2"}]},
        {"version": 1, "codes": [{"feature": 1}]},
        {"codes": []},
        [],
    ],
)
def test_a_description_that_cannot_be_is_refused(inputs):
    with pytest.raises((ValueError, KeyError, TypeError)):
        InputScaling.described(CODED.tensors(), {"inputs": inputs})


MEAN, STD = torch.tensor([0.1, 5.0, 0.0, 1.0]).double(), torch.tensor([0.5, 2.0, 1.0, 0.0]).double()
LEAST, MOST = torch.tensor([0.0, 1.0, -20.0, 1.0]).double(), torch.tensor([40.0, 9.0, 20.0, 1.0]).double()


def bent_scaling() -> InputScaling:
    """A count with a long tail, a number without, one with two long tails, and a constant."""
    statistics = (MEAN, STD, LEAST, MOST)
    return InputScaling.of("standard", *statistics).bent(*statistics)


def test_only_numbers_with_long_tails_are_bent():
    assert bent_scaling().bends == (4.0, 0.0, 2.0, 0.0)
    points = bent_scaling()(torch.tensor([[0.0, 7.0, 0.0, 1.0], [40.0, 3.0, -20.0, 1.0]]))
    expected = [[0, 1, 0, 0], [math.asinh(160), -1, math.asinh(-40), 0]]
    torch.testing.assert_close(points, torch.tensor(expected))


def test_bent_numbers_keep_their_order_and_small_ones_their_distances():
    x = torch.linspace(0, 40, 1000)
    points = bent_scaling()(torch.stack([x, x, x, x], 1))[:, 0]
    assert (points.diff() > 0).all()
    assert points[1] == pytest.approx(4 * float(x[1]), rel=0.01)


def test_bends_come_back_from_a_description_and_from_points():
    scaling = bent_scaling()
    again = InputScaling.described(scaling.tensors(), scaling.description())
    assert again.bends == scaling.bends
    rows = torch.tensor([[0.5, 7.0, -3.0, 1.0], [40.0, 3.0, 20.0, 1.0]])
    torch.testing.assert_close(scaling.typical_rows(scaling(rows)), rows)
    assert torch.equal(scaling.sparing([0])(rows)[:, 0], rows[:, 0])


@pytest.mark.parametrize(
    "bent", [{"feature": 9, "bend": 1.0}, {"feature": 0, "bend": -1.0}, {"feature": 0, "bend": "1"}]
)
def test_a_bend_that_cannot_be_is_refused(bent):
    with pytest.raises(ValueError, match="bend"):
        InputScaling.described(CODED.tensors(), {"inputs": {"version": 2, "codes": [], "bent": [bent]}})
