"""What an epoch would take on one GPU, reckoned from data sheets: docs/scaling.md. Nothing here was measured on a GPU.

    python tools/gpu_time.py

Assumed of an H200: 60% of the data sheet's FLOP/s in products (67 TFLOP/s in float32, 495 in TF32, 989 in bfloat16,
dense, of which bf16x3 takes three for one), 70% of its memory's 4800 GB/s, 60% of the instructions that its 132 x 128
lanes issue at 1.755 GHz, and 4 us a launch, of which `tests/test_pretended_cuda.py` counts some 80 a step. Rows come
faster than they are used. The set-up is left out.

A step of many features by torch: one product forms the block; its m p entries are written, read and written by phi, 12
bytes each, and read by two products in float32, which take the longer of 8 bytes and 4 c FLOP. By one program
(`triton_gemm.py`) an entry is written once and read once, 8 bytes, and takes 21 instructions that nothing else hides
(`tools/triton_registers.py`). That its product is as fast as torch's is assumed too: the last column says how many
times as long it may take before torch's way is as good.

A step of few features computes each entry twice, in 37 instructions (17.5 and two turns of 9.9 for 9 features).
Either passes over the Nystrom basis twice, over its leading fifth four times more, and over the local tail twice.

The second table is for few centers, where the host's launches take longer than the GPU's work. What a CUDA graph of the
step would save is the difference, for it launches once; a step beside its launches takes the longer of the two, since
the host runs ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

from ep3stream.config import Precision
from ep3stream.solver.gpu import GEMM_PRECISIONS, MAX_FEATURES, factor_width
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
GEMM_INSTRUCTIONS = 21
LAUNCHES_S = 80 * 4e-6
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


SMALL: tuple[tuple[int, int, Precision], ...] = ((9, 1, "float32"), (784, 10, "bf16x3"))


def step_parts(problem: Problem, precision: Precision, by_one_program: bool = False) -> dict[str, float]:
    """Seconds of a step on a batch, by what takes them."""
    entries = BATCH * problem.p
    projection = 4 * problem.p * (PASSES * MODEL_RANK + 2 * GROUP) / MEMORY_BYTES_PER_S
    parts = {"basis and tail": projection, "launches": LAUNCHES_S}
    if problem.d <= MAX_FEATURES["laplacian"]:
        return {"block": 2 * entries * INSTRUCTIONS / INSTRUCTIONS_PER_S, "passes over it": 0.0} | parts
    product = 2 * entries * factor_width(problem.d, precision) / FLOPS[precision]
    read = max(4 / MEMORY_BYTES_PER_S, 2 * problem.c / FLOPS["float32"])
    if by_one_program:
        rest = entries * (GEMM_INSTRUCTIONS / INSTRUCTIONS_PER_S + 4 / MEMORY_BYTES_PER_S + read)
    else:
        rest = entries * (12 / MEMORY_BYTES_PER_S + 2 * read)
    return {"block": product, "passes over it": rest} | parts


def slack(problem: Problem, precision: Precision) -> float:
    """How many times as long the product of one program may take before torch's way is as good."""
    torchs, own = (sum(step_parts(problem, precision, each).values()) for each in (False, True))
    return 1 + (torchs - own) / step_parts(problem, precision)["block"]


def text() -> str:
    """The table of large models, in Markdown."""
    lines = [
        "| n, d, c, p | precision | by | block | its phi and products | basis and tail | launches | step | epoch | "
        "published | slack |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for problem in PROBLEMS:
        is_narrow = problem.d <= MAX_FEATURES["laplacian"]
        for precision in [*FLOPS][:1] if is_narrow else FLOPS:
            for by_one_program in (
                (False, True) if precision in GEMM_PRECISIONS and not is_narrow else (False,)
            ):
                parts = step_parts(problem, precision, by_one_program)
                step = sum(parts.values())
                told = " | ".join(f"{1e3 * seconds:.1f} ms" for seconds in parts.values())
                by = "one program" if by_one_program else "no block" if is_narrow else "torch"
                spare = f"{slack(problem, precision):.2f}" if by_one_program else ""
                lines.append(
                    f"| {problem.n:.0e}, {problem.d}, {problem.c}, {problem.p:,} | {precision} | {by} | {told} | "
                    f"{1e3 * step:.1f} ms | {problem.n / BATCH * step:.0f} s | {problem.published} | {spare} |"
                )
    return "\n".join(lines).replace("e+0", "e")


def small_text() -> str:
    """The table of few centers: what a CUDA graph of the step would save."""
    lines = [
        "| d, c, precision | p | work of a step | launches | saved by a graph | of an epoch of 10^6 rows |",
        "|---|---|---|---|---|---|",
    ]
    for d, c, precision in SMALL:
        for p in (1000, 5000, 20_000, 50_000, 100_000):
            parts = step_parts(Problem(1e6, d, c, p, ""), precision, precision in GEMM_PRECISIONS)
            launches = parts.pop("launches")
            work = sum(parts.values())
            saved = max(0.0, launches - work)
            lines.append(
                f"| {d}, {c}, {precision} | {p:,} | {1e3 * work:.2f} ms | {1e3 * launches:.2f} ms | "
                f"{1e3 * saved:.2f} ms | {1e6 / BATCH * saved:.2f} s |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(text(), small_text(), sep="\n\n")
