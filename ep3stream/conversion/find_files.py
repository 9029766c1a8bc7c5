"""Finds the files of a source: named ones, those below named directories, and those that match patterns.

Every file is read once, however many names lead to it, and what is passed over is told. Links are followed; a
directory that was entered before is not entered again, so that links in a circle end.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ep3stream.errors import SourceError
from ep3stream.formats.arrays import is_array_file
from ep3stream.formats.source import reading
from ep3stream.formats.svmlight import SVMLIGHT_SUFFIXES
from ep3stream.formats.tables import TABLE_SUFFIXES, lost_parts

FOUND_SUFFIXES = (*TABLE_SUFFIXES, *SVMLIGHT_SUFFIXES)
_LONGEST_FIRST = sorted(FOUND_SUFFIXES, key=len, reverse=True)

# A URL in which `Path` has made one slash of two.
_URL = re.compile(r"([a-z0-9]{2,}):/+")

# Files beside tables that hold no rows: marks of the writer, checksums, texts for people.
_NO_ROWS = re.compile(
    r"_SUCCESS|_metadata|_common_metadata|_started_.*|_committed_.*|\._.*|\.~lock\..*|~\$.*|\.DS_Store|\.git.*"
    r"|Thumbs\.db|desktop\.ini|(README|LICENSE|LICENCE|CHANGELOG)(\..*)?"
    r"|.*\.(crc|md5|sha1|sha256|md|rst|pdf|html|log|py|ipynb|ya?ml|toml)",
    re.IGNORECASE,
)

# Directories in which a table format keeps which of the Parquet files beside them are of the table.
_LOGS = {"_delta_log": "Delta", ".hoodie": "Hudi"}
_NOT_ENTERED = (".git", ".svn", ".hg", "__pycache__", "__MACOSX")

# How texts of rows are often called, which does not say how they are written.
_BARE_TEXTS = (".txt", ".data", ".dat", ".test", ".names", ".asc", ".tab", ".psv", "")

# Files that a message names.
_MAX_NAMED = 5
_LOGGER = logging.getLogger(__name__)

Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file of a source. below: the named directory that it lies in; None if it was named by itself."""

    path: Path
    below: Path | None = None


def find_files(paths: Sequence[Path]) -> list[FoundFile]:
    """Every file that is named, lies below a named directory or matches a pattern, sorted within each.

    A file that several names lead to is taken once. Raises SourceError for a name without files, for files of
    other kinds that were named, for what is no file or cannot be entered, and for `a.csv` beside `a.csv.gz` in a
    directory: they would be the same rows twice.
    """
    found = [file for path in paths for file in _expand(path)]
    if not found:
        raise SourceError("nothing to convert; name tables or directories of them, or give --x and --y")
    for file in found:
        _require_file(file.path)
    once = _each_once(found)
    named = {path for path in paths if path.is_file()}
    _refuse_same_names(once, named)
    return once


def _expand(path: Path) -> list[FoundFile]:
    if path.is_dir():
        return _below(path)
    if path.exists() or path.is_symlink():
        return [FoundFile(path)]
    if not glob.has_magic(str(path)):
        raise SourceError(_missing(path))
    matches = [Path(name) for name in _matches(str(path))]
    files = {match: FoundFile(match) for match in matches if not _is_mark(match) and not match.is_dir()}
    for directory in (match for match in matches if match.is_dir()):
        files = {file.path: file for file in _below(directory, may_be_empty=True)} | files
    if not files:
        raise SourceError(f"{path}: matches no file; check the pattern")
    return sorted(files.values(), key=lambda file: file.path)


def _matches(pattern: str) -> list[str]:
    """What matches; `**` enters each directory once, for by way of links in a circle there is no end of names."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return glob.glob(pattern)
    place = parts.index("**")
    head, tail = os.sep.join(parts[:place]), os.sep.join(parts[place + 1 :])
    head = head or (os.sep if pattern.startswith(os.sep) else "")
    entered: set[Identity] = set()
    directories = [
        name for root in (_matches(head) if head else [""]) for name in _directories(Path(root), entered)
    ]
    if tail:
        return [
            found for name in directories for found in _matches(os.path.join(glob.escape(str(name)), tail))
        ]
    files = (found for name in directories for found in glob.glob(os.path.join(glob.escape(str(name)), "*")))
    return [found for found in files if not os.path.isdir(found)]


def _directories(root: Path, entered: set[Identity]) -> Iterator[Path]:
    """A directory and those below it, links to directories last, without hidden ones and those entered before."""
    waiting = [root] if root.is_dir() else []
    while waiting:
        directory = waiting.pop(0)
        if (identity := _identity(directory)) in entered:
            continue
        entered.add(identity)
        yield directory
        with reading(directory):
            children = sorted(
                child for child in directory.iterdir() if child.is_dir() and child.name[0] != "."
            )
        links = [child for child in children if child.is_symlink()]
        waiting = [*(child for child in children if child not in links), *waiting, *links]


def _missing(path: Path) -> str:
    if url := _URL.match(str(path)):
        address = f"{url[1]}://{str(path)[url.end() :]}"
        return f"{address}: sources are files on a disk, not URLs; fetch it first, then convert it"
    return f"{path}: there is no such file; check the name"


def _is_mark(path: Path) -> bool:
    return _NO_ROWS.fullmatch(path.name) is not None and not path.name.lower().endswith(FOUND_SUFFIXES)


def _require_file(file: Path) -> None:
    """Raises SourceError unless this is a file with the suffix of a table."""
    if file.is_symlink() and not file.exists():
        raise SourceError(
            f"{file}: is a link to nothing ({os.readlink(file)}); restore that, or remove the link"
        )
    with reading(file):
        mode = file.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise SourceError(
            f"{file}: is {kind}, and rows are read twice; write them to a file and convert that"
        )
    if not file.name.lower().endswith(FOUND_SUFFIXES):
        remedy = "give arrays as --x and --y" if is_array_file(file) else "convert it first"
        if file.suffix.lower() in _BARE_TEXTS:
            remedy = "call it .csv or .tsv if it is a text of rows below a header of names"
        raise SourceError(f"{file}: is none of {', '.join(FOUND_SUFFIXES)}; {remedy}")


def _each_once(found: Sequence[FoundFile]) -> list[FoundFile]:
    """The files without those that were found before under another name, which are told."""
    first: dict[Identity, FoundFile] = {}
    again: list[str] = []
    # A link stands back behind the file that it leads to, wherever the two lie.
    for file in sorted(found, key=lambda file: file.path.is_symlink()):
        known = first.setdefault(_identity(file.path), file)
        if known is not file:
            same = "named twice" if known.path == file.path else f"the same file as {known.path}"
            again.append(f"{file.path} ({same})")
    if again:
        _LOGGER.warning("read once, though named or linked more than once: %s", _named(again))
    kept = set(map(id, first.values()))
    return [file for file in found if id(file) in kept]


def _refuse_same_names(found: Sequence[FoundFile], named: set[Path]) -> None:
    """Raises SourceError for files of one directory that differ in their suffix alone, unless all were named."""
    alike: dict[Path, list[Path]] = defaultdict(list)
    for file in found:
        name = file.path.name
        suffix = next(suffix for suffix in _LONGEST_FIRST if name.lower().endswith(suffix))
        stem = name[: -len(suffix)]
        if suffix == ".zip":  # a.zip and a.csv.zip both hold a.csv.
            stem = stem.removesuffix(Path(stem).suffix) if stem.lower().endswith((".csv", ".tsv")) else stem
        alike[file.path.with_name(stem or name)].append(file.path)
    for files in alike.values():
        if len(files) > 1 and not named.issuperset(files):
            raise SourceError(
                f"{files[0]}: lies beside {files[1].name}, probably the same rows in another form; "
                "remove one, or name the files one by one to take both"
            )


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{', '.join(names[:_MAX_NAMED])}{more}"


def _identity(path: Path) -> Identity:
    """What is the same for all names of one file or directory."""
    with reading(path):
        status = path.stat()
    return status.st_dev, status.st_ino


# -- Below a named directory


@dataclass(slots=True)
class _Walk:
    """What was found below a directory: files to read, and names of files that are passed over."""

    files: list[Path] = field(default_factory=list)
    passed: list[Path] = field(default_factory=list)
    again: list[Path] = field(default_factory=list)
    entered: set[Identity] = field(default_factory=set)


def _below(directory: Path, may_be_empty: bool = False) -> list[FoundFile]:
    """Tables in and below a directory, without names that begin with . or _; what is passed over is told."""
    walk = _Walk()
    links = list(_entered(walk, directory))
    while links:
        links += _entered(walk, links.pop(0))
    if walk.again:
        told = _named(sorted(map(str, walk.again)))
        _LOGGER.warning("links to directories that are read already are passed over: %s", told)
    if walk.passed:
        told = _named(sorted(str(file.relative_to(directory)) for file in walk.passed))
        _LOGGER.warning("%s: %d file(s) are passed over: %s", directory, len(walk.passed), told)
    if not walk.files and not may_be_empty:
        raise SourceError(
            f"{directory}: holds no table ({', '.join(FOUND_SUFFIXES)}); name another directory"
        )
    return [FoundFile(file, directory) for file in sorted(walk.files)]


def _entered(walk: _Walk, directory: Path) -> Iterator[Path]:
    """Add what lies in and below a directory; returns the links to other directories, which are entered later."""
    identity = _identity(directory)
    if identity in walk.entered:
        walk.again.append(directory)
        return
    walk.entered.add(identity)
    with reading(directory):
        children = sorted(directory.iterdir())
    _refuse_logs(directory, children)
    _refuse_lost_parts(directory, children)
    for child in children:
        is_hidden = child.name.startswith((".", "_", "~$"))
        if child.is_dir():
            if is_hidden or child.name in _NOT_ENTERED:
                walk.passed += _hidden_tables(child)
            elif child.suffix.lower() == ".zarr" or (child / "zarr.json").exists():
                walk.passed.append(child)
            elif child.is_symlink():
                yield child
            else:
                yield from _entered(walk, child)
        elif child.name.lower().endswith(FOUND_SUFFIXES) and not is_hidden:
            walk.files.append(child)
        elif not _is_mark(child) and not child.name.startswith(("._", "~$")):
            walk.passed.append(child)


def _hidden_tables(directory: Path) -> list[Path]:
    if directory.name in _NOT_ENTERED:
        return []
    below = (Path(parent, name) for parent, _, names in os.walk(directory) for name in names)
    return [file for file in below if file.name.lower().endswith(FOUND_SUFFIXES) and not _is_mark(file)]


def _refuse_logs(directory: Path, children: Sequence[Path]) -> None:
    """Raises SourceError for a table whose log tells which of its files count: others hold rows that were deleted."""
    kind = next((_LOGS[child.name] for child in children if child.name in _LOGS), None)
    if kind is None and directory / "data" in children and any(directory.glob("metadata/*.metadata.json")):
        kind = "Iceberg"
    if kind is not None:
        raise SourceError(
            f"{directory}: is a {kind} table, whose files may hold rows that were deleted from it; read it by its "
            "own library and convert the arrow table, or name the files one by one"
        )


def _refuse_lost_parts(directory: Path, children: Sequence[Path]) -> None:
    """Raises SourceError if a directory of Parquet files says that there are more of them."""
    if directory / "_metadata" in children and (lost := lost_parts(directory / "_metadata")):
        raise SourceError(
            f"{directory}: its _metadata names {len(lost)} file(s) that are not there ({_named(lost)}); bring "
            "them back, or remove _metadata if those rows are to go"
        )
