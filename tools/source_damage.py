"""Damage to files that are to be converted: refused, told, harmless, or data without a word? For tools/bench_damage.py.

Each trial copies one of the sources below, damages one of its files, and converts it. `refused`: an error of the
package. `same`: the values that were written. `told`: other values, and a warning said so. `unknowable`: other values
without a word, where the format has nothing that could tell: a digit of a text or a bit of a plain array has no
checksum, a text that ends behind a row is a text, and nothing says how many files a directory had. `SILENT` is the
rest, and `CRASHED` any other exception; both must be 0, and so must anything that a conversion leaves behind.
"""

from __future__ import annotations

import gzip
import logging
import random
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
import zarr.codecs
from numcodecs import Zstd

import ep3stream
from ep3stream import ConvertConfig
from ep3stream.errors import Ep3streamError

SOURCE_OUTCOMES = ("refused", "told", "same", "unknowable", "SILENT", "CRASHED")
SOURCES_MUST_BE_ZERO = ("SILENT", "CRASHED")

N_ROWS, N_FEATURES = 400, 4
_GENERATOR = np.random.default_rng(0)
X = _GENERATOR.normal(size=(N_ROWS, N_FEATURES)).round(3).astype("f4")
Y = _GENERATOR.normal(size=N_ROWS).round(3).astype("f4")
NAMES = [f"x{j}" for j in range(N_FEATURES)]

Rows = tuple[np.ndarray, np.ndarray]

# What damages change: bits that only a checksum sees, where a file ends, or which files there are.
BITS, LENGTH, FILES = "bits", "length", "files"


@dataclass(frozen=True)
class Source:
    """A kind of source. make(folder) writes it; `given` are the paths to convert, in the folder.

    blind: what the format has nothing to see.
    """

    make: Callable[[Path], None]
    given: tuple[str, ...]
    blind: frozenset[str] = frozenset()
    is_pair: bool = False

    @property
    def is_table(self) -> bool:
        """Whether the target is a column with a name."""
        return self.given[0] == "d" or any(part in self.given[0] for part in ("csv", "parquet", "arrow"))


@dataclass(frozen=True)
class Damage:
    """What is done to a file, and what it changes."""

    do: Callable[[random.Random, Path], str]
    changes: str


# -- sources


def hdf5(**settings: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with h5py.File(folder / "d.h5", "w", libver="latest") as file:
            for name, array in (("x", X), ("y", Y)):
                chunks = (50, *array.shape[1:]) if settings else None
                file.create_dataset(name, data=array, chunks=chunks, **settings)

    return make


def hdf5_virtual(folder: Path) -> None:
    layout = h5py.VirtualLayout(X.shape, "f4")
    for part in range(4):
        rows = slice(100 * part, 100 * part + 100)
        with h5py.File(folder / f"part{part}.h5", "w", libver="latest") as file:
            file["x"] = X[rows]
        layout[rows] = h5py.VirtualSource(f"part{part}.h5", "x", shape=(100, N_FEATURES))
    with h5py.File(folder / "d.h5", "w", libver="latest") as file:
        file.create_virtual_dataset("x", layout)
        file["y"] = Y


def hdf5_external(folder: Path) -> None:
    """HDF5 looks for external files in the working directory, so that they are named from the root on."""
    (folder / "raw.bin").write_bytes(X.tobytes())
    with h5py.File(folder / "d.h5", "w", libver="latest") as file:
        file.create_dataset("x", X.shape, "f4", external=[(str(folder / "raw.bin"), 0, X.nbytes)])
        file["y"] = Y


def hdf5_linked(folder: Path) -> None:
    with h5py.File(folder / "x.h5", "w", libver="latest") as file:
        file.create_dataset("x", data=X, chunks=(50, N_FEATURES), fletcher32=True)
    with h5py.File(folder / "d.h5", "w", libver="latest") as file:
        file["x"] = h5py.ExternalLink("x.h5", "/x")
        file["y"] = Y


def zarr_group(version: int, is_sharded: bool = False, **settings: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        group = zarr.open_group(folder / "d.zarr", mode="w", zarr_format=version)
        for name, array in (("x", X), ("y", Y)):
            inner = array.shape[1:]
            own = {**settings, "shards": (200, *inner)} if is_sharded else settings
            group.create_array(name, shape=array.shape, dtype="f4", chunks=(50, *inner), **own)[:] = array

    return make


def npy(folder: Path) -> None:
    np.save(folder / "x.npy", X)
    np.save(folder / "y.npy", Y)


def npz(save: Callable[..., None], order: str = "C") -> Callable[[Path], None]:
    return lambda folder: save(folder / "d.npz", x=X.copy(order=order), y=Y)


def idx(folder: Path, packed: bool = False) -> None:
    for name, array in (("x", X), ("y", Y)):
        header = bytes([0, 0, 0x0D, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        data = header + array.astype(">f4").tobytes()
        target = folder / f"{name}-idx{array.ndim}-float{'.gz' * packed}"
        target.write_bytes(gzip.compress(data) if packed else data)


def table(rows: slice = slice(None)) -> pa.Table:
    columns = {name: pa.array(X[rows, j]) for j, name in enumerate(NAMES)}
    return pa.table({**columns, "y": pa.array(Y[rows])})


def csv_text(rows: slice = slice(None)) -> bytes:
    lines = [",".join([*NAMES, "y"])]
    lines += [",".join(f"{value:.3f}" for value in row) for row in np.column_stack([X, Y])[rows]]
    return "\n".join([*lines, ""]).encode()


def parts(suffix: str, write: Callable[[Path, slice], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "d").mkdir()
        for part in range(4):
            write(folder / f"d/part-{part}{suffix}", slice(100 * part, 100 * part + 100))

    return make


def write_parquet(path: Path, rows: slice = slice(None)) -> None:
    pq.write_table(table(rows), path, row_group_size=50, write_page_checksum=True)


def write_arrow(path: Path, is_file: bool) -> None:
    make = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with make(path, table().schema) as writer:
        writer.write_table(table(), max_chunksize=50)


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("d.csv", csv_text())


def svmlight_text() -> bytes:
    rows = (" ".join(f"{j + 1}:{value:.3f}" for j, value in enumerate(row)) for row in X)
    return "".join(f"{y:.3f} {row}\n" for y, row in zip(Y, rows, strict=True)).encode()


def one(name: str, data: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data()) and None


def zstd(data: bytes) -> bytes:
    return bytes(Zstd(checksum=True).encode(data))


NOTHING: frozenset[str] = frozenset()
PLAIN, TEXT, MANY = frozenset({BITS}), frozenset({BITS, LENGTH}), frozenset({FILES})
CHECKED = [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]

SOURCES: dict[str, Source] = {
    "hdf5": Source(hdf5(), ("d.h5",), PLAIN),
    "hdf5 checked": Source(hdf5(compression="gzip", fletcher32=True), ("d.h5",)),
    "hdf5 lzf": Source(hdf5(compression="lzf", fletcher32=True), ("d.h5",)),
    "hdf5 virtual": Source(hdf5_virtual, ("d.h5",), PLAIN),
    "hdf5 external": Source(hdf5_external, ("d.h5",), PLAIN),
    "hdf5 linked": Source(hdf5_linked, ("d.h5",), PLAIN),
    "zarr 2": Source(zarr_group(2), ("d.zarr",), PLAIN),
    "zarr 3": Source(zarr_group(3), ("d.zarr",), PLAIN),
    "zarr checked": Source(zarr_group(3, compressors=CHECKED), ("d.zarr",)),
    "zarr sharded": Source(zarr_group(3, True, compressors=CHECKED), ("d.zarr",)),
    "npy": Source(npy, ("x.npy", "y.npy"), PLAIN, is_pair=True),
    "npz": Source(npz(np.savez), ("d.npz",)),
    "npz deflated": Source(npz(np.savez_compressed), ("d.npz",)),
    "npz columns": Source(npz(np.savez_compressed, "F"), ("d.npz",)),
    "idx": Source(idx, ("x-idx2-float", "y-idx1-float"), PLAIN, is_pair=True),
    "idx.gz": Source(lambda folder: idx(folder, True), ("x-idx2-float.gz", "y-idx1-float.gz"), is_pair=True),
    "parquet": Source(lambda folder: write_parquet(folder / "d.parquet"), ("d.parquet",), PLAIN),
    "arrow file": Source(lambda folder: write_arrow(folder / "d.arrow", True), ("d.arrow",), PLAIN),
    "arrow stream": Source(lambda folder: write_arrow(folder / "stream.arrow", False), ("stream.arrow",), TEXT),
    "csv": Source(one("d.csv", csv_text), ("d.csv",), TEXT),
    "csv.gz": Source(one("d.csv.gz", lambda: gzip.compress(csv_text())), ("d.csv.gz",)),
    "csv.zst": Source(one("d.csv.zst", lambda: zstd(csv_text())), ("d.csv.zst",)),
    "csv.zip": Source(lambda folder: write_zip(folder / "d.csv.zip"), ("d.csv.zip",)),
    "svmlight": Source(one("d.svm", svmlight_text), ("d.svm",), TEXT),
    "svmlight.gz": Source(one("d.svm.gz", lambda: gzip.compress(svmlight_text())), ("d.svm.gz",)),
    "parquet parts": Source(parts(".parquet", write_parquet), ("d",), PLAIN | MANY),
    "csv.gz parts": Source(
        parts(".csv.gz", lambda path, rows: path.write_bytes(gzip.compress(csv_text(rows)))), ("d",), MANY
    ),
}  # fmt: skip


# -- damages: each changes one file and says what it did


def flip(dice: random.Random, file: Path) -> str:
    data = bytearray(file.read_bytes())
    place = dice.randrange(len(data))
    data[place] ^= 1 << dice.randrange(8)
    file.write_bytes(data)
    return f"byte {place}"


def zeros(dice: random.Random, file: Path) -> str:
    data = bytearray(file.read_bytes())
    start = dice.randrange(len(data))
    stop = min(len(data), start + dice.choice((4, 64, 512)))
    data[start:stop] = bytes(stop - start)
    file.write_bytes(data)
    return f"bytes {start} to {stop}"


def cut(dice: random.Random, file: Path) -> str:
    size = dice.randrange(1, file.stat().st_size)
    file.write_bytes(file.read_bytes()[:size])
    return f"to {size} bytes"


def empty(dice: random.Random, file: Path) -> str:
    file.write_bytes(b"")
    return "to 0 bytes"


def grow(dice: random.Random, file: Path) -> str:
    """Its own end again, as a writer leaves it that was stopped and began anew."""
    n_bytes = dice.randrange(1, 600)
    file.write_bytes(file.read_bytes() + file.read_bytes()[-n_bytes:])
    return f"by {n_bytes} bytes"


def delete(dice: random.Random, file: Path) -> str:
    file.unlink()
    return "removed"


def move(dice: random.Random, file: Path) -> str:
    file.rename(file.with_name(f"{file.name}.bak"))
    return "renamed"


DAMAGES: dict[str, Damage] = {
    "flip a bit": Damage(flip, BITS),
    "zero a range": Damage(zeros, BITS),
    "cut": Damage(cut, LENGTH),
    "empty": Damage(empty, LENGTH),
    "grow": Damage(grow, LENGTH),
    "delete": Damage(delete, FILES),
    "move": Damage(move, FILES),
}


# -- trials


class _Warnings(logging.Handler):
    """Warnings of a conversion, and what else is told of the damaged file."""

    def __init__(self, damaged: str) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self._damaged = damaged

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or self._damaged in record.getMessage():
            self.lines.append(record.getMessage())


def run_source_trials(directory: Path, n_trials: int, seed: int) -> tuple[Counter, list[str]]:
    """Counts of (damage, source, outcome), and lines about what must not be."""
    counts: Counter = Counter()
    examples: list[str] = []
    sound = {
        name: _converted(_made(directory, name), source, "(none)", [])[0] for name, source in SOURCES.items()
    }
    for name, rows in sound.items():
        assert rows is not None, f"{name} cannot be converted before it is damaged"
    for trial in range(n_trials):
        dice = random.Random(f"sources/{seed}/{trial}")
        name, kind = dice.choice(sorted(SOURCES)), dice.choice(sorted(DAMAGES))
        folder = _made(directory, name)
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        file = dice.choice(sorted(before))
        what = DAMAGES[kind].do(dice, file)
        if file.exists() and file.read_bytes() == before[file]:
            continue
        told: list[str] = []
        rows, error = _converted(folder, SOURCES[name], file.name, told)
        outcome = judge(rows, error, sound[name], bool(told), DAMAGES[kind].changes in SOURCES[name].blind)
        counts[kind, name, outcome] += 1
        if outcome in SOURCES_MUST_BE_ZERO:
            place = f"{file.relative_to(folder)} {what}"
            examples.append(f"source trial {trial}: {outcome}: {kind} of {name}: {place}: {error!r:.200}")
    return counts, examples


def _made(directory: Path, name: str) -> Path:
    """The source, anew; under its own name, since HDF5 writes the paths of external files into a file."""
    folder = directory / name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    SOURCES[name].make(folder)
    return folder


def _converted(
    folder: Path, source: Source, damaged: str, told: list[str]
) -> tuple[Rows | None, Exception | None]:
    """The rows of the store, or the error; what was warned of goes to `told`."""
    store, heard = folder.with_name("store.zarr"), _Warnings(damaged)
    shutil.rmtree(store, ignore_errors=True)
    given = [folder / name for name in source.given]
    files = {"x_file": given[0], "y_file": given[1]} if source.is_pair else {}
    config = ConvertConfig(target="y" if source.is_table else None, shuffle=False)
    logger = logging.getLogger("ep3stream")
    level, propagates = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(heard)
    try:
        ep3stream.convert(None if source.is_pair else given[0], store, config, **files)
        with ep3stream.open_store(store) as opened:
            reader = opened.split("train")
            return reader.read_rows(np.arange(reader.info.n_rows)), None
    except Exception as error:  # What must not happen is counted, so that the other trials are run.
        left = [path.name for path in folder.parent.glob(".store*")]
        return None, RuntimeError(f"{left} was left behind") if left else error
    finally:
        logger.removeHandler(heard)
        logger.setLevel(level)
        logger.propagate = propagates
        told += heard.lines


def judge(rows: Rows | None, error: Exception | None, sound: Rows, is_told: bool, is_blind: bool) -> str:
    """One of SOURCE_OUTCOMES."""
    if rows is None:
        return "refused" if isinstance(error, Ep3streamError) else "CRASHED"
    if all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(rows, sound, strict=True)):
        return "same"
    if is_told:
        return "told"
    return "unknowable" if is_blind else "SILENT"


def source_table(counts: Counter) -> str:
    """Per source and kind of damage: refused, told, same, unknowable; what must be 0 stands in the examples."""
    kinds = list(DAMAGES)
    lines = [f"{'':<15}" + "".join(f"{kind:>15}" for kind in kinds)]
    for name in SOURCES:
        cells = [
            "/".join(str(counts[kind, name, outcome]) for outcome in SOURCE_OUTCOMES[:4]) for kind in kinds
        ]
        lines.append(f"{name:<15}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join([*lines, "refused/told/same/unknowable"])
