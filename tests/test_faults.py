"""What a running fit meets: storage that fails, hangs, dies or goes away.

It carries on to the same bytes, or stops with exit code 3, a named segment and a checkpoint to go on from.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_server import BUCKET, ENVIRONMENT, Request, S3Server, s3_server
from small_stores import PLAIN_OPTIONS, make_store, plain_config

import ep3stream
from ep3stream import cli
from ep3stream.errors import DamagedDataError
from ep3stream.run.state import list_checkpoints
from ep3stream.store import object_files, read_threads, retries
from ep3stream.store.files import LocalFiles
from ep3stream.store.reader import open_store

SETTINGS = {"solver": {"centers": 30, "batch_size": 64}, "run": {"memory_bytes": 1 << 22}}
OPTIONS = [*PLAIN_OPTIONS, "--centers", "30", "--batch-size", "64", "--memory", "4MiB"]
STEPS = 23  # Of the epoch.
WINDOW_BYTES = 4 * 5000  # Two windows of two segments.


def config(**run: Any) -> ep3stream.FitConfig:
    return plain_config(**SETTINGS).with_settings({"run": run}, "test")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of some segments, and the run of a fit that nothing happened to."""
    made = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ep3stream.training.plan._STREAM_BYTES", WINDOW_BYTES)
        make_run(made)
    return made


def make_run(made: Path) -> None:
    make_store(made / "rows.zarr", split="train=1")
    ep3stream.fit(made / "rows.zarr", made / "run", config())


@pytest.fixture
def store(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(retries, "PAUSES_S", (0.001, 0.001))
    monkeypatch.setattr(object_files, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(object_files, "_PATIENCE_S", 2.0)
    monkeypatch.setattr("ep3stream.training.plan._STREAM_BYTES", WINDOW_BYTES)
    return Path(shutil.copytree(made / "rows.zarr", tmp_path / "rows.zarr"))


def model(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "model").iterdir()}


def streaming_read(monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable[[int], None]) -> list[int]:
    """Calls `fault(n)` before the n-th read of file `name` since the set-up; gives the reads so far."""
    read, times = LocalFiles.read_into, []

    def faulty(self: LocalFiles, file: str, start: int, *outs: memoryview) -> None:
        if file == name and any("ep3stream-read" in t.name for t in [threading.current_thread()]):
            times.append(len(times) + 1)
            fault(len(times))
        read(self, file, start, *outs)

    monkeypatch.setattr(LocalFiles, "read_into", faulty)
    return times


def fail(*numbers: int) -> Callable[[int], None]:
    def fault(number: int) -> None:
        if not numbers or number in numbers:
            raise OSError(5, os.strerror(5))

    return fault


# A segment that cannot be read.


@pytest.mark.parametrize("numbers", [(1,), (1, 2)], ids=["once", "twice"])
def test_a_segment_that_fails_once_or_twice_changes_nothing(made, store, tmp_path, monkeypatch, numbers):
    reads = streaming_read(monkeypatch, "train/x/c/7/0", fail(*numbers))
    ep3stream.fit(store, tmp_path / "run", config())
    assert model(tmp_path / "run") == model(made / "run")
    assert len(reads) == len(numbers) + 1


def require_stopped_well(code: int, said: str, run: Path, words: str) -> int:
    """Exit code 3, one line that names a segment, a sound checkpoint behind some steps; gives its step."""
    assert code == 3
    assert re.search(rf"rows.zarr: split train, segment \d+ {words}", said), said
    ((step, _),) = list_checkpoints(run / "checkpoints")
    assert 0 < step < STEPS
    assert ep3stream.verify(run) == []
    return step


def test_a_segment_that_fails_for_ever_ends_the_fit_with_a_checkpoint_from_which_it_goes_on(
    made, store, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        segment = int(late_segment(store))
        streaming_read(patch, f"train/x/c/{segment}/0", fail())
        code = cli.main(["fit", str(store), str(tmp_path / "run"), *OPTIONS])
    said = capsys.readouterr().err
    require_stopped_well(code, said, tmp_path / "run", r"cannot be read \(OSError\(5, ")
    assert f"segment {segment} " in said
    assert cli.main(["fit", str(store), str(tmp_path / "run"), *OPTIONS]) == 0
    assert model(tmp_path / "run") == model(made / "run")


def late_segment(store: Path) -> int:
    """One that the fit reads behind its first steps."""
    from ep3stream.stream.order import RowOrder

    info = open_store(store).split("train").info
    order = RowOrder(0, info.n_rows, info.segment_rows, 1, 64, np.empty(0, np.int64))
    return int(order.segments(0)[-2])


def test_a_store_deleted_under_a_fit_ends_it_with_a_checkpoint(made, store, tmp_path, monkeypatch, capsys):
    steps = []

    def observe(now: Any) -> None:
        steps.append(now.step)
        shutil.rmtree(store, ignore_errors=True)

    with pytest.raises(DamagedDataError, match=r"segment \d+ cannot be read .*is missing") as caught:
        ep3stream.fit(store, tmp_path / "run", config(), observe=observe)
    require_stopped_well(caught.value.exit_code, str(caught.value), tmp_path / "run", "cannot be read")
    shutil.copytree(made / "rows.zarr", store)
    ep3stream.fit(store, tmp_path / "run", config())
    assert model(tmp_path / "run") == model(made / "run")


# A read that hangs.


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Lets all hanging reads go at last; their threads must then end."""
    event = threading.Event()
    yield event
    event.set()
    deadline = time.monotonic() + 200
    while left := [t for t in threading.enumerate() if t.name.startswith("ep3stream")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


@pytest.mark.parametrize("numbers", [(1,), (1, 2)], ids=["once", "twice"])
def test_a_read_that_hangs_is_begun_again_and_never_writes_to_memory_in_use(
    made, store, tmp_path, monkeypatch, release, numbers
):
    read = LocalFiles.read_into

    def hang(number: int) -> None:
        if number in numbers:
            release.wait(30)

    reads = streaming_read(monkeypatch, "train/x/c/7/0", hang)
    begun = time.monotonic()
    ep3stream.fit(store, tmp_path / "run", config(read_timeout_s=1))
    assert time.monotonic() - begun < 25  # less than the 30 s that the read hangs
    assert model(tmp_path / "run") == model(made / "run")
    assert len(reads) == len(numbers) + 1
    assert LocalFiles.read_into is not read


def test_a_hung_read_that_wakes_up_writes_past_the_window(store, monkeypatch, release):
    """The read hangs inside of its window's memory, then fills it with rubbish while batches are made of it."""
    import torch

    from ep3stream.stream.order import RowOrder
    from ep3stream.stream.prefetch import BatchStream

    reader = open_store(store, 1).split("train")
    info = reader.info
    order = RowOrder(0, info.n_rows, info.segment_rows, 3, 50, np.empty(0, np.int64))
    segment = int(order.segments(0)[1])
    expected = [batch.x.clone() for batch in stream_of(reader, order)]
    read, hung = LocalFiles.read_into, []

    def faulty(self: LocalFiles, file: str, start: int, *outs: memoryview) -> None:
        if file == f"train/x/c/{segment}/0" and not hung:
            hung.append(threading.current_thread())
            release.wait(30)
            outs[0][:] = b"\xff" * len(outs[0])
            return
        read(self, file, start, *outs)

    monkeypatch.setattr(LocalFiles, "read_into", faulty)
    with BatchStream(reader, order, 0, order.steps_per_epoch, torch.device("cpu")) as stream:
        first = next(stream).x.clone()
        release.set()
        hung[0].join()
        seen = [first, *(batch.x.clone() for batch in stream)]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def stream_of(reader: Any, order: Any) -> Iterator[Any]:
    import torch

    from ep3stream.stream.prefetch import BatchStream

    with BatchStream(reader, order, 0, order.steps_per_epoch, torch.device("cpu")) as stream:
        yield from stream


def test_a_read_that_hangs_for_ever_is_reported_by_segment(
    made, store, tmp_path, monkeypatch, capsys, release
):
    segment = late_segment(store)
    with monkeypatch.context() as patch:
        patch.setattr(read_threads, "_STOP_S", 0.2)
        reads = streaming_read(patch, f"train/x/c/{segment}/0", lambda _: release.wait(30) and None)
        code = cli.main(["fit", str(store), str(tmp_path / "run"), *OPTIONS, "--read-timeout", "1"])
    said = capsys.readouterr().err
    require_stopped_well(code, said, tmp_path / "run", "did not come within 1 s, 3 times; see to its disk")
    assert len(reads) == 3
    release.set()
    assert cli.main(["fit", str(store), str(tmp_path / "run"), *OPTIONS]) == 0
    assert model(tmp_path / "run") == model(made / "run")


def test_a_stop_does_not_wait_for_a_read_that_hangs(store, monkeypatch, release):
    import torch

    from ep3stream.stream.order import RowOrder
    from ep3stream.stream.prefetch import BatchStream

    monkeypatch.setattr(read_threads, "_STOP_S", 0.2)
    reader = open_store(store).split("train")
    order = RowOrder(0, reader.info.n_rows, reader.info.segment_rows, 2, 50, np.empty(0, np.int64))
    reads = streaming_read(
        monkeypatch, f"train/x/c/{order.segments(0)[0]}/0", lambda _: release.wait(30) and None
    )
    begun = time.monotonic()
    with BatchStream(reader, order, 0, 9, torch.device("cpu")):
        while not reads:
            time.sleep(0.01)
    assert time.monotonic() - begun < 25
    assert [t.name for t in threading.enumerate() if t.name.startswith("ep3stream")] == ["ep3stream-read"]


def test_set_up_and_scores_survive_a_read_that_hangs(made, store, monkeypatch, release):
    read, hung = LocalFiles.read_into, []

    def faulty(self: LocalFiles, file: str, start: int, *outs: memoryview) -> None:
        if not hung:
            hung.append(file)
            release.wait(30)
        read(self, file, start, *outs)

    expected = ep3stream.evaluate(made / "run", store)
    monkeypatch.setattr(LocalFiles, "read_into", faulty)
    assert ep3stream.evaluate(made / "run", store, read_timeout_s=0.2) == expected
    hung.clear()
    rows = np.arange(0, 1500, 7)
    here, there = (open_store(place, 0.2).split("train") for place in (store, made / "rows.zarr"))
    np.testing.assert_array_equal(here.read_rows(rows)[0], there.read_rows(rows)[0])
    assert hung


# Workers of a cluster.


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        silence_logs=50,
    ) as cluster:
        yield cluster


def test_a_fit_by_two_worker_processes_ends_with_the_same_bytes_though_one_of_them_is_killed(
    made, store, tmp_path, cluster
):
    killed = []

    def observe(now: Any) -> None:
        if not killed:
            killed.append(next(iter(cluster.workers.values())).pid)
            os.kill(killed[0], signal.SIGKILL)

    run = config(dask=cluster.scheduler_address)
    ep3stream.fit(store, tmp_path / "run", run, observe=observe)
    assert killed
    assert model(tmp_path / "run") == model(made / "run")


def test_a_cluster_that_goes_away_ends_the_fit_with_a_checkpoint(made, store, tmp_path):
    from distributed import LocalCluster

    cluster = LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    )
    with (
        cluster,
        pytest.raises(DamagedDataError, match=r"was not read by the Dask cluster|did not come") as caught,
    ):
        ep3stream.fit(
            store,
            tmp_path / "run",
            config(dask=cluster.scheduler_address, read_timeout_s=1),
            observe=lambda _: cluster.close(timeout=1),
        )
    require_stopped_well(
        caught.value.exit_code, str(caught.value), tmp_path / "run", "(was not read by|did not come)"
    )
    ep3stream.fit(store, tmp_path / "run", config())
    assert model(tmp_path / "run") == model(made / "run")


# An S3 endpoint.


@pytest.fixture(scope="module")
def server(made: Path) -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(server: S3Server, made: Path, monkeypatch: pytest.MonkeyPatch, store: Path) -> S3Server:
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_files, "_BACKOFF_S", 0.001)
    monkeypatch.setattr(object_files, "_RETRIES", 2)
    server.reset()
    bucket = object_files.ObjectFiles(object_files.ObjectUrl(BUCKET, "rows.zarr"))
    for file in made.joinpath("rows.zarr").rglob("*"):
        if file.is_file():
            bucket.put(file.relative_to(made / "rows.zarr").as_posix(), file)
    return server


URL = f"s3://{BUCKET}/rows.zarr"


@pytest.mark.parametrize("fault", [500, "short", 0.15], ids=["500", "short bodies", "slowly"])
def test_an_endpoint_that_fails_now_and_then_or_answers_slowly_changes_nothing(made, s3, tmp_path, fault):
    answers: list[Request] = []

    def now_and_then(request: Request) -> Any:
        answers.append(request)
        return fault if len(answers) % 3 == 0 and "/c/" in request.path else None

    s3.fault = now_and_then
    ep3stream.fit(URL, tmp_path / "run", config())
    assert model(tmp_path / "run") == model(made / "run")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (500, r"cannot be read .*InternalError.*; see to the server and the network"),
        ("short", "cannot be read"),
        (30.0, "did not come within 1 s|cannot be read"),
    ],
    ids=["500", "short bodies", "never"],
)
def test_an_endpoint_that_fails_for_ever_ends_the_fit_with_a_checkpoint(
    made, s3, store, tmp_path, monkeypatch, fault, words
):
    monkeypatch.setattr(read_threads, "_STOP_S", 0.2)
    late = f"/train/x/c/{late_segment(store)}/0"
    s3.fault = lambda request: fault if request.path.endswith(late) and at_work(tmp_path / "run") else None
    with pytest.raises(DamagedDataError) as caught:
        ep3stream.fit(URL, tmp_path / "run", config(read_timeout_s=1 if fault == 30 else 100))
    require_stopped_well(caught.value.exit_code, str(caught.value), tmp_path / "run", f"({words})")
    s3.fault = lambda _: None
    s3.released.set()
    ep3stream.fit(URL, tmp_path / "run", config())
    assert model(tmp_path / "run") == model(made / "run")


def at_work(run: Path) -> bool:
    """Whether the set-up is over, which reads some segments as well."""
    return (run / "setup" / "manifest.json").exists()
