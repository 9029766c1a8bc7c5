"""A fit killed at three moments ends with the same bytes as one never killed, on Zarr and on HDF5.

    python tools/bench_resume.py [--rows 60000] [--centers 1500] [--directory .bench]

Synthetic rows, fits by the command line, SIGKILL: once during the set-up, once inside the first epoch and once inside
the second. Prints where each kill met the fit and compares every file of the two models. Exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

LIMIT_S = 300


def main() -> int:
    options = arguments()
    directory = Path(options.directory) / "resume"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((options.rows, 64), dtype=np.float32)
    np.save(directory / "x.npy", x)
    np.save(directory / "y.npy", np.sin(x[:, 0]) + x[:, 1] * x[:, 2])
    different = 0
    for suffix in ("zarr", "h5"):
        store = directory / f"rows.{suffix}"
        ep3stream("convert", "--x", directory / "x.npy", "--y", directory / "y.npy", store).wait(LIMIT_S)
        settings = [
            "--centers",
            options.centers,
            "--batch-size",
            256,
            "--epochs",
            2,
            "--checkpoint-steps",
            20,
            "--validate",
            "none",
            "--kernel",
            "laplacian",
        ]
        ep3stream("fit", store, directory / f"whole-{suffix}", *settings).wait(LIMIT_S)
        run = directory / f"killed-{suffix}"
        steps = 2 * -(-(options.rows - options.centers) // 256)
        for least in (None, steps // 5, 3 * steps // 5):
            process = ep3stream("fit", store, run, *settings)
            wait_for(process, run, least)
            process.send_signal(signal.SIGKILL)
            process.wait(LIMIT_S)
            print(
                f"{suffix:<5} killed, newest checkpoint: {newest(run) or 'none'} of {steps} steps", flush=True
            )
        ep3stream("fit", store, run, *settings).wait(LIMIT_S)
        same = model_bytes(run) == model_bytes(directory / f"whole-{suffix}")
        different += not same
        print(f"{suffix:<5} models are {'identical' if same else 'DIFFERENT'}", flush=True)
    return int(different > 0)


def ep3stream(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "ep3stream", "--quiet", *map(str, arguments)])


def wait_for(process: subprocess.Popen[bytes], run: Path, step: int | None) -> None:
    """Until the fit holds the run's lock (None), or has a checkpoint of at least `step`."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "config.toml").exists() if step is None else newest(run) >= step:
            return
        time.sleep(0.01)
    sys.exit(f"the fit reached no such moment; it ended with {process.poll()}")


def newest(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


def model_bytes(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "model").iterdir()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=60_000, type=int)
    parser.add_argument("--centers", default=1500, type=int)
    parser.add_argument("--directory", default=".bench")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
