"""The work directory of an unfinished conversion, beside the store: which process works there, and how far it is.

.NAME.convert/plan.json       source and settings; a process goes on only with the same ones
              progress.json   how far the conversion is; replaced as a whole
              rows/           encoded rows on their way into order (spill.py)
              sorting         exists if rows go through rows/ which could have gone straight into the store
              store           the store being written
              finished        the finished store, while it is uploaded into a bucket
              uploaded.json   which files were uploaded (upload.py)
              committing      exists from the moment just before the store is moved to its place
              lock            held while a process works here
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ep3stream.disk import LockHeldError, delete, remove, replacing, take_lock, write
from ep3stream.errors import DamagedDataError, DiskError, InputError
from ep3stream.store.json_files import signed_bytes, signed_object

Json = Mapping[str, Any]

# The files that are removed last, in this order.
_REMOVED_LAST = ("committing", "uploaded.json", "lock")


class ConversionWork:
    """A work directory that this process holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def rows(self) -> Path:
        """The directory of the spilled rows."""
        return self.path / "rows"

    @property
    def store(self) -> Path:
        """The store being written."""
        return self.path / "store"

    @property
    def finished(self) -> Path:
        """The finished store, while it is uploaded into a bucket."""
        return self.path / "finished"

    def uploaded(self) -> Json | None:
        """Returns the content last given to `set_uploaded`; None if there is none, or it is damaged."""
        return _read(self.path / "uploaded.json")

    def set_uploaded(self, content: Json) -> None:
        """Remembers what was uploaded. A conversion that starts again keeps it: the objects in the bucket stay ours."""
        _write(self.path / "uploaded.json", content)

    def progress(self) -> Json | None:
        """Returns the content last given to `set_progress`; None if there is none, or it is damaged."""
        return _read(self.path / "progress.json")

    def set_progress(self, content: Json) -> None:
        """Remembers how far the conversion is; raises DiskError.

        Does not wait for the disk: the store that the progress describes has not reached the disk either. After a
        power failure, `progress` finds damage by the digest, and the writer by those of the segments. A wait took 20
        to 100 ms while 768 MB of NPY were converted on ext4, and there would be one each second.
        """
        _write(self.path / "progress.json", content, is_synced=False)

    def begin_commit(self) -> None:
        """Notes that from now on the store may be in its place; raises DiskError."""
        _write(self.path / "committing", {})

    @property
    def is_sorting(self) -> bool:
        """Whether `start_sorting` was called."""
        return (self.path / "sorting").exists()

    def start_sorting(self) -> None:
        """Notes that rows cannot go straight into the store, and removes the store; raises DiskError."""
        _write(self.path / "sorting", {})
        self.start_writing_again()

    def start_writing_again(self) -> None:
        """Removes the store and the progress; the spilled rows stay."""
        for path in (self.path / "progress.json", self.path / "committing", self.store, self.finished):
            delete(path)

    def start_again(self) -> None:
        """Removes everything but the plan and the note of an upload."""
        self.start_writing_again()
        delete(self.path / "sorting")
        delete(self.rows)
        self.rows.mkdir()

    def size(self) -> int:
        """Returns the bytes of all files."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def remove(self) -> None:
        """Removes the directory, once the store has its place or will not be made.

        The process may be killed here too. The notes of the commit and of the upload go after all other files, so
        that the next process still sees that the store is done. The lock goes last: from then on another process may
        take the directory.
        """
        with suppress(OSError):
            for item in self.path.iterdir():
                if item.name not in _REMOVED_LAST:
                    remove(item)
            for name in _REMOVED_LAST:
                remove(self.path / name)
            self.path.rmdir()


def was_committed(store: Path) -> bool:
    """Returns whether a process moved `store` to its place and was killed before it removed its work directory."""
    path = _work_path(store)
    with _making(store):
        is_moved = (path / "committing").exists() and not os.path.lexists(path / "store")
        return is_moved and os.path.lexists(store)


def is_begun(store: Path) -> bool:
    """Returns whether there is a work directory for `store`."""
    with _making(store):
        return _work_path(store).exists()


@contextmanager
def _making(store: Path) -> Iterator[None]:
    """Raises InputError where the disk cannot have such a path: a name too long, no permission, a file above it."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{store} cannot be made ({reason}); correct permissions or choose another place"
        ) from error


@contextmanager
def conversion_work(store: Path, plan: Json, restart: bool) -> Iterator[ConversionWork]:
    """Yields the work directory for `store`: a new one, or the one that an earlier process left with the same plan.

    restart: what an earlier process left is removed, whatever its plan.
    Raises InputError if the directory cannot be made or is in use, and if its plan differs: the error names the first
    difference. The directory stays when the block ends, in any way; the block removes it if nobody needs it any more.
    """
    path = _work_path(store)
    with _making(store):
        try:
            lock = take_lock(path / "lock")
        except LockHeldError as error:
            raise InputError(f"{store} is being made by {error.holder}; wait for it or stop it") from None
    with lock:
        work = ConversionWork(path)
        earlier = None if restart else _read(path / "plan.json")
        if earlier is None:
            delete(path / "plan.json")
            work.start_again()
            _write(path / "plan.json", plan)
        else:
            _require_same(earlier, plan, store, path)
            work.rows.mkdir(exist_ok=True)
        yield work


def _work_path(store: Path) -> Path:
    with _making(store):  # with_name takes no path that has no name, such as / or ..
        return store.with_name(f".{store.name}.convert")


def _require_same(earlier: Json, plan: Json, store: Path, path: Path) -> None:
    for name in sorted({*earlier, *plan}):
        if earlier.get(name) != plan.get(name):
            raise InputError(
                f"{store}: an unfinished conversion had {name} {earlier.get(name)!r:.200}, now it is "
                f"{plan.get(name)!r:.200}; give what it had, or --restart to begin again (its files are in {path})"
            )


def _read(path: Path) -> Json | None:
    try:
        return signed_object(path.read_bytes(), str(path))
    except (FileNotFoundError, DamagedDataError):
        return None


def _write(path: Path, content: Json, is_synced: bool = True) -> None:
    try:
        with replacing(path, is_synced=is_synced) as partial:
            write(partial, [signed_bytes(content)])
    except OSError as error:
        raise DiskError(
            f"{path}: cannot be written ({error.strerror or error}); free space and run the same command to go on"
        ) from error
