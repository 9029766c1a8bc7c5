"""Kernel products on CPU, K(Z, X) (K(X, Z) a - y): the solver's blocks, plain torch, and other ways to block it.

    python tools/bench_kernels.py [--features 8,64,784] [--repeats 9] [--threads 2] [--clock cpu] [--compile]

p = 8192 centers, m = 2048 rows, c = 10 outputs, Laplacian, float32. All variants run in turn, `--repeats` times over;
`speed` is the median time of `plain` over the median of the variant. On a busy machine use `--threads 1 --clock cpu`,
which counts the processor's time of this process instead of the wall's. Peers and variants:

    plain               weights (p, c): one matrix for each of product, norms, clamp, root, scale, exp; two products
    plain, outputs first  the same with the weights as (c, p)
    three products      the step's three matrix products alone, unblocked: no kernel at all
    ep3stream           `BatchBlock`, as a step calls it, with the preparation of the batch
    exp, rows R         a tile of R whole rows of the block; clamp, sqrt, neg, exp in place
    exp2, rows R        the same; clamp, rsqrt, -1 / ., exp2, the factor log2(e) in the points
    exp2, tile R x C    tiles of both rows and columns, each column strip of the block kept apart
    oneDNN, rows R      exp2, and the product from oneDNN, its maximum with 0 included
    packed, rows R      the same, the columns laid out once for all tiles: what the solver does
    packed, tile R x C  the same with tiles of both
    bf16 product        that of the factors in bfloat16 alone, of which float32's accuracy takes three
    Strassen, rows R    one level of Strassen's algorithm: 7 products of an eighth instead of 8
    compiled, rows R    packed, the element-wise passes by `torch.compile` (--compile; needs a C++ compiler)
    pool, tile R x C    packed, column strips on a pool of `--threads` threads, torch's own parallelism off
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ep3stream.solver.blocks import BatchBlock
from ep3stream.solver.kernels import RadialKernel

P, M, C = 8192, 2048, 10
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Problem:
    """Points (p, d) and (m, d), weights (c, p), targets (c, m), and the memory of the block."""

    z: Tensor
    x: Tensor
    weights: Tensor
    targets: Tensor
    bandwidth: float
    memory: Tensor

    @classmethod
    def of(cls, n_features: int) -> Problem:
        """Standard normal points, the bandwidth the square root of d."""
        generator = torch.Generator().manual_seed(n_features)
        shapes = ((P, n_features), (M, n_features), (C, P), (C, M))
        z, x, weights, targets = (torch.randn(shape, generator=generator) for shape in shapes)
        return cls(z, x, weights / P, targets, n_features**0.5, torch.zeros(P, M))


Passes = Callable[[Tensor, Tensor], None]
Product = Callable[[Tensor], Callable[[Tensor, Tensor], Tensor]]


def exp_passes(squared: Tensor, out: Tensor) -> None:
    torch.exp(squared.clamp_min_(0).sqrt_().neg_(), out=out)


def exp2_passes(squared: Tensor, out: Tensor) -> None:
    exp2_of_not_negative(squared.clamp_min_(0), out)


def exp2_of_not_negative(squared: Tensor, out: Tensor) -> None:
    torch.exp2(torch.div(squared.new_full((), -1), squared.rsqrt_(), out=squared), out=out)


def fused_passes(squared: Tensor, out: Tensor) -> None:
    out.copy_(torch.exp(-torch.sqrt(squared)))


def by_mm(x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, out: torch.mm(z, x.T, out=out)


def by_onednn(x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, _: torch.ops.mkldnn._linear_pointwise(z, x, None, "relu", [], "")


def by_packed(x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return by_onednn(torch.ops.mkldnn._reorder_linear_weight(x, 512))


def by_strassen(x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    (b11, b12), (b21, b22) = ([c.T for c in half.chunk(2, 1)] for half in x.chunk(2))
    b11, b21, b12, b22 = b11, b12, b21, b22  # X' has the blocks of X transposed.
    right = [b11 + b22, b11, b12 - b22, b21 - b11, b22, b11 + b12, b21 + b22]

    def product(z: Tensor, out: Tensor) -> Tensor:
        (a11, a12), (a21, a22) = (half.chunk(2, 1) for half in z.chunk(2))
        left = [a11 + a22, a21 + a22, a11, a22, a11 + a12, a21 - a11, a12 - a22]
        m = [one @ other for one, other in zip(left, right, strict=True)]
        (c11, c12), (c21, c22) = (half.chunk(2, 1) for half in out.chunk(2))
        torch.add(m[0], m[3], out=c11).sub_(m[4]).add_(m[6])
        torch.add(m[2], m[4], out=c12)
        torch.add(m[1], m[3], out=c21)
        torch.sub(m[0], m[1], out=c22).add_(m[2]).add_(m[5])
        return out

    return product


def prepared(points: Tensor, unit: float, left: bool) -> Tensor:
    """[z, |z|^2, 1] or [-2x, 1, |x|^2]."""
    scaled = points / unit
    squared = scaled.square().sum(1, keepdim=True)
    ones = torch.ones_like(squared)
    return torch.cat([scaled, squared, ones], 1) if left else torch.cat([-2 * scaled, ones, squared], 1)


def plain(problem: Problem) -> Callable[[], Tensor]:
    z, x, weights, targets = (
        problem.z,
        problem.x,
        problem.weights.T.contiguous(),
        problem.targets.T.contiguous(),
    )

    def run() -> Tensor:
        k_zx = full_matrix_passes(z, x, problem.bandwidth)
        return (k_zx @ (k_zx.T @ weights - targets)).T

    return run


def plain_outputs_first(problem: Problem) -> Callable[[], Tensor]:
    def run() -> Tensor:
        k_zx = full_matrix_passes(problem.z, problem.x, problem.bandwidth)
        return (problem.weights @ k_zx - problem.targets) @ k_zx.T

    return run


def full_matrix_passes(z: Tensor, x: Tensor, bandwidth: float) -> Tensor:
    """K(Z, X), each pass over the whole matrix."""
    squared = torch.addmm(x.square().sum(1)[None], z, x.T, alpha=-2)
    squared += z.square().sum(1, keepdim=True)
    return squared.clamp_min_(0).sqrt_().mul_(-1 / bandwidth).exp_()


def three_products(problem: Problem) -> Callable[[], Tensor]:
    def run() -> Tensor:
        k_zx = problem.z @ problem.x.T
        return (problem.weights @ k_zx) @ k_zx.T

    return run


def bf16_product(problem: Problem) -> Callable[[], Tensor]:
    z, x = problem.z.bfloat16(), problem.x.bfloat16()
    return lambda: z @ x.T


def package(problem: Problem) -> Callable[[], Tensor]:
    kernel = RadialKernel("laplacian", problem.bandwidth, torch.zeros(problem.z.shape[1]))
    z = kernel.left(problem.z)

    def run() -> Tensor:
        block = BatchBlock(kernel, z, kernel.right(problem.x), problem.memory)
        return block.times(block.left_times(problem.weights) - problem.targets)

    return run


def tiled(
    problem: Problem,
    unit: float,
    passes: Passes,
    n_rows: int,
    n_columns: int = M,
    n_threads: int = 0,
    product: Product = by_mm,
) -> Callable[[], Tensor]:
    """Column strips of (p, n_columns), kept one after the other, by tiles of n_rows; on a pool if there are threads."""
    z = prepared(problem.z, unit, left=True)
    strips = problem.memory.view(M // n_columns, P, n_columns)
    columns = range(0, M, n_columns)
    rows = range(0, P, n_rows)
    pool = ThreadPoolExecutor(n_threads) if n_threads else None
    each = pool.map if pool else map

    def run() -> Tensor:
        x = prepared(problem.x, unit, left=False)
        residual = torch.zeros(C, M)
        direction = torch.zeros(C, P)

        def forward(start: int) -> None:
            strip, sums = strips[start // n_columns], torch.zeros(C, n_columns)
            times_columns = product(x[start : start + n_columns])
            for row in rows:
                tile = strip[row : row + n_rows]
                passes(times_columns(z[row : row + n_rows], tile), tile)
                sums.addmm_(problem.weights[:, row : row + n_rows], tile)
            residual[:, start : start + n_columns] = sums

        def backward(row: int) -> None:
            for start in columns:
                k_zx = strips[start // n_columns, row : row + n_rows]
                direction[:, row : row + n_rows].addmm_(residual[:, start : start + n_columns], k_zx.T)

        n_torch = torch.get_num_threads()
        if pool:
            torch.set_num_threads(1)
        list(each(forward, columns))
        residual.sub_(problem.targets)
        list(each(backward, rows))
        torch.set_num_threads(n_torch)
        return direction

    return run


def variants(problem: Problem, options: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    unit, unit2 = problem.bandwidth, problem.bandwidth / LOG2_E
    found = {
        "plain": plain(problem),
        "plain, outputs first": plain_outputs_first(problem),
        "three products": three_products(problem),
        "bf16 product": bf16_product(problem),
        "ep3stream": package(problem),
        "exp, rows 1024": tiled(problem, unit, exp_passes, 1024),
    }
    for n_rows in (128, 256, 512, 1024):
        found[f"exp2, rows {n_rows}"] = tiled(problem, unit2, exp2_passes, n_rows)
    for n_rows, n_columns in ((256, 512), (512, 512), (256, 1024), (512, 1024)):
        found[f"exp2, tile {n_rows} x {n_columns}"] = tiled(problem, unit2, exp2_passes, n_rows, n_columns)
    rest = exp2_of_not_negative
    found["oneDNN, rows 512"] = tiled(problem, unit2, rest, 512, product=by_onednn)
    for n_rows in (128, 256, 512, 1024):
        found[f"packed, rows {n_rows}"] = tiled(problem, unit2, rest, n_rows, product=by_packed)
    for n_rows, n_columns in ((256, 512), (512, 512), (512, 1024)):
        both = tiled(problem, unit2, rest, n_rows, n_columns, product=by_packed)
        found[f"packed, tile {n_rows} x {n_columns}"] = both
    if problem.z.shape[1] % 2 == 0:
        found["Strassen, rows 512"] = tiled(problem, unit2, exp2_passes, 512, product=by_strassen)
    if options.threads > 1:
        for n_rows, n_columns in ((256, 512), (512, 512), (256, 1024), (512, 1024)):
            pooled = tiled(problem, unit2, rest, n_rows, n_columns, options.threads, by_packed)
            found[f"pool, tile {n_rows} x {n_columns}"] = pooled
    if options.compile:
        compiled = torch.compile(fused_passes, dynamic=False)
        found["compiled, rows 512"] = tiled(problem, unit, compiled, 512, product=by_packed)
    return found


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    print(f"{'d':>4} {'variant':<22} {'median ms':>9} {'least ms':>9} {'speed':>6}")
    for n_features in options.features:
        runs = variants(Problem.of(n_features), options)
        expected = runs["plain"]()
        for name, run in runs.items():
            if name not in ("three products", "bf16 product"):
                error = float((run() - expected).norm() / expected.norm())
                assert error < 1e-4, f"{name} is off by {error:.1e}"
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.repeats):
            for name, run in runs.items():
                began = clock()
                run()
                times[name].append(1e3 * (clock() - began))
        base = statistics.median(times["plain"])
        for name, taken in times.items():
            median = statistics.median(taken)
            print(
                f"{n_features:>4} {name:<22} {median:>9.1f} {min(taken):>9.1f} {base / median:>6.2f}",
                flush=True,
            )


def arguments() -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", default="8,64,784", type=integers)
    parser.add_argument("--repeats", default=9, type=int)
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
