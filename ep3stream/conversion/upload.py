"""Uploads a finished store from a work directory into a bucket: many files at once, the manifest last.

The entity tag of each uploaded file is remembered in the work directory. An upload that was killed goes on with the
files whose objects are missing or differ. Until the manifest is uploaded, the bucket holds no store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import xxhash

from ep3stream.conversion.work import ConversionWork
from ep3stream.errors import DiskError, InputError
from ep3stream.store.files import ObjectUrl
from ep3stream.store.manifest import MANIFEST_NAME, Manifest
from ep3stream.store.object_files import ObjectFiles
from ep3stream.store.zarr_store import read_manifest

_THREADS = 4
_REMEMBER_EVERY_S = 1.0


class Upload:
    """The upload of one store to `url`.

    Every method raises what `ObjectFiles` raises, and DiskError if the bucket refuses.
    """

    def __init__(self, url: ObjectUrl) -> None:
        self._url = url
        self._files = ObjectFiles(url)

    def require_free(self) -> None:
        """Raises InputError if the bucket holds any object below the URL."""
        with self._refusals_named():
            found = self._files.listing()
        if found:
            raise InputError(
                f"{self._url} exists: it holds {len(found)} objects, {min(found)} among them; "
                "remove them or choose another name"
            )

    def is_over(self, work: ConversionWork) -> bool:
        """Returns whether the bucket holds the complete store whose upload `work` remembers."""
        remembered = work.uploaded()
        if remembered is None:
            return False
        with self._refusals_named():
            data = read_manifest(self._files)
        if data is None:
            return False
        return bool(Manifest.from_json(data, str(self._url)).fingerprint == remembered["fingerprint"])

    def run(self, work: ConversionWork, tell: Callable[[int, int], None]) -> None:
        """Uploads every file of `work.finished` that is not in the bucket yet.

        After each file, calls `tell` with the bytes uploaded so far and the bytes of all files. Raises InputError if
        the bucket holds objects of anybody else below the URL.
        """
        manifest = (work.finished / MANIFEST_NAME).read_bytes()
        fingerprint = Manifest.from_json(manifest, str(work.finished)).fingerprint
        sizes = {
            file.relative_to(work.finished).as_posix(): file.stat().st_size
            for file in work.finished.rglob("*")
            if file.is_file() and file.name != MANIFEST_NAME
        }
        with self._refusals_named():
            tags = self._uploaded_before(work, fingerprint, sizes)
            self._put_files(work, fingerprint, sizes, tags, tell)
            try:
                self._files.put(MANIFEST_NAME, manifest, is_new=True)
            except FileExistsError:
                raise InputError(
                    f"{self._url} was made by another conversion meanwhile; choose another name"
                ) from None

    def _uploaded_before(
        self, work: ConversionWork, fingerprint: str, sizes: dict[str, int]
    ) -> dict[str, str | None]:
        """Returns file -> entity tag of the files uploaded before; removes objects of an earlier, other upload."""
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
        # All names are remembered before the first file is uploaded: objects of these names are ours from now on.
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
        """Uploads the files that `tags` lacks and adds their tags; remembers the tags now and then, and at the end."""

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

    @contextmanager
    def _refusals_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskError(
                f"{self._url} cannot be written ({error}); correct the network, the AWS_... variables or the "
                "bucket's permissions, then run the same command to go on"
            ) from error


def stand_in(url: ObjectUrl, work: Path | None) -> Path:
    """Returns the path that names the work directory of a conversion to `url`: in `work`, or the current directory."""
    return (work or Path()).absolute() / f"{url.name}-{xxhash.xxh3_64_hexdigest(str(url).encode())[:8]}"
