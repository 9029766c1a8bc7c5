"""How fast blocks of kernels on columns are formed, beside the plain torch expression and a Laplacian.

    python tools/bench_columns.py [--threads 1]

Nanoseconds of processor time for each kernel value, the least of several rounds, for tiles of 512 centers and batches
of 4096 rows, all in one run: product and anova with 7 and 25 numbers, and with 2 of them categories; the same by whole
tensors, as one would write it; and a Laplacian of 8 features.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ep3stream.solver.columns import COLUMN_KERNELS, ColumnKernel
from ep3stream.solver.kernels import Kernel, RadialKernel

CENTERS, ROWS, ROUNDS = 512, 4096, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    laplacian = RadialKernel("laplacian", bandwidth=4.0, centre=torch.zeros(8))
    base = nanoseconds(block_of(laplacian, 8, ()))
    print(f"{'kernel':<40}{'ns a value':>12}{'plain torch':>14}{'ratio':>8}")
    print(f"{'laplacian, 8 features':<40}{base:>12.2f}")
    for d in (7, 25):
        for categories in ((), (0, 1)):
            for name in COLUMN_KERNELS:
                kernel = column_kernel(name, d, categories)
                ours = nanoseconds(block_of(kernel, d, categories))
                theirs = nanoseconds(plain_of(kernel, d, categories))
                words = f"{name}, {d} columns, {len(categories)} of them categories"
                print(f"{words:<40}{ours:>12.2f}{theirs:>14.2f}{theirs / ours:>8.1f}", flush=True)


def column_kernel(name: str, d: int, categories: tuple[int, ...]) -> ColumnKernel:
    """All columns with the same weight."""
    metric = torch.ones(3, d)
    metric[0], metric[1] = 1 / d, 0
    metric[1, list(categories)] = 1
    return ColumnKernel.of(name, metric)


def points(n: int, d: int, categories: tuple[int, ...]) -> Tensor:
    x = torch.randn(n, d)
    x[:, list(categories)] = torch.randint(0, 20, (n, len(categories))).float()
    return x


def block_of(kernel: Kernel, d: int, categories: tuple[int, ...]) -> Callable[[], object]:
    """A tile of a step: points prepared before, the block in memory that is there."""
    z, x = kernel.left(points(CENTERS, d, categories)), kernel.right(points(ROWS, d, categories))
    x, out = x.for_products(2), torch.empty(CENTERS, ROWS)
    return lambda: kernel.block(z, x, out=out)


def plain_of(kernel: ColumnKernel, d: int, categories: tuple[int, ...]) -> Callable[[], object]:
    """The formula, a column at a time over the whole tile."""
    z, x = points(CENTERS, d, categories), points(ROWS, d, categories)

    def plain() -> Tensor:
        product = torch.ones(CENTERS, ROWS)
        for j in range(d):
            distance = (z[:, j, None] - x[:, j]).abs()
            if j in categories:
                distance = (distance > 0).float()
            factor = torch.exp(-kernel.weights[j] * distance)
            product = product * (factor if kernel.name == "product" else (1 + factor) / 2)
        return product

    return plain


def nanoseconds(work: Callable[[], object]) -> float:
    """Processor time of a call for each value of the block: the least of some rounds after a first one."""
    work()
    took = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        took.append(time.process_time() - began)
    return 1e9 * min(took) / (CENTERS * ROWS)


if __name__ == "__main__":
    main()
