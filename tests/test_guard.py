"""The guard: what it takes for a blow-up, where it goes back to, and when it gives up."""

from __future__ import annotations

import math

import pytest
import torch

from ep3stream.errors import DivergedError
from ep3stream.solver.guard import Guard, RunningLoss
from ep3stream.solver.step import SolverState


def state(value: float) -> SolverState:
    return SolverState(*(torch.full((1, 3), value) for _ in range(3)), averaged=int(value))


def after(losses) -> RunningLoss:
    running = RunningLoss()
    for loss in losses:
        running = running.after(loss)
    return running


def watched(guard: Guard, current: SolverState, losses, start: int = 0, value: float | None = None) -> int:
    """Shows `losses` in eights, as a fit does; returns how often the guard rolled back."""
    n_rolled_back = 0
    for first in range(0, len(losses), 8):
        if value is not None:
            current.weights.fill_(value)
        n_rolled_back += guard.watch(start + first + 8, list(losses[first : first + 8]), current)
    return n_rolled_back


def test_the_running_loss_is_the_mean_of_the_batches_so_far():
    running = after([4.0, 2.0, 3.0])
    assert running.mean == pytest.approx(3.0)
    assert running.first == 4.0


def test_falling_noisy_and_level_losses_are_no_blow_up():
    falling = [math.exp(-t / 20) for t in range(400)]
    noisy = [1 + 0.9 * math.sin(7 * t) for t in range(400)]
    for losses in (falling, noisy, [0.0] * 100, [1e-30] * 100):
        running = RunningLoss()
        for loss in losses:
            running = running.after(loss)
            assert not running.has_blown_up


def test_one_batch_with_a_heavy_tail_is_no_blow_up():
    assert not after([1.0] * 60 + [1e6]).has_blown_up


def test_a_small_loss_that_grows_but_stays_far_below_the_zero_model_is_no_blow_up():
    assert not after([1.0] + [1e-4] * 800 + [1e-3] * 400).has_blown_up


@pytest.mark.parametrize(
    "losses",
    [
        [1.0, math.nan],
        [1.0, math.inf],
        [1.0] * 60 + [1.5**t for t in range(40)],
        [1.0] * 9 + [math.nan],
    ],
)
def test_growth_and_values_that_are_not_finite_are_a_blow_up(losses):
    assert after(losses).has_blown_up


def test_going_back_restores_the_last_good_state_and_halves_the_step():
    current = state(1)
    guard = Guard.start(current, 0.5)
    assert watched(guard, current, [1.0] * 64, value=2.0) == 0
    assert guard.good_step == 64
    current.averaged, current.velocity = 99, torch.ones(1, 3)
    assert watched(guard, current, [math.nan], 64, value=9.0) == 1
    assert torch.equal(current.weights, torch.full((1, 3), 2.0))
    assert torch.equal(current.velocity, torch.zeros(1, 3))
    assert (current.averaged, guard.step_size, guard.n_cuts) == (1, 0.25, 1)
    assert not guard.loss.has_blown_up


def test_the_good_state_is_a_copy():
    current = state(1)
    guard = Guard.start(current, 0.5)
    current.weights.fill_(7)
    guard.watch(8, [math.nan], current)
    assert torch.equal(current.weights, torch.ones(1, 3))


def test_a_good_state_that_a_checkpoint_may_be_reading_is_not_written_to():
    current = state(1)
    guard = Guard.start(current, 0.5)
    before = guard.tensors()
    watched(guard, current, [1.0] * 64, value=2.0)
    assert guard.good_step == 64
    assert all(torch.equal(tensor, torch.ones(1, 3)) for tensor in before.values())


def test_a_state_soon_after_going_back_is_not_yet_taken_for_good():
    current = state(1)
    guard = Guard.start(current, 0.5)
    watched(guard, current, [1.0] * 96 + [math.nan], value=2.0)
    kept = guard.good_step
    assert watched(guard, current, [1.0] * 56, 104, value=3.0) == 0
    assert guard.good_step == kept
    watched(guard, current, [1.0] * 64, 160, value=4.0)
    assert guard.good_step > kept
    assert torch.equal(guard.good_weights, torch.full((1, 3), 4.0))


def test_a_state_that_is_not_calm_is_not_kept():
    current = state(1)
    guard = Guard.start(current, 0.5)
    watched(guard, current, [1.0] * 64 + [1.9] * 128)
    assert guard.good_step == 64


def test_blow_ups_one_upon_the_other_cut_the_step_to_an_eighth_and_the_fourth_ends_the_fit():
    current = state(1)
    guard = Guard.start(current, 1.28)
    sizes = []
    for _ in range(3):
        assert guard.watch(8, [math.nan], current)
        sizes.append(guard.step_size)
    assert sizes == pytest.approx([0.64, 0.08, 0.01])
    with pytest.raises(DivergedError, match=r"step 8 with step size 0\.01, after 3 cuts; try"):
        guard.watch(8, [math.nan], current)


def test_a_blow_up_after_a_good_state_halves_the_step_again():
    current = state(1)
    guard = Guard.start(current, 1.0)
    assert watched(guard, current, [math.nan] + [1.0] * 95) == 1
    assert guard.good_step > 8
    assert watched(guard, current, [math.nan] + [1.0] * 7, 96) == 1
    assert guard.step_size == 0.25
    assert watched(guard, current, [math.nan], 104) == 1
    assert guard.step_size == 0.25 / 8
