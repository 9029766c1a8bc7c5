"""Measures `convert` against the least the machine can do, in one run: rates as ratios, and peak memory.

NPY against a plain copy with crc32c of the same bytes, with and without fsync (a store is always brought to
the disk before it gets its name); CSV and Parquet against pyarrow reading the same file and keeping nothing.
Each conversion runs in a process of its own, whose peak memory is the figure. Parquet of numbers and categories is
measured in processor seconds, the least of several runs, and with another checkout of the package too if one is named.

    python tools/bench_convert.py --gigabytes 4 --features 32 --directory /some/disk
    python tools/bench_convert.py --only mixed --directory /dev/shm --beside ../checkout-of-before
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
start_cpu = time.process_time()
convert(arguments["source"], arguments["store"], config, progress=note, **arguments["files"])
seconds = time.perf_counter() - began
cpu = time.process_time()
peak = peak_mib()
found = {"seconds": seconds, "until_sync": stages.get("sync", seconds), "peak_mib": peak, "base_mib": base}
print(json.dumps(found | {"start_cpu": start_cpu, "cpu": cpu - start_cpu}))
"""
# One thread reads the file: batch by batch, and as the table that a user gets.
_READ = """
import json, sys, time
import pyarrow as pa
import pyarrow.parquet as pq
pa.set_cpu_count(1)
file, found = sys.argv[1], {}
began = time.process_time()
with pq.ParquetFile(file) as table:
    for _ in table.iter_batches(1 << 17, use_threads=False):
        pass
found["batches"] = time.process_time() - began
began = time.process_time()
table = pq.read_table(file, use_threads=False)
found["table"] = time.process_time() - began
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
    parser.add_argument("--mixed-rows", type=int, default=2_000_000, help="of numbers and categories")
    parser.add_argument("--repeats", type=int, default=4, help="of which the least is shown, for `mixed`")
    parser.add_argument(
        "--beside", type=Path, help="another checkout, which converts the same file, for `mixed`"
    )
    parts = {"npy": _npy, "csv": _csv, "parquet": _parquet, "mixed": _mixed}
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


def _mixed(directory: Path, options: argparse.Namespace) -> None:
    """Parquet of numbers and categories: processor seconds of reading and converting, one after the other."""
    file, n_rows = directory / "mixed.parquet", options.mixed_rows
    pq.write_table(_mixed_table(n_rows), file)
    checkouts = {"": Path(__file__).parent.parent} | ({" beside": options.beside} if options.beside else {})
    least: dict[str, float] = {}
    for _ in range(options.repeats):
        read = subprocess.run(
            [sys.executable, "-c", _READ, str(file)], check=True, stdout=subprocess.PIPE, text=True
        )
        found: dict[str, float] = json.loads(read.stdout)
        for name, checkout in checkouts.items():
            for shuffle in (False, True):
                config: dict[str, object] = {"target": "y", "shuffle": shuffle}
                done = _convert(directory, [str(file)], config, options, {}, checkout)
                found[f"{'shuffled' if shuffle else 'in order'}{name}"] = done["cpu"]
                found[f"start{name}"] = done["start_cpu"]
        least = {name: min(seconds, least.get(name, seconds)) for name, seconds in found.items()}
    batches, table = least.pop("batches"), least.pop("table")
    print(
        f"Parquet, numbers and categories, {n_rows:,} rows, {file.stat().st_size / 1e6:.0f} MB: pyarrow reads it in "
        f"{batches:.2f} s as batches, {table:.2f} s as a table (processor seconds, one thread)"
    )
    for name, seconds in least.items():
        print(
            f"  {name:16} {seconds:.2f} s, {seconds / batches:.1f} and {seconds / table:.1f} times pyarrow's reading"
        )
    file.unlink()


def _mixed_table(n_rows: int) -> pa.Table:
    """8 columns of numbers, a text, a dictionary, a time, and a target."""
    rng = np.random.default_rng(0)
    columns: dict[str, object] = {f"x{j}": rng.standard_normal(n_rows).round(6) for j in range(4)}
    columns |= {f"x{j}": rng.standard_normal(n_rows).astype(np.float32) for j in (4, 5)}
    columns |= {f"x{j}": rng.integers(0, 10_000, n_rows) for j in (6, 7)}
    columns["city"] = np.array([f"city {i}" for i in range(50)])[rng.integers(0, 50, n_rows)]
    carriers = pa.array([f"C{i}" for i in range(12)])
    columns["carrier"] = pa.DictionaryArray.from_arrays(
        pa.array(rng.integers(0, 12, n_rows), pa.int32()), carriers
    )
    seconds = rng.integers(0, 3 * 365 * 86_400, n_rows).astype("timedelta64[s]")
    columns["when"] = np.datetime64("2020-01-01", "us") + seconds
    return pa.table({**columns, "y": rng.standard_normal(n_rows)})


def _convert(
    directory: Path,
    source: list[str],
    config: dict[str, object],
    options: argparse.Namespace,
    files: dict[str, str],
    checkout: Path | None = None,
) -> dict[str, float]:
    store = directory / "out.zarr"
    arguments = {
        "source": source,
        "store": str(store),
        "config": {**config, "memory_bytes": options.memory},
        "files": files,
    }
    command = [sys.executable, "-c", _CHILD, json.dumps(arguments)]
    # `python -c` imports from where it runs.
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=checkout)
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
