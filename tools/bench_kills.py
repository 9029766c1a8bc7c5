"""Conversions killed at random moments, gone on with by the same command, end with the bytes of one never killed.

    python tools/bench_kills.py [--kills 100] [--source all] [--rows 50000] [--seed 0] [--directory .bench]

The rows are New York's flights of 2013 (examples/flights_table.py). csv: as text, shuffled into two splits; hdf5: the
same into an HDF5 file; npy: the numbers, in order and straight into the store. Memory and segments are so small that
rows are spilled and the store has many files. SIGKILL comes at a random moment after the command took its work
directory over, whose state then tells the stage: `read`; `write`, once a store is begun; `sync`, once it has all its
rows; `renamed`, once it has its name. Kept are the rows that the next command need not read (and write) again. Exits
with 1 if a store has other bytes than that of an undisturbed command, or if anything is left beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from pyarrow import csv

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from flights_table import flights_table

LIMIT_S = 300
SMALL = ["--memory", "2MiB", "--segment-bytes", "64KiB"]
TABLE = ["flights.csv", "--target", "arr_delay", "--split", "train=0.9,test=0.1", *SMALL]
CASES = {
    "csv": ("zarr", TABLE),
    "hdf5": ("h5", TABLE),
    "npy": ("zarr", ["--x", "x.npy", "--y", "y.npy", "--no-shuffle", "--memory", "1MiB", "--segment-bytes", "8KiB"]),
}  # fmt: skip
STAGES = ("read", "write", "sync", "renamed")


@dataclass(slots=True)
class Tally:
    """Of one case: rows kept at each kill by stage, conversions, and how many of these went wrong."""

    kept: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    conversions: int = 0
    different: int = 0

    @property
    def n_kills(self) -> int:
        """In all stages."""
        return sum(map(len, self.kept.values()))


def main() -> int:
    options = arguments()
    directory = options.directory / "kills"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_sources(directory, options.rows)
    dice, began, wrong = random.Random(options.seed), time.monotonic(), 0
    names = list(CASES) if options.source == "all" else [options.source]
    print(f"{'':<6}{'kills':>6}" + "".join(f"{f'{stage} (kept)':>16}" for stage in STAGES), " conversions")
    for index, name in enumerate(names):
        n_kills = options.kills * (index + 1) // len(names) - options.kills * index // len(names)
        tally = kill_often(directory, name, n_kills, dice)
        wrong += tally.different
        cells = [f"{len(kept)} ({np.mean(kept or [0]):,.0f})" for kept in (tally.kept[s] for s in STAGES)]
        print(f"{name:<6}{tally.n_kills:>6}" + "".join(f"{cell:>16}" for cell in cells), end="  ")
        print(f"{tally.conversions}, identical: {'no' if tally.different else 'yes'}", flush=True)
    print(f"{options.rows} rows, {time.monotonic() - began:.0f} s")
    return int(wrong > 0)


def kill_often(directory: Path, name: str, n_kills: int, dice: random.Random) -> Tally:
    """Conversions with as many kills as they take, until there were `n_kills` in all; then one that ends."""
    suffix, words = CASES[name]
    whole, store = directory / f"whole-{name}.{suffix}", directory / f"killed-{name}.{suffix}"
    working_s = undisturbed(directory, whole, words)
    expected, tally = contents(whole), Tally()
    while tally.n_kills < n_kills:
        tally.conversions += 1
        for _ in kills(directory, store, words, dice, working_s / 2):
            stage = stage_of(store, whole)
            tally.kept[stage].append(rows_kept(store, stage))
            if tally.n_kills == n_kills:
                break
        if not store.exists() or work_of(store).exists():
            undisturbed(directory, store, words)
        wrong = [str(work_of(store))] if work_of(store).exists() else []
        wrong += sorted(file for file, _ in expected.items() ^ contents(store).items())
        if wrong:
            tally.different += 1
            print(f"{name}: differs or is left over: {', '.join(dict.fromkeys(wrong))}", flush=True)
        remove(store)
    return tally


def kills(
    directory: Path, store: Path, words: list[str], dice: random.Random, within_s: float
) -> Iterator[None]:
    """Starts the command until it ends by itself; yields behind each kill."""
    while True:
        process = start(directory, store, words)
        wait_until_working(process, store)
        try:
            process.wait(dice.uniform(0, within_s))
        except subprocess.TimeoutExpired:
            process.kill()
        if process.wait(LIMIT_S) == 0:
            return
        if process.returncode > 0:
            sys.exit(f"the command failed with {process.returncode}")
        yield
        if store.exists() and not work_of(store).exists():
            return  # all was done: the same command would refuse to replace it


def undisturbed(directory: Path, store: Path, words: list[str]) -> float:
    """Seconds from taking over the work directory to the end."""
    process = start(directory, store, words)
    wait_until_working(process, store)
    began = time.monotonic()
    if process.wait(LIMIT_S):
        sys.exit(f"the command failed with {process.returncode}")
    return time.monotonic() - began


def start(directory: Path, store: Path, words: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ep3stream", "--quiet", "convert", *words, store.name]
    return subprocess.Popen(command, cwd=directory)


def wait_until_working(process: subprocess.Popen[bytes], store: Path) -> None:
    """Until it has written its number into the lock of the work directory, or has ended."""
    lock, mark = work_of(store) / "lock", f'"pid": {process.pid},'.encode()
    while process.poll() is None and not (lock.exists() and mark in lock.read_bytes()):
        time.sleep(0.002)


def stage_of(store: Path, whole: Path) -> str:
    """What the command was at when it was killed."""
    if store.exists():
        return "renamed"
    written = size(work_of(store) / "store")
    if not written:
        return "read"
    return "sync" if written >= size(whole) - manifest_size(whole) else "write"


def rows_kept(store: Path, stage: str) -> int:
    """Rows that need not be written again; while reading, rows that need not be read again."""
    work = work_of(store)
    if stage == "read":
        marks = sorted((work / "rows").glob("*.json"))
        return sum(json.loads(marks[-1].read_bytes())["mark"]["counts"]) if marks else 0
    if not (work / "progress.json").exists():
        return 0
    writer = json.loads((work / "progress.json").read_bytes())["writer"] or {"splits": {}}
    return sum(split["written"]["n_rows"] for split in writer["splits"].values())


def manifest_size(store: Path) -> int:
    if store.is_dir():
        return (store / "manifest.json").stat().st_size
    with h5py.File(store) as file:
        return int(file["manifest.json"].size)


def contents(store: Path) -> dict[str, bytes]:
    files = [store] if store.is_file() else [file for file in store.rglob("*") if file.is_file()]
    return {file.relative_to(store).as_posix(): file.read_bytes() for file in files}


def size(store: Path) -> int:
    files = [store] if store.is_file() else store.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def remove(store: Path) -> None:
    if store.is_dir():
        shutil.rmtree(store)
    else:
        store.unlink()


def work_of(store: Path) -> Path:
    return store.with_name(f".{store.name}.convert")


def write_sources(directory: Path, n_rows: int) -> None:
    table = flights_table().slice(0, n_rows)
    csv.write_csv(table, directory / "flights.csv")
    numbers = table.drop_columns(["origin", "carrier", "arr_delay"])
    np.save(directory / "x.npy", np.column_stack([column.to_numpy() for column in numbers.columns]))
    np.save(directory / "y.npy", table["arr_delay"].to_numpy().astype(np.float32))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", default=100, type=int)
    parser.add_argument("--source", default="all", choices=("all", *CASES))
    parser.add_argument("--rows", default=50_000, type=int, help="of the flights, up to 327346")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--directory", default=Path(".bench"), type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
