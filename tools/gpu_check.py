"""What cannot be tested without a GPU: is it right, and how fast is it. One command, under eight minutes on an H100.

    python tools/gpu_check.py [--seconds 4] [--out gpu_check.json] [--only step,fused]
    python tools/gpu_check.py --cpu      the same code at toy sizes on a CPU, to see that it runs; its times say nothing

Needs torch, numpy and Triton (which torch's CUDA builds bring) and nothing else of what ep3stream needs: it makes its
own data. First checks, then benchmarks; a check that fails ends with exit code 1, after all the others.

    checks       a step on the GPU against the CPU; no step waits for the GPU; the same bits each time; fused products,
                 phi and blocks of each precision against float64; the ring of pinned memory
    peak         the largest matrix products, in float32, TF32 and bfloat16
    fashion      the shape of Fashion-MNIST: d = 784, c = 10, p = 5000
    step         d = 1280, c = 10, p = 65,536 and 262,144: ep3stream's step, fed from pinned memory, and five plain
                 passes of torch over the block; rows/s, share of that precision's peak, of the time starved of data,
                 seconds for 5 million rows (published on an A100: 271 and 406 by EigenPro's successor, 1359 and 7663
                 by EigenPro3)
    fused        taxi rides, d = 9, c = 1, p = 100,000: kernel evaluations per second, both products, fused and not
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]


def _without_the_rest() -> None:
    """Lets `ep3stream.solver` be imported where what stores and runs need is not installed."""
    package = types.ModuleType("ep3stream")
    package.__path__ = [str(ROOT / "ep3stream")]
    sys.modules.setdefault("ep3stream", package)
    for name in ("tomli_w", "xxhash"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)


if __name__ == "__main__":
    if "--cpu" in sys.argv:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    _without_the_rest()

from ep3stream.config import Precision
from ep3stream.mesh import Mesh
from ep3stream.solver import gpu
from ep3stream.solver.blocks import BatchBlock, kernel_times, times_kernel
from ep3stream.solver.kernels import RADIAL_KERNELS, RadialKernel
from ep3stream.solver.projection import build_nystrom
from ep3stream.solver.step import Solver, SolverState
from ep3stream.solver.targets import TargetCode
from ep3stream.stream.batch_slots import BatchSlot, DataWaits

PUBLISHED_S = {65_536: "271 / 1359", 262_144: "406 / 7663"}
PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bfloat16")


@dataclass(slots=True)
class Report:
    """Rows of the tables, as they come."""

    device: torch.device
    seconds: float
    toy: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, part: str, what: str, **values: Any) -> None:
        """A row, told at once."""
        self.rows.append({"part": part, "what": what, **values})
        told = ", ".join(f"{name} {_text(value)}" for name, value in values.items())
        print(f"| {part} | {what} | {told} |", flush=True)

    def check(self, what: str, error: float, limit: float) -> None:
        """A row that is right or wrong."""
        is_right = error <= limit
        self.add("check", what, error=error, limit=limit, verdict="right" if is_right else "WRONG")
        if not is_right:
            self.failed.append(what)

    def randn(self, *shape: int, seed: int = 0) -> Tensor:
        """Standard normal numbers on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def solver_for(
    report: Report,
    p: int,
    d: int,
    c: int,
    m: int,
    precision: Precision,
    keep_block: bool = True,
    name: str = "laplacian",
) -> Solver:
    """A Nystrom solver on random centers, its block memory as a fit's."""
    device = report.device
    mesh = Mesh(0, 1, device)
    centers, sample = report.randn(p, d, seed=1), report.randn(min(2000, p), d, seed=2)
    kernel = RadialKernel("laplacian", math.sqrt(d), torch.zeros(d, device=device), precision=precision)
    rank = min(500, p // 4)
    projection, _ = build_nystrom(
        replace(kernel, precision="float32"),
        centers,
        centers[: min(2000, p)],
        sample,
        p,
        rank,
        max(1, rank // 2),
        mesh,
        torch.Generator().manual_seed(0),
    )
    targets = TargetCode(False, torch.zeros(c, device=device), torch.ones(c, device=device))
    is_fused = gpu.fuses("laplacian", device, d, 2 * c)
    memory = None if is_fused else torch.zeros(p * m, device=device)
    left = kernel.left(centers)
    return Solver(kernel, left, projection, targets, 0.9, 3.0, mesh, memory)


class Ring:
    """Batches of rows on the host, sent ahead through the fit's own slots: pinned memory and a side stream."""

    def __init__(self, report: Report, m: int, d: int, c: int, n_host: int) -> None:
        manifest: Any = types.SimpleNamespace(
            task="regression", n_features=d, n_outputs=c, x_dtype="float32", y_dtype="float32"
        )
        cuda = report.device.type == "cuda"
        copies = torch.cuda.Stream(report.device) if cuda else None
        self.slots = [BatchSlot(manifest, m, report.device, copies) for _ in range(3)]
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(max(n_host, m), d, generator=generator)
        self.x, self.y, self.m = x.numpy(), torch.sin(x[:, :c]).contiguous().numpy(), m
        self.device = report.device

    def batches(self, n_steps: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        """x, y and the seconds the device waited for them; one thread gathers ahead, as in a fit."""
        import queue
        import threading

        import numpy as np

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


def check_steps(report: Report) -> None:
    """Against the CPU, against itself, and whether any of it waits for the GPU."""
    p, d, c, m = (100, 40, 3, 32) if report.toy else (600, 40, 3, 256)
    steps = 5

    def stepped(device: torch.device, is_strict: bool = False) -> SolverState:
        on = Report(device, report.seconds, report.toy)
        solver = solver_for(Report(torch.device("cpu"), 0, True), p, d, c, m, "float32")
        solver = moved(solver, device) if device.type == "cuda" else solver
        state = solver.initial_state()
        x = torch.randn(steps * m, d, generator=torch.Generator().manual_seed(9)).to(on.device)
        y = torch.sin(x[:, :c])
        synchronize(device)
        if is_strict:
            torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(steps):
                rows = slice(step * m, step * m + m)
                solver.step(state, x[rows], y[rows], 1e-3, score=step == 3)
        finally:
            if is_strict:
                torch.cuda.set_sync_debug_mode("default")
        return state

    cpu, here = stepped(torch.device("cpu")), stepped(report.device)
    scale = float(cpu.weights.abs().max())
    report.check(
        "five steps, GPU and CPU", float((cpu.weights - here.weights.cpu()).abs().max()) / scale, 1e-4
    )
    again = stepped(report.device)
    report.check("the same bits twice", float((again.weights != here.weights).sum()), 0)
    if report.device.type == "cuda":
        try:
            stepped(report.device, is_strict=True)
            waits = 0.0
        except RuntimeError as error:
            print(f"a step waits: {error}", file=sys.stderr)
            waits = 1.0
        report.check("steps that wait for the GPU", waits, 0)


def moved(solver: Solver, device: torch.device) -> Solver:
    """The same solver, built on the CPU, with its tensors on the device."""
    mesh = Mesh(0, 1, device)
    projection: Any = solver.projection
    tensors = {
        item.name: value.to(device)
        for item in fields(projection)
        if item.init and isinstance(value := getattr(projection, item.name), Tensor)
    }
    kernel: Any = solver.kernel
    d = kernel.centre.numel()
    prepared = solver.centers.prepared.to(device)
    return replace(
        solver,
        kernel=replace(kernel, centre=torch.zeros(d, device=device)),
        centers=replace(solver.centers, prepared=prepared, is_factor=False, packed=None),
        projection=replace(projection, mesh=mesh, **tensors),
        targets=solver.targets.to(device),
        mesh=mesh,
        block_memory=None if solver.block_memory is None else solver.block_memory.to(device),
    )


def check_blocks(report: Report) -> None:
    """Fused products, blocks and phi of every kernel and precision, against float64."""
    p, m = (30, 40) if report.toy else (3000, 2000)
    for name in RADIAL_KERNELS:
        for d in (9, 64):
            z, x = report.randn(p, d, seed=1), report.randn(m, d, seed=2)
            x[:20] = z[:20]
            shape = {"dispersal": 0.7, "rational_quadratic": 50.0}.get(name, 1.0)
            kernel = RadialKernel(name, math.sqrt(d), torch.zeros(d, device=report.device), shape)
            exact64 = RadialKernel(name, math.sqrt(d), torch.zeros(d, device=report.device).double(), shape)
            truth = exact64.block(exact64.left(z.double()), exact64.right(x.double()))
            left, right = kernel.left(z), kernel.right(x)
            w = report.randn(3, p, seed=3)
            how = "fused" if gpu.fuses(name, report.device, d, 3) else "by tiles"
            off = (times_kernel(kernel, w, left, right) - w.double() @ truth).abs().max() / p**0.5
            report.check(f"{name}, d={d}, {how}: weights times block", float(off), 3e-5)
            back = (
                kernel_times(kernel, left, right, x[:, :2]) - truth @ x[:, :2].double()
            ).abs().max() / m**0.5
            report.check(f"{name}, d={d}, {how}: block times residual", float(back), 3e-5)
            if d > gpu.MAX_FEATURES[name]:
                for precision, limit in zip(PRECISIONS, (3e-5, 3e-3, 3e-2), strict=True):
                    own = replace(kernel, precision=precision)
                    found = BatchBlock(own, own.left(z), own.right(x), None).whole()
                    report.check(f"{name}, {precision}: block", float((found - truth).abs().max()), limit)
                    itself = (found.diagonal()[:20] - 1).abs().max()
                    report.check(f"{name}, {precision}: K(x, x) - 1", float(itself), 1e-5)


def check_ring(report: Report) -> None:
    """What arrives is what was sent, however fast the slots go round."""
    m, d, c = 512, 32, 2
    ring, wrong = Ring(report, m, d, c, 4 * m), torch.zeros((), device=report.device)
    host = torch.from_numpy(ring.x).to(report.device)
    for step, (x, _, _) in enumerate(ring.batches(40)):
        wrong += (x != host[(step % 4) * m : (step % 4) * m + m]).sum()
    report.check("rows that came wrong through the ring", float(wrong), 0)


def check_nccl(report: Report) -> None:
    """A group of one: NCCL is there, and sums."""
    import torch.distributed as dist

    if report.device.type != "cuda" or not dist.is_nccl_available():
        report.add("check", "NCCL", verdict="not here")
        return
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    tensor = torch.ones(1000, device=report.device)
    dist.all_reduce(tensor)
    report.check("NCCL, a group of one", float((tensor - 1).abs().max()), 0)
    dist.destroy_process_group()


# Benchmarks.


def peaks(report: Report) -> dict[str, float]:
    """FLOP/s of the best of a few large products, by precision."""
    found: dict[str, float] = {}
    sizes = (64, 128) if report.toy else (8192, 16384)
    for precision in PRECISIONS:
        best = 0.0
        for size in sizes:
            dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
            a, b = (report.randn(size, size, seed=seed).to(dtype) for seed in (1, 2))
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            best = max(best, 2 * size**3 * rate(lambda a=a, b=b: a @ b, report))
            torch.backends.cuda.matmul.allow_tf32 = False
        found[precision] = best
        report.add("peak", precision, tflops=best / 1e12)
    return found


def bench_step(report: Report, part: str, p: int, d: int, c: int, m: int, peak: dict[str, float]) -> None:
    for precision in PRECISIONS:
        solver = solver_for(report, p, d, c, m, precision)
        state, ring = solver.initial_state(), Ring(report, m, d, c, 8 * m)
        for x, y, _ in ring.batches(3):
            solver.step(state, x, y, 1e-6)
        synchronize(report.device)
        began = time.perf_counter()
        for x, y, _ in ring.batches(5):
            solver.step(state, x, y, 1e-6)
        synchronize(report.device)
        each = (time.perf_counter() - began) / 5
        n_steps = max(8, int(report.seconds / each))
        began, waited = time.perf_counter(), 0.0
        for step, (x, y, wait) in enumerate(ring.batches(n_steps)):
            solver.step(state, x, y, 1e-6, score=step % 8 == 7)
            waited += wait
            if step % 8 == 7:
                synchronize(report.device)  # As a fit does, to read its losses.
        synchronize(report.device)
        elapsed = time.perf_counter() - began
        rows = n_steps * m / elapsed
        plain = m * rate(plain_step(report, solver, p, d, c, m, precision), report)
        report.add(
            part,
            f"p={p}, d={d}, c={c}, m={m}, {precision}",
            rows_per_s=rows,
            of_gemm_peak=rows * 2 * p * d / peak[precision],
            starved=waited / elapsed,
            s_for_5M_rows=5e6 / rows,
            published_s=PUBLISHED_S.get(p, ""),
            plain_rows_per_s=plain,
            times_plain=rows / plain,
            gib=torch.cuda.max_memory_allocated(report.device) / 2**30
            if report.device.type == "cuda"
            else 0.0,
        )
        del solver, state, ring
        if report.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(report.device)


def plain_step(
    report: Report, solver: Solver, p: int, d: int, c: int, m: int, precision: Precision
) -> Callable[[], Any]:
    """Distances, clamp, root, scale, exp, each a pass over the whole block, and both products; no preconditioner."""
    z, x = report.randn(p, d, seed=1), report.randn(m, d, seed=4)
    z_norms, x_norms = z.square().sum(1), x.square().sum(1)
    weights, y = report.randn(p, c, seed=6), report.randn(m, c, seed=7)
    bandwidth = math.sqrt(d)

    def step() -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = precision != "float32"
        in_half = precision == "bfloat16"
        block = (x.bfloat16() @ z.bfloat16().T).float() if in_half else x @ z.T
        block.mul_(-2).add_(z_norms).add_(x_norms[:, None])
        block.clamp_min_(0).sqrt_().mul_(-1 / bandwidth).exp_()
        found = block.T @ (block @ weights - y)
        torch.backends.cuda.matmul.allow_tf32 = False
        return found

    return step


def bench_fused(report: Report, p: int, d: int, c: int, m: int) -> None:
    """Both products with a block, by kernel evaluations: each is needed twice, and formed once or twice."""
    kernel = RadialKernel("laplacian", math.sqrt(d), torch.zeros(d, device=report.device))
    z, x = report.randn(p, d, seed=1), report.randn(m, d, seed=2)
    left, right = kernel.left(z), kernel.right(x)
    weights, residual = report.randn(c, p, seed=3), report.randn(c, m, seed=4)
    memory = torch.zeros(p * m, device=report.device)

    def both(kept: Tensor | None) -> Callable[[], Any]:
        def work() -> None:
            block = BatchBlock(kernel, left, right, kept)
            block.left_times(weights)
            block.times(residual)

        return work

    found = {}
    if gpu.fuses("laplacian", report.device, d, c):
        found["fused"] = p * m * rate(both(None), report)
    else:
        report.add("fused", "fused", verdict="not here: needs Triton")
    devices, gpu.DEVICES = gpu.DEVICES, set()
    found["torch alone, block kept"] = p * m * rate(both(memory), report)
    gpu.DEVICES = devices
    if report.device.type == "cuda":
        found["block kept, phi in one pass"] = p * m * rate(both(memory), report)
    for what, speed in found.items():
        report.add("fused", f"p={p}, d={d}, c={c}, m={m}: {what}", evaluations_per_s=speed)
    if "fused" in found:
        ratio = found["fused"] / max(value for name, value in found.items() if name != "fused")
        report.add("fused", "times the fastest unfused", ratio=ratio)


def run(report: Report, only: set[str]) -> None:
    toy = report.toy
    if "checks" in only:
        check_steps(report)
        check_blocks(report)
        check_ring(report)
        check_nccl(report)
    if not only & {"fashion", "step", "fused", "peak"}:
        return
    peak = peaks(report) if only & {"fashion", "step", "peak"} else {}
    devices, gpu.DEVICES = (
        gpu.DEVICES,
        set() if toy else gpu.DEVICES,
    )  # It interprets slowly.
    if "fashion" in only:
        bench_step(report, "fashion", *((200, 40, 3, 64) if toy else (5000, 784, 10, 2048)), peak)
    if "step" in only:
        for p in (300,) if toy else (65_536, 262_144):
            bench_step(report, "step", p, *((40, 3, 64) if toy else (1280, 10, 4096)), peak)
    gpu.DEVICES = devices
    if "fused" in only:
        bench_fused(report, *((70, 9, 1, 66) if toy else (100_000, 9, 1, 8192)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each timing")
    parser.add_argument("--only", default="checks,peak,fashion,step,fused")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu_check.json")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        print("there is no GPU here; --cpu runs the same code at toy sizes", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.cpu else "cuda")
    if options.cpu and os.environ.get("TRITON_INTERPRET") == "1" and gpu.triton_runs("cpu"):
        gpu.DEVICES = {"cpu"}
    report = Report(device, 0.02 if options.cpu else options.seconds, options.cpu)
    name = "CPU, toy sizes" if options.cpu else torch.cuda.get_device_name(device)
    print(
        f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, Triton: {gpu.triton_runs(device.type)}"
    )
    print("| part | what | result |\n|---|---|---|")
    began = time.perf_counter()
    run(report, set(options.only.split(",")))
    elapsed = time.perf_counter() - began
    report.add("all", "seconds", elapsed_s=elapsed)
    options.out.write_text(
        json.dumps({"device": name, "torch": torch.__version__, "rows": report.rows}, indent=1)
    )
    for what in report.failed:
        print(f"WRONG: {what}", file=sys.stderr)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
