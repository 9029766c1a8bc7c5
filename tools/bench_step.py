"""A step of the solver on CPUs against its floor: the operations of its matrix products at the machine's GEMM rate.

    python tools/bench_step.py [--features 784] [--batches 256,512,1024,2048,4096] [--centers 5000] [--threads 2]

c = 10 outputs, Laplacian, float32, the `nystrom` projection at its default sizes. The columns are processor ms of a
step divided by the number of threads, each the least of `--repeats` runs in turn:

    step        `Solver.step`, all of it
    block       of this, the kernel block and its products in both directions
    products    the three matrix products of a plain step alone, p x d by d x m, c x p by p x m, c x m by m x p
    floor       2 p m (d + 2 c) operations at the rate of the fastest square product measured here
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ep3stream.mesh import Mesh
from ep3stream.solver.kernels import RadialKernel
from ep3stream.solver.projection import build_nystrom
from ep3stream.solver.step import Solver
from ep3stream.solver.tail import Grouping
from ep3stream.solver.targets import TargetCode
from ep3stream.training.plan import MODEL_RANK

C, RANK, LANDMARKS, SAMPLES, GROUP = 10, MODEL_RANK, 2000, 3000, 256
_SQUARES = (1024, 2048, 4096)


def least(runs: dict[str, Callable[[], object]], repeats: int, threads: int) -> dict[str, float]:
    """Seconds of each run."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.process_time()
            run()
            taken[name].append((time.process_time() - began) / threads)
    return {name: min(times) for name, times in taken.items()}


def gemm_rate(repeats: int, threads: int) -> float:
    """Operations a second of the fastest square float32 product."""
    rates = []
    for n in _SQUARES:
        a, b, out = (torch.randn(n, n) for _ in range(3))
        seconds = least({"mm": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, repeats, threads)["mm"]
        rates.append(2 * n**3 / seconds)
    return max(rates)


def solver_of(n_centers: int, n_features: int, most_rows: int) -> Solver:
    """A solver with standard normal centers and the bandwidth the square root of d."""
    generator = torch.Generator().manual_seed(0)
    centers, sample = (torch.randn(n, n_features, generator=generator) for n in (n_centers, SAMPLES))
    kernel = RadialKernel("laplacian", n_features**0.5, torch.zeros(n_features))
    mesh = Mesh(0, 1, torch.device("cpu"))
    grouping = Grouping(GROUP, n_centers, lambda numbers: centers[numbers.start : numbers.stop])
    sizes = (n_centers, RANK, RANK)
    left, diagonal = kernel.left(centers), kernel.diagonal(centers)
    projection, _ = build_nystrom(
        kernel, left, diagonal, centers[:LANDMARKS], sample, *sizes, mesh, generator, grouping=grouping
    )
    targets = TargetCode(False, torch.zeros(C), torch.ones(C))
    room = torch.zeros(n_centers * most_rows)
    return Solver(kernel, left, projection, targets, 0.9, 3.0, mesh, room)


def runs_of(solver: Solver, n_features: int, m: int) -> dict[str, Callable[[], object]]:
    """What is timed for batches of m rows."""
    x, y, state = torch.randn(m, n_features), torch.randn(m, C), solver.initial_state()
    z = torch.randn(len(solver.centers), n_features)

    def block() -> Tensor:
        formed = solver.block(x)
        return formed.times(formed.left_times(state.weights) - y.T)

    def products() -> Tensor:
        k = z @ x.T
        return (state.weights @ k - y.T) @ k.T

    return {"step": lambda: solver.step(state, x, y, 0.0), "block": block, "products": products}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    rate = gemm_rate(options.repeats, options.threads)
    print(f"GEMM, {options.threads} threads: {rate / 1e9:.0f} GFLOP/s")
    print(f"{'d':>5} {'m':>5} {'step':>8} {'block':>8} {'products':>9} {'floor':>8} {'step/floor':>10}")
    for d in options.features:
        solver = solver_of(options.centers, d, max(options.batches))
        for m in options.batches:
            taken = least(runs_of(solver, d, m), options.repeats, options.threads)
            step, block, products = (1e3 * taken[name] for name in ("step", "block", "products"))
            floor = 1e3 * 2 * options.centers * m * (d + 2 * C) / rate
            print(
                f"{d:>5} {m:>5} {step:>8.1f} {block:>8.1f} {products:>9.1f} {floor:>8.1f} {step / floor:>10.2f}",
                flush=True,
            )


def arguments() -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", default=[784], type=integers)
    parser.add_argument("--batches", default=[256, 512, 1024, 2048, 4096], type=integers)
    parser.add_argument("--centers", default=5000, type=int)
    parser.add_argument("--repeats", default=9, type=int)
    parser.add_argument("--threads", default=2, type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
