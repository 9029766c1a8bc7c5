"""Finds the files to convert and opens them as one source; digests them while they are read."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import xxhash

from ep3stream.config import Task
from ep3stream.data.batch import Source, reading
from ep3stream.data.npy import ArraySource
from ep3stream.data.tables import TABLE_SUFFIXES, TableSource
from ep3stream.errors import SourceError

_DIGEST_BLOCK_BYTES = 1 << 20


def open_source(
    paths: Sequence[Path], x_file: Path | None, y_file: Path | None, target: str | None, task: Task | None
) -> Source:
    """The tables under `paths`, or the pair of .npy files; raises SourceError naming file and remedy."""
    if x_file is None and y_file is None:
        return TableSource.open(find_tables(paths), target, task)
    if x_file is None or y_file is None:
        raise SourceError("one of --x and --y is missing; give both .npy files")
    if paths:
        raise SourceError(f"{paths[0]} was given beside --x and --y; convert them separately")
    if target is not None:
        raise SourceError(f"--target {target} names a column, but y comes from {y_file}; leave it out")
    return ArraySource.open(x_file, y_file, task)


def find_tables(paths: Sequence[Path]) -> list[Path]:
    """Every table that is named, lies in a named directory or matches a pattern, sorted within each."""
    files = [file for path in paths for file in _expand(path)]
    if not files:
        raise SourceError("nothing to convert; name tables or directories of them, or give --x and --y")
    for file in files:
        if not file.name.lower().endswith(TABLE_SUFFIXES):
            remedy = "give .npy files as --x and --y" if file.suffix == ".npy" else "convert it first"
            raise SourceError(f"{file}: is none of {', '.join(TABLE_SUFFIXES)}; {remedy}")
        with reading(file), file.open("rb") as stream:
            if not stream.read(1):
                raise SourceError(f"{file}: is empty; leave it out or give a file with data")
    return files


def _expand(path: Path) -> Iterator[Path]:
    if path.is_dir():
        found = [file for file in path.iterdir() if file.name.lower().endswith(TABLE_SUFFIXES)]
        found = [file for file in found if not file.name.startswith(".") and file.is_file()]
        if not found:
            raise SourceError(f"{path}: holds no table ({', '.join(TABLE_SUFFIXES)}); name another directory")
    elif not path.exists() and glob.has_magic(str(path)):
        found = [Path(name) for name in glob.glob(str(path))]
        if not found:
            raise SourceError(f"{path}: matches no file; check the pattern")
    else:
        found = [path]
    return iter(sorted(found))


class SourceDigests:
    """xxh3_128 of each file's bytes, taken just behind the reader, while they are still in the page cache."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = tuple(files)
        self._sizes = [file.stat().st_size for file in self._files]
        self._hashes = [xxhash.xxh3_128() for _ in self._files]
        self._done = [0] * len(self._files)

    @property
    def bytes_total(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes)

    def bytes_before(self, index: int) -> int:
        """Bytes of the files that are read before file `index`."""
        return sum(self._sizes[:index])

    def advance(self, index: int, end_byte: int) -> None:
        """Digest file `index` up to `end_byte`."""
        file = self._files[index]
        with reading(file), file.open("rb", buffering=0) as stream:
            stream.seek(self._done[index])
            while self._done[index] < end_byte:
                block = stream.read(min(_DIGEST_BLOCK_BYTES, end_byte - self._done[index]))
                if not block:
                    raise SourceError(
                        f"{file}: became shorter while it was read; convert it when it is complete"
                    )
                self._hashes[index].update(block)
                self._done[index] += len(block)

    def finish(self) -> tuple[Mapping[str, object], ...]:
        """What the manifest says about each file: its base name, size and digest."""
        for index, size in enumerate(self._sizes):
            self.advance(index, size)
        return tuple(
            {"name": file.name, "bytes": size, "digest": digest.hexdigest()}
            for file, size, digest in zip(self._files, self._sizes, self._hashes, strict=True)
        )
