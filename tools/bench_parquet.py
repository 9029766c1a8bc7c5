"""Measures `ep3stream convert` on Parquet files of numbers and categories against pyarrow reading the same file.

The reference is pyarrow reading the whole file into arrow arrays, with as many threads as `--threads` says: as a table
with texts as texts (`read_table`, what a user does), as a table with texts as dictionaries, and in batches that are
let go. Both are whole processes, from start to end with their imports; the reading is told by itself too, and the
command for a table of 100 rows, which is all start. `floor` is what no conversion can leave out beside decoding: the
file read and digested, and as many bytes as the store has read, digested with xxh3 and crc32c, and written. All take
turns, in one run; of each the least of `--repeats` is shown, in processor seconds and in wall seconds.

    OMP_NUM_THREADS=1 python tools/bench_parquet.py --directory /dev/shm --files flights.parquet:arr_delay
    OMP_NUM_THREADS=1 python tools/bench_parquet.py --directory /dev/shm --rows 5000000 --beside ../checkout-of-before

Without `--files` one is made: 20 columns of float32, 5 of texts (5 to 1000 distinct ones), a target.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# What a child does between its imports and its end; it prints the processor and wall seconds of that.
_READ = """
import json, sys, time
import pyarrow as pa
import pyarrow.parquet as pq
file, way, n_threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
pa.set_cpu_count(n_threads)
began, cpu = time.perf_counter(), time.process_time()
texts = [field.name for field in pq.read_schema(file) if str(field.type) in ("string", "large_string")]
if way == "table":
    pq.read_table(file, use_threads=n_threads > 1)
elif way == "dictionaries":
    pq.read_table(file, use_threads=n_threads > 1, read_dictionary=texts)
else:
    with pq.ParquetFile(file, read_dictionary=texts) as table:
        for _ in table.iter_batches(1 << 17, use_threads=n_threads > 1):
            pass
print(json.dumps([time.process_time() - cpu, time.perf_counter() - began]))
"""
_FLOOR = """
import json, sys, time
from pathlib import Path
import google_crc32c, xxhash
source, store, copy = map(Path, sys.argv[1:])
files = [file for file in store.rglob("*") if file.is_file()]
memory = bytearray(1 << 20)
began, cpu = time.perf_counter(), time.process_time()
def passes(file):
    with file.open("rb", buffering=0) as stream:
        while n_bytes := stream.readinto(memory):
            yield memoryview(memory)[:n_bytes]
digest = xxhash.xxh3_128()
for data in passes(source):
    digest.update(data)
for number, file in enumerate(files):
    with Path(copy, str(number)).open("wb", buffering=0) as stream:
        for data in passes(file):
            digest.update(data)
            google_crc32c.value(bytes(data))
            stream.write(data)
print(json.dumps([time.process_time() - cpu, time.perf_counter() - began]))
"""
_READINGS = ("table", "dictionaries", "batches")


class Seconds(NamedTuple):
    """Processor and wall seconds."""

    cpu: float
    wall: float


def main() -> None:
    """Print one table for each file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", nargs="+", default=[], metavar="FILE:TARGET")
    parser.add_argument(
        "--rows", type=int, default=5_000_000, help="of the file that is made without --files"
    )
    parser.add_argument("--threads", type=int, default=1, help="of pyarrow's reading")
    parser.add_argument("--directory", type=Path, help="where to work; default: a temporary one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--beside", type=Path, help="another checkout, which converts the same files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for file, target in _files(Path(directory), options):
            _measure(file, target, Path(directory), options)


def _files(directory: Path, options: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    for text in options.files:
        name, _, target = text.rpartition(":")
        yield Path(name).absolute(), target
    if not options.files:
        file = directory / "made.parquet"
        pq.write_table(_made_table(options.rows), file)
        yield file, "y"


def _measure(file: Path, target: str, directory: Path, options: argparse.Namespace) -> None:
    """Measure everything for one file, in turn, and print the least of each."""
    checkouts = {"": Path(__file__).parent.parent} | ({" beside": options.beside} if options.beside else {})
    small, store, copy = (directory / name for name in ("small.parquet", "store.zarr", "copy"))
    pq.write_table(pq.ParquetFile(file).read_row_group(0).slice(0, 100), small)
    least, n_stored = dict[str, Seconds](), 0

    def note(name: str, found: Seconds) -> None:
        least[name] = Seconds(*map(min, found, least.get(name, found)))

    for _ in range(options.repeats):
        for way in _READINGS:
            told, whole = _child([sys.executable, "-c", _READ, str(file), way, str(options.threads)])
            note(f"reading, {way}", told)
            note(f"Python reading, {way}", whole)
        for name, checkout in checkouts.items():
            for order, source, words in (
                ("100 rows", small, ()),
                ("in order", file, ("--no-shuffle",)),
                ("shuffled", file, ()),
            ):
                shutil.rmtree(store, ignore_errors=True)
                command = [sys.executable, "-m", "ep3stream", "convert", str(source), str(store)]
                note(f"convert, {order}{name}", _child([*command, "--target", target, *words], checkout)[1])
        copy.mkdir()
        note("floor", _child([sys.executable, "-c", _FLOOR, str(file), str(store), str(copy)])[0])
        n_stored = sum(part.stat().st_size for part in copy.iterdir())
        shutil.rmtree(copy)
    n_rows = pq.read_metadata(file).num_rows
    sizes = f"{file.stat().st_size / 1e6:.1f} MB, its store {n_stored / 1e6:.1f} MB"
    print(f"{file.name}: {n_rows:,} rows, {sizes}; processor and wall seconds")
    base = least["Python reading, table"]
    for name, found in least.items():
        ratios = f"{found.cpu / base.cpu:5.2f} {found.wall / base.wall:5.2f}"
        print(f"  {name:32} {found.cpu:6.2f} {found.wall:6.2f}   {ratios} times a Python that reads a table")


def _child(words: list[str], checkout: Path | None = None) -> tuple[Seconds, Seconds]:
    """Run a process: the seconds that its last line tells, 0 if none, and those that it took."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # `python -m` imports from where it runs; after the first time it finds the package compiled, as pip leaves it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    result = subprocess.run(words, check=True, capture_output=True, text=True, cwd=checkout, env=environment)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = result.stdout.splitlines()
    told = Seconds(*json.loads(lines[-1])) if checkout is None else Seconds(0, 0)
    return told, Seconds(cpu, wall)


def _made_table(n_rows: int) -> pa.Table:
    """20 columns of float32, 5 of texts, and a target."""
    rng = np.random.default_rng(0)
    columns: dict[str, object] = {f"x{j}": rng.standard_normal(n_rows, np.float32) for j in range(20)}
    for j, n_texts in enumerate((5, 20, 50, 200, 1000)):
        words = pa.array([f"word {i}" for i in range(n_texts)])
        columns[f"c{j}"] = words.take(pa.array(rng.integers(0, n_texts, n_rows)))
    return pa.table({**columns, "y": rng.standard_normal(n_rows, np.float32)})


if __name__ == "__main__":
    main()
