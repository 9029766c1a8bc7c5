"""Write a synthetic store of taxi rides, 10^9 rows x 9 float32 by default, whose noise is known.

    python tools/make_billion.py STORE [--rows 1000000000] [--test-rows 1000000] [--seed 0] [--processes 2]

The shape is that of the New York taxi benchmark (10^9 x 9, one real target). The nine features of a ride are places in
km, hour, weekday, day of the year, passengers and km driven; the target is the logarithm of its seconds, a smooth
function of them plus independent Gaussian noise of standard deviation NOISE_STD: no model has a test error below
NOISE_STD^2, and one that had learnt everything would have just that. Rows are independent, so that the store is
shuffled as it is made. A row depends on the seed, its split and its number alone.

Processes make blocks of rows in shared memory; this one hands them to the package's own writer, so that the store has
segments, digests, checksums and a manifest like any other. Killed, the same command goes on with the rows on the disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.conversion.spec import StoreSpec
from ep3stream.conversion.writer import StoreWriter
from ep3stream.errors import Ep3streamError, InputError
from ep3stream.store.reader import open_store

FEATURES = (
    "pickup_x_km",
    "pickup_y_km",
    "dropoff_x_km",
    "dropoff_y_km",
    "hour",
    "weekday",
    "day_of_year",
    "passengers",
    "driven_km",
)
NOISE_STD = 0.25
SPLITS = ("test", "train")
SEGMENT_BYTES = 16 << 20
_BLOCK_ROWS = 1 << 18
_SAVE_EVERY_S = 5.0
_TELL_EVERY_S = 10.0

Values = NDArray[np.float32]


def main() -> int:
    options = arguments()
    try:
        make_store(options.store, options.rows, options.test_rows, options.seed, options.processes)
    except Ep3streamError as error:
        print(f"make_billion: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def make_store(store: Path, rows: int, test_rows: int, seed: int = 0, processes: int = 2) -> None:
    """Write the store, or what is left of it to write; raises InputError where another one has the name."""
    store = store.absolute()
    sizes = {"test": test_rows, "train": rows}
    source = {"made_by": "tools/make_billion.py", "seed": seed, "rows": sizes, "noise_std": NOISE_STD}
    if store.exists():
        with open_store(store) as there:
            if there.manifest.source != (source,):
                raise InputError(f"{store} is another store; choose another name or remove it")
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    progress = store.with_name(f".{store.name}.progress.json")
    with opened_writer(store, progress, source) as writer, BlockFactory(processes, seed) as factory:
        teller = Teller(sum(sizes.values()))
        saved_at = time.monotonic()
        for split, n_rows in sizes.items():
            done = writer.rows_written(split)
            teller.skip(done)
            for x, y in factory.rows(split, done, n_rows):
                writer.append_checked(split, x, y)
                teller.tell(len(x))
                if time.monotonic() - saved_at > _SAVE_EVERY_S:
                    save(progress, {"source": source, "writer": writer.state()})
                    saved_at = time.monotonic()
        writer.commit()
        progress.unlink(missing_ok=True)
        teller.tell(0, at_once=True)


def opened_writer(store: Path, progress: Path, source: dict[str, Any]) -> StoreWriter:
    """One that goes on where a killed one was, if it was to write the same rows."""
    spec = StoreSpec(
        task="regression",
        n_features=len(FEATURES),
        n_outputs=1,
        x_dtype="float32",
        feature_names=FEATURES,
        target_names=("log_seconds",),
        class_names=None,
        columns={},
        shuffle_seed=source["seed"],
        source=(source,),
        segment_bytes=SEGMENT_BYTES,
        codec="none",
    )
    partial = store.with_name(f".{store.name}.partial")
    if not progress.exists():
        return StoreWriter.start(store, partial, spec, "zarr", keeps_partial=True)
    saved = json.loads(progress.read_text())
    if saved["source"] != source:
        raise InputError(f"{partial} has rows of {saved['source']}; remove it and {progress.name} first")
    return StoreWriter.resume(store, partial, spec, saved["writer"])


def save(progress: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    new = progress.with_suffix(".new")
    new.write_text(json.dumps(content))
    new.replace(progress)


class BlockFactory:
    """Makes blocks of rows in processes of its own, a few ahead. A context manager."""

    def __init__(self, processes: int, seed: int) -> None:
        self._seed = seed
        context = multiprocessing.get_context("spawn")
        self._memory = [
            context.RawArray("f", _BLOCK_ROWS * (len(FEATURES) + 1)) for _ in range(processes + 2)
        ]
        self._pool = ProcessPoolExecutor(processes, context, _adopt, (self._memory,))

    def __enter__(self) -> BlockFactory:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def rows(self, split: str, start: int, stop: int) -> Any:
        """x (k, 9), y (k, 1) of rows start to stop of a split, in order; valid until the next are asked for."""
        under_way: deque[tuple[int, int, Future[None]]] = deque()
        blocks = iter(range(start // _BLOCK_ROWS, -(-stop // _BLOCK_ROWS)))
        free = deque(range(len(self._memory)))
        while True:
            while free and (block := next(blocks, None)) is not None:
                slot = free.popleft()
                under_way.append((block, slot, self._pool.submit(_make, slot, self._seed, split, block)))
            if not under_way:
                return
            block, slot, made = under_way.popleft()
            made.result()
            first = block * _BLOCK_ROWS
            part = slice(max(start - first, 0), min(stop - first, _BLOCK_ROWS))
            x, y = _views(self._memory[slot])
            yield x[part], y[part]
            free.append(slot)


_slots: list[Any] = []


def _adopt(memory: list[Any]) -> None:
    """In a new process: knows the shared memory, and ends with the process that made it, however that ends."""
    _slots[:] = memory
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _make(slot: int, seed: int, split: str, block: int) -> None:
    rides(seed, split, block, *_views(_slots[slot]))


def _views(memory: Any) -> tuple[Values, Values]:
    flat = np.frombuffer(memory, np.float32)
    n_x = _BLOCK_ROWS * len(FEATURES)
    return flat[:n_x].reshape(_BLOCK_ROWS, -1), flat[n_x:].reshape(_BLOCK_ROWS, 1)


def rides(seed: int, split: str, block: int, x: Values, y: Values) -> None:
    """Rows of one block into x (n, 9) and y (n, 1), the same for the same seed, split and block."""
    stream = np.random.SeedSequence((seed, SPLITS.index(split), block))
    generator = np.random.Generator(np.random.SFC64(stream))
    n = len(x)

    def normal() -> Values:
        return generator.standard_normal(n, np.float32)

    def uniform(high: float) -> Values:
        return generator.random(n, np.float32) * np.float32(high)

    outer = np.where(generator.random(n, np.float32) < 0.2, np.float32(3), np.float32(1))
    pickup_x, pickup_y = 1.5 * outer * normal(), 3 * outer * normal()
    dropoff_x, dropoff_y = pickup_x + 1.5 * normal(), pickup_y + 2.5 * normal()
    hour, weekday, day = uniform(24), np.floor(uniform(7)), np.floor(uniform(365))
    passengers = np.floor(1 + 5 * uniform(1) ** 3)
    straight = np.sqrt((dropoff_x - pickup_x) ** 2 + (dropoff_y - pickup_y) ** 2 + np.float32(0.1))
    driven = straight * (np.float32(1.2) + uniform(0.4))
    columns = (pickup_x, pickup_y, dropoff_x, dropoff_y, hour, weekday, day, passengers, driven)
    for place, column in enumerate(columns):
        x[:, place] = column
    y[:, 0] = log_seconds(x) + NOISE_STD * normal()


def log_seconds(x: Values) -> Values:
    """What is to be learnt, (n,), of rows x (n, 9): smooth, with products of features."""
    pickup_x, pickup_y, dropoff_x, dropoff_y, hour, weekday, day, _, driven = x.T
    turn = np.float32(2 * np.pi)
    middle = np.exp(-((pickup_x + dropoff_x) ** 2 + (pickup_y + dropoff_y) ** 2) / np.float32(100))
    rush = 0.35 * np.cos(turn * (hour - 3) / 24) + 0.15 * np.cos(turn * (hour - 1) / 12)
    season = 0.05 * np.sin(turn * day / 365)
    weekend = 0.15 / (1 + np.exp(np.float32(-4) * (weekday - np.float32(4.5))))
    km_per_h = 22 * (1 + rush * middle + season + weekend) * (1 - np.float32(0.4) * middle)
    return np.log(60 + 3600 * driven / km_per_h)


class Teller:
    """Rows per second on stderr, now and then."""

    def __init__(self, total: int) -> None:
        self._total, self._rows, self._here = total, 0, 0
        self._began = self._told = time.monotonic()

    def skip(self, rows: int) -> None:
        """Rows that an earlier process wrote."""
        self._rows += rows

    def tell(self, rows: int, at_once: bool = False) -> None:
        """So many more are handed over."""
        self._rows, self._here, now = self._rows + rows, self._here + rows, time.monotonic()
        if at_once or now - self._told > _TELL_EVERY_S:
            rate = self._here / max(now - self._began, 1e-9)
            print(f"{self._rows:,} of {self._total:,} rows, {rate:,.0f} rows/s", file=sys.stderr, flush=True)
            self._told = now


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--rows", default=10**9, type=int, help="of the split `train`")
    parser.add_argument("--test-rows", default=10**6, type=int)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--processes", default=2, type=int)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
