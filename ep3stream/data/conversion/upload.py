"""A finished store on its way from a work directory into a bucket: whole files, many at once, the manifest last.

What was put is remembered with its entity tag, so that an upload that was killed goes on with the files whose
objects are not there, or not the same. Until the manifest is put there is no store in the bucket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import xxhash

from ep3stream.data.conversion.work import ConversionWork
from ep3stream.data.location import ObjectUrl
from ep3stream.data.manifest import MANIFEST_NAME, Manifest
from ep3stream.data.object_files import ObjectFiles
from ep3stream.data.zarr_backend import read_manifest
from ep3stream.errors import DiskError, InputError

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
