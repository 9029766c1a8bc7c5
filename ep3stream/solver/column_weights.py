"""Learns the weights of a kernel on columns from a sample of rows, before the fit.

The loss is the held-out error of a small Nystrom ridge regression. With m centers Z and rows X_t to train on, X_h held
out, all drawn afresh for each step,

    A = K(X_t, Z)'K(X_t, Z) / n + rho K(Z, Z),   a = A^-1 K(X_t, Z)'Y_t / n,   L = |K(X_h, Z) a - Y_h|^2 / n,

and log w, log c and log rho follow its gradient by Adam (Kingma, Ba 2015): through A by automatic differentiation,
through the three blocks by `ColumnKernel.slopes`. Held-out rows tell what matters: on the rows trained on the sharpest
weights would look best. The last quarter of the steps is averaged.

A fit has more centers than the small problem, and more centers resolve sharper weights. So a last stage compares
multiples of the weights on larger problems, and carries the trend of the best multiple on to the size of the fit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ep3stream.errors import ConfigError
from ep3stream.solver.columns import ColumnKernel

_LOGGER = logging.getLogger(__name__)

# Rows that the weights are learnt on at most, and of these the rows and centers of one small problem.
POOL_ROWS = 60_000
_STEP_ROWS, _STEP_CENTERS, _STEPS = 4000, 500, 80
_RATES = (0.25, 0.05)
_AVERAGED = 0.25

# Of the problems that compare multiples of the weights.
_SHARP_ROWS, _SHARP_CENTERS = 16_000, 1500
_MULTIPLES = tuple(2.0**k for k in range(-1, 4))
_MOST = 4.0
_RIDGES = (0.1, 0.3, 1.0, 3.0)
_JITTER = 1e-7
_FEWEST_ROWS = 100
_FIRST_SHARE = 1.0
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class _Small:
    """One small problem: z, (m, d); x and y, (2n, d) and (2n, c), the first n to train on, the others held out."""

    z: Tensor
    x: Tensor
    y: Tensor

    @property
    def n_trained(self) -> int:
        return len(self.x) // 2


def learnt_weights(
    kernel: ColumnKernel, x: Tensor, y: Tensor, n_centers: int, generator: torch.Generator
) -> ColumnKernel:
    """The kernel with learnt weights, for a fit with `n_centers` centers.

    x: (n, d), scaled rows in random order, float32; y: (n, c), their coded targets. Numbers start with the weight
    1 / d for a difference of one, categories with 1 / d. Costs 80 steps of 4 x 10^6 kernel evaluations each, then
    about as much again. Deterministic for a generator. Raises ConfigError for fewer than 100 rows.
    """
    if len(x) < _FEWEST_ROWS:
        raise ConfigError(
            f"the {kernel.name} kernel learns its weights from rows, but there are only {len(x)}; "
            f"give column weights, or at least {_FEWEST_ROWS} rows"
        )
    n_held = min(len(x) // 5, 3 * _STEP_ROWS)
    held, pool = slice(0, n_held), slice(n_held, len(x))
    start = _start(kernel, x[pool])
    learnt, rho = _descended(start, x[pool], y[pool], generator)
    return _sharpened(learnt, rho, (x[pool], y[pool]), (x[held], y[held]), n_centers)


def _start(kernel: ColumnKernel, x: Tensor) -> ColumnKernel:
    """Every column that varies with the same weight, so that a typical pair of rows has K near exp(-1)."""
    varies = (x.amax(0) > x.amin(0)).cpu()
    each = 1 / max(1, int(varies.sum()))
    weights = torch.where(varies, each, 0.0)
    return replace(kernel, weights=weights, shares=torch.where(varies, _FIRST_SHARE, 0.0))


def _descended(
    kernel: ColumnKernel, x: Tensor, y: Tensor, generator: torch.Generator
) -> tuple[ColumnKernel, float]:
    """The kernel after all steps, and the ridge rho that came with it."""
    varies = kernel.weights > 0
    log_weights, log_shares = (
        torch.log(torch.where(varies, each, 1.0)).double() for each in (kernel.weights, kernel.shares)
    )
    log_rho = torch.full((), math.log(1e-3), dtype=torch.float64)
    parameters = [log_weights, log_shares, log_rho]
    adam = torch.optim.Adam(parameters, lr=_RATES[0], betas=(0.9, 0.95))
    totals, n_averaged, losses = [torch.zeros_like(each) for each in parameters], 0, []

    def current(weights: Tensor, shares: Tensor) -> ColumnKernel:
        return replace(
            kernel,
            weights=torch.where(varies, weights.exp(), 0.0).float(),
            shares=torch.where(varies, shares.exp(), 0.0).float(),
        )

    for step in range(_STEPS):
        adam.param_groups[0]["lr"] = _RATES[0] * (_RATES[1] / _RATES[0]) ** (step / _STEPS)
        loss, *gradients = _gradients(current(log_weights, log_shares), log_rho, _drawn(x, y, generator))
        losses.append(loss)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        adam.step()
        if step >= _STEPS * (1 - _AVERAGED):
            n_averaged += 1
            for total, parameter in zip(totals, parameters, strict=True):
                total += parameter
    _LOGGER.debug("column weights: held-out losses %s", [round(loss, 4) for loss in losses])
    log_weights, log_shares, log_rho = (total / n_averaged for total in totals)
    return current(log_weights, log_shares), float(log_rho.exp())


def _drawn(x: Tensor, y: Tensor, generator: torch.Generator) -> _Small:
    """A small problem of rows drawn without repetition."""
    n_rows = min(_STEP_ROWS, int(len(x) / 2.2))
    n_centers = min(_STEP_CENTERS, len(x) - 2 * n_rows)
    rows = torch.randperm(len(x), generator=generator)[: 2 * n_rows + n_centers].to(x.device)
    return _Small(x[rows[:n_centers]], x[rows[n_centers:]], y[rows[n_centers:]])


def _gradients(
    kernel: ColumnKernel, log_rho: Tensor, problem: _Small
) -> tuple[float, Tensor, Tensor, Tensor]:
    """The loss, and its slopes by log w, log c and log rho."""
    n = problem.n_trained
    z = kernel.left(problem.z)
    k_xz = kernel.block(kernel.left(problem.x), kernel.right(problem.z)).requires_grad_()
    k_zz = kernel.block(z, kernel.right(problem.z)).requires_grad_()
    ridge = log_rho.clone().requires_grad_()
    with torch.enable_grad():
        trained, held = k_xz[:n], k_xz[n:]
        gram = (trained.T @ trained / n).double() + ridge.exp() * k_zz.double()
        gram = gram + _JITTER * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor = torch.linalg.cholesky(gram)
        weights = torch.cholesky_solve((trained.T @ problem.y[:n] / n).double(), factor)
        loss = (held @ weights.float() - problem.y[n:]).square().sum(1).mean()
    g_xz, g_zz, g_rho = torch.autograd.grad(loss, (k_xz, k_zz, ridge))
    of_x = kernel.slopes(problem.x, problem.z, g_xz)
    of_z = kernel.slopes(problem.z, problem.z, g_zz)
    return float(loss.detach()), of_x[0] + of_z[0], of_x[1] + of_z[1], g_rho


def _sharpened(
    kernel: ColumnKernel,
    rho: float,
    pool: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    n_centers: int,
) -> ColumnKernel:
    """The kernel with the multiple of the weights that suits `n_centers` centers."""
    x, y = (each[: _SHARP_ROWS + _SHARP_CENTERS] for each in pool)
    n_small = min(n_centers, _SHARP_CENTERS, len(x) // 8)
    rest = x[n_small:], y[n_small:]
    losses = [_held_out_loss(kernel.scaled(each), rho, x[:n_small], rest, held) for each in _MULTIPLES]
    best = _lowest(losses)
    growth = math.log(max(n_centers / _STEP_CENTERS, 1)) / math.log(max(n_small / _STEP_CENTERS, 2))
    multiple = min(2 ** (best * max(1.0, growth)), _MOST)
    _LOGGER.info(
        "column weights: held-out error %.4f; best times %.2f for %d centers, so times %.2f for %d",
        min(losses),
        2**best,
        n_small,
        multiple,
        n_centers,
    )
    return kernel.scaled(multiple)


def _lowest(losses: Sequence[float]) -> float:
    """log2 of the best multiple: the vertex of the parabola through the least loss and its neighbours."""
    at = min(range(len(losses)), key=lambda k: losses[k])
    first = math.log2(_MULTIPLES[0])
    if at in (0, len(losses) - 1):
        return first + at
    before, here, behind = losses[at - 1 : at + 2]
    return first + at + 0.5 * (before - behind) / max(before - 2 * here + behind, 1e-12)


def _held_out_loss(
    kernel: ColumnKernel, rho: float, z: Tensor, trained: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]
) -> float:
    """The least held-out loss of Nystrom regressions with the centers z over a few ridges."""
    right = kernel.right(z)
    gram = torch.zeros(len(z), len(z), dtype=torch.float64, device=z.device)
    moment = torch.zeros(len(z), trained[1].shape[1], dtype=torch.float64, device=z.device)
    for x, y in zip(*(each.split(_CHUNK) for each in trained), strict=True):
        block = kernel.block(kernel.left(x), right)
        gram += (block.T @ block).double()
        moment += (block.T @ y).double()
    k_zz = kernel.block(kernel.left(z), right).double()
    k_zz.diagonal().add_(_JITTER)
    n = len(trained[0])
    k_hz = kernel.block(kernel.left(held[0]), right)
    losses = []
    for ridge in _RIDGES:
        weights = torch.linalg.solve(gram / n + ridge * rho * k_zz, moment / n)
        losses.append(float((k_hz @ weights.float() - held[1]).square().sum(1).mean()))
    return min(losses)
