"""What streaming costs: a fit's epoch against reading alone, and against the same epoch from memory.

    python tools/bench_stream.py [--gigabytes 1] [--repeats 3] [--parts io,compute] [--storage-mib-s 0] [--cold]
                                 [--centers 5000] [--directory .bench]

io: a fit of 100 centers to synthetic rows of 128 features. `reads` is the rate of reading and decoding its segments,
the same way and as many at once, into memory that nobody looks at; `stream` that of making batches of them, with
nobody computing; `steps` that of the fit's steps, with nobody reading; `fit` that of the fit, which can be no more than
the least of these. compute: a fit of 5000 centers to Fashion-MNIST (Debian's package dataset-fashion-mnist). The time
of its epoch, against that of the same batches taken from arrays in memory.

Ways: threads of the process reading Zarr or HDF5; Zarr by a Dask cluster in the process, and by one of two processes;
Zarr in a bucket of moto's S3 server on loopback, which is far slower than a real one.
Each ratio is of runs one behind the other, in turns from the first to the last and back, so that a machine that gets
slower favours neither; medians of the repeats are printed, with their extremes.
--storage-mib-s: as if the disk gave no more than this, so that it is the limit; buckets are left out. --cold: the
system forgets the files before each run, so that they come from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self
from unittest import mock

import numpy as np
import torch
from bench_fashion import read_idx
from bench_memory import write_store

import ep3stream
from ep3stream.config import MIB, ConvertConfig, FitConfig
from ep3stream.conversion.convert import convert
from ep3stream.store.files import Location, ObjectUrl
from ep3stream.store.object_files import ObjectFiles
from ep3stream.store.reader import RowStore, SplitReader, open_store
from ep3stream.stream.batch_slots import Batch
from ep3stream.stream.order import RowOrder
from ep3stream.stream.prefetch import BatchStream, StreamTimes
from ep3stream.stream.segment_reads import DaskReads, LocalReads
from ep3stream.training.fit import FitRun

FEATURES = 128
# The batch that is best for so few centers has so few rows that Python's own time per step would be the limit.
IO = {
    "solver": {"centers": 100, "batch_size": 4096},
    "data": {"scale": "none"},
    "kernel": {"bandwidth": 16.0},
}
COMPUTE = {"data": {"scale": "none"}, "kernel": {"bandwidth": 10.0}}
SOURCE = "/usr/share/datasets/fashion-mnist"
LIMIT = "BENCH_STREAM_MIB_S"
WAYS = (
    ("Zarr, threads", "zarr", None),
    ("HDF5, threads", "h5", None),
    ("Zarr, Dask in process", "zarr", "threads"),
    ("Zarr, Dask, 2 processes", "zarr", "processes"),
    ("Zarr in a bucket (moto)", "s3", None),
)


class SlowStorage:
    """Has this process read no faster than some MiB a second, whatever reads."""

    def __init__(self, mib_per_s: float) -> None:
        self._rate, self._free_at, self._lock = mib_per_s * MIB, 0.0, threading.Lock()
        self._read = RowStore.fill_segment

    def __call__(self, store: RowStore, split: str, index: int, x: Any, y: Any, times: Any) -> None:
        """Instead of `RowStore.fill_segment`."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + (x.nbytes + y.nbytes) / self._rate
            ready_at = self._free_at
        self._read(store, split, index, x, y, times)
        time.sleep(max(0.0, ready_at - time.monotonic()))


# Worker processes import this file as well, and two of them share the storage.
if limit := float(os.environ.get(LIMIT, 0)):
    n_readers = 1 if __name__ == "__main__" else 2
    slow = SlowStorage(limit / n_readers)
    RowStore.fill_segment = lambda *arguments: slow(*arguments)  # type: ignore[method-assign]


def main() -> int:
    options = arguments()
    if options.storage_mib_s and LIMIT not in os.environ:
        os.environ[LIMIT] = str(options.storage_mib_s)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    folder = Path(options.directory) / "stream"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if "io" in options.parts:
        stores = {ending: folder / f"rows.{ending}" for ending in ("zarr", "h5")}
        for store in stores.values():
            write_store(store, max(200_000, round(options.gigabytes * 1e9 / (4 * FEATURES + 4))), FEATURES)
        things = {"reads": reading_alone, "stream": batches_alone, "steps": steps_alone, "fit": epoch}
        with nullcontext() if options.storage_mib_s else bucket(stores["zarr"]) as url:
            measure(folder, stores | ({} if url is None else {"s3": url}), IO, options, things)
    if "compute" in options.parts:
        stores = {ending: fashion(folder / f"fashion.{ending}") for ending in ("zarr", "h5")}
        settings = {**COMPUTE, "solver": {"centers": options.centers}}
        measure(folder, stores, settings, options, {"memory": from_memory, "fit": epoch})
    shutil.rmtree(folder)
    return 0


def measure(
    folder: Path,
    stores: dict[str, Location],
    settings: Any,
    options: argparse.Namespace,
    things: dict[str, Callable[..., float]],
) -> None:
    """A line for each way: the things by turns, as rates if one of them is reading, else as seconds."""
    are_rates = "reads" in things
    unit = "MiB/s" if are_rates else "s"
    print(
        f"{'':>24}"
        + "".join(f"{f'{name} {unit}':>13}" for name in things)
        + f"  fit / {next(iter(things))} (least-most)"
        + ("  fit / least of the others" if are_rates else "")
    )
    for name, ending, dask in WAYS:
        if ending not in stores:
            continue
        store, run = stores[ending], folder / f"run-{stores[ending].name}"
        if not run.exists():  # The set-up, which is not measured.
            ep3stream.fit(store, run, config(settings))
        with cluster(dask) as address:
            rounds = []
            for k in range(options.repeats + 1):  # The first one warms up.
                seconds = {}
                for thing in list(things)[:: 1 if k % 2 else -1]:
                    if options.cold:
                        forget(store)
                    seconds[thing] = things[thing](store, run, settings, address)
                rounds.append([seconds[thing] for thing in things])
        columns = list(zip(*rounds[1:], strict=True))
        if are_rates:
            columns = [tuple(store_mib(store) / each for each in column) for column in columns]
        others, fits = columns[:-1], columns[-1]
        told = [ratio(fits, others[0])]
        if are_rates:
            told.append(ratio(fits, [min(each) for each in zip(*others, strict=True)]))
        medians = "".join(f"{statistics.median(column):>13.2f}" for column in columns)
        print(f"{name:>24}{medians}{''.join(told)}", flush=True)


def ratio(numbers: Sequence[float], to: Sequence[float]) -> str:
    """The median of the ratios, and their extremes."""
    found = [number / each for number, each in zip(numbers, to, strict=True)]
    return f"{statistics.median(found):>8.3f} ({min(found):.3f}-{max(found):.3f})"


def config(settings: Any, dask: str | None = None) -> FitConfig:
    run = {"checkpoint_minutes": 0.0, **({} if dask is None else {"dask": dask})}
    plain = {"data": {"validate": "none"}, "kernel": {"name": "laplacian"}, "solver": {"epochs": 1}}
    given = FitConfig().with_settings(plain, "bench_stream").with_settings(settings, "bench_stream")
    return given.with_settings({"run": run}, "bench_stream")


def epoch(store: Location, run: Path, settings: Any, dask: str | None) -> float:
    """Seconds of the steps of one epoch, from a set-up that is there."""
    fresh = run.with_name("fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(run, fresh, ignore=shutil.ignore_patterns("checkpoints", "model", "metrics.jsonl"))
    ep3stream.fit(store, fresh, config(settings, dask))
    records = [json.loads(line) for line in (fresh / "metrics.jsonl").read_text().splitlines()]
    return max(float(record["elapsed_s"]) for record in records)


def reading_alone(store: Location, run: Path, settings: Any, dask: str | None) -> float:
    """Seconds in which the same segments come into memory, with as many on their way as in the fit."""
    reader, order = reader_and_order(store, run)
    reads = LocalReads(reader) if dask is None else DaskReads(reader, dask)
    depth = 2 * order.window_segments
    rooms = [tuple(np.ones(shape, dtype) for shape, dtype in reader.layout(0)) for _ in range(depth)]
    with reads:
        under_way: deque[Any] = deque()
        began = time.perf_counter()
        for place, segment in enumerate(order.segments(0).tolist()):
            if len(under_way) == depth:
                under_way.popleft()()
            under_way.append(reads.begin(segment, *rooms[place % depth]))
        while under_way:
            under_way.popleft()()
        return time.perf_counter() - began


def batches_alone(store: Location, run: Path, settings: Any, dask: str | None) -> float:
    """Seconds in which all batches of the epoch are made."""
    reader, order = reader_and_order(store, run)
    with BatchStream(reader, order, 0, order.steps_per_epoch, torch.device("cpu"), dask) as stream:
        began = time.perf_counter()
        for _ in stream:
            pass
        return time.perf_counter() - began


def from_memory(store: Location, run: Path, settings: Any, dask: str | None) -> float:
    """Seconds of the epoch whose batches come from arrays in memory."""
    return epoch_of(MemoryStream, store, run, settings)


def steps_alone(store: Location, run: Path, settings: Any, dask: str | None) -> float:
    """Seconds of as many steps, on batches that lie in memory as they are."""
    return epoch_of(ReadyBatches, store, run, settings)


def epoch_of(kind: type[ReadyBatches], store: Location, run: Path, settings: Any) -> float:
    reader, order = reader_and_order(store, run)
    rows = reader.read_rows(np.arange(reader.info.n_rows))
    stream = kind(order, *(torch.from_numpy(array) for array in rows))
    with mock.patch.object(FitRun, "_stream", return_value=stream):
        return epoch(store, run, settings, None)


class ReadyBatches:
    """As many batches as an epoch has, each a run of rows in memory."""

    def __init__(self, order: RowOrder, x: torch.Tensor, y: torch.Tensor) -> None:
        self.times = StreamTimes()
        self._order, self._x, self._y = order, x, y
        self._step = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __next__(self) -> Batch:
        self._step += 1
        return Batch(self._step, *self._rows(*self._order.batch_bounds(self._step)), 0.0)

    def _rows(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._x[first:end], self._y[first:end]


class MemoryStream(ReadyBatches):
    """The batches of a BatchStream's first epoch, from all rows in memory."""

    def __init__(self, order: RowOrder, x: torch.Tensor, y: torch.Tensor) -> None:
        super().__init__(order, x, y)
        rows = []
        for visit in order.visits(0, order.steps_per_epoch):
            place, row = np.divmod(order.window_rows(0, visit.index, visit.segments), order.segment_rows)
            rows.append(visit.segments[place] * order.segment_rows + row)
        self._order_of_rows = torch.from_numpy(np.concatenate(rows))
        self._room = torch.empty(order.batch_size, x.shape[1])

    def _rows(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._order_of_rows[first:end]
        return torch.index_select(self._x, 0, rows, out=self._room[: len(rows)]), self._y[rows]


def reader_and_order(store: Location, run: Path) -> tuple[SplitReader, RowOrder]:
    from ep3stream.run.setup import Setup

    reader = open_store(store).split("train")
    return reader, Setup.load(run / "setup").order(reader.info, 0)


@contextmanager
def bucket(store: Path) -> Iterator[ObjectUrl]:
    """A copy of the store behind moto's S3 server, which is a process of its own and itself slow."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    names = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    os.environ.update(names | {"AWS_ENDPOINT_URL": address})
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                make = urllib.request.Request(f"{address}/bench", method="PUT")
                urllib.request.urlopen(make).close()
                break
            except OSError:
                time.sleep(0.1)
        url = ObjectUrl("bench", store.name)
        files = ObjectFiles(url)
        for file in store.rglob("*"):
            if file.is_file():
                files.put(file.relative_to(store).as_posix(), file)
        yield url
    finally:
        server.terminate()
        server.wait()


@contextmanager
def cluster(kind: str | None) -> Iterator[str | None]:
    if kind is None:
        yield None
        return
    from distributed import LocalCluster

    processes = kind == "processes"
    size = (
        {"n_workers": 2, "threads_per_worker": 1} if processes else {"n_workers": 1, "threads_per_worker": 2}
    )
    with LocalCluster(
        **size,
        processes=processes,
        host="127.0.0.1" if processes else None,
        dashboard_address=":0",
        silence_logs=50,
    ) as made:
        yield made.scheduler_address


def forget(store: Location) -> None:
    """Have the system drop what it keeps of a store's files."""
    if isinstance(store, ObjectUrl):
        return
    for file in [store] if store.is_file() else [path for path in store.rglob("*") if path.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def store_mib(store: Location) -> float:
    reader = open_store(store).split("train")
    return (
        sum(np.dtype(d).itemsize * int(np.prod(s)) for s, d in reader.layout(0))
        * reader.info.n_segments
        / MIB
    )


def fashion(path: Path) -> Path:
    x = (read_idx(SOURCE, "train-images-idx3-ubyte.gz").reshape(-1, 784) / 255).astype(np.float32)
    source = path.with_name("fashion.npz")
    if not source.exists():
        np.savez(source, x=x, y=read_idx(SOURCE, "train-labels-idx1-ubyte.gz").astype(np.int64))
    convert(source, path, ConvertConfig())
    return path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", default=1.0, type=float)
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--parts", default="io,compute", type=lambda text: text.split(","))
    parser.add_argument("--centers", default=5000, type=int)
    parser.add_argument("--storage-mib-s", default=0.0, type=float)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--directory", default=".bench")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
