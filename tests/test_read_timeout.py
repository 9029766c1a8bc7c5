"""`--read-timeout` holds for whoever reads a store, and 0 means for ever; a store that hangs is read again."""

from __future__ import annotations

import math
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_stores import PLAIN_OPTIONS, make_store, plain_config, smooth_rows

import ep3stream
from ep3stream import ConfigError, FitConfig, InputError, cli
from ep3stream.store import read_threads
from ep3stream.store.files import LocalFiles
from ep3stream.store.read_threads import ReadThreads
from ep3stream.store.reader import open_store

pytestmark = pytest.mark.usefixtures("quick_columns")

CENTERS = [*PLAIN_OPTIONS, "--centers", "30"]


def config(timeout_s: float, **solver: Any) -> FitConfig:
    return plain_config(
        data={"validate": "test"},
        solver={"centers": 30, "batch_size": 64, **solver},
        run={"read_timeout_s": timeout_s, "memory_bytes": 1 << 24},
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(
        tmp_path_factory.mktemp("store") / "rows.zarr", n_rows=2200, split="train=0.95,test=0.05"
    )


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ep3stream.fit(store, tmp_path_factory.mktemp("runs") / "run", config(100))


Use = Callable[[Path, Path, Path, float], Any]


def use_of_kernel_model(store: Path, run: Path, folder: Path, timeout_s: float) -> Any:
    rows = open_store(store, timeout_s)
    model = ep3stream.KernelModel(smooth_rows(30)[0], n_outputs=2)
    model.fit(rows.split("train"), validation=rows.split("test"))
    return model.predict(smooth_rows(20)[0]).numpy()


def use_of_estimator(store: Path, run: Path, folder: Path, timeout_s: float) -> Any:
    rows = open_store(store, timeout_s)
    model = ep3stream.KernelRegressor(n_centers=30, epochs=1, random_state=0).fit(rows)
    return np.array(model.score(rows.split("test")))


def use_of_data_set(store: Path, run: Path, folder: Path, timeout_s: float) -> Any:
    rows = open_store(store, timeout_s).split("train")
    sets = [ep3stream.StoreDataset(rows, batch_size=100, shuffle=shuffle) for shuffle in (True, False)]
    return [x.numpy().copy() for data in sets for x, _ in data]


def predictions(store: Path, run: Path, folder: Path, timeout_s: float) -> Any:
    out = folder / f"out-{timeout_s}.npy"
    ep3stream.predict(run, store, out, "test", read_timeout_s=timeout_s)
    return np.load(out)


def run_of_fit(store: Path, folder: Path, settings: FitConfig) -> Any:
    run = ep3stream.fit(
        store, folder / f"run-{settings.run.read_timeout_s}-{settings.solver.centers}", settings
    )
    return ep3stream.load(run).predict(smooth_rows(20)[0])


USES: dict[str, Use] = {
    "fit, with set-up and validation": lambda s, r, f, t: run_of_fit(s, f, config(t)),
    "fit with means of clusters": lambda s, r, f, t: run_of_fit(s, f, config(t, centers="kmeans:20")),
    "fit with the rows of a split": lambda s, r, f, t: run_of_fit(s, f, config(t, centers=f"{s}/test")),
    "evaluate": lambda s, r, f, t: ep3stream.evaluate(r, s, read_timeout_s=t),
    "predict": predictions,
    "verify": lambda s, r, f, t: ep3stream.verify(s, read_timeout_s=t),
    "plan": lambda s, r, f, t: ep3stream.plan(s, config(t)).sizes.n_centers,
    "tune": lambda s, r, f, t: (
        ep3stream.tune(s, config(t), kernels=("laplacian",), n_centers=60).config.run.read_timeout_s == t
    ),
    "KernelModel": use_of_kernel_model,
    "estimators": use_of_estimator,
    "StoreDataset": use_of_data_set,
    "read_rows": lambda s, r, f, t: open_store(s, t).split("train").read_rows(np.arange(0, 900, 7))[0],
    "a reader in another process": lambda s, r, f, t: pickle.loads(
        pickle.dumps(open_store(s, t).split("train"))
    ).read_rows(np.arange(9))[0],
}


@pytest.mark.parametrize(
    ("use", "given", "in_force"), [*((use, 0.0, math.inf) for use in USES), ("evaluate", 345.0, 345.0)]
)
def test_the_time_out_is_that_of_all_reads(
    store: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    use: str,
    given: float,
    in_force: float,
) -> None:
    init, found = ReadThreads.__init__, []

    def note(threads: ReadThreads, n_threads: int, timeout_s: float, name: str) -> None:
        found.append((name, timeout_s))
        init(threads, n_threads, timeout_s, name)

    monkeypatch.setattr(ReadThreads, "__init__", note)
    USES[use](store, run, tmp_path, given)
    # A model may look into the store that it was fitted to, for the names of columns.
    others = {(name, seconds) for name, seconds in found if seconds != in_force}
    assert others <= ({("ep3stream-open", 120.0)} if use in ("evaluate", "predict") else set())
    assert len(found) > len(others) + (use != "evaluate")


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Lets all hanging reads go at last; their threads must then end."""
    monkeypatch.setattr(read_threads, "_STOP_S", 0.2)
    event = threading.Event()
    yield event
    event.set()
    deadline = time.monotonic() + 200
    while left := [t for t in threading.enumerate() if t.name.startswith("ep3stream")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def hang(
    monkeypatch: pytest.MonkeyPatch, release: threading.Event, name: str, is_first_only: bool
) -> list[str]:
    """Makes reads of rows, or of the manifest, hang until `release`; gives the files of those that did."""
    real, hung = getattr(LocalFiles, name), []

    def faulty(self: LocalFiles, file: str, *more: Any) -> Any:
        if not (is_first_only and hung):
            hung.append(file)
            assert release.wait(100)
        return real(self, file, *more)

    monkeypatch.setattr(LocalFiles, name, faulty)
    return hung


@pytest.mark.parametrize("use", [use for use in USES if use not in ("verify", "plan")])
def test_a_read_that_hangs_is_begun_again(
    store: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    release: threading.Event,
    use: str,
) -> None:
    expected = USES[use](store, run, tmp_path, 50)
    with monkeypatch.context() as patch:
        hung = hang(patch, release, "read_into", is_first_only=True)
        found = USES[use](store, run, tmp_path, 0.5)
    assert len(hung) == 1
    assert not release.is_set()
    np.testing.assert_equal(found, expected)


def test_a_disk_that_no_longer_answers_ends_every_command(
    store: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    release: threading.Event,
    capsys: pytest.CaptureFixture[str],
) -> None:
    timeout = ["--read-timeout", "0.3"]
    commands = {
        "fit": ["fit", str(store), str(tmp_path / "new"), *CENTERS, *timeout],
        "evaluate": ["evaluate", str(run), str(store), *timeout],
        "predict": ["predict", str(run), str(store), str(tmp_path / "out.npy"), *timeout],
        "plan": ["plan", str(store), *CENTERS, *timeout],
        "tune": ["tune", str(store), "--out", str(tmp_path / "tuned.toml"), *timeout],
        "verify": ["verify", str(store), *timeout],
    }
    with monkeypatch.context() as patch:
        hang(patch, release, "read_into", is_first_only=False)
        for name, words in commands.items():
            assert cli.main(words) == 3, name
            said = "".join(capsys.readouterr())
            assert "did not come within 0.3 s" in said, name
            assert "see to its disk, server or cluster, or allow more by --read-timeout" in said
    with monkeypatch.context() as patch:
        hang(patch, release, "read_small", is_first_only=False)
        for name, words in commands.items():
            assert cli.main(words) == 2, name
            said = capsys.readouterr().err
            assert f"{store} cannot be reached: it did not answer within 0.3 s; see to its disk" in said, name
    assert not (tmp_path / "out.npy").exists()


def test_a_time_out_below_0_is_refused(store: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bad in (-1, math.nan):
        with pytest.raises(ConfigError, match="use a positive number of seconds, or 0 to wait for ever"):
            open_store(store, bad)
    assert cli.main(["evaluate", str(run), str(store), "--read-timeout", "-1"]) == 2
    assert "read_timeout_s is -1.0; use a positive number" in capsys.readouterr().err


def test_a_store_of_another_reader_keeps_its_own_time_out(store: Path) -> None:
    assert open_store(store).split("train").read_timeout_s == 120
    assert open_store(store, 0).read_timeout_s == math.inf
    with pytest.raises(InputError, match="does not exist"):
        open_store(store / "none", 0)
