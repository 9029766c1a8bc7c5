"""The parts of `tools/gpu_check.py`: checks that compare a GPU with the CPU and with float64, and benchmarks of it."""

from __future__ import annotations

import importlib
import json
import math
import os
import queue
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ep3stream.config import ConvertConfig, FitConfig, Precision
from ep3stream.mesh import Mesh
from ep3stream.solver import gpu
from ep3stream.solver.blocks import BatchBlock, fuses, kernel_times, times_kernel
from ep3stream.solver.columns import COLUMN_KERNELS, ColumnKernel
from ep3stream.solver.eigenpro import build_eigenpro
from ep3stream.solver.exact import build_exact
from ep3stream.solver.kernels import RADIAL_KERNELS, CallableKernel, Kernel, RadialKernel
from ep3stream.solver.points import UnpreparedPoints
from ep3stream.solver.projection import build_nystrom
from ep3stream.solver.step import Solver, SolverState
from ep3stream.solver.tail import Grouping
from ep3stream.solver.targets import TargetCode
from ep3stream.stream.batch_slots import BatchSlot, DataWaits

# Seconds of an epoch over 5 million rows of 1280 features and 10 outputs on an A100 (Abedsoltan, Ma, Pandit, Belkin
# 2024, "Fast training of large kernel models with delayed projections"): of EigenPro's successor, and of EigenPro3.
PUBLISHED_S = {65_536: "271 / 1359", 262_144: "406 / 7663", 1_048_576: "1268 / over 24 h"}
PRECISIONS: tuple[Precision, ...] = ("float32", "bf16x3", "tf32", "bfloat16")
CPU = torch.device("cpu")


@dataclass(slots=True)
class Report:
    """Rows of the tables, as they come; after each of them all are written to `out` as JSON.

    seconds: of each timing; limit_s: of all parts together. toy: sizes so small that a CPU takes seconds. about: what
    is told of the machine. peak: FLOP/s by precision, once they were measured.
    """

    device: torch.device
    seconds: float
    toy: bool
    limit_s: float = math.inf
    out: Path | None = None
    about: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    peak: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @property
    def left_s(self) -> float:
        """The seconds that are left of the limit."""
        return self.limit_s - (time.perf_counter() - self.began)

    def add(self, part: str, what: str, **values: Any) -> None:
        """A row, told and written at once."""
        self.rows.append({"part": part, "what": what, **values})
        told = ", ".join(f"{name} {text_of(value)}" for name, value in values.items())
        print(f"| {part} | {what} | {told} |", flush=True)
        if self.out is not None:
            unfinished = self.out.with_suffix(".unfinished")
            unfinished.write_text(json.dumps({**self.about, "rows": self.rows}, indent=1))
            os.replace(unfinished, self.out)

    def check(self, part: str, what: str, error: float, limit: float) -> None:
        """A row that is right or wrong."""
        is_right = error <= limit
        self.add(part, what, error=error, limit=limit, verdict="right" if is_right else "WRONG")
        if not is_right:
            self.failed.append(what)

    def randn(self, *shape: int, seed: int = 0, device: torch.device | None = None) -> Tensor:
        """Standard normal numbers on the device, or on another one."""
        device = device or self.device
        return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def text_of(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def rate(work: Callable[[], Any], report: Report) -> float:
    """Calls per second, after one that is not counted, over about the seconds that were asked for."""
    work()
    synchronize(report.device)
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < report.seconds:
        for _ in range(1 if report.toy else 4):
            work()
        synchronize(report.device)
        calls += 1 if report.toy else 4
    return calls / (time.perf_counter() - began)


# Problems.


def laplacian(d: int, device: torch.device, precision: Precision = "float32") -> RadialKernel:
    return RadialKernel("laplacian", math.sqrt(d), torch.zeros(d, device=device), precision=precision)


def column_kernel(name: str, d: int) -> ColumnKernel:
    """A kernel on d columns, each third of them a category."""
    is_category = torch.arange(d) % 3 == 2
    return ColumnKernel.of(name, torch.stack([torch.full((d,), 0.3), is_category, torch.full((d,), 0.5)]))


def rational(z: Tensor, x: Tensor) -> Tensor:
    """A kernel as a user gives it."""
    return 1 / (1 + torch.cdist(z, x).square() / z.shape[1])


def solver_of(kernel: Kernel, projection: str, p: int, d: int, c: int, m: int, report: Report) -> Solver:
    """A solver on random centers, its local tail and block memory as a fit's, on the device of the report."""
    device, mesh, rank = report.device, Mesh(0, 1, report.device), min(250, p // 4)
    # The same numbers on every device where the sizes are small enough to make them on the host.
    at = device if p > 10_000 else CPU
    centers = report.randn(p, d, seed=1, device=at).to(device)
    sample = report.randn(min(2000, p), d, seed=2, device=at).to(device)
    landmarks, generator = centers[: min(2000, p)], torch.Generator().manual_seed(0)
    q, built, left = max(1, rank // 2), None, UnpreparedPoints(centers, kernel.left).whole()
    if projection == "exact":
        built = build_exact(kernel, centers, sample, q, mesh, generator)
    elif projection == "eigenpro":
        built = build_eigenpro(kernel, centers, landmarks, sample, p, (q, q), (2, 1e-3), mesh, generator)
    else:
        diagonal = kernel.diagonal(centers)
        grouping = Grouping(min(256, p // 4), p, lambda numbers: centers[numbers.start : numbers.stop])
        built = build_nystrom(
            kernel, left, diagonal, landmarks, sample, p, rank, q, mesh, generator, grouping=grouping
        )
    targets = TargetCode(False, torch.zeros(c, device=device), torch.ones(c, device=device))
    memory = None if fuses(kernel, device, 2 * c) else torch.zeros(p * m, device=device)
    return Solver(kernel, left, built[0], targets, 0.9, 3.0, mesh, memory)


class Ring:
    """Batches of rows on the host, sent ahead through the fit's own slots: pinned memory and a side stream."""

    def __init__(self, report: Report, m: int, d: int, c: int, n_host: int) -> None:
        manifest: Any = types.SimpleNamespace(
            task="regression", n_features=d, n_outputs=c, x_dtype="float32", y_dtype="float32"
        )
        cuda = report.device.type == "cuda"
        copies = torch.cuda.Stream(report.device) if cuda else None
        self.slots = [BatchSlot(manifest, m, report.device, copies) for _ in range(3)]
        x = report.randn(max(n_host, m), d, seed=5, device=CPU)
        self.x, self.y, self.m = x.numpy(), torch.sin(x[:, :c]).contiguous().numpy(), m
        self.device = report.device

    def batches(self, n_steps: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        """x, y and the seconds the device waited for them; one thread gathers ahead, as in a fit."""
        free: queue.SimpleQueue[BatchSlot] = queue.SimpleQueue()
        ready: queue.SimpleQueue[BatchSlot] = queue.SimpleQueue()
        for slot in self.slots:
            free.put(slot)

        def run() -> None:
            rows = np.arange(self.m)
            for step in range(n_steps):
                slot = free.get()
                slot.begin(step)
                slot.gather(self.x, self.y, (rows + step * self.m) % len(self.x))
                slot.send()
                ready.put(slot)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        waits = DataWaits(self.device)
        for _ in range(n_steps):
            waits.begin()
            slot = ready.get()
            batch = slot.batch(waits)
            yield batch.x, batch.y, batch.waited_s
            slot.release()
            free.put(slot)
        thread.join()


# Checks.

# Each path of a step: projection, kernel and features; the last three form no block.
PATHS: dict[str, tuple[str, Callable[[torch.device], Kernel], int]] = {
    **{
        f"nystrom, {each}": ("nystrom", lambda at, each=each: laplacian(64, at, each), 64)
        for each in PRECISIONS
    },
    "exact": ("exact", lambda at: laplacian(64, at), 64),
    "eigenpro": ("eigenpro", lambda at: laplacian(64, at), 64),
    "a callable": ("nystrom", lambda at: CallableKernel(rational).without_waits(at), 64),
    "few features": ("nystrom", lambda at: laplacian(9, at), 9),
    "product": ("nystrom", lambda at: column_kernel("product", 9), 9),
    "anova": ("nystrom", lambda at: column_kernel("anova", 6), 6),
}


def check_paths(report: Report) -> None:
    """Five steps of each path: against the CPU, the same bits again, and without a wait for the GPU."""
    p, m, c = (100, 32, 3) if report.toy else (600, 256, 3)

    def stepped(path: str, device: torch.device, is_strict: bool = False) -> SolverState:
        projection, kernel, d = PATHS[path]
        solver = solver_of(kernel(device), projection, p, d, c, m, replace(report, device=device, out=None))
        state, x = solver.initial_state(), report.randn(5 * m, d, seed=9, device=CPU).to(device)
        y = torch.sin(x[:, :c])
        synchronize(device)
        if is_strict:
            torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(5):
                rows = slice(step * m, step * m + m)
                solver.step(state, x[rows], y[rows], 1e-3, score=step == 3)
        finally:
            if is_strict:
                torch.cuda.set_sync_debug_mode("default")
        return state

    for path in PATHS:
        # With these tensor cores cut sums off, by some 3e-6 of a kernel value.
        limit = 1e-3 if any(each in path for each in PRECISIONS[1:]) else 1e-4
        expected, here, again = (
            stepped(path, at).average.cpu() for at in (CPU, report.device, report.device)
        )
        error = float((expected - here).abs().max() / expected.abs().max())
        report.check("paths", f"{path}: five steps, GPU and CPU", error, limit)
        report.check("paths", f"{path}: the same bits twice", float((again != here).sum()), 0)
        if report.device.type != "cuda":
            continue
        try:
            stepped(path, report.device, is_strict=True)
            waits = 0.0
        except RuntimeError as error:
            print(f"{path}: a step waits: {error}", file=sys.stderr)
            waits = 1.0
        report.check("paths", f"{path}: steps that wait for the GPU", waits, 0)


def check_blocks(report: Report) -> None:
    """Fused products and blocks of every radial kernel and precision, against float64."""
    p, m = (30, 40) if report.toy else (3000, 2000)
    for name in RADIAL_KERNELS:
        for d in (9, 64, 784):
            z, x = report.randn(p, d, seed=1), report.randn(m, d, seed=2)
            x[:20] = z[:20]
            shape = {"dispersal": 0.7, "rational_quadratic": 50.0}.get(name, 1.0)
            kernel = RadialKernel(name, math.sqrt(d), torch.zeros(d, device=report.device), shape)
            truth = kernel.block(kernel.left(z.double()), kernel.right(x.double()))
            if d <= gpu.MAX_FEATURES[name]:
                check_products(report, "blocks", f"{name}, d={d}", kernel, z, x, truth)
                continue
            for precision, limit in zip(PRECISIONS, (3e-5, 3e-4, 3e-3, 3e-2), strict=True):
                own = replace(kernel, precision=precision)
                found = BatchBlock(own, own.left(z), own.right(x), None).whole()
                what = f"{name}, d={d}, {precision}"
                report.check("blocks", f"{what}: block", float((found - truth).abs().max()), limit)
                itself = float((found.diagonal()[:20] - 1).abs().max())
                report.check("blocks", f"{what}: K(x, x) - 1", itself, 1e-5)
                if gpu.gemm_serves(name, report.device, precision):
                    check_one_program(report, what, own, z, x, found)


def check_one_program(
    report: Report, what: str, kernel: RadialKernel, z: Tensor, x: Tensor, block: Tensor
) -> None:
    """That a program runs which forms a block and multiplies it, and gives the products of its block."""
    for k in (1, 20):
        w = report.randn(k, len(z), seed=3)
        kept = torch.zeros_like(block)
        found = kernel.fused(w, kernel.left(z), kernel.right(x), over_left=True, block=kept)
        runs = found is not None
        report.check("blocks", f"{what}, c={k}: Triton's product runs", float(not runs), 0)
        if found is not None:
            off = (found - w.double() @ block.double()).abs().max() / len(z) ** 0.5
            report.check("blocks", f"{what}, c={k}: weights times block", float(off), 3e-5)
            report.check(
                "blocks", f"{what}, c={k}: the block beside it", float((kept - block).abs().max()), 0
            )


def check_products(
    report: Report, part: str, what: str, kernel: Kernel, z: Tensor, x: Tensor, truth: Tensor
) -> None:
    """Both products with a block of z, (p, d), and x, (m, d), for few outputs and for many."""
    left, right = kernel.left(z), kernel.right(x)
    for k in (1, 10):
        how = f"{what}, c={k}, {'fused' if fuses(kernel, report.device, k) else 'by tiles'}"
        w, g = report.randn(k, len(z), seed=3), report.randn(len(x), k, seed=4)
        off = (times_kernel(kernel, w, left, right) - w.double() @ truth).abs().max() / len(z) ** 0.5
        report.check(part, f"{how}: weights times block", float(off), 3e-5)
        off = (kernel_times(kernel, left, right, g) - truth @ g.double()).abs().max() / len(x) ** 0.5
        report.check(part, f"{how}: block times residual", float(off), 3e-5)


def check_columns(report: Report) -> None:
    """Blocks, products and slopes of kernels on columns, against float64."""
    p, m, d = (30, 40, 8) if report.toy else (3000, 2000, 8)
    for name in COLUMN_KERNELS:
        kernel = column_kernel(name, d)
        z, x = report.randn(p, d, seed=1), report.randn(m, d, seed=2)
        z[:, 2::3], x[:, 2::3] = z[:, 2::3].round(), x[:, 2::3].round()
        truth = kernel.block(kernel.left(z.double()), kernel.right(x.double()))
        error = (kernel.block(kernel.left(z), kernel.right(x)) - truth).abs().max()
        report.check("columns", f"{name}: block", float(error), 1e-5)
        check_products(report, "columns", name, kernel, z, x, truth)
        exact = kernel.slopes(z.double(), x.double(), truth)
        for what, found, expected in zip("wc", kernel.slopes(z, x, truth.float()), exact, strict=False):
            error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
            report.check("columns", f"{name}: slopes {what}", float(error), 1e-3)


def check_ring(report: Report) -> None:
    """What arrives is what was sent, however fast the slots go round."""
    m, d, c = 512, 32, 2
    ring, wrong = Ring(report, m, d, c, 4 * m), torch.zeros((), device=report.device)
    host = torch.from_numpy(ring.x).to(report.device)
    for step, (x, _, _) in enumerate(ring.batches(40)):
        wrong += (x != host[(step % 4) * m : (step % 4) * m + m]).sum()
    report.check("ring", "rows that came wrong through the ring", float(wrong), 0)


def check_nccl(report: Report) -> None:
    """A group of one: NCCL is there, and sums."""
    if report.device.type != "cuda" or not dist.is_nccl_available():
        report.add("nccl", "a group of one", verdict="not here")
        return
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    tensor = torch.ones(1000, device=report.device)
    dist.all_reduce(tensor)
    report.check("nccl", "a group of one", float((tensor - 1).abs().max()), 0)
    dist.destroy_process_group()


# Benchmarks.


def measure_peak(report: Report) -> None:
    """FLOP/s of the best of a few large products, by precision; of three products the FLOP of one count."""
    for precision in PRECISIONS:
        best = 0.0
        for size in (64, 128) if report.toy else (8192, 16384):
            dtype = torch.bfloat16 if precision in ("bfloat16", "bf16x3") else torch.float32
            a, b = (report.randn(size, size, seed=seed).to(dtype) for seed in (1, 2))
            with gpu.tensor_cores(precision, report.device):
                best = max(best, 2 * size**3 * rate(lambda a=a, b=b: a @ b, report))
        report.peak[precision] = best / 3 if precision == "bf16x3" else best
        report.add("peak", precision, tflops=report.peak[precision] / 1e12)


def bench_steps(report: Report) -> None:
    """The step of large models of many features."""
    for p in (300, 400) if report.toy else (262_144, 1_048_576):
        bench_step(report, "step", p, *((40, 3, 64) if report.toy else (1280, 10, 4096)))


def bench_fashion(report: Report) -> None:
    """The step of a fit to Fashion-MNIST."""
    bench_step(report, "fashion", *((200, 40, 3, 64) if report.toy else (5000, 784, 10, 2048)))


def bench_step(report: Report, part: str, p: int, d: int, c: int, m: int) -> None:
    """ep3stream's step, fed from pinned memory, in each precision and way, beside five plain passes over the block."""
    began = time.perf_counter()
    built = solver_of(laplacian(d, report.device), "nystrom", p, d, c, m, report)
    synchronize(report.device)
    report.add(part, f"p={p}, d={d}, c={c}: basis and local tail", elapsed_s=time.perf_counter() - began)
    ring = Ring(report, m, d, c, 8 * m)
    for precision in PRECISIONS:
        kernel = laplacian(d, report.device, precision)
        centers = UnpreparedPoints(report.randn(p, d, seed=1), kernel.left).whole()
        solver = replace(built, kernel=kernel, centers=centers)
        plain = m * rate(plain_step(report, p, d, c, m, precision), report)
        ways = (True, False) if gpu.gemm_serves(kernel.name, report.device, precision) else (False,)
        for by_one_program in ways:
            with nullcontext() if by_one_program else by_torch():
                found = timed_steps(report, solver, ring, 2 * p * d, precision)
            found |= {"published_s": PUBLISHED_S.get(p, "")}
            found |= {"plain_rows_per_s": plain, "times_plain": found["rows_per_s"] / plain}
            by = "one program" if by_one_program else "torch"
            report.add(part, f"p={p}, d={d}, c={c}, m={m}, {precision}, by {by}", **found)
        del solver, centers
        free_memory(report.device)


@contextmanager
def by_torch() -> Iterator[None]:
    """Blocks of many features by torch's product and a pass of phi, where one program would serve."""
    kinds, gpu.GEMM_KINDS = gpu.GEMM_KINDS, ()
    try:
        yield
    finally:
        gpu.GEMM_KINDS = kinds


def timed_steps(
    report: Report, solver: Solver, ring: Ring, flops_a_row: float, precision: Precision
) -> dict[str, Any]:
    """What steps fed by the ring take, for as long as the report says; flops_a_row: of the product for a row."""
    state = solver.initial_state()
    for x, y, _ in ring.batches(3):
        solver.step(state, x, y, 1e-6, score=True)
    synchronize(report.device)
    began = time.perf_counter()
    for x, y, _ in ring.batches(5):
        solver.step(state, x, y, 1e-6)
    synchronize(report.device)
    n_steps = max(8, int(5 * report.seconds / (time.perf_counter() - began)))
    began, waited = time.perf_counter(), 0.0
    for step, (x, y, wait) in enumerate(ring.batches(n_steps)):
        solver.step(state, x, y, 1e-6, score=step % 8 == 7)
        waited += wait
        if step % 8 == 7:
            synchronize(report.device)  # As a fit does, to read its losses.
    synchronize(report.device)
    elapsed = time.perf_counter() - began
    rows = n_steps * ring.m / elapsed
    found: dict[str, Any] = {"rows_per_s": rows, "ms_a_step": 1e3 * elapsed / n_steps}
    if precision in report.peak:
        found["of_gemm_peak"] = rows * flops_a_row / report.peak[precision]
    found |= {"starved": waited / elapsed, "s_for_5M_rows": 5e6 / rows}
    if report.device.type == "cuda":
        found["gib"] = torch.cuda.max_memory_allocated(report.device) / 2**30
    return found


def plain_step(report: Report, p: int, d: int, c: int, m: int, precision: Precision) -> Callable[[], Any]:
    """Distances, clamp, root, scale, exp, each a pass over the whole block, and both products; no preconditioner."""
    z, x = report.randn(p, d, seed=1), report.randn(m, d, seed=4)
    z_norms, x_norms = z.square().sum(1), x.square().sum(1)
    weights, y = report.randn(p, c, seed=6), report.randn(m, c, seed=7)
    bandwidth = math.sqrt(d)

    def step() -> Tensor:
        with gpu.tensor_cores("float32" if precision == "bf16x3" else precision, report.device):
            in_half = precision == "bfloat16"
            block = (x.bfloat16() @ z.bfloat16().T).float() if in_half else x @ z.T
            block.mul_(-2).add_(z_norms).add_(x_norms[:, None])
            block.clamp_min_(0).sqrt_().mul_(-1 / bandwidth).exp_()
            return block.T @ (block @ weights - y)

    return step


def bench_fused(report: Report) -> None:
    """Both products with a block of few features, by kernel evaluations: each entry is needed twice."""
    p, m = (70, 66) if report.toy else (100_000, 8192)
    for d in (9,) if report.toy else (9, 32):
        kernel = laplacian(d, report.device)
        for c in (1, 10):
            bench_products(report, "fused", f"p={p}, d={d}, c={c}, m={m}", kernel, p, d, c, m)


def bench_columns(report: Report) -> None:
    """The same for kernels on columns."""
    p, m, d = (70, 66, 8) if report.toy else (100_000, 8192, 8)
    for name in COLUMN_KERNELS:
        for c in (1, 10):
            what = f"{name}, p={p}, d={d}, c={c}, m={m}"
            bench_products(report, "column kernels", what, column_kernel(name, d), p, d, c, m)


def bench_products(
    report: Report, part: str, what: str, kernel: Kernel, p: int, d: int, c: int, m: int
) -> None:
    """A block's two products: fused, with the block kept, and with the block kept but formed by torch alone."""
    left, right = kernel.left(report.randn(p, d, seed=1)), kernel.right(report.randn(m, d, seed=2))
    weights, residual = report.randn(c, p, seed=3), report.randn(c, m, seed=4)
    memory = torch.zeros(p * m, device=report.device)

    def both(kept: Tensor | None) -> Callable[[], Any]:
        def work() -> None:
            block = BatchBlock(kernel, left, right, kept)
            block.left_times(weights)
            block.times(residual)

        return work

    found = {}
    if fuses(kernel, report.device, c):
        found["fused"] = p * m * rate(both(None), report)
    found["block_kept"] = p * m * rate(both(memory), report)
    devices, gpu.DEVICES = gpu.DEVICES, set()
    try:
        found["torch_alone"] = p * m * rate(both(memory), report)
    finally:
        gpu.DEVICES = devices
    report.add(part, what, **{f"{name}_evaluations_per_s": speed for name, speed in found.items()})


def bench_model(report: Report) -> None:
    """`KernelModel` on arrays: an epoch on the device, and predictions beside those of the CPU."""
    require_modules("xxhash", "tomli_w", "safetensors")
    from ep3stream.online.kernel_model import KernelModel

    n, d, p = (600, 20, 100) if report.toy else (60_000, 784, 5000)
    x = report.randn(n, d, seed=1, device=CPU)
    y = torch.sin(x[:, 0]) + x[:, 1] * x[:, 2]
    # The CPU takes as long as it takes: it gets few of the rows.
    few = min(n, 4000)
    found = {}
    for device in (CPU, report.device):
        model = KernelModel(x[: min(p, 500)], "laplacian", device=str(device), bandwidth=math.sqrt(d))
        model.fit((x[:few].numpy(), y[:few].numpy()), epochs=1)
        found[device.type] = torch.as_tensor(model.predict(x[:500])).cpu()
    mine, theirs = found[report.device.type], found["cpu"]
    report.check(
        "KernelModel", "predictions, GPU and CPU", float((mine - theirs).abs().max() / y.std()), 1e-2
    )
    model = KernelModel(x[:p], "laplacian", device=str(report.device), bandwidth=math.sqrt(d))
    for epochs in (1, 2):
        began = time.perf_counter()
        model.fit((x.numpy(), y.numpy()), epochs=epochs)
        synchronize(report.device)
        elapsed = time.perf_counter() - began
        told = "set-up and an epoch" if epochs == 1 else "another epoch"
        report.add("KernelModel", f"n={n}, d={d}, p={p}: {told}", elapsed_s=elapsed, rows_per_s=n / elapsed)
    report.add("KernelModel", "the precision that auto is", found=model.state_dict()["precision"])


def bench_stream(report: Report) -> None:
    """A store of rows, and a fit that streams it: rows a second, and the share of the time without data."""
    require_modules("xxhash", "tomli_w", "safetensors", "zarr", "numcodecs")
    from ep3stream.conversion.convert import convert
    from ep3stream.training.fit import fit

    n, d, p = (600, 20, 100) if report.toy else (500_000, 256, 50_000)
    x = report.randn(n, d, seed=1, device=CPU).numpy()
    y = np.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    with tempfile.TemporaryDirectory() as folder:
        store, told = Path(folder) / "store.zarr", []
        began = time.perf_counter()
        convert((x, y), store, ConvertConfig())
        report.add("stream", f"convert n={n}, d={d}", elapsed_s=time.perf_counter() - began)
        for precision in (*PRECISIONS, "auto"):
            tables = {
                "data": {"validate": "none"},
                "kernel": {"name": "laplacian"},
                "solver": {"centers": p, "epochs": 1, "precision": precision},
                "run": {"minutes": 0},
            }
            began = time.perf_counter()
            config = FitConfig().with_settings(tables, "gpu_check")
            fit(store, Path(folder) / precision, config, observe=told.append)
            report.add(
                "stream",
                f"fit n={n}, d={d}, p={p}, {precision}",
                elapsed_s=time.perf_counter() - began,
                rows_per_s=told[-1].rows_per_s,
                starved=told[-1].starved,
                loss=told[-1].loss,
                found=json.loads((Path(folder) / precision / "run.json").read_text())["plan"]["precision"],
            )


class NotHere(Exception):
    """A part needs what is not installed."""


def require_modules(*names: str) -> None:
    """Raises NotHere where one of these is missing, or stood in for by an empty module."""
    for name in names:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise NotHere(f"needs {name}") from error
        if module.__spec__ is None:
            raise NotHere(f"needs {name}")


# Parts with Triton's programs in toy sizes on a CPU, where they are interpreted.
INTERPRETED = ("blocks", "columns", "fused")

# In the order of what is most wanted.
PARTS: dict[str, Callable[[Report], None]] = {
    "paths": check_paths,
    "blocks": check_blocks,
    "columns": check_columns,
    "ring": check_ring,
    "nccl": check_nccl,
    "peak": measure_peak,
    "step": bench_steps,
    "fused": bench_fused,
    "column kernels": bench_columns,
    "fashion": bench_fashion,
    "KernelModel": bench_model,
    "stream": bench_stream,
}
