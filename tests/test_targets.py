"""Losses of coded targets, in the unit of y."""

from __future__ import annotations

import pytest
import torch

from ep3stream.solver.targets import TargetCode


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e18, 1e25, 1e36])
def test_the_mean_squared_error_is_right_in_any_unit_of_y(unit: float) -> None:
    """Its square may be beyond float32; the guard would take infinity for a fit that blows up."""
    residual = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    code = TargetCode(False, torch.zeros(2), torch.tensor([unit, 2 * unit]))
    expected = unit**2 * (1 + 4 + 4 * (9 + 0.25)) / 4
    assert float(code.mean_squared_error(residual)) == pytest.approx(expected, rel=1e-6)
