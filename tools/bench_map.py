"""Maps: regions with borders of many scales by two coordinates, where eigenvalues fall slowly.

    python tools/bench_map.py [--centers 10000] [--rows 500000] [--ways none,auto,exact] [--epochs 1] [--seeds 0]

Land or sea is the sign of a sum of waves whose lengths fall by 1.9 from octave to octave, seven octaves, on a square
with standardised coordinates; Laplacian kernel, bandwidth 0.3. 20,000 more rows are for the test; the centers are not
trained on. `none` and `auto` are values of --tail, a number is a group size; `exact` is the exact projection, whose
memory is 16 p^2 bytes.

    accuracy, mse   on the test rows, after so many epochs of one fit
    seconds         of the processor, set-up and steps; `to none` is this over that of the way `none`
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ep3stream import KernelModel

TEST_ROWS = 20_000
BANDWIDTH = 0.3
_OCTAVES, _WAVES, _FALL = 7, 24, 1.9


def regions(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x, (n, 2), uniform, and y, (n,), 0 or 1; the map is always the same."""
    of_map = torch.Generator().manual_seed(11)
    x = torch.rand(n_rows, 2, generator=generator) * 3.4 - 1.7
    height = torch.zeros(n_rows)
    for octave in range(_OCTAVES):
        waves = torch.randn(2, _WAVES, generator=of_map) * 2.2 * _FALL**octave
        shifts = torch.rand(_WAVES, generator=of_map) * 6.283
        height += torch.cos(x @ waves + shifts).sum(1) * _FALL ** (-0.85 * octave) / _WAVES**0.5
    return x, (height > 0.1).long()


def settings_of(way: str) -> dict[str, Any]:
    """Arguments of KernelModel."""
    if way == "exact":
        return {"projection": "exact"}
    return {"tail": way if way in ("none", "auto") else int(way)}


def run(
    way: str, n_centers: int, n_rows: int, epochs: int, seed: int
) -> Iterator[tuple[float, float, float]]:
    """Of one fit, after each epoch: accuracy, mse, and processor seconds so far."""
    x, y = regions(n_centers + n_rows + TEST_ROWS, torch.Generator().manual_seed(seed))
    centers, x_test, y_test = x[:n_centers], x[-TEST_ROWS:], y[-TEST_ROWS:]
    rows = x[n_centers:-TEST_ROWS], y[n_centers:-TEST_ROWS]
    memory = max(2 << 30, 40 * n_centers**2) if way == "exact" else 2 << 30
    given = settings_of(way) | {"bandwidth": BANDWIDTH, "seed": seed, "memory": memory}
    model, seconds = KernelModel(centers, "laplacian", 2, task="classification", **given), 0.0
    for _ in range(epochs):
        began = time.process_time()
        model.fit_epoch(rows)
        seconds += time.process_time() - began
        score = model.score(x_test, y_test)
        yield score["accuracy"], score["mse"], seconds


def main() -> None:
    """Prints a line for each way, seed and epoch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--centers", default=10_000, type=int)
    parser.add_argument("--rows", default=500_000, type=int)
    parser.add_argument("--ways", default="none,auto,exact", type=lambda text: text.split(","))
    parser.add_argument("--epochs", default=1, type=int)
    parser.add_argument("--seeds", default="0", type=lambda text: [int(item) for item in text.split(",")])
    options = parser.parse_args()
    print(f"{'way':<6} {'seed':>4} {'epoch':>5} {'accuracy':>9} {'mse':>9} {'seconds':>8} {'to none':>8}")
    for seed in options.seeds:
        plain: dict[int, float] = {}
        for way in options.ways:
            found = run(way, options.centers, options.rows, options.epochs, seed)
            for epoch, (accuracy, mse, seconds) in enumerate(found, 1):
                if way == "none":
                    plain[epoch] = seconds
                ratio = f"{seconds / plain[epoch]:.2f}" if epoch in plain else "-"
                line = (
                    f"{way:<6} {seed:>4} {epoch:>5} {accuracy:>9.4f} {mse:>9.5f} {seconds:>8.1f} {ratio:>8}"
                )
                print(line, flush=True)


if __name__ == "__main__":
    main()
