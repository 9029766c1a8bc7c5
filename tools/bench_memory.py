"""Peak resident memory of a fit must not grow with the rows.

    python tools/bench_memory.py [--rows 1000000,10000000,100000000] [--features 8] [--centers 1000]
                                 [--steps-rows 4000000] [--repeats 3] [--directory .bench]

Writes synthetic stores of the given sizes, fits each in a process of its own with the same settings, and prints the
peak resident memory of each process (VmHWM, the median of the repeats) and its ratio to the first. A fit takes one
epoch, or the part of one that has --steps-rows rows: the order, the manifest, the samples and the read-ahead are those
of all rows, and what a fit holds after some windows it holds after all. Exits with 1 if a ratio is not within 5% of 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ep3stream.config import MIB
from ep3stream.conversion.spec import StoreSpec
from ep3stream.conversion.writer import create_store

LIMIT = 0.05
FIT = """
import json, re, sys, time
from pathlib import Path
from ep3stream import FitConfig, fit
config = FitConfig().with_settings(json.loads(sys.argv[3]), "bench_memory")
began = time.perf_counter()
fit(sys.argv[1], sys.argv[2], config)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(json.dumps({"peak_mib": int(peak[1]) / 1024, "seconds": time.perf_counter() - began}))
"""


def main() -> int:
    options = arguments()
    directory = Path(options.directory) / "memory"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    print("| rows | store, MB | epochs | peak MiB | ratio | rows/s |\n" + "|---" * 6 + "|")
    first = 0.0
    worst = 0.0
    for n_rows in options.rows:
        store = directory / f"rows-{n_rows}.zarr"
        write_store(store, n_rows, options.features)
        epochs = min(1.0, options.steps_rows / n_rows)
        settings = {
            "data": {"validate": "none"},
            "kernel": {"name": "laplacian"},
            "solver": {"centers": options.centers, "epochs": epochs},
        }
        found = [peak(store, directory / f"run-{n_rows}-{k}", settings) for k in range(options.repeats)]
        middle = statistics.median(each["peak_mib"] for each in found)
        first = first or middle
        worst = max(worst, abs(middle / first - 1))
        megabytes = n_rows * (options.features + 1) * 4 / 1e6
        rate = n_rows * epochs / statistics.median(each["seconds"] for each in found)
        cells = f"{megabytes:,.0f} | {epochs:g} | {middle:.0f} | {middle / first:.3f} | {rate:,.0f}"
        print(f"| {n_rows:,} | {cells} |", flush=True)
        shutil.rmtree(store)
    print(f"\npeak memory differs by {100 * worst:.1f}% at most; the limit is {100 * LIMIT:.0f}%")
    return int(worst > LIMIT)


def peak(store: Path, run: Path, settings: dict[str, Any]) -> dict[str, float]:
    """MiB and seconds of a fit in a process of its own."""
    command = [sys.executable, "-c", FIT, str(store), str(run), json.dumps(settings)]
    found: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return found


def regression_spec(n_features: int) -> StoreSpec:
    """Of one target, in segments of 16 MiB, the rows as shuffled."""
    return StoreSpec(
        task="regression",
        n_features=n_features,
        n_outputs=1,
        x_dtype="float32",
        feature_names=tuple(f"x{i}" for i in range(n_features)),
        target_names=("y",),
        class_names=None,
        columns={},
        shuffle_seed=0,
        source=(),
        segment_bytes=16 * MIB,
    )


def write_store(path: Path, n_rows: int, n_features: int) -> None:
    """Standard normal features; the target is a smooth function of the first three, with noise. HDF5 in a .h5."""
    spec = regression_spec(n_features)
    generator = np.random.Generator(np.random.SFC64(0))
    began = time.perf_counter()
    with create_store(path, spec, "hdf5" if path.suffix == ".h5" else "zarr") as writer:
        for start in range(0, n_rows, 100_000):
            x = generator.standard_normal((min(100_000, n_rows - start), n_features), dtype=np.float32)
            noise = 0.1 * generator.standard_normal(len(x), dtype=np.float32)
            writer.append("train", x, (np.sin(x[:, 0]) + x[:, 1] * x[:, 2] + noise)[:, None])
        writer.commit()
    print(f"# wrote {path.name} in {time.perf_counter() - began:.1f} s", file=sys.stderr)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", default="1000000,10000000,100000000", type=lambda text: [int(n) for n in text.split(",")]
    )
    parser.add_argument("--features", default=8, type=int)
    parser.add_argument("--centers", default=1000, type=int)
    parser.add_argument("--steps-rows", default=4_000_000, type=int)
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--directory", default=".bench")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
