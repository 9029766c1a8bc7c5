"""docs/errors.md, row by row: what was done is done here, and what it says must be what the table says.

The expected message and exit code are read from the table; … in a message stands for any text.
"""

from __future__ import annotations

import errno
import gzip
import os
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr
from rank_kernels import deadly
from s3_server import ENVIRONMENT, s3_server
from small_stores import PLAIN_OPTIONS, plain_config

import ep3stream
from ep3stream import cli
from ep3stream.store.files import LocalFiles
from ep3stream.store.json_files import signed_bytes, signed_object
from ep3stream.training import plan as machine

TABLE = Path(__file__).parents[1] / "docs" / "errors.md"
CENTERS = [*PLAIN_OPTIONS, "--centers", "20"]
ROWS = "".join(f"{i % 7},{i % 5},{i % 3}\n" for i in range(40))
OTHER_COLOR = "c,y\nblue,1\nred,2\n"
ROWS_OF_2 = "".join(f"{i},{i % 7}\n" for i in range(40))


@dataclass(frozen=True)
class Row:
    what: str
    message: str
    code: int


def read_table() -> dict[str, Row]:
    """The rows of all tables: what was done, the message, the exit code; the last cell, what to do, is not empty."""
    rows = {}
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[2].isdecimal():
            what, message, code, remedy = cells
            assert what not in rows, what
            assert remedy, what
            rows[what] = Row(what, message.strip("`"), int(code))
    return rows


TABLE_ROWS = read_table()


@dataclass
class Workspace:
    """An empty folder, beside a folder of made things: rows.csv, rows.zarr, classes.csv, classes.zarr, run."""

    made: Path
    here: Path
    patch: pytest.MonkeyPatch
    capture: Callable[[], tuple[str, str]]

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.here / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.made / name, self.here / name))

    def said(self, *arguments: object) -> tuple[int, str]:
        """Exit code and message of a command."""
        code = cli.main([str(argument) for argument in arguments])
        out, err = self.capture()
        return code, "".join(err.splitlines(keepends=True)[-1:] or out).removeprefix("ep3stream: ").strip()

    def convert(self, content: str | bytes, *options: object, name: str = "t.csv") -> tuple[int, str]:
        options = options or ("--target", "y")
        return self.said("convert", self.file(name, content), self.here / "out.zarr", *options)

    def quietly_convert(self, content: str) -> tuple[int, str]:
        """Only warnings are told."""
        return self.convert(content, "--target", "y", "--quiet")

    def fit(self, *options: object, store: Path | None = None, run: str | Path = "run") -> tuple[int, str]:
        store = store or self.made / "rows.zarr"
        return self.said("fit", store, self.here / run, *CENTERS, *options)

    def store(self, x: Any, y: Any) -> Path:
        """Converted without a word."""
        np.savez(self.here / "rows.npz", x=np.asarray(x, np.float32), y=y)
        assert self.said("convert", self.here / "rows.npz", self.here / "s.zarr")[0] == 0
        return self.here / "s.zarr"

    def settings(self, text: str) -> tuple[int, str]:
        return self.fit("--config", self.file("fit.toml", text))

    def kernel(self, function: Any, devices: int = 1, max_restarts: int = 0) -> tuple[int, str]:
        changes = {"solver": {"centers": 20}, "run": {"devices": devices, "max_restarts": max_restarts}}
        settings = plain_config(**changes)
        return self.raised(
            lambda: ep3stream.fit(self.made / "rows.zarr", self.here / "run", settings, kernel=function)
        )

    def raised(self, work: Callable[[], Any]) -> tuple[int, str]:
        with pytest.raises(ep3stream.Ep3streamError) as caught:
            work()
        return caught.value.exit_code, str(caught.value)

    def predict(self, x: Any) -> tuple[int, str]:
        return self.raised(lambda: ep3stream.load(self.made / "run").predict(x))


def laplacian(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.exp(-torch.cdist(z, x))


def flip(file: Path, place: int = -9) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def newer(manifest: Path) -> None:
    content = signed_object(manifest.read_bytes(), str(manifest)) | {"format_version": 99}
    manifest.write_bytes(signed_bytes(content))


def damage(w: Workspace, hurt: Callable[[Path], Any], *command: object) -> tuple[int, str]:
    """A command on a copy of the store that was hurt."""
    store = w.copy("rows.zarr")
    hurt(store)
    return w.said(*(store if word == "STORE" else word for word in command))


def damage_run(w: Workspace, hurt: Callable[[Path], Any]) -> tuple[int, str]:
    hurt(w.copy("run"))
    return w.said("evaluate", w.here / "run", w.made / "rows.zarr")


def loop(w: Workspace) -> Path:
    os.symlink(w.here / "loop", w.here / "loop")
    return w.here / "loop"


def pipe(w: Workspace) -> Path:
    os.mkfifo(w.here / "pipe")
    return w.here / "pipe"


def refuse(error: int) -> Callable[..., Any]:
    def refusing(*_: Any, **__: Any) -> None:
        raise OSError(error, os.strerror(error))

    return refusing


def small_machine(w: Workspace) -> tuple[int, str]:
    w.patch.setattr(machine, "machine_bytes", lambda device: 50_000)
    return w.fit()


def full_disk(w: Workspace) -> tuple[int, str]:
    w.patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    return w.fit()


def read_only(w: Workspace) -> tuple[int, str]:
    path = w.file("t.csv", "a,b,y\n" + ROWS)
    w.patch.setattr(Path, "mkdir", refuse(30))
    return w.said("convert", path, w.here / "out.zarr", "--target", "y")


def half_written(w: Workspace) -> tuple[int, str]:
    with h5py.File(w.here / "t.h5", "w") as file:
        file.create_dataset("x", (40, 2), "f4", chunks=(20, 2))[:20] = 1
        file["y"] = np.arange(40.0)
    return w.said("convert", w.here / "t.h5", w.here / "s.zarr")


def lost_source(w: Workspace) -> tuple[int, str]:
    layout = h5py.VirtualLayout((40, 2), "f4")
    layout[:] = h5py.VirtualSource("part.h5", "x", shape=(40, 2))
    with h5py.File(w.here / "t.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
        file["y"] = np.arange(40.0)
    return w.said("convert", w.here / "t.h5", w.here / "s.zarr")


def emptied_chunk(w: Workspace) -> tuple[int, str]:
    group = zarr.open_group(w.here / "t.zarr", mode="w")
    group.create_array("x", shape=(40, 2), chunks=(20, 2), dtype="f4")[:] = 1
    (w.here / "t.zarr/x/c/1/0").write_bytes(b"")
    return w.said("convert", w.here / "t.zarr", w.here / "s.zarr")


def two_arrays(w: Workspace) -> tuple[int, str]:
    with (w.here / "x.npy").open("wb") as file:
        np.save(file, np.ones((7, 2), "f4"))
        np.save(file, np.ones((7, 2), "f4"))
    np.save(w.here / "y.npy", np.arange(7.0))
    return w.said("convert", "--x", w.here / "x.npy", "--y", w.here / "y.npy", w.here / "s.zarr")


def pickled(w: Workspace) -> tuple[int, str]:
    np.save(w.here / "x.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.save(w.here / "y.npy", np.zeros(1))
    return w.said("convert", "--x", w.here / "x.npy", "--y", w.here / "y.npy", w.here / "out.zarr")


def unequal(w: Workspace) -> tuple[int, str]:
    np.savez(w.here / "t.npz", x=np.zeros((3, 1)), y=np.zeros(4))
    return w.said("convert", w.here / "t.npz", w.here / "out.zarr")


def port_of_another_server(w: Workspace) -> tuple[int, str]:
    """One that answers as an HTTP server answers what it does not understand."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        try:
            return w.fit("--dask", f"tcp://127.0.0.1:{server.getsockname()[1]}")
        finally:
            server.shutdown(socket.SHUT_RDWR)


def centers_of_another_width(w: Workspace) -> tuple[int, str]:
    np.save(w.here / "z.npy", np.zeros((20, 5), np.float32))
    return w.fit("--centers", w.here / "z.npy")


def unicode_path(w: Workspace) -> tuple[int, str]:
    path = w.file("Übung 1 ☃.csv", "a,b,y\n" + ROWS)
    store, run = w.here / "Übung 1 ☃.zarr", w.here / "Läufe ☃" / "erster Lauf"
    assert w.said("convert", path, store, "--target", "y")[0] == 0
    return w.fit("--centers", "5", store=store, run=run)


def unfinished(w: Workspace) -> tuple[int, str]:
    work = w.here / ".rows.zarr.convert"
    shutil.copytree(w.made / "rows.zarr", work / "store", ignore=shutil.ignore_patterns("manifest.json"))
    return w.said("fit", work / "store", w.here / "r")


def lost_settings(w: Workspace) -> tuple[int, str]:
    run = w.copy("run")
    (run / "config.toml").write_bytes(b"")
    return w.said("verify", run)


def unstarted(w: Workspace) -> tuple[int, str]:
    (w.here / "run").mkdir()
    w.file("run/config.toml", "")
    return w.said("evaluate", w.here / "run", w.made / "rows.zarr")


def another_store(w: Workspace) -> tuple[int, str]:
    run = w.copy("run")
    shutil.rmtree(run / "model")
    x = np.random.default_rng(1).standard_normal((90, 2))
    return w.said("fit", w.store(x, x[:, 0]), run, *CENTERS)


def callable_model(w: Workspace) -> tuple[int, str]:
    settings = plain_config(solver={"centers": 20})
    ep3stream.fit(w.made / "rows.zarr", w.here / "run", settings, kernel=laplacian)
    w.capture()
    return w.said("evaluate", w.here / "run", w.made / "rows.zarr")


def seven_of_two_gpus(w: Workspace) -> tuple[int, str]:
    w.patch.setattr(torch.cuda, "device_count", lambda: 2)
    return w.fit("--devices", 7)


def as_rank_0(w: Workspace, size: int, port: int) -> None:
    """As torchrun would have started this process."""
    places = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    for name, value in (places | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items():
        w.patch.setenv(name, str(value))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_of_one_process(w: Workspace) -> tuple[int, str]:
    as_rank_0(w, 1, free_port())
    return w.fit("--devices", 2)


def taken_port(w: Workspace) -> tuple[int, str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        as_rank_0(w, 2, int(taken.getsockname()[1]))
        return w.fit()


def dying_rank(w: Workspace) -> tuple[int, str]:
    return w.kernel(deadly, devices=2)


def link_in_store(store: Path) -> None:
    file = store / "train" / "x" / "c" / "0" / "0"
    file.rename(store.parent / "elsewhere")
    file.symlink_to(store.parent / "elsewhere")


def forbidden_read(w: Workspace) -> tuple[int, str]:
    # Not by chmod: to root, who runs tests in containers, nothing is forbidden.
    w.patch.setattr(LocalFiles, "read_into", refuse(errno.EACCES))
    return w.fit()


def endless_read(w: Workspace) -> tuple[int, str]:
    """A fit whose reads, once the set-up is over, hang until the test is."""
    read, end = LocalFiles.read_into, threading.Event()

    def hang(*arguments: Any) -> None:
        if threading.current_thread().name == "ep3stream-read":
            end.wait(30)
        read(*arguments)

    w.patch.setattr(LocalFiles, "read_into", hang)
    w.patch.setattr("ep3stream.store.read_threads._STOP_S", 0.1)
    try:
        return w.fit("--read-timeout", "0.2")
    finally:
        end.set()


def endless_opening(w: Workspace) -> tuple[int, str]:
    """A disk on which nothing can be read any more."""
    read, end = LocalFiles.read_small, threading.Event()

    def hang(*arguments: Any) -> bytes:
        end.wait(30)
        return read(*arguments)

    w.patch.setattr(LocalFiles, "read_small", hang)
    try:
        return w.fit("--read-timeout", "0.2")
    finally:
        end.set()


def in_bucket(w: Workspace, fault: Any, *command: object) -> tuple[int, str]:
    """A command while the server of `s3://bucket` answers with a status, or not at all."""
    w.patch.setattr("ep3stream.store.object_files._RETRIES", 0)
    w.patch.setattr("ep3stream.store.object_files._PATIENCE_S", 0.0)
    w.patch.chdir(w.here)
    with s3_server() as server:
        server.make_bucket()
        server.fault = lambda _: fault
        url = "http://127.0.0.1:9" if fault == "dead" else server.url
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": url}.items():
            w.patch.setenv(name, value)
        return w.said(*command)


def without_obstore(w: Workspace) -> tuple[int, str]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "obstore"]:
        w.patch.delitem(sys.modules, name)
    w.patch.setitem(sys.modules, "obstore", None)
    return w.said("inspect", "s3://bucket/rows.zarr")


def unknown_category(w: Workspace) -> tuple[int, str]:
    table = w.file("t.csv", "a,y\n" + "".join(f"{'uv'[i % 2]},{i}\n" for i in range(60)))
    assert w.said("convert", table, w.here / "t.zarr", "--target", "y")[0] == 0
    assert w.fit(store=w.here / "t.zarr")[0] == 0
    return w.said("predict", w.here / "run", w.file("april.csv", "a\nz\n"), w.here / "out.csv")


def without_tensorboard(w: Workspace) -> tuple[int, str]:
    w.patch.setattr("ep3stream.run.tensorboard.find_spec", lambda _: None)
    return w.fit("--tensorboard")


CASES: dict[str, Callable[[Workspace], tuple[int, str]]] = {
    # data to convert
    "a column of numbers with gaps": lambda w: w.quietly_convert("a,y\n" + ",1\n" + ROWS_OF_2),
    "a row without a target": lambda w: w.quietly_convert("a,y\n" + "1,\n" + ROWS_OF_2),
    "rows left out by `--missing drop`": lambda w: w.convert(
        "a,y\n" + ",1\n" + ROWS_OF_2, "--target", "y", "--missing", "drop", "--quiet"
    ),
    "a category in a `--split-file` that the first file does not have": lambda w: w.convert(
        "c,y\nred,1\ngreen,2\n",
        *("--target", "y", "--quiet", "--split-file", f"test={w.file('test.csv', OTHER_COLOR)}"),
        name="train.csv",
    ),
    "a file that is in two splits": lambda w: w.convert(
        "a,y\n" + ROWS_OF_2,
        *("--target", "y", "--quiet", "--split-file", f"test={w.here / 'train.csv'}"),
        name="train.csv",
    ),
    "a cell is empty or NaN, with `--missing error`": lambda w: w.convert(
        f"a,b,y\n{ROWS}nan,1,1\n", "--target", "y", "--missing", "error"
    ),
    "a cell is infinite": lambda w: w.convert(f"a,b,y\n{ROWS}1,inf,1\n"),
    "a value is beyond float32": lambda w: w.convert(f"a,b,y\n{ROWS}1e39,1,1\n"),
    "a value is beyond float16, with `--dtype float16`": lambda w: w.convert(
        f"a,b,y\n{ROWS}70000,1,1\n", "--target", "y", "--dtype", "float16"
    ),
    "a text among numbers": lambda w: w.convert(
        "a,b,y\n" + "".join(f"{i},{i},{i}\n" for i in range(3000)) + "1,n/a?,1\n"
    ),
    "a row of another width": lambda w: w.convert(f"a,b,y\n{ROWS}1,2\n"),
    "an empty file": lambda w: w.convert(""),
    "a packed file under a plain name": lambda w: w.convert(gzip.compress(f"a,b,y\n{ROWS}".encode())),
    "a file in UTF-16": lambda w: w.convert(f"a,b,y\n{ROWS}".encode("utf-16")),
    "a file without a header": lambda w: w.convert("0.5,0.5,1\n1,2,3\n"),
    "a column of texts that look like numbers": lambda w: w.quietly_convert(
        "a,y\n" + "".join(f'"{1000 + i:,}",{i}\n' for i in range(40))
    ),
    "a column of dates in another notation": lambda w: w.quietly_convert(
        "a,y\n" + "".join(f"01/{1 + i % 28:02}/2024,{i}\n" for i in range(40))
    ),
    "a column of dates where day and month may be either": lambda w: w.quietly_convert(
        "a,y\n" + "".join(f"01/{1 + i % 12:02}/2024,{i}\n" for i in range(40))
    ),
    "times of which some have a zone": lambda w: w.convert("a,y\n2024-03-01T10:00,1\n2024-03-01T10:00Z,2\n"),
    "a target of texts that look like numbers": lambda w: w.convert(
        "a,y\n" + "".join(f"{i},{i}%\n" for i in range(40))
    ),
    "numbers with leading zeros": lambda w: w.quietly_convert(
        "a,y\n" + "".join(f"0{i % 7},{i}\n" for i in range(40))
    ),
    "texts that are the same number": lambda w: w.convert(
        "a,y\n" + "".join(f"{'0' * (1 + i % 2)},{i}\n" for i in range(40)),
        *("--target", "y", "--category", "a", "--quiet"),
    ),
    "a column of identifiers": lambda w: w.quietly_convert(
        "a,y\n" + "".join(f"user{i},{i}\n" for i in range(60))
    ),
    "a column without a name": lambda w: w.quietly_convert(f",a,y\n{ROWS}"),
    "a header and no rows": lambda w: w.convert("a,b,y\n"),
    "the target is no column": lambda w: w.convert(f"a,b,y\n{ROWS}", "--target", "z"),
    "no target is named": lambda w: w.convert(f"a,b,y\n{ROWS}", "--no-shuffle"),
    "all rows have one label": lambda w: w.convert("a,y\n1,no\n2,no\n"),
    "a class that `--like` does not know": lambda w: w.convert(
        "a,b,y\n1,2,perhaps\n", "--like", w.made / "classes.zarr"
    ),
    "a column that `--like` has is missing": lambda w: w.convert(
        "a,y\n1,no\n", "--like", w.made / "classes.zarr"
    ),
    "a new name for a column that `--like` does not have": lambda w: w.convert(
        "a,b,y\n1,2,no\n", "--like", w.made / "classes.zarr", "--rename", "b=weight"
    ),
    "unknown categories to be ignored, without `--like`": lambda w: w.convert(
        "a,b,y\n1,2,no\n", "--target", "y", "--unknown", "ignore"
    ),
    "a file without the target that `--like` has": lambda w: w.convert(
        "a,b\n1,2\n", "--like", w.made / "classes.zarr"
    ),
    "x and y of different lengths": unequal,
    "an HDF5 dataset of which a part was never written": half_written,
    "an HDF5 file whose sources are lost": lost_source,
    "a Zarr array that was copied in part": emptied_chunk,
    "an NPY file with a second array behind the first": two_arrays,
    "an NPY file of Python objects": pickled,
    "a truncated file": lambda w: w.convert(gzip.compress(f"a,b,y\n{ROWS}".encode())[:-20], name="t.csv.gz"),
    "a URL": lambda w: w.said("convert", "https://example.com/t.csv", w.here / "s.zarr", "--target", "y"),
    "the file is not there": lambda w: w.said(
        "convert", w.here / "t.csv", w.here / "out.zarr", "--target", "y"
    ),
    "the store exists": lambda w: w.said(
        "convert", w.made / "rows.csv", w.made / "rows.zarr", "--target", "y"
    ),
    "split fractions that are not 1 in all": lambda w: w.convert(
        f"a,b,y\n{ROWS}", "--target", "y", "--split", "train=0.5,test=0.4"
    ),
    # data to fit
    "a single row": lambda w: w.fit(store=w.store([[1.0, 2.0]], [1.0])),
    "all y are equal": lambda w: w.fit(store=w.store(np.random.default_rng(0).random((90, 2)), np.ones(90))),
    "all columns are constant": lambda w: w.fit(store=w.store(np.ones((90, 2)), np.arange(90.0))),
    "columns too large for squares, unscaled": lambda w: w.fit(
        "--scale", "none", store=w.store(np.random.default_rng(0).random((90, 2)) * 1e25, np.arange(90.0))
    ),
    # settings
    "bandwidth 0": lambda w: w.fit("--bandwidth", 0),
    "no centers": lambda w: w.fit("--centers", 0),
    "more centers than rows": lambda w: w.fit("--centers", 5000),
    "as many eigenpairs as samples": lambda w: w.fit("--data-rank", 100, "--nystrom-samples", 100),
    "a batch of more rows than there are": lambda w: w.fit("--batch-size", 5000),
    "no epochs": lambda w: w.fit("--epochs", 0),
    "an unknown kernel": lambda w: w.fit("--kernel", "lapacian"),
    "a parameter that the kernel does not have": lambda w: w.fit("--kernel", "gaussian", "--degree", 3),
    "a device that is not there": seven_of_two_gpus,
    "more devices than centers": lambda w: w.fit("--devices", 30),
    "another number of devices than torchrun started": two_of_one_process,
    "too little memory": lambda w: w.fit("--memory", "20KB"),
    "a machine with less memory than --memory allows": small_machine,
    "a memory that is no number": lambda w: w.fit("--memory", "lots"),
    "a negative ridge": lambda w: w.fit("--ridge", -1),
    "a seed below 0": lambda w: w.fit("--seed", -1),
    "a split that the store does not have": lambda w: w.fit("--split", "validation"),
    "patience without a validation": lambda w: w.fit("--patience", 2, "--validate", "auto"),
    "a weight for an unknown class": lambda w: w.fit(
        "--class-weights", "maybe=2", store=w.made / "classes.zarr"
    ),
    "centers of another width": centers_of_another_width,
    "the port of a Dask dashboard, or of another server": port_of_another_server,
    "a Dask scheduler that does not answer": lambda w: w.fit("--dask", "tcp://127.0.0.1:9"),
    "curves for TensorBoard without it": without_tensorboard,
    "an unknown setting": lambda w: w.settings("[solver]\ncentres = 20\n"),
    "a setting of another type": lambda w: w.settings("[solver]\nbatch_size = 'two'\n"),
    "settings that are no TOML": lambda w: w.settings("[solver\n"),
    "settings that are not there": lambda w: w.fit("--config", w.here / "fit.toml"),
    # kernels
    "a kernel of the wrong shape": lambda w: w.kernel(lambda z, x: laplacian(z, x)[:, 1:]),
    "a kernel that gives NaN": lambda w: w.kernel(lambda z, x: laplacian(z, x) * torch.nan),
    "a kernel that is not symmetric": lambda w: w.kernel(lambda z, x: laplacian(z, x) * (1 + z[:, :1] ** 2)),
    "a kernel that is indefinite": lambda w: w.kernel(torch.cdist),
    "a kernel that gives another type": lambda w: w.kernel(lambda z, x: laplacian(z, x).numpy()),
    "a kernel that is no function": lambda w: w.kernel("gaussian"),
    "a model with a callable kernel, without it": callable_model,
    # prediction
    "x of another width": lambda w: w.predict(np.zeros((3, 5))),
    "x with NaN": lambda w: w.predict(np.full((3, 2), np.nan)),
    "x of texts": lambda w: w.predict(np.array([["a", "b"]])),
    "x that is ragged": lambda w: w.predict([[1, 2], [3]]),
    "a store with other columns": lambda w: w.said("evaluate", w.made / "run", w.made / "classes.zarr"),
    "a directory that is no run": lambda w: w.said("evaluate", w.here, w.made / "rows.zarr"),
    "a store where a run belongs": lambda w: w.said("report", w.made / "rows.zarr"),
    "the status of a run that is not there": lambda w: w.said("status", w.here / "first"),
    "the model of a fit that has none yet": unstarted,
    "a table with a category that the model has never seen": unknown_category,
    "a table without a column of the model": lambda w: w.said(
        "predict", w.made / "run", w.file("april.csv", "a\n1\n"), w.here / "out.csv"
    ),
    "an export over what exists": lambda w: w.said("export", w.made / "run", w.file("flights", "mine")),
    "a comparison over another page": lambda w: w.said(
        "report", w.made / "run", w.made / "run", "--out", w.file("thesis.html", "<h1>Mine</h1>")
    ),
    "a table's predictions as an array": lambda w: w.said(
        "predict", w.made / "run", w.file("april.csv", "a,b\n1,2\n"), w.here / "out.npy"
    ),
    "a table where the run belongs": lambda w: w.said(
        "predict", w.file("april.csv", f"a,b\n{ROWS}"), w.made / "run", w.here / "out.csv"
    ),
    "predictions into a directory that is not there": lambda w: w.said(
        "predict",
        w.made / "run",
        w.file("april.csv", "a,b\n" + "1,2\n" * 9),
        w.here / "nowhere" / "out.csv",
    ),
    "predictions over a file that exists": lambda w: w.said(
        "predict", w.made / "run", w.made / "rows.zarr", w.file("out.npy", "mine")
    ),
    # files
    "a changed byte in a store": lambda w: damage(
        w, lambda store: flip(store / "train/x/c/0/0"), "fit", "STORE", w.here / "r", *CENTERS
    ),
    "a shortened file of a store": lambda w: damage(
        w, lambda store: os.truncate(store / "train/x/c/0/0", 100), "fit", "STORE", w.here / "r", *CENTERS
    ),
    "a deleted file of a store": lambda w: damage(
        w, lambda store: (store / "train/y/c/0/0").unlink(), "fit", "STORE", w.here / "r", *CENTERS
    ),
    "a link in a store": lambda w: damage(w, link_in_store, "fit", "STORE", w.here / "r", *CENTERS),
    "a file of a store that may not be read": forbidden_read,
    "a read that does not end": endless_read,
    "a disk that does not answer when a store is opened": endless_opening,
    "a read timeout below 0": lambda w: w.fit("--read-timeout", "-1"),
    "a changed manifest": lambda w: damage(
        w, lambda store: flip(store / "manifest.json"), "inspect", "STORE"
    ),
    "a conversion that did not end": unfinished,
    "a store that lost its manifest": lambda w: damage(
        w, lambda store: (store / "manifest.json").unlink(), "fit", "STORE", w.here / "r"
    ),
    "a store of which nothing is left": lambda w: damage(
        w, lambda store: (shutil.rmtree(store), store.mkdir()), "verify", "STORE"
    ),
    "an HDF5 store that was emptied": lambda w: (
        w.file("flights.h5", ""),
        w.said("verify", w.here / "flights.h5"),
    )[1],
    "a run that lost its settings": lost_settings,
    "a file that is no store": lambda w: w.said("inspect", w.made / "rows.csv"),
    "a run where a store belongs": lambda w: w.said("fit", w.made / "run", w.here / "r"),
    "an empty directory as a store": lambda w: w.said("plan", w.here),
    "a store that is not there": lambda w: w.said("inspect", w.here / "rows.zarr"),
    "another store on resuming": another_store,
    "a changed byte in a model": lambda w: damage_run(
        w, lambda run: flip(run / "model" / "tensors.safetensors")
    ),
    "a deleted file of a model": lambda w: damage_run(
        w, lambda run: (run / "model" / "tensors.safetensors").unlink()
    ),
    "a link that leads in a circle, as a store": lambda w: w.said("inspect", loop(w)),
    "a link that leads in a circle, as settings": lambda w: w.fit("--config", loop(w)),
    "a pipe as settings": lambda w: w.fit("--config", pipe(w)),
    "a full disk": full_disk,
    "a read-only disk": read_only,
    # buckets
    "a URL that names no object": lambda w: w.said("fit", "s3://bucket", w.here / "run"),
    "a bucket that does not exist": lambda w: in_bucket(w, None, "inspect", "s3://other/rows.zarr"),
    "credentials that are refused": lambda w: in_bucket(w, 403, "inspect", "s3://bucket/rows.zarr"),
    "a server that does not answer": lambda w: in_bucket(w, "dead", "inspect", "s3://bucket/rows.zarr"),
    "a bucket that may not be written to": lambda w: in_bucket(
        w, 403, "convert", w.made / "rows.csv", "s3://bucket/out.zarr", "--target", "y"
    ),
    "a store in a bucket, without obstore": without_obstore,
    "a run in a bucket": lambda w: w.said("fit", w.made / "rows.zarr", "s3://bucket/run"),
    "an HDF5 store in a bucket": lambda w: in_bucket(
        w, None, "convert", w.made / "rows.csv", "s3://bucket/rows.h5", "--target", "y"
    ),
    # several devices
    "a rank that dies again and again": dying_rank,
    "a rendezvous port that is taken": taken_port,
    "a kernel that only this process has": lambda w: w.kernel(lambda z, x: laplacian(z, x), 2),
    # versions
    "a store of a newer version": lambda w: damage(
        w, lambda store: newer(store / "manifest.json"), "inspect", "STORE"
    ),
    "a model of a newer version": lambda w: damage_run(w, lambda run: newer(run / "model" / "manifest.json")),
    "settings of a newer version": lambda w: w.settings("format_version = 99\n"),
    # no errors
    "a constant column": lambda w: w.fit(
        "--quiet",
        store=w.store(np.c_[np.ones(90), np.random.default_rng(0).random((90, 1))], np.arange(90.0)),
    ),
    "spaces and any letters in names": unicode_path,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("made")
    x = np.random.default_rng(0).standard_normal((200, 2))
    for name, y in (("rows", np.sin(x[:, 0])), ("classes", np.where(x[:, 0] > 0, "yes", "no"))):
        lines = [f"{a:.6g},{b:.6g},{value}" for (a, b), value in zip(x, y, strict=True)]
        (made / f"{name}.csv").write_text("\n".join(["a,b,y", *lines]))
        assert (
            cli.main(["convert", str(made / f"{name}.csv"), str(made / f"{name}.zarr"), "--target", "y"]) == 0
        )
    assert cli.main(["fit", str(made / "rows.zarr"), str(made / "run"), *CENTERS]) == 0
    return made


def test_the_table_has_a_test_for_every_row_and_a_row_for_every_test() -> None:
    assert TABLE_ROWS.keys() == CASES.keys()
    assert len(CASES) >= 40


@pytest.mark.parametrize("what", CASES)
def test_the_message_and_exit_code_are_those_of_the_table(
    what: str,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    code, message = CASES[what](Workspace(made, tmp_path, monkeypatch, capsys.readouterr))
    row = TABLE_ROWS[what]
    pattern = ".*".join(re.escape(part) for part in row.message.split("…"))
    assert re.fullmatch(pattern, message), message
    assert code == row.code
    if code == 2:
        assert ";" in message or "." in message, "an error says what to do"
