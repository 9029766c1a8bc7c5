"""How long checkpoints hold a fit up.

    python tools/bench_checkpoints.py [--rows 150000] [--centers 50000] [--outputs 40] [--every 5,20]

Fits the same synthetic rows without a checkpoint on the way and with one every so many steps, each in a process of
its own, and prints per fit: the size of a checkpoint, how many were saved, how long the fit stood still for them
(`stalled_s` in metrics.jsonl: the copy of the state and the start of the thread that writes it), what part of its time
that is, and its time against that of the fit without, which holds what the writing takes from the solver as well, and
the machine's noise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np


def main() -> int:
    options = arguments()
    directory = Path(options.directory) / "checkpoints"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((options.rows, 16), dtype=np.float32)
    np.save(directory / "x.npy", x)
    np.save(
        directory / "y.npy", np.sin(x @ generator.standard_normal((16, options.outputs), dtype=np.float32))
    )
    store = directory / "rows.zarr"
    ep3stream("convert", "--x", directory / "x.npy", "--y", directory / "y.npy", store)
    print(f"{'every':>6} {'MB each':>8} {'saved':>6} {'stalled s':>10} {'of s':>7} {'share':>7} {'time':>6}")
    alone = 0.0
    for every in (0, *options.every):
        run = directory / f"every-{every}"
        settings = (
            "--centers",
            options.centers,
            "--model-rank",
            100,
            "--batch-size",
            512,
            "--checkpoint-minutes",
            0,
            "--epochs",
            1,
            "--validate",
            "none",
            "--kernel",
            "laplacian",
        )
        ep3stream("fit", store, run, *settings, "--checkpoint-steps", every, "--memory", "4GiB")
        last, n_saved = read_metrics(run / "metrics.jsonl")
        newest = max((run / "checkpoints").iterdir())
        megabytes = sum(file.stat().st_size for file in newest.iterdir()) / 1e6
        stalled, elapsed = last["stalled_s"], last["elapsed_s"]
        alone = alone or elapsed
        print(
            f"{every or 'none':>6} {megabytes:>8.1f} {n_saved:>6} {stalled:>10.3f} {elapsed:>7.1f} "
            f"{stalled / elapsed:>7.2%} {elapsed / alone:>6.2f}",
            flush=True,
        )
        shutil.rmtree(run)
    return 0


def ep3stream(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "ep3stream", "--quiet", *map(str, arguments)], check=True)


def read_metrics(path: Path) -> tuple[dict[str, float], int]:
    """The last step's record, and how many checkpoints were saved before it."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    last = max(place for place, record in enumerate(records) if record["kind"] == "step")
    return records[last], sum(record.get("event") == "checkpoint" for record in records[:last])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=150_000, type=int)
    parser.add_argument("--centers", default=50_000, type=int)
    parser.add_argument("--outputs", default=40, type=int)
    parser.add_argument("--every", default="5,20", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--directory", default=".bench")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
