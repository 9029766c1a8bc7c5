"""The directory of an unfinished conversion, beside the store: who works in it, what at, and how far it is.

.NAME.convert/plan.json       source and settings; the same ones are needed to go on
              progress.json   how far the conversion is; replaced as a whole
              rows/           encoded rows on their way to their place (spill.py)
              store           the store being written
              finished        the store once it is whole, on its way into a bucket
              uploaded.json   what was put into the bucket, for an upload to go on
              committing      there when the store may have left for its place
              lock            held while a process works here
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from ep3stream.data.backend import remove
from ep3stream.data.signed_json import signed_bytes, signed_object
from ep3stream.errors import DamagedDataError, DiskError, InputError

Json = Mapping[str, Any]


class ConversionWork:
    """A work directory that this process holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def rows(self) -> Path:
        """Directory of the spilled rows."""
        return self.path / "rows"

    @property
    def store(self) -> Path:
        """The store being written."""
        return self.path / "store"

    @property
    def finished(self) -> Path:
        """The finished store, where it goes into a bucket."""
        return self.path / "finished"

    def uploaded(self) -> Json | None:
        """What `set_uploaded` was told last."""
        return _read(self.path / "uploaded.json")

    def set_uploaded(self, content: Json) -> None:
        """Remember what has been put into the bucket; it stays whatever begins again, for it is ours."""
        _write(self.path / "uploaded.json", content)

    def progress(self) -> Json | None:
        """What `set_progress` was told last; None at the start, or where it is damaged."""
        return _read(self.path / "progress.json")

    def set_progress(self, content: Json) -> None:
        """Remember how far the conversion is."""
        _write(self.path / "progress.json", content)

    def begin_commit(self) -> None:
        """From now on the store may have its place."""
        _write(self.path / "committing", {})

    def start_writing_again(self) -> None:
        """Forget the store; the spilled rows stay."""
        for name in ("progress.json", "committing"):
            (self.path / name).unlink(missing_ok=True)
        remove(self.store)
        remove(self.finished)

    def start_again(self) -> None:
        """Forget everything but the plan."""
        self.start_writing_again()
        remove(self.rows)
        self.rows.mkdir()

    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def remove(self) -> None:
        """Remove the directory; the store has its name by now, or will not be made."""
        with suppress(OSError):
            for item in self.path.iterdir():
                if item.name not in ("committing", "uploaded.json"):
                    remove(item)  # those two go last: a process may be killed here as well
        shutil.rmtree(self.path, ignore_errors=True)


def was_committed(store: Path) -> bool:
    """Whether a process put its store there and was killed before it could remove its work directory."""
    path = _work_path(store)
    is_moved = (path / "committing").exists() and not os.path.lexists(path / "store")
    return is_moved and os.path.lexists(store)


def is_begun(store: Path) -> bool:
    """Whether a process has left work for `store`."""
    return _work_path(store).exists()


def _work_path(store: Path) -> Path:
    return store.with_name(f".{store.name}.convert")


@contextmanager
def conversion_work(store: Path, plan: Json, restart: bool) -> Iterator[ConversionWork]:
    """The work directory for `store`, new or with what an earlier process left of the same plan.

    Raises InputError when the directory cannot be made, is in use, or was left by another plan: then the
    first thing that differs is named. After an InputError from the disk or a kill it stays for the next
    process; whoever finishes, or meets what no second try can cure, removes it.
    """
    path = _work_path(store)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("a+")
    except OSError as error:
        raise InputError(
            f"{store} cannot be made ({error.strerror or error}); correct permissions or choose another place"
        ) from error
    with lock:
        _take(lock, store)
        work = ConversionWork(path)
        left = None if restart else _read(path / "plan.json")
        if left is None:
            (path / "plan.json").unlink(missing_ok=True)
            work.start_again()
            _write(path / "plan.json", plan)
        else:
            _require_same(left, plan, store, path)
        yield work


def _take(lock: TextIO, store: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise InputError(f"{store} is being made by {lock.read(200)}; wait for it or stop it") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()


def _require_same(left: Json, plan: Json, store: Path, path: Path) -> None:
    for name in sorted({*left, *plan}):
        if left.get(name) != plan.get(name):
            raise InputError(
                f"{store}: an unfinished conversion had {name} {left.get(name)!r:.200}, now it is "
                f"{plan.get(name)!r:.200}; give what it had, or --restart to begin again (its files are in {path})"
            )


def _read(path: Path) -> Json | None:
    try:
        return signed_object(path.read_bytes(), str(path))
    except (FileNotFoundError, DamagedDataError):
        return None


def _write(path: Path, content: Json) -> None:
    partial = path.with_suffix(".partial")
    try:
        partial.write_bytes(signed_bytes(content))
        partial.rename(path)
    except OSError as error:
        raise DiskError(
            f"{path}: cannot be written ({error.strerror or error}); free space and run the same command to go on"
        ) from error
