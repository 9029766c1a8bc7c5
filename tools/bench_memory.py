"""Peak resident memory of a fit must not grow with the rows.

    python tools/bench_memory.py [--rows 200000,2000000] [--features 32] [--centers 1000] [--directory .bench]

Writes synthetic stores of the given sizes, fits each in a process of its own with the same settings, and prints the
peak resident memory of each process (VmHWM) and its ratio to the first. Exits with 1 if one is above 1.10.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ep3stream.config import MIB
from ep3stream.data.store import StoreSpec, create_store

LIMIT = 1.10
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
    print(f"{'rows':>12} {'store MB':>9} {'peak MiB':>9} {'ratio':>6} {'rows/s':>9}")
    first = 0.0
    worst = 0.0
    for n_rows in options.rows:
        store = directory / f"rows-{n_rows}.zarr"
        write_store(store, n_rows, options.features)
        settings = {"solver": {"centers": options.centers}}
        command = [
            sys.executable,
            "-c",
            FIT,
            str(store),
            str(directory / f"run-{n_rows}"),
            json.dumps(settings),
        ]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        first = first or result["peak_mib"]
        ratio = result["peak_mib"] / first
        worst = max(worst, ratio)
        megabytes = n_rows * options.features * 4 / 1e6
        rate = n_rows / result["seconds"]
        print(
            f"{n_rows:>12,} {megabytes:>9.0f} {result['peak_mib']:>9.0f} {ratio:>6.3f} {rate:>9.0f}",
            flush=True,
        )
        shutil.rmtree(store)
    print(f"peak memory grew by {100 * (worst - 1):.1f}% at most; the limit is {100 * (LIMIT - 1):.0f}%")
    return int(worst > LIMIT)


def write_store(path: Path, n_rows: int, n_features: int) -> None:
    """Standard normal features; the target is a smooth function of the first four, with noise."""
    spec = StoreSpec(
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
    generator = np.random.default_rng(0)
    began = time.perf_counter()
    with create_store(path, spec, "zarr") as writer:
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
        "--rows", default="200000,2000000", type=lambda text: [int(n) for n in text.split(",")]
    )
    parser.add_argument("--features", default=32, type=int)
    parser.add_argument("--centers", default=1000, type=int)
    parser.add_argument("--directory", default=".bench")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
