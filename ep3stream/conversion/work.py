"""The directory of an unfinished conversion, beside the store: who works in it, what at, and how far it is.

.NAME.convert/plan.json       source and settings; the same ones are needed to go on
              progress.json   how far the conversion is; replaced as a whole
              rows/           encoded rows on their way to their place (spill.py)
              store           the store being written
              finished        the store once it is whole, on its way into a bucket
              uploaded.json   what was put into the bucket, for an upload to go on
              committing      there when the store may have left for its place
              lock            held while a process works here

A finished store on its way from a work directory into a bucket: whole files, many at once, the manifest last.

What was put is remembered with its entity tag, so that an upload that was killed goes on with the files whose
objects are not there, or not the same. Until the manifest is put there is no store in the bucket.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import xxhash

from ep3stream.errors import DamagedDataError, DiskError, InputError
from ep3stream.store.backend import remove
from ep3stream.store.files import ObjectUrl
from ep3stream.store.json_files import signed_bytes, signed_object
from ep3stream.store.manifest import MANIFEST_NAME, Manifest
from ep3stream.store.object_files import ObjectFiles
from ep3stream.store.zarr_store import read_manifest

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


_THREADS = 4

_REMEMBER_EVERY_S = 1.0


class Upload:
    """The upload of one conversion to `url`. Raises what `ObjectFiles` does, DiskError where it refuses to write."""

    def __init__(self, url: ObjectUrl) -> None:
        self._url = url
        self._files = ObjectFiles(url)

    def require_free(self) -> None:
        """InputError where the bucket holds anything below the URL; also shows that it can be reached."""
        with _refusals(self._url):
            found = self._files.listing()
        if found:
            raise InputError(
                f"{self._url} exists: it holds {len(found)} objects, {min(found)} among them; "
                "remove them or choose another name"
            )

    def is_over(self, work: ConversionWork) -> bool:
        """Whether the store that this work began to upload is there, complete."""
        remembered = work.uploaded()
        if remembered is None:
            return False
        with _refusals(self._url):
            data = read_manifest(self._files)
        if data is None:
            return False
        return bool(Manifest.from_json(data, str(self._url)).fingerprint == remembered["fingerprint"])

    def run(self, work: ConversionWork, tell: Callable[[int, int], None]) -> None:
        """Put every file of `work.finished` that is not there yet; `tell` the bytes put so far, and all."""
        manifest = (work.finished / MANIFEST_NAME).read_bytes()
        fingerprint = Manifest.from_json(manifest, str(work.finished)).fingerprint
        sizes = {
            file.relative_to(work.finished).as_posix(): file.stat().st_size
            for file in work.finished.rglob("*")
            if file.is_file() and file.name != MANIFEST_NAME
        }
        with _refusals(self._url):
            tags = self._settle(work, fingerprint, sizes)
            self._put_files(work, fingerprint, sizes, tags, tell)
            self._commit(manifest)

    def _settle(self, work: ConversionWork, fingerprint: str, sizes: dict[str, int]) -> dict[str, str | None]:
        """File -> entity tag where it has been put already; removes what an earlier, other upload put there."""
        remembered = work.uploaded() or {"fingerprint": fingerprint, "tags": {}}
        found = self._files.listing()
        if foreign := set(found) - set(remembered["tags"]):
            raise InputError(
                f"{self._url} holds {len(foreign)} objects that are not of this conversion, {min(foreign)} among "
                "them; remove them or choose another name"
            )
        is_same = remembered["fingerprint"] == fingerprint
        tags = {
            name: tag
            for name, tag in remembered["tags"].items()
            if is_same and tag is not None and found.get(name) == (sizes.get(name), tag)
        }
        # All names are remembered before the first is put: they are ours from now on.
        names = dict.fromkeys([*remembered["tags"], *sizes])
        work.set_uploaded({"fingerprint": fingerprint, "tags": {**names, **tags}})
        if stale := [name for name in found if name not in sizes]:
            self._files.delete(stale)
        return tags

    def _put_files(
        self,
        work: ConversionWork,
        fingerprint: str,
        sizes: dict[str, int],
        tags: dict[str, str | None],
        tell: Callable[[int, int], None],
    ) -> None:
        def remember() -> None:
            work.set_uploaded({"fingerprint": fingerprint, "tags": {**dict.fromkeys(sizes), **tags}})

        total, done = sum(sizes.values()), sum(sizes[name] for name in tags)
        remembered_at = time.monotonic()
        with ThreadPoolExecutor(_THREADS, "ep3stream-upload") as pool:
            puts = {
                pool.submit(self._files.put, name, work.finished / name): name
                for name in sorted(sizes)
                if name not in tags
            }
            try:
                for put in as_completed(puts):
                    name = puts[put]
                    tags[name] = put.result()
                    done += sizes[name]
                    tell(done, total)
                    if time.monotonic() - remembered_at > _REMEMBER_EVERY_S:
                        remember()
                        remembered_at = time.monotonic()
            finally:
                pool.shutdown(cancel_futures=True)
                ended = (put for put in puts if not put.cancelled() and put.exception() is None)
                tags.update((puts[put], put.result()) for put in ended)
                remember()

    def _commit(self, manifest: bytes) -> None:
        try:
            self._files.put(MANIFEST_NAME, manifest, is_new=True)
        except FileExistsError:
            raise InputError(
                f"{self._url} was made by another conversion meanwhile; choose another name"
            ) from None


@contextmanager
def _refusals(url: ObjectUrl) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{url} cannot be written ({error}); correct the network, the AWS_... variables or the bucket's "
            "permissions, then run the same command to go on"
        ) from error


def stand_in(url: ObjectUrl, work: Path | None) -> Path:
    """The path beside which the work of a conversion to `url` lies: in `work`, or where the command was given."""
    return (work or Path()).absolute() / f"{url.name}-{xxhash.xxh3_64_hexdigest(str(url).encode())[:8]}"
