"""What cannot be tested without a GPU: is it right, and how fast is it. One command, under 15 minutes on an H200.

    python tools/gpu_check.py [--limit-s 780] [--seconds 3] [--out gpu_check.json] [--only step,fused]
    python tools/gpu_check.py --page gpu_check.json     its rows as a section of docs/benchmarks.md
    python tools/gpu_check.py --cpu                     the same code at toy sizes on a CPU; its times say nothing

Needs torch, numpy and Triton (which torch's CUDA builds bring) and nothing else of what ep3stream needs, but for the
last two parts: it makes its own data. A part that fails leaves the others alone; the file of rows is written anew after
each row. After `--limit-s` seconds no further part begins. Exit code 1 where a check or a part failed.

    paths            steps of every projection, precision and kind of kernel: the CPU's, the same bits twice, no waits
    blocks, columns  products and blocks of every kernel against float64, K(x, x) = 1
    ring, nccl       pinned memory, and a group of one
    peak             the largest matrix products, in float32, TF32 and bfloat16
    step             d = 1280, c = 10, p = 262,144 and 1,048,576: ep3stream's step, fed from pinned memory, by one
                     program and by torch, beside five plain passes over the block; rows/s, share of that precision's
                     peak, of the time starved of data, seconds for 5 million rows beside published ones
    fused            d = 9 and 32, c = 1 and 10, p = 100,000: kernel evaluations per second of both products
    column kernels   the same for kernels on 8 columns
    fashion          the shape of Fashion-MNIST: d = 784, c = 10, p = 5000
    KernelModel      an epoch on arrays of that shape
    stream           a store, and fits that stream it
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def _prepare() -> None:
    """Finds ep3stream and `gpu_parts` beside this file, and goes without two packages that only files need."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    if "--cpu" in sys.argv:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in ("tomli_w", "xxhash"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)


def run(report: Any, only: set[str]) -> None:
    """The parts in their order, each by itself."""
    from gpu_parts import INTERPRETED, PARTS, NotHere, free_memory

    from ep3stream.solver import gpu

    runs_on = gpu.DEVICES
    for name, part in PARTS.items():
        if only and name not in only:
            continue
        if report.left_s <= 0:
            report.add(name, "not begun", verdict=f"the {report.limit_s:.0f} s were over")
            continue
        began = time.perf_counter()
        gpu.DEVICES = runs_on if report.device.type == "cuda" or name in INTERPRETED else set()
        try:
            part(report)
        except NotHere as error:
            report.add(name, "not here", verdict=str(error))
        except Exception as error:
            traceback.print_exc()
            report.add(
                name, "ended by an error", verdict=f"{type(error).__name__}: {error}".splitlines()[0][:300]
            )
            report.failed.append(name)
        free_memory(report.device)
        report.add("seconds", name, elapsed_s=time.perf_counter() - began)


def page(found: dict[str, Any]) -> str:
    """The rows in Markdown: checks as one sentence and those that are wrong, the others a table for each part."""
    from gpu_parts import text_of

    rows = found["rows"]
    checks = [row for row in rows if "limit" in row]
    wrong = [row for row in checks if row["verdict"] != "right"]
    lines = [
        f"## On a GPU: {found['device']}",
        "",
        f"`python tools/gpu_check.py`, {found['date']}, torch {found['torch']}, CUDA {found['cuda']}, Triton: "
        f"{found['triton']}. {len(checks)} checks, {len(wrong)} of them wrong.",
    ]
    lines += [
        f"* Wrong: {row['what']}, {text_of(row['error'])} (limit {text_of(row['limit'])})" for row in wrong
    ]
    lines += [
        f"* {row['part']}: {row['what']} ({row['verdict']})"
        for row in rows
        if "verdict" in row and "limit" not in row
    ]
    measured = [row for row in rows if "verdict" not in row and row["part"] != "seconds"]
    for part in dict.fromkeys(row["part"] for row in measured):
        of_part = [row for row in measured if row["part"] == part]
        names = list(dict.fromkeys(name for row in of_part for name in row if name != "part"))
        lines += ["", "| " + " | ".join([part, *(name.replace("_", " ") for name in names[1:])]) + " |"]
        lines.append("|---" * len(names) + "|")
        lines += ["| " + " | ".join(text_of(row.get(name, "")) for name in names) + " |" for row in of_part]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="toy sizes, on a CPU")
    parser.add_argument("--toy", action="store_true", help="toy sizes, on whatever device there is")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each timing")
    parser.add_argument(
        "--limit-s", type=float, default=780.0, help="after so many seconds no further part begins"
    )
    parser.add_argument("--only", default="", help="parts, by name; default: all")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu_check.json")
    parser.add_argument(
        "--page", type=Path, metavar="FILE.json", help="print the rows of an earlier run in Markdown"
    )
    options = parser.parse_args()
    _prepare()
    import torch

    if options.page is not None:
        print(page(json.loads(options.page.read_text())))
        return 0
    from gpu_parts import Report

    from ep3stream.solver import gpu

    if not options.cpu and not torch.cuda.is_available():
        print("there is no GPU here; --cpu runs the same code at toy sizes", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.cpu else "cuda")
    if options.cpu and os.environ.get("TRITON_INTERPRET") == "1" and gpu.triton_runs("cpu"):
        gpu.DEVICES = {"cpu"}
    is_toy = options.cpu or options.toy
    about = {
        "device": "CPU, toy sizes" if options.cpu else torch.cuda.get_device_name(device),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": gpu.triton_runs(device.type),
    }
    report = Report(device, 0.02 if is_toy else options.seconds, is_toy, options.limit_s, options.out, about)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("| part | what | result |\n|---|---|---|")
    run(report, set(filter(None, options.only.split(","))))
    for what in report.failed:
        print(f"WRONG: {what}", file=sys.stderr)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
