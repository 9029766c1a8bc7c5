"""A stream that is started and stopped at any moment leaves nothing behind: no thread, no file, no byte."""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from s3_server import BUCKET, ENVIRONMENT, s3_server
from test_prefetch import ORDER, STEPS, _expected_rows, _Faulty, _stream, _write

from ep3stream.store.files import ObjectUrl
from ep3stream.store.object_files import ObjectFiles
from ep3stream.store.reader import SplitReader, open_store

WARM_UP = 25
# What the allocators of Python, numpy and the threads keep for another time; not a batch, a window or a stack each.
SPARE_BYTES = 4 << 20


@pytest.fixture
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SplitReader]:
    if request.param != "s3":
        yield _write(tmp_path / "s", request.param)
        return
    _write(tmp_path / "s")
    with s3_server() as server:
        server.make_bucket()
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        bucket = ObjectFiles(ObjectUrl(BUCKET, "s"))
        for file in (tmp_path / "s").rglob("*"):
            if file.is_file():
                bucket.put(file.relative_to(tmp_path / "s").as_posix(), file)
        server.remembers = False
        yield open_store(f"s3://{BUCKET}/s").split("train")


class Held:
    """What this process holds now: threads, open files, bytes that Python and numpy know of, and bytes in all."""

    def __init__(self) -> None:
        gc.collect()
        self.threads = {
            thread.name for thread in threading.enumerate() if thread.name.startswith("ep3stream")
        }
        self.files = len(os.listdir("/proc/self/fd"))
        # The least of some: a thread of the test's S3 server reads 10 MB at a time, and soon lets go.
        self.traced = min(traced_soon() for _ in range(5))
        self.resident = psutil.Process().memory_info().rss


def traced_soon() -> int:
    """Bytes, after a moment."""
    time.sleep(0.05)
    return tracemalloc.get_traced_memory()[0]


def make_room_for_names() -> None:
    """Has Python enlarge its table of interned strings, of 3.8 MB where moto is imported, before it is counted.

    Strings that come and go use the table up, so that some start at some time enlarges it, once.
    """
    names = []
    for number in range(1 << 20):
        before = tracemalloc.get_traced_memory()[0]
        names.append(sys.intern(f"a name, {number}"))
        if tracemalloc.get_traced_memory()[0] - before > 100_000:
            return
    raise AssertionError("the table of interned strings did not grow")


def start_and_stop(reader: _Faulty, rng: np.random.Generator, expected: list[list[int]]) -> None:
    """Once, at a random step, for a random while, left in a random way, over storage in a random mood."""
    reader.delay_s = float(rng.choice([0, 0, 0.001, 0.003]))
    reader.errors = {int(rng.integers(11)): [KeyError("odd")]} if rng.random() < 0.2 else {}
    start = int(rng.integers(0, 3 * STEPS))
    with suppress(KeyError), _stream(reader, start, 3 * STEPS) as stream:
        for batch in islice(stream, int(rng.integers(0, 20))):
            assert batch.x[:, 0].tolist() == expected[batch.step]
        time.sleep(float(rng.choice([0, 0.002])))
        if rng.random() < 0.2:
            raise KeyError("mine")


def leave_nothing(reader: SplitReader, n_times: int) -> None:
    rng, expected, faulty = np.random.default_rng(0), _expected_rows(ORDER, 3), _Faulty(reader)
    faulthandler.dump_traceback_later(60 + n_times, exit=True)
    tracemalloc.start()
    try:
        make_room_for_names()
        for _ in range(WARM_UP):
            start_and_stop(faulty, rng, expected)
        before = Held()
        for _ in range(n_times):
            start_and_stop(faulty, rng, expected)
            assert [t.name for t in threading.enumerate() if t.name.startswith("ep3stream")] == []
        faulty.attempts.clear()
        after = Held()
    finally:
        tracemalloc.stop()
        faulthandler.cancel_dump_traceback_later()
    assert after.threads == before.threads == set()
    assert after.files <= before.files + (3 if "s3" in str(reader.path) else 0)  # Idle connections.
    assert after.traced - before.traced < 200_000
    assert after.resident - before.resident < SPARE_BYTES


@pytest.mark.parametrize("storage", ["zarr", "hdf5"], indirect=True)
def test_starts_and_stops_leave_nothing(storage: SplitReader) -> None:
    leave_nothing(storage, 25)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "n_times"), [("zarr", 1000), ("hdf5", 1000), ("s3", 200)], indirect=["storage"]
)
def test_a_thousand_starts_and_stops_leave_nothing(storage: SplitReader, n_times: int) -> None:
    leave_nothing(storage, n_times)


def test_the_test_sees_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(f"{__name__}.start_and_stop", lambda *_: kept.append((tmp_path / "x").open("a")))
    with pytest.raises(AssertionError):
        leave_nothing(_write(tmp_path / "s"), 5)
    monkeypatch.setattr(f"{__name__}.start_and_stop", lambda *_: kept.append(np.ones(20_000)))
    with pytest.raises(AssertionError):
        leave_nothing(_write(tmp_path / "t"), 5)
    for file in kept[: WARM_UP + 5]:
        file.close()
