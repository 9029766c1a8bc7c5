"""What ptxas makes of ep3stream's Triton programs for an H100, on a machine without a GPU: a table.

    python tools/triton_registers.py

Of each program: registers a thread (255 at most; fewer let more threads run), instructions that spill registers to
memory, shared memory, and instructions for each entry of a kernel block. These are the instructions of the outermost
loop, or all where there is none, with one turn of the loop inside: over four features of a radial kernel, over one
number or category, or over as many features as a product takes at once (64 of bfloat16, 32 of TF32). It needs Triton,
whose wheel brings ptxas and cuobjdump, and counts instructions, not time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ep3stream.solver import triton_columns, triton_gemm, triton_products, triton_radial
from ep3stream.solver.gpu import GEMM_KINDS, GEMM_OUTPUTS, KINDS

_TARGET = GPUTarget("cuda", 90, 32)
_FLOATS = ("shape", "power")
_POINTERS = ("w", "a", "b", "constants", "block", "out", "squared", "weighted")
# What Triton is told of numbers that are multiples of 16.
_ALIGNED = (*_POINTERS, "n_sum", "n_out", "n_a", "n_b", "n_columns", "stride", "out_stride", "stretch")
_RADIAL = len(KINDS) - 2


class Program(NamedTuple):
    """A Triton kernel with its constants and options. entries: of a kernel block, in one turn of its loop.

    factors: Triton's name of the type of `a` and `b`.
    """

    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int]
    entries: int
    factors: str = "fp32"

    def __str__(self) -> str:
        told = {
            name: value for name, value in self.constants.items() if "block" not in name and name != "short"
        }
        if self.factors != "fp32":
            told["factors"] = self.factors
        if "kind" in told:
            told["kind"] = KINDS[told["kind"]]
        return f"{self.kernel.__name__} {', '.join(f'{name}={value}' for name, value in told.items())}"


class Figures(NamedTuple):
    """Registers a thread, spilling instructions, shared memory, instructions an entry, and those of a turn inside."""

    registers: int
    spills: int
    shared_bytes: int
    instructions: float
    inside: float


def times(kind: str, n_rows: int, d: int = 9, power: float = 1.0) -> Program:
    """The program of a product with so many outputs; d: features of a radial kernel."""
    block_sum, block_out, warps = triton_products.block(n_rows)
    number = KINDS.index(kind)
    constants = {
        "kind": number,
        "d": d if number < _RADIAL else 0,
        "degree": int(power) if power in (1, 2) else 0,
        "block_sum": block_sum,
        "block_out": block_out,
    }
    kernel, own = triton_products._times_few, {"n_rows": n_rows, "padded": triton.next_power_of_2(n_rows)}
    if n_rows > triton_products.FEW_OUTPUTS:
        kernel = triton_products._times_many
        padded = max(16, triton.next_power_of_2(n_rows))
        own = {"padded": padded}
    options = {"num_warps": warps, "num_stages": 1}
    return Program(kernel, constants | own, options, block_sum * block_out)


def on_columns(kernel: Any, is_anova: bool, power: float) -> Program:
    """The program of a block or of the sums of slopes of a kernel on columns; an entry is one of one column."""
    tile = {name: triton_columns.BLOCK[name] for name in ("rows", "columns")}
    options = {name: triton_columns.BLOCK[name] for name in ("num_warps", "num_stages")}
    constants = {"is_anova": is_anova, "degree": int(power) if power in (1, 2) else 0, **tile}
    return Program(kernel, constants, options, tile["rows"] * tile["columns"])


def gemm(kind: str, factors: str, is_kept: bool, n_outputs: int) -> Program:
    """The program of a block of many features and of its product; factors: bf16, or fp32 for TF32."""
    tile = {name: triton_gemm.BLOCK[name] for name in ("block_out", "block_sum")}
    options = {name: triton_gemm.BLOCK[name] for name in ("num_warps", "num_stages")}
    constants = {
        "kind": KINDS.index(kind),
        "short": tl.bfloat16,
        "is_kept": is_kept,
        "padded": triton_gemm.padded(n_outputs),
        "block_width": triton_gemm.BLOCK_BYTES // (2 if factors == "bf16" else 4),
        **tile,
    }
    entries = tile["block_out"] * tile["block_sum"]
    return Program(triton_gemm._gemm, constants, options, entries, factors)


def gemms() -> list[Program]:
    """Those that form a block, multiply it, or do both."""
    shown = ((True, 0), (False, 16), (True, 16), (True, GEMM_OUTPUTS))
    return [
        gemm(kind, factors, *each) for kind in GEMM_KINDS for factors in ("bf16", "fp32") for each in shown
    ]


def profile(kind: str) -> Program:
    """The program of phi in one pass."""
    entries = triton_radial.PROFILE_ENTRIES
    return Program(triton_radial._profile, {"kind": KINDS.index(kind), "block": entries}, {}, entries)


def programs() -> list[Program]:
    """Every kernel, with the constants that a fit can choose at their ends."""
    found = [times(kind, n_rows) for kind in KINDS[:_RADIAL] for n_rows in (1, 16)]
    found += [times("laplacian", n_rows) for n_rows in (2, 4, 32, 128)]
    found += [times("rational_quadratic", n_rows, 32) for n_rows in (1, 4, 16, 128)]
    found.append(times("laplacian", 1, 32))
    for kind in KINDS[_RADIAL:]:
        found += [times(kind, n_rows, power=power) for power in (1, 2, 0.5) for n_rows in (1, 4, 16, 128)]
    for kernel in (triton_columns._column_block, triton_columns._column_sums):
        found += [on_columns(kernel, is_anova, power) for is_anova in (False, True) for power in (1, 2, 0.5)]
    return found + [profile(kind) for kind in KINDS[:_RADIAL]] + gemms()


def figures(program: Program) -> Figures:
    """What the program needs on an H100, from its machine code."""
    kinds = dict.fromkeys(_POINTERS, "*fp32") | dict.fromkeys(_FLOATS, "fp32")
    kinds |= dict.fromkeys(("a", "b"), f"*{program.factors}")
    params = program.kernel.params
    names = [each.name for each in params]
    signature = {name: "constexpr" if name in program.constants else kinds.get(name, "i32") for name in names}
    free = [each.name not in program.constants and not each.do_not_specialize for each in params]
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if free[place] and name in _ALIGNED
    }
    source = ASTSource(program.kernel, signature, program.constants, aligned)
    binary = triton.compile(source, target=_TARGET, options=program.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    outer, *inner = sorted(_loops(listing), key=len, reverse=True)
    threads = 32 * binary.metadata.num_warps / program.entries
    registers = re.search(r"REG:(\d+)", listing)
    assert registers is not None
    return Figures(
        int(registers[1]),
        len(re.findall(r"\b(?:LDL|STL)\b", listing)),
        binary.metadata.shared,
        threads * len(outer),
        threads * len(inner[0]) if inner else 0.0,
    )


def _loops(listing: str) -> list[range]:
    """The instructions of each jump back, as numbers; all of them where there is none."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", listing, re.M)
    places = {int(place, 16): number for number, (place, _) in enumerate(lines)}
    loops = []
    for number, (_, text) in enumerate(lines):
        target = re.search(r"BRA.*?(0x[0-9a-f]+)", text)
        first = places.get(int(target[1], 16), number) if target else number
        if first < number:
            loops.append(range(first, number + 1))
    return loops or [range(len(lines))]


def main() -> None:
    print("| program | registers | spills | shared bytes | instructions an entry | in a turn inside |")
    print("|---|---|---|---|---|---|")
    for program in programs():
        found = figures(program)
        held = f"{found.registers} | {found.spills} | {found.shared_bytes}"
        print(f"| {program} | {held} | {found.instructions:.1f} | {found.inside:.1f} |", flush=True)


if __name__ == "__main__":
    if os.environ.pop("TRITON_INTERPRET", None):
        sys.exit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    with tempfile.TemporaryDirectory() as os.environ["TRITON_CACHE_DIR"]:
        main()
