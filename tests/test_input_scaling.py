"""The transform from stored rows to the points of a kernel: numbers scaled, codes of categories as 0/1 features."""

from __future__ import annotations

import pytest
import torch

from ep3stream.solver.bends import chosen_bend, may_be_bent
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


SAMPLE = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0)).double()
SAMPLE[:, 1] = SAMPLE[:, 1].mul(3).exp()  # Lognormal.
SAMPLE[::50, 2] = 99_999  # A code for gaps.
SAMPLE[:, 3] = (SAMPLE[:, 3] > 2.5).double()  # A rare mark.
SAMPLE[:, 4] = 1.0
SAMPLE[:, 5] = 7.0  # It varies in other rows alone.


def bent_scaling() -> InputScaling:
    """Of a normal column, those with long tails above, and a constant."""
    least, most = SAMPLE.min(0).values, SAMPLE.max(0).values
    most[5] = 1e6
    statistics = (SAMPLE.mean(0), SAMPLE.std(0), least, most)
    return InputScaling.of("standard", *statistics).bent(SAMPLE.float(), least, most)


def test_only_numbers_with_long_tails_are_bent():
    assert [bend != 0 for bend in bent_scaling().bends] == [False, True, True, True, False, True]


@pytest.mark.parametrize("power", [0, 1, 3])
def test_what_is_left_out_at_once_would_not_be_bent(power):
    columns = torch.cat([SAMPLE, SAMPLE[:, :1].mul(power).exp(), SAMPLE.round()], 1).T.sort().values
    low, high = columns[:, 0], columns[:, -1]
    found = [chosen_bend(*one) is not None for one in zip(columns, low.tolist(), high.tolist(), strict=True)]
    may_be = may_be_bent(columns, low, high).tolist()
    assert not any(is_bent and not may for is_bent, may in zip(found, may_be, strict=True))
    assert any(found)


def test_what_is_not_far_out_is_spread_as_if_nothing_else_was_there():
    points = bent_scaling()(SAMPLE.float())
    for column in (0, 1, 2):
        low, first, third, high = points[:, column].quantile(torch.tensor([0.02, 0.25, 0.75, 0.97])).tolist()
        assert 1.0 < third - first < 2.0  # 1.35 for a normal sample.
        assert 2.5 < high - low < 5.0  # 3.9.
    # A code for gaps is apart from the others, but not by as much as it was.
    assert 3 < float(points[0, 2] - points[1:50, 2].max()) < 20
    assert points[:, 3].unique().diff().item() == pytest.approx(2**0.5, rel=0.05)


def test_the_logarithm_of_a_lognormal_column_is_found():
    points = bent_scaling()(SAMPLE.float())[:, 1]
    inside = (SAMPLE[:, 1] > SAMPLE[:, 1].quantile(0.1)) & (SAMPLE[:, 1] < SAMPLE[:, 1].quantile(0.9))
    correlation = torch.corrcoef(torch.stack([points.double(), SAMPLE[:, 1].log()])[:, inside])[0, 1]
    assert float(correlation) > 0.995


def test_bent_numbers_keep_their_order():
    x = SAMPLE.sort(0).values
    x[:, 4] = 0
    points = bent_scaling()(x.float())
    assert (points.diff(dim=0) >= 0).all()
    assert bent_scaling()(torch.full((1, 6), 1e30)).isfinite().all()


def test_bends_come_back_from_a_description_and_from_points():
    scaling = bent_scaling()
    again = InputScaling.described(scaling.tensors(), scaling.description())
    assert again.bends == scaling.bends
    rows = SAMPLE[:2].float()
    rows[1, 5] = 1e6
    torch.testing.assert_close(scaling.typical_rows(scaling(rows)), rows)
    assert torch.equal(scaling.sparing([1])(rows)[:, 1], rows[:, 1])


@pytest.mark.parametrize(
    "bent", [{"feature": 9, "bend": 1.0}, {"feature": 0, "bend": -1.0}, {"feature": 0, "bend": "1"}]
)
def test_a_bend_that_cannot_be_is_refused(bent):
    with pytest.raises(ValueError, match="bend"):
        InputScaling.described(CODED.tensors(), {"inputs": {"version": 2, "codes": [], "bent": [bent]}})
