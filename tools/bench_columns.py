"""How fast blocks of kernels on columns are formed, beside the plain torch expression and a Laplacian.

    python tools/bench_columns.py [--threads 1] [--torch]

Nanoseconds of processor time for each kernel value, the least of several rounds, for tiles of 512 centers and batches
of 4096 rows, all in one run: product and anova with 7, 25 and 60 columns, 2 of them categories or none, by compiled
loops; the same by whole tensors, as one would write it, or with --torch by the strips of torch that serve where there
is no Numba; and a Laplacian of 8 features. The rounds of all go in turn, so that other work on the machine meets all.
"""

from __future__ import annotations

import argparse
import itertools
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
    parser.add_argument("--torch", action="store_true", help="beside the strips of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    laplacian = RadialKernel("laplacian", bandwidth=4.0, centre=torch.zeros(8))
    works = {"laplacian": block_of(laplacian, 8, ())}
    for d, categories, name in itertools.product((7, 25, 60), ((), (0, 1)), COLUMN_KERNELS):
        kernel = column_kernel(name, d, categories)
        words = f"{name}, {d} columns, {len(categories)} of them categories"
        works[words] = block_of(kernel, d, categories)
        theirs = strips_of if options.torch else plain_of
        works[f"{words} by torch"] = theirs(kernel, d, categories)
    found = nanoseconds(works)
    base = found["laplacian"]
    print(f"{'kernel':<42}{'ns a value':>12}{'laplacians':>12}{'by torch':>12}{'ratio':>8}")
    print(f"{'laplacian, 8 features':<42}{base:>12.2f}{1:>12.2f}")
    for words in works:
        if f"{words} by torch" in found:
            ours, theirs_ns = found[words], found[f"{words} by torch"]
            print(f"{words:<42}{ours:>12.2f}{ours / base:>12.2f}{theirs_ns:>12.2f}{theirs_ns / ours:>8.1f}")


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


def strips_of(kernel: ColumnKernel, d: int, categories: tuple[int, ...]) -> Callable[[], object]:
    """A tile as torch forms it where there is no Numba."""
    z, x = kernel.left(points(CENTERS, d, categories)), kernel.right(points(ROWS, d, categories))
    out = torch.empty(CENTERS, ROWS)
    return lambda: kernel.block_by_torch(z, x, out)


def nanoseconds(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Processor time of each call for each value of the block: the least of some rounds after a first one."""
    took: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            took[name].append(time.process_time() - began)
    return {name: 1e9 * min(times[1:]) / (CENTERS * ROWS) for name, times in took.items()}


if __name__ == "__main__":
    main()
