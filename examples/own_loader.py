"""Training on a simulation that never ends: rows are made, learnt from and forgotten.

    python examples/own_loader.py [DIRECTORY]

A surrogate of a projectile with drag: from speed, angle and drag to how far it flies. Each batch is simulated when it
is asked for, by PyTorch's own DataLoader, and no row is ever seen twice, so the running loss is a test loss.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset

import ep3stream

GRAVITY = 9.81
LOW, HIGH = torch.tensor([10.0, 0.2, 0.0]), torch.tensor([60.0, 1.3, 0.05])


def launches(n_rows: int, generator: torch.Generator) -> torch.Tensor:
    """Speed in m/s, angle in radians, drag in 1/m; (n_rows, 3)."""
    return LOW + (HIGH - LOW) * torch.rand(n_rows, 3, generator=generator)


def distance(launch: torch.Tensor, step_s: float = 0.02) -> torch.Tensor:
    """Metres until it is on the ground again, (n_rows,); explicit steps, all rows at once."""
    speed, angle, drag = launch.T
    vx, vy = speed * angle.cos(), speed * angle.sin()
    x, y = torch.zeros_like(vx), torch.zeros_like(vx)
    for _ in range(int(2 * HIGH[0] / GRAVITY / step_s)):
        flies = (y >= 0).to(x)
        x, y = x + flies * step_s * vx, y + flies * step_s * vy
        slowed = 1 - step_s * drag * torch.hypot(vx, vy)
        vx, vy = vx * slowed, vy * slowed - step_s * GRAVITY
    return x


class Simulation(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """`n_batches` of `batch_size` launches and their distances."""

    def __init__(self, n_batches: int, batch_size: int, seed: int) -> None:
        self.n_batches, self.batch_size, self.seed = n_batches, batch_size, seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.n_batches):
            x = launches(self.batch_size, generator)
            yield x, distance(x)


def main(directory: Path, n_batches: int = 60, n_centers: int = 1000) -> float:
    """R2 on launches never simulated before."""
    centers = launches(n_centers, torch.Generator().manual_seed(1))
    model = ep3stream.KernelModel(centers / (HIGH - LOW), "matern52", bandwidth=1.0)
    for epoch in range(3):
        loader = DataLoader(Simulation(n_batches, 512, seed=epoch), batch_size=None)
        loss = model.fit_epoch((x / (HIGH - LOW), y) for x, y in loader)
        print(f"after {(epoch + 1) * n_batches * 512:,} launches: off by {loss**0.5:.2f} m")
    x, y = next(iter(Simulation(1, 2000, seed=99)))
    scores = model.score(x / (HIGH - LOW), y)
    model.save(directory / "model")
    print(f"R2 {scores['r2']:.4f} on 2,000 new ones; the model is in {directory / 'model'}")
    return float(scores["r2"])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".examples/own_loader"))
