"""What `ep3stream plan` predicts against what `ep3stream fit` then takes.

    python tools/bench_plan.py [--cases small,wide,many] [--repeats 1] [--clock wall|cpu]
                               [--directory .bench] [--speeds]

Writes a synthetic store for each case and, in processes of their own, plans the fit and does it. Prints seconds, set-up
and steps together, and peak resident memory, predicted and measured. Exits with 1 where a case's median ratio is not
within 30% of 1. --speeds plans without fitting, for a table of rows and kernel evaluations per second by features,
centers and kernel. On a busy machine plan and fit meet different loads: --clock cpu compares processor seconds, with
OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_memory import write_store

LIMIT = 0.30
PLAN = """
import json, sys, time
from ep3stream import FitConfig, plan
config = FitConfig().with_settings(json.loads(sys.argv[2]), "bench_plan")
clock = {"wall": time.perf_counter, "cpu": time.process_time}[sys.argv[3]]
print(json.dumps(plan(sys.argv[1], config, clock=clock).as_json()))
"""
FIT = """
import json, re, sys, time
from pathlib import Path
from ep3stream import FitConfig, fit
config = FitConfig().with_settings(json.loads(sys.argv[2]), "bench_plan")
clock = {"wall": time.perf_counter, "cpu": time.process_time}[sys.argv[3]]
began = clock()
fit(sys.argv[1], sys.argv[4], config)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(json.dumps({"seconds": clock() - began, "peak": 1024 * int(peak[1])}))
"""


@dataclass(frozen=True)
class Case:
    """One problem: rows and features of its store, centers of its model, and the batch, 0 for the measured one."""

    rows: int
    features: int
    centers: int
    batch_size: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """Of the fit."""
        return {
            "data": {"validate": "none"},
            "kernel": {"name": "laplacian"},
            "solver": {"centers": self.centers, "epochs": 1, "batch_size": self.batch_size},
        }


CASES = {
    "small": Case(4_000_000, 9, 1000, 2048),
    "wide": Case(60_000, 784, 5000),
    "many": Case(400_000, 32, 20_000),
}


SPEEDS = ((9, 1000), (9, 5000), (9, 20_000), (100, 5000), (100, 20_000), (784, 5000), (784, 20_000))


def main() -> int:
    options = arguments()
    directory = Path(options.directory) / "plan"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    if options.speeds:
        return speeds(directory, options.clock)
    print("| case | rows x features, centers | set-up + steps s, plan | s, fit | ratio ", end="")
    print("| peak MB, plan | MB, fit | ratio |\n" + "|---" * 8 + "|")
    worst = 0.0
    for name in options.cases:
        case, store = CASES[name], directory / f"{name}.zarr"
        write_store(store, case.rows, case.features)
        times, memories = [], []
        for repeat in range(options.repeats):
            planned, done = plan_and_fit(case, store, directory / f"{name}-{repeat}", options.clock)
            setup_s, fit_s, megabytes = planned
            times.append((setup_s + fit_s) / done[0])
            memories.append(megabytes / done[1])
            about = f"{name} | {case.rows:,} x {case.features}, {case.centers:,}"
            time_cells = f"{setup_s:.3g} + {fit_s:.3g} | {done[0]:.3g} | {times[-1]:.2f}"
            print(
                f"| {about} | {time_cells} | {megabytes:.0f} | {done[1]:.0f} | {memories[-1]:.2f} |",
                flush=True,
            )
        worst = max(worst, *(abs(statistics.median(ratios) - 1) for ratios in (times, memories)))
        shutil.rmtree(store)
    print(f"\nthe worst median is {100 * worst:.0f}% off; the limit is {100 * LIMIT:.0f}%")
    return int(worst > LIMIT)


def speeds(directory: Path, clock: str) -> int:
    """Prints what plans say of fits of all kinds, with batches of 2048 rows."""
    print("| features | centers | kernel | rows/s | 10^9 kernel evaluations/s |\n" + "|---" * 5 + "|")
    for n_features, n_centers in SPEEDS:
        store = directory / f"speed-{n_features}-{n_centers}.zarr"
        write_store(store, 5 * n_centers + 20_000, n_features)
        for kernel in ("laplacian", "gaussian", "matern52"):
            settings = {"solver": {"centers": n_centers, "epochs": 1, "batch_size": 2048}}
            settings["kernel"] = {"name": kernel}
            expected = run_python(PLAN, str(store), json.dumps(settings), clock)["expected"]
            rate = expected["rows_per_s"]
            print(
                f"| {n_features} | {n_centers:,} | {kernel} | {rate:,.0f} | {rate * n_centers / 1e9:.2f} |",
                flush=True,
            )
        shutil.rmtree(store)
    return 0


def plan_and_fit(
    case: Case, store: Path, run: Path, clock: str
) -> tuple[tuple[float, float, float], tuple[float, float]]:
    """Seconds of set-up and of steps, and megabytes, as planned; seconds and megabytes as they came out."""
    settings = json.dumps(case.settings)
    planned = run_python(PLAN, str(store), settings, clock)
    done = run_python(FIT, str(store), settings, clock, str(run))
    expected = planned["expected"]
    megabytes = expected["peak_bytes"] / 1e6
    return (expected["setup_s"], expected["fit_s"], megabytes), (done["seconds"], done["peak"] / 1e6)


def run_python(code: str, *arguments: str) -> dict[str, Any]:
    """What the code prints, as JSON."""
    command = [sys.executable, "-c", code, *arguments]
    found: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=list(CASES), type=lambda text: text.split(","))
    parser.add_argument("--repeats", default=1, type=int)
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--speeds", action="store_true")
    parser.add_argument("--directory", default=".bench")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
