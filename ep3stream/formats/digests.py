"""Digests of the files of a source, taken while the files are read, and checks that they have not changed.

The manifest of a store records the digests. An interrupted conversion goes on only with the same files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ep3stream.errors import SourceError
from ep3stream.formats.source import reading

DIGEST_BLOCK_BYTES = 64 << 20
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Name, size and time of a file, by which it is recognised without reading it."""

    name: str
    bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path) -> FileStamp:
        """The stamp of a file; for a directory (a Zarr array) the bytes of all its files and the newest time."""
        with reading(file):
            if not file.is_dir():
                stat = file.stat()
                return cls(file.name, stat.st_size, stat.st_mtime_ns)
            stats = [found.stat() for found in _files_below(file)]
        newest = max((stat.st_mtime_ns for stat in stats), default=0)
        return cls(file.name, sum(stat.st_size for stat in stats), newest)


def stamps_of(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Name, size and time of each file as JSON, by which a resumed conversion recognises the files."""
    stamps = map(FileStamp.of, files)
    return [{"name": stamp.name, "bytes": stamp.bytes, "mtime_ns": stamp.mtime_ns} for stamp in stamps]


class SourceDigests:
    """A digest of the bytes of each file, taken just behind the reader, while they are still in the page cache.

    digest = xxh3_128(xxh3_128(block 0) | xxh3_128(block 1) | ...) of blocks of 64 MiB, so that a resumed
    conversion reads at most one block again: `state()` keeps the digests of whole blocks for `restore`.
    Of a directory (a Zarr array) only the names and sizes of its files are digested: reading every chunk a
    second time would double the work.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = tuple(files)
        self._stamps = tuple(map(FileStamp.of, self._files))
        self._blocks: list[list[str]] = [[] for _ in self._files]
        self._open_blocks = [xxhash.xxh3_128() for _ in self._files]
        self._done = [0] * len(self._files)
        self._memory = memoryview(bytearray(_READ_BYTES))

    @property
    def bytes_total(self) -> int:
        """The size of all files together; 0 for a source without files."""
        return sum(stamp.bytes for stamp in self._stamps)

    def bytes_before(self, index: int) -> int:
        """The size of the files that are read before file `index`."""
        return sum(stamp.bytes for stamp in self._stamps[:index])

    def advance(self, index: int, end_byte: int, raw: memoryview | None = None) -> None:
        """Digest file `index` up to `end_byte`; `raw` are the last bytes before it, if they are in memory.

        Raises SourceError if the file ends before `end_byte`.
        """
        file = self._files[index]
        if raw is not None and len(raw) < end_byte - self._done[index]:
            self.advance(index, end_byte - len(raw))  # for example a header
        if end_byte <= self._done[index] or file.is_dir():
            return
        if raw is not None:
            self._update(index, raw[len(raw) - (end_byte - self._done[index]) :])
            return
        with reading(file), file.open("rb", buffering=0) as stream:
            stream.seek(self._done[index])
            while (left := end_byte - self._done[index]) > 0:
                n_bytes = stream.readinto(self._memory[: min(len(self._memory), left)])
                if not n_bytes:
                    raise SourceError(
                        f"{file}: became shorter while it was read; convert it when it is complete"
                    )
                self._update(index, self._memory[:n_bytes])

    def _update(self, index: int, data: memoryview) -> None:
        while data:
            to_boundary = DIGEST_BLOCK_BYTES - self._done[index] % DIGEST_BLOCK_BYTES
            part, data = data[:to_boundary], data[to_boundary:]
            self._open_blocks[index].update(part)
            self._done[index] += len(part)
            if len(part) == to_boundary:
                self._blocks[index].append(self._open_blocks[index].hexdigest())
                self._open_blocks[index].reset()

    def state(self) -> list[dict[str, Any]]:
        """For each file its stamp, the digests of whole blocks, and how much of the file is digested; as JSON."""
        return [
            {
                "name": stamp.name,
                "bytes": stamp.bytes,
                "mtime_ns": stamp.mtime_ns,
                "blocks": list(self._blocks[index]),
                "done": self._done[index],
                "open_block": self._open_blocks[index].hexdigest(),
            }
            for index, stamp in enumerate(self._stamps)
        ]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Continue from the `state()` of another process; raises SourceError, which names a changed file."""
        self.require_unchanged(state)
        for index, entry in enumerate(state):
            self._blocks[index] = list(entry["blocks"])
            self._open_blocks[index].reset()
            self._done[index] = DIGEST_BLOCK_BYTES * len(self._blocks[index])

    def require_unchanged(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Raise SourceError if the files are not those of `state()`, by name, size and time.

        A file with another time and the same size is accepted if the part read before still has its digest.
        """
        names = [entry["name"] for entry in state]
        found = [stamp.name for stamp in self._stamps]
        if names != found:
            other = next((name for name in found if name not in names), None) or "their order or number"
            raise SourceError(f"the source's files changed since the conversion began: {other}")
        for file, stamp, entry in zip(self._files, self._stamps, state, strict=True):
            if stamp.bytes != entry["bytes"]:
                what = f"{entry['bytes']} bytes then, {stamp.bytes} now"
            elif stamp.mtime_ns != entry["mtime_ns"] and file.is_dir():
                what = "written to since"
            elif stamp.mtime_ns != entry["mtime_ns"] and not _has_content(file, entry):
                what = "other content"
            else:
                continue
            raise SourceError(f"{file}: changed since the conversion began ({what})")

    def finish(self) -> tuple[Mapping[str, object], ...]:
        """The entry of each file in the manifest: its base name, size and digest.

        Raises SourceError for a file whose size or time has changed since it was opened.
        """
        return tuple(self._finished(index) for index in range(len(self._files)))

    def _finished(self, index: int) -> dict[str, object]:
        file, stamp = self._files[index], self._stamps[index]
        self.advance(index, stamp.bytes)
        if FileStamp.of(file) != stamp:
            raise SourceError(f"{file}: changed while it was read; convert it when it is complete")
        if file.is_dir():
            sizes = [
                f"{found.relative_to(file).as_posix()} {found.stat().st_size}\n"
                for found in _files_below(file)
            ]
            digest = xxhash.xxh3_128_hexdigest("".join(sizes).encode(errors="surrogateescape"))
            return {"name": stamp.name, "bytes": stamp.bytes, "names_digest": digest}
        blocks = [*self._blocks[index], self._open_blocks[index].hexdigest()]
        if stamp.bytes and stamp.bytes % DIGEST_BLOCK_BYTES == 0:
            blocks.pop()  # the last block is whole and digested already
        digest = xxhash.xxh3_128_hexdigest(bytes.fromhex("".join(blocks)))
        return {"name": stamp.name, "bytes": stamp.bytes, "digest": digest}


def _has_content(file: Path, entry: Mapping[str, Any]) -> bool:
    """Whether the part of the file that was read before still has the digests of its `state()` entry."""
    again = SourceDigests([file])
    again.advance(0, entry["done"])
    return all(again.state()[0][key] == entry[key] for key in ("blocks", "open_block"))


def _files_below(directory: Path) -> list[Path]:
    """Every file below a directory, sorted by its path."""
    found = [Path(parent, name) for parent, _, names in os.walk(directory) for name in names]
    return sorted(found)
