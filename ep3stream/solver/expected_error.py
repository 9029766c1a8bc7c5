"""Where a small model is expected to err, and centers drawn there.

A region that a small model already describes needs few centers; one with a border or a step through it needs many. So
rows become centers with a probability that follows the error that a small model is expected to make at them: the
random form of what greedy methods do one center at a time (f-greedy; Schaback, Wendland 2000). The error is expected
from the place of a row alone, by a regression of the errors of other rows, and never from its own target: rows that
became centers are not trained on, and to leave out those with the largest noise would bias the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ep3stream.solver.kernels import Kernel

# Of the mean error: no place is left without centers.
_LEAST = 0.05
_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class ExpectedError:
    """|f(x) - y| of a small model at x, expected to be mean + K(x, Z) b.

    z: (m, d), scaled points; weights: b, (m, 1), float32; mean: of the errors.
    """

    kernel: Kernel
    z: Tensor
    weights: Tensor
    mean: float

    def at(self, x: Tensor) -> Tensor:
        """(n,), for scaled rows x, (n, d); at least a twentieth of the mean."""
        right = self.kernel.right(self.z)
        parts = [self.kernel.block(self.kernel.left(some), right) @ self.weights for some in x.split(_CHUNK)]
        return (torch.cat(parts)[:, 0] + self.mean).clamp(min=_LEAST * self.mean)


def drawn_by(expected: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Places, (n,), drawn without repetition with probabilities as `expected`, (N,), positive, N >= n; in random order.

    Each has an exponential waiting time with its own rate, and the first n are drawn (Efraimidis, Spirakis 2006).
    """
    waits = torch.empty(len(expected), dtype=torch.float64).exponential_(generator=generator)
    return torch.topk(waits / expected.cpu(), n, largest=False, sorted=True).indices
