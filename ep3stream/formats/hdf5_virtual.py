"""The mappings of HDF5's virtual datasets: which values come from where, and which from nowhere.

A mapping takes a selection of the source's values to a selection of the virtual dataset's, in order. Selections
may be unlimited along one axis; a `%b` in the name of the file or dataset is the number of a block along it.
Names of files are looked for where HDF5 looks for them (H5F_prefix_open_file of its source).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5s
from numpy.typing import NDArray

# Start and stop along each axis.
Box = tuple[tuple[int, int], ...]

# Pieces of all selections together that are compared one by one; of more, only the number of values is.
_MAX_PIECES = 200_000
_MAX_CELLS = 50_000_000

# HDF5 reads its variables when it is loaded, and so not at another time.
_PREFIXES = {name: os.environ.get(name, "") for name in ("HDF5_VDS_PREFIX", "HDF5_EXTFILE_PREFIX")}

_BLOCK = re.compile(r"%(%|b)")


@dataclass(frozen=True, slots=True)
class Axis:
    """`count` blocks of `block` indices along an axis, `stride` apart, from `start` on; None is without end."""

    start: int
    stride: int
    count: int | None
    block: int | None

    @property
    def is_unlimited(self) -> bool:
        """Whether the selection grows with the dataset."""
        return self.count is None or self.block is None

    def blocks(self, size: int) -> int:
        """How many blocks begin before `size`."""
        if self.count is not None:
            return self.count
        return max(0, -(-(size - self.start) // self.stride))

    def length(self, size: int) -> int:
        """How many indices below `size` are selected, if the selection is unlimited; else how many there are."""
        if not self.is_unlimited:
            return self.count * self.block  # type: ignore[operator]
        if self.block is None:
            return max(0, size - self.start)
        n_blocks = self.blocks(size)
        last = self.start + (n_blocks - 1) * self.stride
        return (n_blocks - 1) * self.block + min(self.block, size - last) if n_blocks else 0

    def intervals(self, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Starts and stops of the blocks within `size`; blocks that touch are one."""
        if self.block is None or (self.block == self.stride and self.count != 1):
            stop = size if self.is_unlimited else self.start + self.count * self.stride  # type: ignore[operator]
            return np.array([min(self.start, size)]), np.array([min(stop, size)])
        starts = self.start + self.stride * np.arange(self.blocks(size), dtype=np.int64)
        return np.minimum(starts, size), np.minimum(starts + self.block, size)

    def bounds(self, length: int) -> tuple[int, int]:
        """The first selected index, and the end of the first `length` of them."""
        if self.block is None or self.block == self.stride:
            return self.start, self.start + length
        n_blocks, rest = divmod(length, self.block)
        if not rest:
            n_blocks, rest = n_blocks - 1, self.block
        return self.start, self.start + n_blocks * self.stride + rest


@dataclass(frozen=True, slots=True)
class Part:
    """What one source gives: its file and dataset, the rows of the virtual dataset, the number of the block."""

    file: str
    dataset: str
    rows: tuple[int, int]
    block: int | None = None


@dataclass(frozen=True, slots=True)
class Mapping:
    """One mapping. target, source: the selections as products of axes; several only of irregular ones.

    is_all: whether the whole source is taken, whatever its shape.
    """

    file: str
    dataset: str
    target: tuple[tuple[Axis, ...], ...]
    source: tuple[tuple[Axis, ...], ...]
    is_all: bool

    @property
    def is_numbered(self) -> bool:
        """Whether the source's name has the number of a block in it."""
        is_unlimited = any(axis.is_unlimited for axis in self.target[0])
        return is_unlimited and (self.is_numbered_file or "%b" in _BLOCK.sub(_keep, self.dataset))

    @property
    def is_numbered_file(self) -> bool:
        """Whether the number is in the name of the file, not of the dataset."""
        return "%b" in _BLOCK.sub(_keep, self.file)

    def named(self, block: int) -> tuple[str, str]:
        """File and dataset of a block."""
        file, dataset = (
            _BLOCK.sub(lambda found: "%" if found[1] == "%" else str(block), name)
            for name in (self.file, self.dataset)
        )
        return file, dataset

    def parts(self, shape: tuple[int, ...]) -> Iterator[Part]:
        """Every source of the mapping, for a virtual dataset of this shape."""
        axis = self.target[0][0]
        if not self.is_numbered:
            boxes = [product[0].intervals(shape[0]) for product in self.target]
            rows = (
                min(int(starts.min()) for starts, _ in boxes),
                max(int(stops.max()) for _, stops in boxes),
            )
            yield Part(self.file, self.dataset, rows)
            return
        unlimited = next(j for j, each in enumerate(self.target[0]) if each.is_unlimited)
        for block in range(self.target[0][unlimited].blocks(shape[unlimited])):
            file, dataset = self.named(block)
            first = axis.start + block * axis.stride if unlimited == 0 else axis.start
            length = axis.block if axis.block is not None and unlimited == 0 else shape[0] - first
            yield Part(file, dataset, (first, min(first + length, shape[0])), block)

    def source_box(
        self, part: Part, shape: tuple[int, ...], found: tuple[int, ...]
    ) -> tuple[Box, str | None]:
        """The box of the source, of shape `found`, from which values come; and what it is too short for, if it is."""
        if self.is_all:
            # The file does not say which shape the whole source had, but how many values are taken from it.
            due = sum(self._n_values(target, part.block, shape) for target in self.target)
            is_right = math.prod(found) == due
            return tuple((0, size) for size in found), None if is_right else f"{due} values are mapped"
        if len(found) != len(self.source[0]):
            return (), f"{len(self.source[0])} axes are mapped"
        if len(self.source) > 1 or not any(axis.is_unlimited for axis in self.source[0]):
            ends = [[axis.bounds(axis.length(0))[1] for axis in product] for product in self.source]
            firsts = [[axis.start for axis in product] for product in self.source]
            box = tuple(
                (min(start), max(stop))
                for start, stop in zip(zip(*firsts, strict=True), zip(*ends, strict=True), strict=True)
            )
            short = [stop for (_, stop), size in zip(box, found, strict=True) if stop > size]
            return box, f"{tuple(stop for _, stop in box)} is mapped" if short else None
        target = next(j for j, axis in enumerate(self.target[0]) if axis.is_unlimited)
        source = next(j for j, axis in enumerate(self.source[0]) if axis.is_unlimited)
        due = self.target[0][target].length(shape[target])
        box = tuple(
            axis.bounds(due if j == source else axis.length(0)) for j, axis in enumerate(self.source[0])
        )
        is_short = self.source[0][source].length(found[source]) < due or any(
            stop > size for j, ((_, stop), size) in enumerate(zip(box, found, strict=True)) if j != source
        )
        return box, f"{tuple(stop for _, stop in box)} is mapped" if is_short else None

    @staticmethod
    def _n_values(target: tuple[Axis, ...], block: int | None, shape: tuple[int, ...]) -> int:
        """How many values of the virtual dataset a selection has: of all its blocks, or of one."""
        lengths = [
            axis.block if block is not None and axis.count is None else axis.length(size)
            for axis, size in zip(target, shape, strict=True)
        ]
        return math.prod(length or 0 for length in lengths)


def _keep(found: re.Match[str]) -> str:
    return "" if found[1] == "%" else "%b"


def mappings_of(found: h5py.Dataset) -> list[Mapping]:
    """Every mapping of a virtual dataset."""
    plist = found.id.get_create_plist()
    return [
        Mapping(
            plist.get_virtual_filename(index),
            plist.get_virtual_dsetname(index),
            _products(plist.get_virtual_vspace(index), found.shape),
            _products(plist.get_virtual_srcspace(index), ()),
            plist.get_virtual_srcspace(index).get_select_type() == h5s.SEL_ALL,
        )
        for index in range(plist.get_virtual_count())
    ]


def _products(space: Any, shape: tuple[int, ...]) -> tuple[tuple[Axis, ...], ...]:
    """A selection as products of axes: one for a regular one, one for each block or point of another."""
    kind = space.get_select_type()
    if kind == h5s.SEL_ALL:
        return (tuple(Axis(0, max(1, size), 1, size) for size in shape),)
    if kind == h5s.SEL_HYPERSLABS and space.is_regular_hyperslab():
        return (
            tuple(
                Axis(a, s, _limited(c), _limited(b))
                for a, s, c, b in zip(*space.get_regular_hyperslab(), strict=True)
            ),
        )
    if kind == h5s.SEL_HYPERSLABS:
        return tuple(
            tuple(Axis(int(a), int(b - a + 1), 1, int(b - a + 1)) for a, b in zip(*block, strict=True))
            for block in space.get_select_hyper_blocklist()
        )
    if kind == h5s.SEL_POINTS:
        return tuple(
            tuple(Axis(int(a), 1, 1, 1) for a in point) for point in space.get_select_elem_pointlist()
        )
    return ((Axis(0, 1, 0, 1),) * len(shape),)


def _limited(number: int) -> int | None:
    return None if number == h5s.UNLIMITED else int(number)


def n_uncovered(shape: tuple[int, ...], mappings: Sequence[Mapping]) -> tuple[int, int]:
    """How many values of a virtual dataset no mapping gives, and the row of the first.

    Compares all selections on a grid of their own edges: O(pieces) memory, whatever the number of rows. Of very
    many pieces only the number of values is compared, as if they did not overlap.
    """
    products = [product for mapping in mappings for product in mapping.target]
    n_pieces = sum(max(axis.blocks(size) for axis, size in zip(p, shape, strict=True)) for p in products)
    if n_pieces > _MAX_PIECES:
        n_given = sum(
            math.prod(axis.length(size) for axis, size in zip(p, shape, strict=True)) for p in products
        )
        return max(0, math.prod(shape) - n_given), 0
    pieces = [[axis.intervals(size) for axis, size in zip(p, shape, strict=True)] for p in products]
    edges = [
        np.unique(
            np.concatenate([[0, size], *(edge for piece in pieces for edge in piece[j])]).astype(np.int64)
        )
        for j, size in enumerate(shape)
    ]
    if math.prod(len(each) - 1 for each in edges) > _MAX_CELLS:
        raise ValueError("a virtual dataset of too many pieces to compare")
    is_covered = np.zeros([len(each) - 1 for each in edges], np.bool_)
    for piece in pieces:
        cells = [_cells(each, *interval) for each, interval in zip(edges, piece, strict=True)]
        if all(isinstance(each, slice) for each in cells):
            is_covered[tuple(cells)] = True
        else:
            lists = [np.arange(len(e) - 1)[c] for e, c in zip(edges, cells, strict=True)]
            is_covered[np.ix_(*lists)] = True
    if is_covered.all():
        return 0, 0
    sizes = np.ones((), np.int64)
    for each in edges:
        sizes = np.multiply.outer(sizes, np.diff(each))
    first = np.unravel_index(int(np.argmin(is_covered)), is_covered.shape)[0]
    return int(sizes[~is_covered].sum()), int(edges[0][first])


def _cells(
    edges: NDArray[np.int64], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> slice | NDArray[np.int64]:
    """Which cells between the edges the intervals cover."""
    first, last = np.searchsorted(edges, starts), np.searchsorted(edges, stops)
    if len(first) == 1:
        return slice(int(first[0]), int(last[0]))
    return np.concatenate(
        [np.arange(a, b) for a, b in zip(first, last, strict=True)] or [np.empty(0, np.int64)]
    )


def lost_block(found: h5py.Dataset, mapping: Mapping, folder: Sequence[str]) -> tuple[str, str] | None:
    """The source whose loss ends a numbered mapping, and a later one that is there; None if there is no later one.

    HDF5 makes the dataset shorter than it was when a source in the middle is lost. `folder`: the names of the
    files, or of the datasets, beside the sources.
    """
    unlimited = next(j for j, axis in enumerate(mapping.target[0]) if axis.is_unlimited)
    n_blocks = mapping.target[0][unlimited].blocks(found.shape[unlimited])
    which = 0 if mapping.is_numbered_file else 1
    pattern = mapping.file if mapping.is_numbered_file else mapping.dataset
    later = [number for number in _numbers(pattern.rpartition("/")[2], folder) if number > n_blocks]
    return (mapping.named(n_blocks)[which], mapping.named(min(later))[which]) if later else None


def _numbers(pattern: str, names: Sequence[str]) -> list[int]:
    """The numbers for which `pattern` gives one of the names."""
    pieces = [re.escape(piece.replace("%%", "%")) for piece in re.split(r"(?<!%)%b", pattern)]
    shape = re.compile(r"(\d+)".join(pieces))
    return [int(match[1]) for name in names if (match := shape.fullmatch(name))]


def candidates(name: str, parent: Path) -> list[Path]:
    """Where HDF5 looks for the file of a source, in order."""
    path = Path(name)
    first = [path] if path.is_absolute() else []
    rest = Path(path.name) if path.is_absolute() else path
    folders = [*prefixes("HDF5_VDS_PREFIX", parent), parent.parent, Path(), parent.resolve().parent]
    return [*first, *(folder / rest for folder in folders)]


def prefixes(variable: str, parent: Path) -> list[Path]:
    """The folders that an environment variable of HDF5 names; ${ORIGIN} is the folder of the file."""
    text = _PREFIXES[variable]
    if not text:
        return []
    if text.startswith("${ORIGIN}"):
        return [Path(str(parent.absolute().parent) + text.removeprefix("${ORIGIN}"))]
    return [Path(each) for each in text.split(os.pathsep) if each]
