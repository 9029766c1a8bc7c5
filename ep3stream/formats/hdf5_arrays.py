"""Datasets of HDF5 files, read only if every byte of them lies somewhere.

HDF5 gives the fill value, usually 0, for whatever it does not find: lost sources of a virtual dataset, data that
were never written, the missing end of an external file. All of these are looked for before the first row is read.
Values that were never written are missing values where the fill value is NaN, and told by their number; where it
is anything else, nobody can tell them from data, and the dataset is refused.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ep3stream.errors import SourceError
from ep3stream.formats.file_holes import tell_holes
from ep3stream.formats.hdf5_virtual import (
    Box,
    Mapping,
    candidates,
    lost_block,
    mappings_of,
    n_uncovered,
    prefixes,
)
from ep3stream.formats.packed_values import PackedValues
from ep3stream.formats.row_array import RowArray, chunked_array
from ep3stream.formats.source import reading

_logger = logging.getLogger(__name__)

_SHUFFLE, _FLETCHER32 = h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32
_MAX_DEPTH = 16


def open_hdf5(file: Path, member: str, default: str) -> RowArray:
    """The dataset `member` of the file, or `default` in the group `member`, through links into other files too.

    Raises SourceError if there is none, if it has no shape, if its type is none of NumPy's, or if some of its
    values lie nowhere.
    """
    with opened_hdf5(file) as root:
        found = _found(file, root, member, default)
        own_file, name = Path(found.file.filename), f"{file}:{found.name}"
        if own_file != file:
            name = f"{own_file}:{found.name}"
        if found.shape is None:
            raise SourceError(f"{name}: is h5py.Empty, an array without values; write the rows")
        with reading(name):
            dtype = _number_type(name, found)
            packed = PackedValues.of(found.attrs, dtype)
            check = _StorageCheck(name, {own_file: None, file: None}, packed)
            check.require_stored(found, tuple((0, size) for size in found.shape))
        check.tell()
        shape, chunk_rows = found.shape, found.chunks[0] if found.chunks else 1

    @contextmanager
    def opened() -> Iterator[Any]:
        with opened_hdf5(file) as root:
            yield _found(file, root, member, default)

    array = chunked_array(name, tuple(check.files), shape, dtype, chunk_rows, opened)
    return array if packed is None else packed.unpacked(array)


@contextmanager
def opened_hdf5(file: Path) -> Iterator[h5py.File]:
    """The file, open to be read; raises SourceError if another process writes it."""
    try:
        opened = h5py.File(file, "r")
    except BlockingIOError:
        raise SourceError(
            f"{file}: is open for writing in another process; convert it when it is complete"
        ) from None
    except OSError as error:
        if "h5clear" not in str(error) and "already open for" not in str(error):
            raise
        raise SourceError(
            f"{file}: is open for writing, or was left so by a process that ended early; convert it when it is "
            "complete, or clear its mark with `h5clear -s`"
        ) from None
    with opened:
        yield opened


def _found(file: Path, root: h5py.File, member: str, default: str) -> h5py.Dataset:
    """The dataset; raises SourceError, which names what is there instead."""
    path = member.strip("/")
    found = _get(file, root, path) if path else root
    if isinstance(found, h5py.Group):
        names, path = list(found)[:10], f"{path}/{default}".strip("/")
        found = _get(file, root, path)
    else:
        names = list(root)[:10]
    if isinstance(found, h5py.Dataset):
        return found
    if found is None:
        held = f"name one of {', '.join(names)}" if names else "it is empty"
        raise SourceError(f"{file}: has no array {('/' + path) if member.strip('/') else default!r}; {held}")
    kind = "a group" if isinstance(found, h5py.Group) else "a named type"
    raise SourceError(f"{file}: {path!r} is {kind}, not an array; name an array by {file}:/NAME")


def _get(file: Path, root: h5py.File, path: str) -> Any:
    """What lies at the path, None if nothing does; raises SourceError for a link that leads nowhere."""
    try:
        found = root.get(path)
    except (KeyError, OSError, RuntimeError, TypeError):
        found = None
    if found is None:
        steps = path.split("/")
        for end in range(1, len(steps) + 1):
            step = "/".join(steps[:end])
            try:
                link = root.get(step, getlink=True)
            except (KeyError, OSError, RuntimeError):
                return None
            if link is None or _is_there(root, step):
                continue
            if isinstance(link, h5py.ExternalLink):
                raise SourceError(
                    f"{file}: {step!r} is a link to {link.path!r} in {link.filename}, which cannot be opened; "
                    "bring that file back, or correct the link"
                )
            if isinstance(link, h5py.SoftLink):
                raise SourceError(
                    f"{file}: {step!r} is a link to {link.path!r}, which is not there; correct the link"
                )
    return found


def _is_there(root: h5py.File, path: str) -> bool:
    try:
        return root.get(path) is not None
    except (KeyError, OSError, RuntimeError):
        return False


def _number_type(name: str, found: h5py.Dataset) -> np.dtype[Any]:
    """The dataset's type; raises SourceError for values that are no numbers. An enumeration is told."""
    dtype: np.dtype[Any] = found.dtype
    what = None
    if h5py.check_string_dtype(dtype) is not None:
        what = "texts"
    elif h5py.check_vlen_dtype(dtype) is not None:
        what = "rows of different lengths"
    elif h5py.check_ref_dtype(dtype) is not None:
        what = "references"
    elif dtype.fields is not None:
        what = f"records of {', '.join(list(dtype.fields)[:5])}"
    elif dtype.kind not in "biuf":
        what = str(dtype)
    if what is not None:
        raise SourceError(f"{name}: holds {what}, not numbers; save it as numbers")
    if dtype.kind in "biu" and (values := h5py.check_enum_dtype(dtype)):
        names = ", ".join(
            f"{key}={value}" for key, value in sorted(values.items(), key=lambda item: item[1])[:3]
        )
        _logger.warning(
            "%s: holds an enumeration (%s ...); its numbers are taken, not their names", name, names
        )
        dtype = np.dtype(dtype.str)
    return dtype


@dataclass(slots=True)
class _StorageCheck:
    """Whether every value of a dataset, called `name` in messages, is stored; `files` gains each file it lies in.

    packed: which stored numbers stand for nothing.
    """

    name: str
    files: dict[Path, None]
    packed: PackedValues | None = None
    told: set[str] = field(default_factory=set)
    n_gaps: int = 0
    gaps: list[str] = field(default_factory=list)

    def require_stored(self, found: h5py.Dataset, box: Box, depth: int = 0) -> None:
        """Raises SourceError if a value in the box (start, stop) of each axis lies nowhere."""
        if any(start >= stop for start, stop in box):
            return
        if depth > _MAX_DEPTH:
            raise self._error("is a virtual dataset of itself", "correct its mapping")
        layout = found.id.get_create_plist().get_layout()
        self._require_filters(found)
        if layout == h5py.h5d.VIRTUAL:
            self._require_sources(found, depth)
        elif found.external:
            self._require_external(found)
        elif layout == h5py.h5d.CHUNKED:
            self._require_chunks(found, box)
        elif layout == h5py.h5d.CONTIGUOUS:
            self._require_written(found, box)

    def tell(self) -> None:
        """Warns of values that are gaps because they were never written."""
        if self.n_gaps:
            _logger.warning(
                "%s: %d values were never written and are missing values, as the fill value says (%s); "
                "write them if they were lost",
                self.name,
                self.n_gaps,
                "; ".join(self.gaps),
            )

    def _error(self, what: str, remedy: str) -> SourceError:
        return SourceError(f"{self.name}: {what}; {remedy}")

    def _place(self, found: h5py.Dataset) -> str:
        place = f"{found.file.filename}:{found.name}"
        return "it" if place == self.name else place

    def _absent(self, found: h5py.Dataset, n_values: int, what: str, remedy: str) -> None:
        """Counts values without a place as gaps if they read as such, else raises SourceError."""
        is_nan = found.dtype.kind == "f" and np.isnan(found.fillvalue)
        if not is_nan and not (self.packed is not None and self.packed.is_gap(found.fillvalue)):
            raise self._error(f"{what} and would be read as {found.fillvalue}", remedy)
        self.n_gaps += n_values
        self.gaps = [*self.gaps, what][:3]

    def _require_filters(self, found: h5py.Dataset) -> None:
        plist = found.id.get_create_plist()
        for index in range(plist.get_nfilters()):
            code, _, _, name = plist.get_filter(index)
            if not h5py.h5z.filter_avail(code):
                raise self._error(
                    f"{self._place(found)} is packed by the filter {code} ({name.decode(errors='replace')}), which "
                    "this HDF5 does not have",
                    "install its plugin (hdf5plugin has most) and set HDF5_PLUGIN_PATH, or write the data with gzip",
                )

    def _require_external(self, found: h5py.Dataset) -> None:
        """The bytes of the dataset lie in other files, one after the other; HDF5 takes zeros behind their ends."""
        left = math.prod(found.shape) * found.id.get_type().get_size()
        folders = prefixes("HDF5_EXTFILE_PREFIX", Path(found.file.filename)) or [Path()]
        for name, offset, size in found.external:
            taken = min(left, size)
            if not taken:
                break
            file = folders[0] / os.fsdecode(name)
            if not file.is_file():
                raise self._error(
                    f"{self._place(found)} lies in {file}, which is not there",
                    "bring it back, or convert where it lies",
                )
            if file.stat().st_size < offset + taken:
                raise self._error(
                    f"{self._place(found)} takes {taken} bytes from byte {offset} on of {file}, which has "
                    f"{file.stat().st_size}",
                    "restore it",
                )
            self.files[file] = None
            tell_holes(str(file), file, offset, offset + taken)
            left -= taken

    def _require_written(self, found: h5py.Dataset, box: Box) -> None:
        """A dataset that lies in one piece has room in the file from the first value on that is written."""
        offset = found.id.get_offset()
        if offset is None:
            raise self._error(f"{self._place(found)} was never written", "write all rows")
        row_bytes = found.id.get_storage_size() // max(1, found.shape[0]) if found.shape else 0
        first, end = (offset + row * row_bytes for row in box[0]) if box else (offset, offset)
        tell_holes(f"{found.file.filename}:{found.name}", Path(found.file.filename), first, end)

    def _require_chunks(self, found: h5py.Dataset, box: Box) -> None:
        """Raises SourceError for chunks outside the grid or without a checksum they should have, or missing ones.

        Rows lie in no chunk if they were never written, or if the index of chunks was damaged.
        """
        chunks, shape = found.chunks, found.shape
        grid = tuple(-(-size // step) for size, step in zip(shape, chunks, strict=True))
        strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
        is_stored = np.zeros(math.prod(grid), np.bool_)
        pipeline = _Pipeline.of(found)
        wrong: list[str] = []

        def add(chunk: Any) -> None:
            at, place = chunk.chunk_offset, 0
            for begin, step, size, stride in zip(at, chunks, shape, strides, strict=True):
                if begin % step or begin >= size:
                    place = -1
                    break
                place += begin // step * stride
            if place < 0:
                wrong.append(f"has a chunk at {tuple(at)}, where none can be")
                return
            if chunk.filter_mask and (fault := pipeline.fault(chunk.filter_mask, chunk.size)):
                wrong.append(f"has a chunk at {tuple(at)} {fault}")
            is_stored[place] = True

        found.id.chunk_iter(add)
        if wrong:
            raise self._error(f"{self._place(found)} {wrong[0]}", "it is damaged: restore it")
        wanted = tuple(
            slice(start // size, -(-stop // size)) for (start, stop), size in zip(box, chunks, strict=True)
        )
        asked = is_stored.reshape(grid)[wanted]
        n_missing = asked.size - int(np.count_nonzero(asked))
        if not n_missing:
            return
        first = np.unravel_index(int(np.argmin(asked)), asked.shape)[0] + wanted[0].start
        row = int(first * chunks[0])
        what = (
            f"{self._place(found)} lacks {n_missing} of its {asked.size} chunks, the first at row {row + 1}, which "
            "were never written or are damaged"
        )
        if n_missing == asked.size:
            raise self._error(what, "write all rows")
        self._absent(found, n_missing * math.prod(chunks), what, "write all rows")

    def _require_sources(self, found: h5py.Dataset, depth: int) -> None:
        """Raises SourceError for a lost or short source of a virtual dataset, or a part that has no source."""
        mappings = mappings_of(found)
        for mapping in mappings:
            for part in mapping.parts(found.shape):
                self._require_source(found, mapping, part, depth)
            if mapping.is_numbered and (lost := lost_block(found, mapping, _names_beside(found, mapping))):
                raise self._error(
                    f"{self._place(found)} ends before its source {lost[0]!r}, which is not there though "
                    f"{lost[1]!r} is",
                    "bring it back",
                )
        n_values, row = n_uncovered(found.shape, mappings)
        if n_values:
            total = math.prod(found.shape)
            what = (
                f"{self._place(found)} is a virtual dataset with no source for {n_values} of its {total} values, "
                f"the first in row {row + 1}"
            )
            if n_values == total:
                raise self._error(what, "map every row")
            self._absent(found, n_values, what, "map every row")

    def _require_source(self, found: h5py.Dataset, mapping: Mapping, part: Any, depth: int) -> None:
        where = f"{self._place(found)} is a virtual dataset whose rows {part.rows[0] + 1} to {part.rows[1]} lie in "
        source_name = f"{part.dataset!r} of {part.file}" if part.file != "." else f"{part.dataset!r}"
        lost = self._error(
            f"{where}{source_name}, which is not there", "bring it back, or correct the mapping"
        )
        with _opened_source(found.file, part.file) as opened:
            if opened is None:
                raise lost
            try:
                source = opened.get(part.dataset)
            except (KeyError, OSError, RuntimeError):
                source = None
            if not isinstance(source, h5py.Dataset) or source.shape is None:
                raise lost
            box, shortfall = mapping.source_box(part, found.shape, source.shape)
            if shortfall:
                raise self._error(
                    f"{where}{source_name}, which has the shape {source.shape}: {shortfall}",
                    "restore it, or correct the mapping",
                )
            self.files[Path(source.file.filename)] = None
            self._tell_packed(found, source)
            self.require_stored(source, box, depth + 1)

    def _tell_packed(self, found: h5py.Dataset, source: h5py.Dataset) -> None:
        """Warns, once, of a source whose attributes say more of its numbers than those of the virtual dataset."""
        packed = PackedValues.of(source.attrs, _stored_type(source))
        if packed is None or packed.said in self.told or PackedValues.of(found.attrs, _stored_type(found)):
            return
        self.told.add(packed.said)
        _logger.warning(
            "%s: its source %s:%s has attributes that the virtual dataset lacks (%s), so its numbers are read as they "
            "are stored; copy the attributes if they are meant",
            self.name,
            source.file.filename,
            source.name,
            packed.said,
        )


def _stored_type(found: h5py.Dataset) -> np.dtype[Any]:
    """The type without what h5py notes beside it."""
    dtype: np.dtype[Any] = found.dtype
    return np.dtype(dtype.str) if dtype.kind in "biuf" else dtype


def _names_beside(found: h5py.Dataset, mapping: Mapping) -> list[str]:
    """The names of the files or datasets among which a numbered mapping finds its sources."""
    if mapping.is_numbered_file:
        folders = {each.parent for each in candidates(mapping.file, Path(found.file.filename))}
        return [name for folder in folders if folder.is_dir() for name in os.listdir(folder)]
    with _opened_source(found.file, mapping.file) as opened:
        group = None if opened is None else opened.get(mapping.dataset.rpartition("/")[0] or "/")
        return list(group) if isinstance(group, h5py.Group) else []


@contextmanager
def _opened_source(root: h5py.File, name: str) -> Iterator[h5py.File | None]:
    """The file of a source where HDF5 looks for it; None if it is nowhere."""
    if name == ".":
        yield root
        return
    for candidate in candidates(name, Path(root.filename)):
        if candidate.is_file():
            with reading(candidate), opened_hdf5(candidate) as opened:
                yield opened
            return
    yield None


@dataclass(frozen=True, slots=True)
class _Pipeline:
    """The filters of a dataset, by which a chunk that left some out is judged."""

    codes: tuple[int, ...]
    optional: tuple[bool, ...]
    chunk_bytes: int

    @classmethod
    def of(cls, found: h5py.Dataset) -> _Pipeline:
        plist = found.id.get_create_plist()
        filters = [plist.get_filter(index) for index in range(plist.get_nfilters())]
        chunk_bytes = math.prod(found.chunks) * found.id.get_type().get_size()
        return cls(
            tuple(each[0] for each in filters),
            tuple(bool(each[1] & h5py.h5z.FLAG_OPTIONAL) for each in filters),
            chunk_bytes,
        )

    def fault(self, mask: int, n_bytes: int) -> str | None:
        """What is wrong with a chunk of `n_bytes` that was stored without the filters of the mask; None if nothing.

        A filter that may be left out is, where it does not make the chunk smaller. What is then left has the size
        of the chunk: a mask with other bytes, or without the checksum, is no writer's doing.
        """
        left_out = [bool(mask >> index & 1) for index in range(len(self.codes))]
        if mask >> len(self.codes):
            return "without filters that it does not have"
        for code, is_optional, is_out in zip(self.codes, self.optional, left_out, strict=True):
            if is_out and (code == _FLETCHER32 or not is_optional):
                return "without its checksum" if code == _FLETCHER32 else f"without the filter {code}"
        kept = [code for code, is_out in zip(self.codes, left_out, strict=True) if not is_out]
        plain_bytes = self.chunk_bytes + 4 * kept.count(_FLETCHER32)
        if set(kept) <= {_SHUFFLE, _FLETCHER32} and n_bytes != plain_bytes:
            return f"of {n_bytes} bytes where {plain_bytes} are due"
        if _SHUFFLE in self.codes and _SHUFFLE not in kept and set(kept) - {_FLETCHER32}:
            return "that was not shuffled"
        return None
