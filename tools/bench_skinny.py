"""Products of a few vectors with a block and a basis, by compiled loops and by torch, and what a step takes with them.

    python tools/bench_skinny.py [--threads 2]

Wall milliseconds, the median of several rounds in which all go in turn: vectors of (k, n) times a matrix of (n, m), and
of (k, m) times its transpose, for a block of 12,288 centers and 1024 rows and for a basis of 500 by 12,288. Then the
nanoseconds that a fit with a kernel on columns takes for a kernel evaluation with its share of the step
(`budget.measured_speed`), for tables of 3, 7 and 25 columns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ep3stream.solver.columns import COLUMN_KERNELS, ColumnKernel
from ep3stream.solver.skinny import few_times_transposed, plus_few_times
from ep3stream.training.budget import measured_speed

MATRICES = {"block": (12_288, 1024), "basis": (500, 12_288)}
VECTORS, ROUNDS = (1, 2, 4, 8, 16), 15
COLUMNS, OUTPUTS = {3: 1, 7: 1, 25: 2}, (1, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads; ms by torch, by loops, and their ratio")
    for name, (n, m) in MATRICES.items():
        matrix = torch.randn(n, m)
        for k in VECTORS:
            took = medians(products(torch.randn(k, n), torch.randn(k, m), matrix))
            for way in ("few @ matrix", "few @ matrix'"):
                times = [took[way, by_loops] for by_loops in (False, True)]
                words = f"{name}, {k:2} vectors, {way:<14}"
                print(words + "".join(f"{each:8.2f}" for each in (*times, times[0] / times[1])))
    print(
        "ns of a kernel evaluation with its share of a step, for " + ", ".join(map(str, OUTPUTS)) + " outputs"
    )
    for name in COLUMN_KERNELS:
        for d, n_categories in COLUMNS.items():
            x = torch.randn(8000, d)
            x[:, d - n_categories :] = torch.randint(0, 10, (8000, n_categories)).float()
            kernel = ColumnKernel(name, torch.rand(d), torch.arange(d) >= d - n_categories, torch.rand(d))
            speeds = [1e9 * measured_speed(kernel, x, c).evaluation_s for c in OUTPUTS]
            print(f"{name}, {d:2} columns" + "".join(f"{each:8.2f}" for each in speeds))


def products(few: Tensor, others: Tensor, matrix: Tensor) -> dict[tuple[str, bool], Callable[[], object]]:
    """Calls by what they compute and whether the loops do."""
    nothing, works = torch.zeros(len(few), matrix.shape[1]), {}
    for by_loops in (False, True):
        works["few @ matrix", by_loops] = partial(plus_few_times, nothing, few, matrix, 1, by_loops)
        works["few @ matrix'", by_loops] = partial(few_times_transposed, others, matrix, by_loops)
    return works


def medians(works: dict[tuple[str, bool], Callable[[], object]]) -> dict[tuple[str, bool], float]:
    """Milliseconds of each call."""
    took: dict[tuple[str, bool], list[float]] = {each: [] for each in works}
    for _ in range(ROUNDS + 1):
        for each, work in works.items():
            began = time.perf_counter()
            work()
            took[each].append(1e3 * (time.perf_counter() - began))
    return {each: statistics.median(times[1:]) for each, times in took.items()}


if __name__ == "__main__":
    main()
