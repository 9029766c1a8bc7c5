"""Measures `convert` against the least the machine can do, in one run: rates as ratios, and peak memory.

NPY against a plain copy with crc32c of the same bytes, with and without fsync (a store is always brought to
the disk before it gets its name); CSV and Parquet against pyarrow reading the same file and keeping nothing.
Each conversion runs in a process of its own, whose peak memory is the figure. tools/bench_parquet.py has numbers and
categories.

    python tools/bench_convert.py --gigabytes 4 --features 32 --directory /some/disk
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

_BLOCK = 8 << 20
_CHILD = """
import json, re, sys, time
from pathlib import Path
from ep3stream.config import ConvertConfig, MIB
from ep3stream.conversion.convert import convert
arguments = json.loads(sys.argv[1])
def peak_mib():  # Not ru_maxrss, which counts the process that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
base = peak_mib()
stages = {}
began = time.perf_counter()
config = ConvertConfig(**arguments["config"])
def note(progress):
    stages.setdefault(progress.stage, time.perf_counter() - began)
convert(arguments["source"], arguments["store"], config, progress=note, **arguments["files"])
seconds = time.perf_counter() - began
peak = peak_mib()
found = {"seconds": seconds, "until_sync": stages.get("sync", seconds), "peak_mib": peak, "base_mib": base}
print(json.dumps(found))
"""


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the NPY file")
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--text-megabytes", type=float, default=400, help="of the CSV file, about")
    parser.add_argument("--directory", type=Path, help="where to work; default: a temporary one")
    parser.add_argument("--memory", type=int, default=1 << 30)
    parts = {"npy": _npy, "csv": _csv, "parquet": _parquet}
    parser.add_argument("--only", choices=list(parts))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for name, measure in parts.items():
            if options.only in (None, name):
                measure(Path(directory).absolute(), options)


def _npy(directory: Path, options: argparse.Namespace) -> None:
    n_rows = int(options.gigabytes * 1e9 / 4 / options.features)
    x, y = directory / "x.npy", directory / "y.npy"
    _write_npy(x, y, n_rows, options.features)
    n_bytes = x.stat().st_size + y.stat().st_size
    copied = [_rate(n_bytes, lambda: _copy(x, directory / "copy", sync=False)) for _ in range(3)]
    synced = _rate(n_bytes, lambda: _copy(x, directory / "copy", sync=True))
    print(f"{n_rows:,} x {options.features} float32, {n_bytes / 1e9:.2f} GB of NPY")
    print(f"  copy + crc32c            {max(copied):7.0f} MB/s (best of 3), with fsync {synced:.0f} MB/s")
    for shuffle in (False, True):
        found = _convert(directory, [], {"shuffle": shuffle}, options, {"x_file": str(x), "y_file": str(y)})
        written, whole = n_bytes / found["until_sync"] / 1e6, n_bytes / found["seconds"] / 1e6
        memory = options.memory >> 20
        print(
            f"  convert {'shuffled  ' if shuffle else 'in order  '}       {written:7.0f} MB/s "
            f"({written / max(copied):.0%} of the copy), with fsync {whole:.0f} MB/s ({whole / synced:.0%}); "
            f"peak {found['peak_mib']:.0f} MiB, {memory} of --memory and {found['peak_mib'] - memory:.0f}"
        )
    x.unlink(), y.unlink()


def _csv(directory: Path, options: argparse.Namespace) -> None:
    file = directory / "table.csv"
    table = _table(int(options.text_megabytes * 1e6 / 10 / options.features), options.features)
    pa_csv.write_csv(table, file)
    _table_race(directory, file, lambda: _read_csv(file), options)


def _parquet(directory: Path, options: argparse.Namespace) -> None:
    file = directory / "table.parquet"
    pq.write_table(_table(int(options.gigabytes * 1e9 / 8 / options.features), options.features), file)
    _table_race(directory, file, lambda: _read_parquet(file), options)


def _table_race(directory: Path, file: Path, read: Callable[[], None], options: argparse.Namespace) -> None:
    read_s = min(_seconds(read) for _ in range(2))
    print(f"{file.suffix[1:]}, {file.stat().st_size / 1e6:.0f} MB: pyarrow reads it in {read_s:.2f} s")
    for shuffle in (False, True):
        found = _convert(directory, [str(file)], {"target": "y", "shuffle": shuffle}, options, {})
        print(
            f"  convert {'shuffled' if shuffle else 'in order'} {found['until_sync']:.2f} s, "
            f"{found['until_sync'] / read_s:.2f} times; with fsync {found['seconds']:.2f} s, "
            f"{found['seconds'] / read_s:.2f} times; peak {found['peak_mib']:.0f} MiB"
        )
    file.unlink()


def _convert(
    directory: Path,
    source: list[str],
    config: dict[str, object],
    options: argparse.Namespace,
    files: dict[str, str],
) -> dict[str, float]:
    store = directory / "out.zarr"
    arguments = {
        "source": source,
        "store": str(store),
        "config": {**config, "memory_bytes": options.memory},
        "files": files,
    }
    command = [sys.executable, "-c", _CHILD, json.dumps(arguments)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(store)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def _write_npy(x: Path, y: Path, n_rows: int, n_features: int) -> None:
    rng = np.random.default_rng(0)
    with x.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (n_rows, n_features)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, n_rows, 1 << 17):
            file.write(rng.standard_normal((min(1 << 17, n_rows - start), n_features), np.float32).data)
    np.save(y, rng.standard_normal(n_rows, np.float32))


def _table(n_rows: int, n_features: int) -> pa.Table:
    rng = np.random.default_rng(0)
    columns = {f"x{j}": rng.standard_normal(n_rows).round(6) for j in range(n_features)}
    return pa.table({**columns, "y": rng.standard_normal(n_rows).round(6)})


def _read_csv(file: Path) -> None:
    with pa_csv.open_csv(file, read_options=pa_csv.ReadOptions(block_size=4 << 20)) as reader:
        for _ in reader:
            pass


def _read_parquet(file: Path) -> None:
    with pq.ParquetFile(file) as table:
        for _ in table.iter_batches(1 << 17):
            pass


def _copy(source: Path, destination: Path, sync: bool) -> None:
    memory, checksum = bytearray(_BLOCK), 0
    with source.open("rb", buffering=0) as read, destination.open("wb", buffering=0) as write:
        while n_bytes := read.readinto(memory):
            block = bytes(memoryview(memory)[:n_bytes])
            checksum = google_crc32c.extend(checksum, block)
            write.write(block)
        if sync:
            os.fsync(write.fileno())
    destination.unlink()


def _rate(n_bytes: int, action: Callable[[], None]) -> float:
    return n_bytes / _seconds(action) / 1e6


def _seconds(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
