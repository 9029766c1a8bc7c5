"""What an epoch would take on one GPU, reckoned from data sheets: docs/scaling.md. Nothing here was measured on a GPU.

    python tools/gpu_time.py

Assumed of an H200: 60% of the data sheet's FLOP/s in products (67 TFLOP/s in float32, 495 in TF32, 989 in bfloat16,
dense, of which bf16x3 takes three for one), 70% of its memory's 4800 GB/s, 60% of the instructions that its 132 x 128
lanes issue at 1.755 GHz, and 3 us a launch, of which `tests/test_pretended_cuda.py` counts some 80 a step. Rows come
faster than they are used. The set-up is left out.

A step of many features: one product forms the block; its m p entries are written, read and written by phi, 12 bytes
each, and read by two products in float32, which take the longer of 8 bytes and 4 c FLOP. A step of few features
computes each entry twice, in 37 instructions (17.5 and two turns of 9.9 for 9 features, `tools/triton_registers.py`).
Either passes over the Nystrom basis twice, over its leading fifth four times more, and over the local tail twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from ep3stream.config import Precision
from ep3stream.solver.gpu import MAX_FEATURES, factor_width
from ep3stream.training.plan import MODEL_RANK

FLOPS: dict[Precision, float] = {
    "float32": 0.6 * 67e12,
    "bf16x3": 0.6 * 989e12 / 3,
    "tf32": 0.6 * 495e12,
    "bfloat16": 0.6 * 989e12,
}
MEMORY_BYTES_PER_S = 0.7 * 4800e9
INSTRUCTIONS_PER_S = 0.6 * 132 * 128 * 1.755e9
INSTRUCTIONS = 37
LAUNCHES_S = 80 * 3e-6
PASSES = 2 + 4 / 5
GROUP = 256
BATCH = 4096


@dataclass(frozen=True, slots=True)
class Problem:
    """n rows, d features, c outputs, p centers; published: what others say of its time, and on what."""

    n: float
    d: int
    c: int
    p: int
    published: str


PROBLEMS = (
    Problem(5e6, 1280, 10, 262_144, "EigenPro 406 s, EigenPro3 7663 s an epoch (A100)"),
    Problem(5e6, 1280, 10, 1_048_576, "EigenPro 1268 s, EigenPro3 over 24 h an epoch (A100)"),
    Problem(1e9, 9, 1, 100_000, "Falkon 3628 s, the whole fit (two Titan Xp)"),
)


def step_parts(problem: Problem, precision: Precision) -> dict[str, float]:
    """Seconds of a step on a batch, by what takes them."""
    entries = BATCH * problem.p
    projection = 4 * problem.p * (PASSES * MODEL_RANK + 2 * GROUP) / MEMORY_BYTES_PER_S
    parts = {"basis and tail": projection, "launches": LAUNCHES_S}
    if problem.d <= MAX_FEATURES["laplacian"]:
        return {"block": 2 * entries * INSTRUCTIONS / INSTRUCTIONS_PER_S, "passes over it": 0.0} | parts
    products = 2 * entries * factor_width(problem.d, precision) / FLOPS[precision]
    reads = max(8 / MEMORY_BYTES_PER_S, 4 * problem.c / FLOPS["float32"])
    passes = entries * (12 / MEMORY_BYTES_PER_S + reads)
    return {"block": products, "passes over it": passes} | parts


def text() -> str:
    """The table, in Markdown."""
    lines = [
        "| n, d, c, p | precision | block | passes over it | basis and tail | launches | step | epoch | published |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for problem in PROBLEMS:
        for precision in [*FLOPS][:1] if problem.d <= MAX_FEATURES["laplacian"] else FLOPS:
            parts = step_parts(problem, precision)
            step = sum(parts.values())
            told = " | ".join(f"{1e3 * seconds:.1f} ms" for seconds in parts.values())
            lines.append(
                f"| {problem.n:.0e}, {problem.d}, {problem.c}, {problem.p:,} | {precision} | {told} | "
                f"{1e3 * step:.1f} ms | {problem.n / BATCH * step:.0f} s | {problem.published} |"
            )
    return "\n".join(lines).replace("e+0", "e")


if __name__ == "__main__":
    print(text())
