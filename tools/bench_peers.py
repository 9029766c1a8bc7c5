"""Fashion-MNIST against the peers, side by side: accuracy by epoch, and how long each takes to reach an accuracy.

    python tools/bench_peers.py [--eigenpro3 PATH] [--eigenpro PATH] [--falkon [PATH]] [--epochs 0.1,0.25,0.3,1,3]

PATH is a checkout of the peer: github.com/EigenPro/EigenPro3, its successor github.com/EigenPro/EigenPro (delayed
projections); or the folder that github.com/FalkonML/falkon is installed in, for CPUs by `FORCE_ONLY_CPU=1 pip install
--no-build-isolation CHECKOUT`, whose `epochs` are iterations. Same rows, as many random centers, the same kernel:
Laplacian, bandwidth 10. Every run has a process of its own on as many cores as `--threads`, one at a time; seconds
start when the method is handed its data, set-up included, and stand still while a model is scored. Peers get arrays in
memory, `ep3stream.fit` a store that it reads. A part of an epoch, and each number of iterations, is a fit of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_fashion import NAMES, read_idx, run_ep3stream

OURS = "ep3stream"


@dataclass(frozen=True, slots=True)
class Point:
    """One scored model."""

    epochs: float
    seconds: float
    cpu_seconds: float
    accuracy: float
    mse: float


def main() -> None:
    options = arguments()
    data = Path(options.directory) / "peers"
    write_data(data, options.source)
    common = {"centers": options.centers, "threads": options.threads, "seed": options.seed}
    races = {OURS: [point for e in options.epochs for point in race(OURS, data, common | {"epochs": e})]}
    peers = {
        "eigenpro3": (options.eigenpro3, options.eigenpro3_level),
        "eigenpro": (options.eigenpro, options.eigenpro_level),
        "falkon": (options.falkon, 0),
    }
    for name, (path, level) in peers.items():
        if path is not None:
            settings = {"path": path, "level": level, "epochs": options.peer_epochs}
            races[name] = race(name, data, common | settings)
    print_points(races)
    print_targets(races, options.targets)


def write_data(data: Path, source: str) -> None:
    """Arrays and a store of each split."""
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    for split, prefix in NAMES.items():
        x = read_idx(source, f"{prefix}-images-idx3-ubyte.gz").reshape(-1, 784) / 255
        np.save(data / f"{split}-x.npy", x)
        np.save(data / f"{split}-y.npy", read_idx(source, f"{prefix}-labels-idx1-ubyte.gz").astype(np.int32))
        files = ["--x", data / f"{split}-x.npy", "--y", data / f"{split}-y.npy"]
        run_ep3stream("convert", *files, data / f"{split}.zarr", "--split", f"{split}=1")


def race(method: str, data: Path, settings: dict[str, object]) -> list[Point]:
    """The points of a method in a process of its own; those before its end, and why, if it fails."""
    command = [sys.executable, str(Path(__file__).with_name("peer_runs.py")), method, str(data)]
    command += [f"--{name}={value}" for name, value in settings.items() if value not in ("", 0)]
    threads = str(settings["threads"])
    ended = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"# {method} did not finish (exit code {ended.returncode}): {reason}", flush=True)
    return [Point(**json.loads(line)) for line in ended.stdout.splitlines()]


def first_at(points: Iterable[Point], accuracy: float) -> float | None:
    """Seconds of the fastest point at least so accurate; None where there is none."""
    return min((point.seconds for point in points if point.accuracy >= accuracy), default=None)


def times(theirs: float | None, ours: float | None) -> str:
    """How many times as long as ours."""
    return "-" if theirs is None or ours is None else f"{theirs / ours:.1f}"


def print_points(races: dict[str, list[Point]]) -> None:
    """`ours s`: seconds of our fastest fit at least as accurate."""
    header = f"{'epochs':>6} {'seconds':>8} {'cpu s':>8} {'accuracy':>9} {'mse':>8}"
    print(f"{'method':<10} {header} {'ours s':>7} {'ratio':>6}")
    for name, points in races.items():
        for point in points:
            line = f"{point.epochs:>6g} {point.seconds:>8.2f} {point.cpu_seconds:>8.2f}"
            line += f" {point.accuracy:>9.4f} {point.mse:>8.5f}"
            ours = None if name == OURS else first_at(races[OURS], point.accuracy)
            same = "" if name == OURS else f" {seconds_text(ours):>7} {times(point.seconds, ours):>6}"
            print(f"{name:<10} {line}{same}")


def print_targets(races: dict[str, list[Point]], targets: Sequence[float]) -> None:
    """Seconds to each accuracy, and the ratio to ours."""
    print(f"\n{'method':<10}" + "".join(f" {f'to {target:g}':>9} {'ratio':>6}" for target in targets))
    for name, points in races.items():
        cells = ""
        for target in targets:
            theirs = first_at(points, target)
            cells += f" {seconds_text(theirs):>9} {times(theirs, first_at(races[OURS], target)):>6}"
        print(f"{name:<10}{cells}")


def seconds_text(seconds: float | None) -> str:
    """`-` for never."""
    return "-" if seconds is None else f"{seconds:.2f}"


def arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[float]:
        return [float(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--eigenpro3", metavar="PATH")
    parser.add_argument("--eigenpro", metavar="PATH")
    parser.add_argument("--falkon", metavar="PATH", nargs="?", const="")
    parser.add_argument("--source", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--directory", default=".bench")
    parser.add_argument("--centers", default=5000, type=int)
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--epochs", default="0.1,0.25,0.3,1,3", type=numbers, help="of ep3stream's fits")
    parser.add_argument("--peer-epochs", default=3, type=int)
    parser.add_argument("--targets", default="0.863,0.8775", type=numbers, help="accuracies to time")
    # The levels at which each was fastest here on 2000 samples; at 200 the successor loses accuracy by the epoch.
    parser.add_argument("--eigenpro3-level", default=200, type=int)
    parser.add_argument("--eigenpro-level", default=100, type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
