"""An epoch on one rank and on two, each with one thread of one core: how much faster two are.

    python tools/bench_ranks.py [--rows 20000] [--centers 10000] [--features 784] [--outputs 10] [--repeats 3]
        [--directory DIR] [--devices 1,2]

A synthetic store is converted once; then `ep3stream fit` runs on 1 and on 2 devices in turn, with its real launcher.
Times are of the steps alone, from metrics.jsonl: neither start-up nor set-up. On a machine with other work the ratio
suffers first: two ranks wait for the one that was held up.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import ep3stream
from ep3stream.run.event_log import read_lines


def make_store(path: Path, n_rows: int, n_features: int, n_outputs: int) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((n_rows, n_features), dtype=np.float32)
    directions = generator.standard_normal((n_features, n_outputs)) / n_features**0.5
    np.savez(path.with_suffix(".npz"), x=x, y=np.sin(2 * x @ directions).astype(np.float32))
    ep3stream.convert([path.with_suffix(".npz")], path, ep3stream.ConvertConfig(splits={"train": 1.0}))


def epoch_s(store: Path, run: Path, devices: int, n_centers: int) -> float:
    """Seconds of the steps of one epoch."""
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "ep3stream", "--quiet", "fit", str(store), str(run)]
    command += ["--devices", str(devices), "--centers", str(n_centers), "--checkpoint-minutes", "0"]
    command += ["--epochs", "1", "--validate", "none", "--kernel", "laplacian"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
    steps = [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "step"]
    first, last = steps[0], steps[-1]
    # From the first record on: the very first steps touch their memory for the first time.
    return (last["elapsed_s"] - first["elapsed_s"]) / (last["epoch"] - first["epoch"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {
        "--rows": 20_000,
        "--centers": 10_000,
        "--features": 784,
        "--outputs": 10,
        "--repeats": 3,
    }.items():
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--devices", default="1,2")
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    counts = [int(count) for count in options.devices.split(",")]
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        folder = Path(name)
        make_store(folder / "rows.zarr", options.rows, options.features, options.outputs)
        found: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(options.repeats):
            for count in counts:
                found[count].append(epoch_s(folder / "rows.zarr", folder / "run", count, options.centers))
                print(f"{count} ranks: {found[count][-1]:.2f} s", file=sys.stderr)
    alone = statistics.median(found[counts[0]])
    print(
        f"p={options.centers}, d={options.features}, c={options.outputs}, {options.rows} rows, 1 thread a rank"
    )
    print(f"| ranks | seconds an epoch, median of {options.repeats} (all) | times as fast |")
    print("|---|---|---|")
    for count, times in found.items():
        each = ", ".join(f"{seconds:.2f}" for seconds in times)
        print(
            f"| {count} | {statistics.median(times):.2f} ({each}) | {alone / statistics.median(times):.2f} |"
        )


if __name__ == "__main__":
    main()
