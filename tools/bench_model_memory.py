"""Memory of the model and its preconditioner, and of the set-up that makes them, against the sum that the sizes imply.

    python tools/bench_model_memory.py [--centers 100000] [--features 100] [--rank 250] [--classes 10] [--batch 512]

Writes a synthetic store, does the set-up of a fit and a few steps in a process of its own, and prints, in MB: the
float32 arrays that the method needs, by name, the centers counted once, as kernel blocks take them; the tensors that
live after the steps, each storage once; and how far resident memory grew. Before, the process does the same with 1000
centers: what libraries load of their code and keep of their own is a line by itself. So is the kernel block of one
batch, whose size the memory budget decides; read-ahead is left out, being streamed by hand here. Exits with 1 if
tensors or growth are off the sum by more than 15%, or the peak of the set-up, the block of its probes included, is
above twice the sum.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from ep3stream import DataConfig, FitConfig, KernelConfig, RunConfig, SolverConfig, open_store
from ep3stream.conversion.spec import StoreSpec
from ep3stream.conversion.writer import create_store
from ep3stream.mesh import Mesh
from ep3stream.run.setup import Setup
from ep3stream.solver.guard import Guard
from ep3stream.store.reader import SplitReader
from ep3stream.training.set_up import write_setup

MB = 1e6
LIMIT, PEAK_LIMIT = 0.15, 2.0
N_STEPS = 12
SMALL = 1000
GROUP = 256


def main() -> int:
    options = arguments()
    directory = Path(options.directory) / "model-memory"
    if options.measure:
        print(json.dumps(measured(directory, options)))
        return 0
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_store(directory / "rows.zarr", options)
    command = [sys.executable, *sys.argv, "--measure"]
    # glibc would keep up to 64 MB of what is freed: resident memory is to be what is in use.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    ended = subprocess.run(command, env=os.environ | allocator, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(ended.stdout)
    shutil.rmtree(directory)
    parts = implied(options.centers, options.features, options.rank, options.classes)
    return report(parts, found)


def implied(p: int, d: int, r: int, c: int) -> dict[str, float]:
    """Float32 arrays of the method, in MB."""
    values = {
        "centers as kernel blocks take them, p (d + 2)": p * (d + 2),
        "weights, velocity, average, 3 p c": 3 * p * c,
        "last good weights and average, 2 p c": 2 * p * c,
        "basis, p r": p * r,
        "core, r r": r * r,
        f"local tail, groups of {GROUP}, p b": p * GROUP,
    }
    return {name: 4 * n / MB for name, n in values.items()}


def report(parts: dict[str, float], found: dict[str, float]) -> int:
    """Prints the table; 1 if a limit is exceeded."""
    total = sum(parts.values())
    for name, megabytes in parts.items():
        print(f"{name:<46} {megabytes:>8.1f} MB")
    print(f"{'sum':<46} {total:>8.1f} MB   of the sum, limit")
    limits = {
        "tensors": (f"within {LIMIT:.0%}", lambda share: abs(share - 1) <= LIMIT),
        "resident growth": (f"within {LIMIT:.0%}", lambda share: abs(share - 1) <= LIMIT),
        "peak of the set-up": (f"{PEAK_LIMIT:g} at most", lambda share: share <= PEAK_LIMIT),
    }
    failed = False
    for name, (limit, is_met) in limits.items():
        share = found[name] / total
        failed |= not is_met(share)
        print(
            f"{name:<46} {found[name]:>8.1f} MB   {share:>10.3f}, {limit}{'' if is_met(share) else '  FAILED'}"
        )
    for name in ("kernel block", "libraries"):
        print(f"{name + ', beside them':<46} {found[name]:>8.1f} MB")
    return int(failed)


def measured(directory: Path, options: argparse.Namespace) -> dict[str, float]:
    """In MB: tensors and resident growth after a few steps, both without the kernel block; the set-up's peak."""
    with open_store(directory / "rows.zarr") as store:
        reader = store.split("train")
        at_first = resident("VmRSS")
        fitted(directory / "small", reader, min(SMALL, options.centers), options)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # Peak memory counts from here.
        found = fitted(directory / "setup", reader, options.centers, options)
        return {
            "peak of the set-up": found["peak"] - before,
            "kernel block": found["block"],
            "resident growth": found["resident"] - before - found["block"],
            "tensors": found["tensors"] - found["block"],
            "libraries": before - at_first,
        }


def fitted(path: Path, reader: SplitReader, n_centers: int, options: argparse.Namespace) -> dict[str, float]:
    """Set-up and steps; in MB, the peak that the system knows of after the one, and what is in use after the other."""
    config = FitConfig(
        data=DataConfig(scale="none"),
        kernel=KernelConfig("laplacian", bandwidth=10.0),
        solver=SolverConfig(
            centers=n_centers, epochs=1, model_rank=options.rank, batch_size=options.batch, tail=GROUP
        ),
        run=RunConfig(memory_bytes=1 << 33),
    )
    mesh = Mesh.of_this_process(torch.device("cpu"))
    write_setup(path, reader, config, None, mesh)
    peak = resident("VmHWM")
    setup = Setup.load(path)
    solver = setup.solver(config, None, mesh)
    setup = setup.without_centers()  # As a fit does.
    state = solver.initial_state()
    guard = Guard.start(state, setup.plan.step_size)
    inputs = setup.inputs()
    for step in range(N_STEPS):
        x, y = reader.read_rows(np.arange(step * options.batch, (step + 1) * options.batch))
        loss = solver.step(state, inputs(torch.from_numpy(x)), torch.from_numpy(y), guard.step_size).loss
        guard.watch(step, [float(loss)], state)
    block = storage_bytes([solver.block_memory]) / MB
    del x, y
    live = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    return {
        "peak": peak,
        "block": block,
        "resident": resident("VmRSS"),
        "tensors": storage_bytes(live) / MB,
    }


def storage_bytes(tensors: object) -> int:
    """Of the memory behind tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def resident(field: str) -> float:
    """VmRSS, or VmHWM, its peak, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024 / MB


def write_store(path: Path, options: argparse.Namespace) -> None:
    """Standard normal features; the class is that of the largest of c linear functions of them."""
    spec = StoreSpec(
        task="classification",
        n_features=options.features,
        n_outputs=options.classes,
        x_dtype="float32",
        feature_names=tuple(f"x{i}" for i in range(options.features)),
        target_names=("y",),
        class_names=tuple(f"c{i}" for i in range(options.classes)),
        columns={},
        shuffle_seed=0,
        source=(),
        segment_bytes=1 << 24,
    )
    generator = np.random.default_rng(0)
    directions = generator.standard_normal((options.features, options.classes), dtype=np.float32)
    with create_store(path, spec, "zarr") as writer:
        for start in range(0, options.rows, 50_000):
            n_rows = min(50_000, options.rows - start)
            x = generator.standard_normal((n_rows, options.features), dtype=np.float32)
            writer.append("train", x, (x @ directions).argmax(1).astype(np.int32))
        writer.commit()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=200_000, type=int)
    parser.add_argument("--centers", default=100_000, type=int)
    parser.add_argument("--features", default=100, type=int)
    parser.add_argument("--rank", default=250, type=int)
    parser.add_argument("--classes", default=10, type=int)
    parser.add_argument("--batch", default=512, type=int)
    parser.add_argument("--directory", default=".bench")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
