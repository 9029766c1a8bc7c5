"""Arrays of which some values lie nowhere: refused, or told with their number; what is whole is read as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from h5py import h5d, h5p, h5s, h5t

import ep3stream
from ep3stream.errors import SourceError
from ep3stream.formats.arrays import open_row_array

X = np.random.default_rng(0).normal(size=(60, 3)).astype("f4")
UNLIMITED = h5s.UNLIMITED


def read(path: Path, name: str = "x") -> np.ndarray:
    blocks = [block for block, _ in open_row_array(path, name).blocks(7, 0)]
    return np.concatenate(blocks)


def put(path: Path, x: np.ndarray = X, name: str = "x", **settings: Any) -> None:
    with h5py.File(path, "a") as file:
        file.create_dataset(name, data=x, **settings)


def virtual(path: Path, shape: tuple[int, ...], pieces: list[tuple[Any, str, str, Any]], fill: Any = None,
            maxshape: Any = None) -> None:  # fmt: skip
    """A virtual dataset `x`: each piece is (where it goes, file, dataset, what is taken of a source of that shape)."""
    layout = h5py.VirtualLayout(shape, "f4", maxshape=maxshape)
    for target, file, dataset, (source_shape, taken) in pieces:
        source = h5py.VirtualSource(file, dataset, shape=source_shape, maxshape=(None, *source_shape[1:]))
        layout[target] = source if taken is None else source[taken]
    with h5py.File(path, "a", libver="latest") as file:
        file.create_virtual_dataset("x", layout, fillvalue=fill)


def numbered(path: Path, file: bytes, dataset: bytes) -> None:
    """A virtual dataset of blocks of 20 rows, whose names have the number of the block in them."""
    with h5py.File(path, "a", libver="latest") as opened:
        plist = h5p.create(h5p.DATASET_CREATE)
        target = h5s.create_simple((20, 3), (UNLIMITED, 3))
        target.select_hyperslab((0, 0), (UNLIMITED, 1), (20, 1), (20, 3))
        plist.set_virtual(target, file, dataset, h5s.create_simple((20, 3)))
        h5d.create(opened.id, b"x", h5t.IEEE_F32LE, h5s.create_simple((20, 3), (UNLIMITED, 3)), plist)


def halves(folder: Path) -> None:
    for k in range(2):
        put(folder / f"p{k}.h5", X[30 * k : 30 * k + 30])
    virtual(
        folder / "x.h5",
        X.shape,
        [(np.s_[30 * k : 30 * k + 30], f"p{k}.h5", "x", ((30, 3), None)) for k in range(2)],
    )


def blocks_in_files(folder: Path) -> None:
    for k in range(3):
        put(folder / f"b{k}.h5", X[20 * k : 20 * k + 20])
    numbered(folder / "x.h5", b"b%b.h5", b"x")


def blocks_in_datasets(folder: Path) -> None:
    for k in range(3):
        put(folder / "x.h5", X[20 * k : 20 * k + 20], f"parts/b{k}")
    numbered(folder / "x.h5", b".", b"/parts/b%b")


def striped(folder: Path) -> None:
    for k in range(3):
        put(folder / f"p{k}.h5", X[k::3])
    virtual(folder / "x.h5", X.shape, [(np.s_[k::3], f"p{k}.h5", "x", ((20, 3), None)) for k in range(3)])


def growing(folder: Path) -> None:
    for k in range(2):
        put(folder / f"p{k}.h5", X[:, k : k + 1], maxshape=(None, 1), chunks=(10, 1))
    pieces = [
        (np.s_[0:UNLIMITED, k : k + 1], f"p{k}.h5", "x", ((60, 1), np.s_[0:UNLIMITED, :])) for k in range(2)
    ]
    virtual(folder / "x.h5", (60, 2), pieces, maxshape=(None, 2))


def same_file(folder: Path) -> None:
    put(folder / "x.h5", X, "part")
    virtual(folder / "x.h5", X.shape, [(np.s_[:], ".", "part", ((60, 3), None))])


def nested(folder: Path) -> None:
    halves(folder)
    (folder / "x.h5").rename(folder / "inner.h5")
    virtual(folder / "x.h5", X.shape, [(np.s_[:], "inner.h5", "x", ((60, 3), None))])


def transposed(folder: Path) -> None:
    """A source of another shape, all of which is taken."""
    put(folder / "p.h5", X.reshape(-1))
    virtual(folder / "x.h5", X.shape, [(np.s_[:], "p.h5", "x", ((180,), None))])


def by_rows_of_a_larger(folder: Path) -> None:
    put(folder / "p.h5", np.vstack([X[30:], X, X[:30]]), chunks=(30, 3))
    virtual(folder / "x.h5", X.shape, [(np.s_[:], "p.h5", "x", ((120, 3), np.s_[30:90]))])


def linked(folder: Path) -> None:
    put(folder / "other.h5", X, "deep/x", chunks=(20, 3))
    with h5py.File(folder / "x.h5", "w") as file:
        file["x"] = h5py.ExternalLink("other.h5", "/deep/x")


def linked_group(folder: Path) -> None:
    put(folder / "other.h5", X, "deep/x")
    with h5py.File(folder / "mid.h5", "w") as file:
        file["g"] = h5py.ExternalLink("other.h5", "/deep")
    with h5py.File(folder / "x.h5", "w") as file:
        file["soft"] = h5py.SoftLink("/hard")
        file["hard"] = h5py.ExternalLink("mid.h5", "/g")
        file["x"] = h5py.SoftLink("/soft/x")


def external(folder: Path) -> None:
    raw = str(folder / "raw.bin")
    (folder / "raw.bin").write_bytes(b"header.." + X[:40].tobytes())
    with h5py.File(folder / "x.h5", "w") as file:
        file.create_dataset(
            "x", X.shape, "f4", external=[(raw, 8, 480), (str(folder / "more.bin"), 0, UNLIMITED)]
        )
    (folder / "more.bin").write_bytes(X[40:].tobytes())


def compact(folder: Path) -> None:
    with h5py.File(folder / "x.h5", "w") as file:
        plist = h5p.create(h5p.DATASET_CREATE)
        plist.set_layout(h5d.COMPACT)
        h5d.create(file.id, b"x", h5t.IEEE_F32LE, h5s.create_simple(X.shape), plist).write(
            h5s.ALL, h5s.ALL, X
        )


def noise_by(compression: str, **settings: Any) -> Callable[[Path], None]:
    return lambda folder: put(folder / "x.h5", chunks=(16, 3), compression=compression, **settings)


def early(libver: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with h5py.File(folder / "x.h5", "w", libver=libver) as file:
            plist = h5p.create(h5p.DATASET_CREATE)
            plist.set_chunk((16, 3))
            plist.set_alloc_time(h5d.ALLOC_TIME_EARLY)
            h5d.create(file.id, b"x", h5t.IEEE_F32LE, h5s.create_simple(X.shape), plist).write(
                h5s.ALL, h5s.ALL, X
            )

    return make


def latest(**settings: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with h5py.File(folder / "x.h5", "w", libver="latest") as file:
            file.create_dataset("x", data=X, **settings)

    return make


def user_block(folder: Path) -> None:
    with h5py.File(folder / "x.h5", "w", userblock_size=1024) as file:
        file.create_dataset("x", data=X, chunks=(16, 3), compression="lzf", shuffle=True)


def plain_mask(folder: Path) -> None:
    """A chunk that its writer stored without filters, as HDF5 allows."""
    with h5py.File(folder / "x.h5", "w") as file:
        made = file.create_dataset("x", X.shape, "f4", chunks=(30, 3), compression="gzip", shuffle=True)
        made[:30] = X[:30]
        made.id.write_direct_chunk((30, 0), X[30:].tobytes(), filter_mask=3)


WHOLE: dict[str, Callable[[Path], None]] = {
    "virtual halves": halves,
    "virtual, numbered files": blocks_in_files,
    "virtual, numbered datasets": blocks_in_datasets,
    "virtual stripes": striped,
    "virtual of the same file": same_file,
    "virtual of a virtual": nested,
    "virtual of another shape": transposed,
    "virtual of some rows": by_rows_of_a_larger,
    "linked": linked,
    "linked by a group": linked_group,
    "external files": external,
    "compact": compact,
    "lzf of noise": noise_by("lzf"),
    "lzf, shuffled, with checksums": noise_by("lzf", shuffle=True, fletcher32=True),
    "gzip": noise_by("gzip", fletcher32=True),
    "allocated early": early("earliest"),
    "allocated early, latest": early("latest"),
    "latest, one chunk": latest(chunks=X.shape),
    "latest, fixed": latest(chunks=(7, 2)),
    "latest, growing": latest(chunks=(7, 2), maxshape=(None, 3)),
    "latest, growing twice": latest(chunks=(7, 2), maxshape=(None, None), compression="gzip"),
    "user block": user_block,
    "a chunk without filters": plain_mask,
}


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_hdf5_that_is_whole_is_read_as_h5py_reads_it(tmp_path, make):
    make(tmp_path)
    np.testing.assert_array_equal(read(tmp_path / "x.h5"), X)


def test_columns_that_grow_are_read(tmp_path):
    growing(tmp_path)
    np.testing.assert_array_equal(read(tmp_path / "x.h5"), X[:, :2])


@pytest.mark.parametrize("prefix", ["elsewhere", "${ORIGIN}/elsewhere"])
def test_a_source_is_found_by_the_virtual_prefix(tmp_path, prefix):
    halves(tmp_path)
    put(tmp_path / "x.h5", X[:, 0], "y")
    (tmp_path / "elsewhere").mkdir()
    for k in range(2):
        (tmp_path / f"p{k}.h5").rename(tmp_path / f"elsewhere/p{k}.h5")
    code = (
        "from pathlib import Path; import numpy as np; from ep3stream.formats.arrays import open_row_array as o\n"
        "np.save('got.npy', np.concatenate([rows for rows, _ in o(Path('x.h5'), 'x').blocks(7, 0)]))"
    )
    environment = {**os.environ, "HDF5_VDS_PREFIX": prefix}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=60)
    np.testing.assert_array_equal(np.load(tmp_path / "got.npy"), X)


def test_a_file_that_another_process_writes_is_told_as_such(tmp_path):
    put(tmp_path / "x.h5")
    code = "import h5py; f = h5py.File('x.h5', 'r+'); print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        writer.stdout.readline()
        with pytest.raises(SourceError, match=r"x.h5: is open for writing in another process"):
            read(tmp_path / "x.h5")
        writer.communicate(b"\n", timeout=60)
    np.testing.assert_array_equal(read(tmp_path / "x.h5"), X)


def test_a_file_that_a_writer_left_open_is_told_as_such(tmp_path):
    code = "import h5py, os; f = h5py.File('x.h5', 'w', libver='latest'); f['x'] = [[1.0]]; f.flush(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    with pytest.raises(SourceError, match="left so by a process that ended early"):
        read(tmp_path / "x.h5")


def then(make: Callable[[Path], None], damage: Callable[[Path], Any]) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        make(folder)
        damage(folder)

    return both


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def shorten(name: str, n_rows: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with h5py.File(folder / name) as file:
            rows = file["x"][:n_rows]
        (folder / name).unlink()
        put(folder / name, rows, maxshape=(None, *rows.shape[1:]))

    return damage


def unmapped(folder: Path) -> None:
    put(folder / "p.h5")
    virtual(folder / "x.h5", (80, 3), [(np.s_[10:70], "p.h5", "x", ((60, 3), None))])


def unmapped_column(folder: Path) -> None:
    put(folder / "p.h5")
    virtual(folder / "x.h5", (60, 4), [(np.s_[:, :3], "p.h5", "x", ((60, 3), None))])


def half_written(**settings: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with h5py.File(folder / "x.h5", "w") as file:
            file.create_dataset("x", X.shape, "f4", chunks=(10, 3), **settings)[:30] = X[:30]

    return make


def of_half_written(folder: Path) -> None:
    half_written()(folder)
    (folder / "x.h5").rename(folder / "p.h5")
    virtual(folder / "x.h5", X.shape, [(np.s_[:], "p.h5", "x", ((60, 3), None))])


def never_written(**settings: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with h5py.File(folder / "x.h5", "w") as file:
            file.create_dataset("x", X.shape, "f4", **settings)

    return make


def link(target: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with h5py.File(folder / "x.h5", "w") as file:
            file["x"] = target

    return make


def of_itself(folder: Path) -> None:
    virtual(folder / "x.h5", X.shape, [(np.s_[:], ".", "x", ((60, 3), None))])


def without_checksum(folder: Path) -> None:
    with h5py.File(folder / "x.h5", "w") as file:
        made = file.create_dataset("x", X.shape, "f4", chunks=(60, 3), compression="gzip", fletcher32=True)
        made.id.write_direct_chunk((0, 0), X.tobytes(), filter_mask=3)


def wrong_mask(folder: Path) -> None:
    """Packed bytes under a mask that says they are not packed."""
    put(folder / "x.h5", np.round(X), chunks=(16, 3), compression="gzip")
    with h5py.File(folder / "x.h5", "r+") as file:
        mask, packed = file["x"].id.read_direct_chunk((16, 0))
        file["x"].id.write_direct_chunk((16, 0), packed + b"more", filter_mask=1)
        assert mask == 0


def unknown_filter(folder: Path) -> None:
    with h5py.File(folder / "x.h5", "w") as file:
        plist = h5p.create(h5p.DATASET_CREATE)
        plist.set_chunk((60, 3))
        plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())
        made = h5d.create(file.id, b"x", h5t.IEEE_F32LE, h5s.create_simple(X.shape), plist)
        made.write_direct_chunk((0, 0), b"packed", filter_mask=0)


def of_type(dtype: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with h5py.File(folder / "x.h5", "w") as file:
            file.create_dataset("x", (60, 3), dtype)

    return make


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "lost source": (then(halves, lose("p1.h5")), r"rows 31 to 60 lie in 'x' of p1.h5, which is not there"),
    "all sources lost": (then(halves, lambda d: [(d / f"p{k}.h5").unlink() for k in range(2)]), "rows 1 to 30"),
    "source without its dataset": (
        then(halves, lambda d: shutil.copyfile(d / "x.h5", d / "empty.h5") and put_other(d / "p0.h5")),
        "'x' of p0.h5, which is not there",
    ),
    "source no HDF5": (then(halves, lambda d: (d / "p0.h5").write_bytes(b"text")), "p0.h5: cannot be read"),
    "shorter source": (then(halves, shorten("p1.h5", 20)), r"has the shape \(20, 3\): 90 values are mapped"),
    "shorter source of some rows": (
        then(by_rows_of_a_larger, shorten("p.h5", 80)),
        r"\(80, 3\): \(90, 3\) is mapped",
    ),
    "nested source lost": (then(nested, lose("p0.h5")), "inner.h5:/x is a virtual dataset whose rows 1 to 30"),
    "source lacks chunks": (of_half_written, "p.h5:/x lacks 3 of its 6 chunks, the first at row 31"),
    "stripe lost": (then(striped, lose("p1.h5")), "rows 2 to 59 lie in 'x' of p1.h5"),
    "numbered file lost": (then(blocks_in_files, lose("b1.h5")), "ends before its source 'b1.h5'.* 'b2.h5' is"),
    "numbered dataset lost": (
        then(blocks_in_datasets, lambda d: h5py.File(d / "x.h5", "r+").__delitem__("parts/b1")),
        "ends before its source '/parts/b1'",
    ),
    "numbered file short": (then(blocks_in_files, shorten("b2.h5", 10)), r"rows 41 to 60 .* \(10, 3\): 60 values"),
    "growing source short": (then(growing, shorten("p1.h5", 40)), r"\(40, 1\): \(60, 1\) is mapped"),
    "dataset of the same file lost": (
        then(same_file, lambda d: h5py.File(d / "x.h5", "r+").__delitem__("part")),
        "lie in 'part', which is not there",
    ),
    "rows without a source": (unmapped, "no source for 60 of its 240 values, the first in row 1"),
    "column without a source": (unmapped_column, "no source for 60 of its 240 values"),
    "of itself": (of_itself, "virtual dataset of itself"),
    "contiguous, never written": (never_written(), "it was never written"),
    "contiguous, filled, never written": (never_written(fillvalue=7), "it was never written"),
    "chunked, never written": (never_written(chunks=(10, 3)), "lacks 6 of its 6 chunks"),
    "chunked, half written": (half_written(), "lacks 3 of its 6 chunks.* would be read as 0.0"),
    "chunked, filled, half written": (half_written(fillvalue=-1), "would be read as -1.0"),
    "external file short": (
        then(external, lambda d: os.truncate(d / "more.bin", 100)),
        "takes 240 bytes from byte 0 on of .*more.bin, which has 100",
    ),
    "external file lost": (then(external, lose("raw.bin")), "raw.bin, which is not there"),
    "link into a lost file": (then(linked, lose("other.h5")), "link to '/deep/x' in other.h5"),
    "link into a lost group": (then(linked_group, lose("other.h5")), "is a link to"),
    "link to nothing": (link(h5py.SoftLink("/nope")), "'x' is a link to '/nope', which is not there"),
    "link to itself": (link(h5py.SoftLink("/x")), "'x' is a link to '/x'"),
    "empty": (link(h5py.Empty("f4")), "is h5py.Empty, an array without values"),
    "named type": (link(np.dtype("f4")), "'x' is a named type, not an array"),
    "group": (lambda d: put(d / "x.h5", X, "x/deeper"), "'x' is a group, not an array"),
    "skipped checksum": (without_checksum, "without its checksum"),
    "mask that hides packed bytes": (wrong_mask, "bytes where 192 are due"),
    "filter that is not here": (unknown_filter, "packed by the filter 32015"),
    "texts": (of_type(h5py.string_dtype()), "holds texts, not numbers"),
    "fixed texts": (of_type("S5"), "holds texts, not numbers"),
    "ragged": (of_type(h5py.vlen_dtype("f4")), "holds rows of different lengths"),
    "references": (of_type(h5py.ref_dtype), "holds references"),
    "records": (of_type([("a", "f4"), ("b", "i4")]), "holds records of a, b"),
    "complex": (of_type("c8"), "holds complex64"),
    "opaque": (of_type("V4"), r"holds (\|V4|void32)"),
}  # fmt: skip


def put_other(path: Path) -> None:
    path.unlink()
    put(path, X, "other")


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_hdf5_with_values_that_lie_nowhere_is_refused_in_one_line(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(SourceError, match=message) as caught:
        read(tmp_path / "x.h5")
    assert "\n" not in str(caught.value)
    assert "x.h5" in str(caught.value) or "p0.h5" in str(caught.value)


def with_gaps(folder: Path) -> int:
    half_written(fillvalue=np.nan)(folder)
    return 90


def with_unmapped_gaps(folder: Path) -> int:
    put(folder / "p.h5")
    virtual(folder / "x.h5", (70, 3), [(np.s_[:60], "p.h5", "x", ((60, 3), None))], fill=np.nan)
    return 30


@pytest.mark.parametrize("make", [with_gaps, with_unmapped_gaps])
def test_what_was_never_written_is_a_gap_where_the_fill_value_is_nan_and_told(tmp_path, make, caplog):
    n_gaps = make(tmp_path)
    rows = read(tmp_path / "x.h5")
    assert np.isnan(rows).sum() == n_gaps
    assert f"{n_gaps} values were never written and are missing values" in caplog.text


def test_an_enumeration_is_read_as_its_numbers_and_told(tmp_path, caplog):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dtype = h5py.enum_dtype({"RED": 0, "GREEN": 5}, basetype="i1")
        file.create_dataset("x", data=np.full((4, 2), 5, "i1"), dtype=dtype)
    assert read(tmp_path / "x.h5").tolist() == [[5, 5]] * 4
    assert "holds an enumeration (RED=0, GREEN=5 ...)" in caplog.text


def test_rows_of_a_link_and_of_y_are_compared_and_its_file_is_a_source(tmp_path):
    linked(tmp_path)
    put(tmp_path / "x.h5", X[:50, 0], "y")
    with pytest.raises(SourceError, match=r"has 60 rows but .* has 50"):
        ep3stream.convert(tmp_path / "x.h5", tmp_path / "s")
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        del file["y"]
    put(tmp_path / "x.h5", X[:, 0], "y")
    manifest = ep3stream.convert(tmp_path / "x.h5", tmp_path / "s")
    assert [entry["name"] for entry in manifest.source] == ["other.h5", "x.h5"]
    assert not list(tmp_path.glob(".*convert"))


def test_the_sources_of_a_virtual_dataset_are_sources_of_the_store(tmp_path):
    halves(tmp_path)
    put(tmp_path / "x.h5", X[:, 0], "y")
    manifest = ep3stream.convert(tmp_path / "x.h5", tmp_path / "s")
    assert [entry["name"] for entry in manifest.source] == ["x.h5", "p0.h5", "p1.h5"]


# Zarr.


def zarr_of(path: Path, x: np.ndarray = X, **settings: Any) -> None:
    settings = {"chunks": (10, 3), **settings}
    data_format = settings.pop("zarr_format", 3)
    group = zarr.open_group(path, mode="w", zarr_format=data_format)
    group.create_array("x", shape=x.shape, dtype=x.dtype, **settings)[:] = x


FORMATS: dict[str, dict[str, Any]] = {
    "v3": {},
    "v2": {"zarr_format": 2},
    "v2 by folders": {"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}},
    "v3 named like v2": {"chunk_key_encoding": {"name": "v2", "separator": "."}},
    "F order": {"zarr_format": 2, "order": "F"},
    "one chunk a column": {"chunks": (10, 1)},
    "uneven chunks": {"chunks": (13, 2)},
    "plain": {"compressors": None},
    "sharded": {"shards": (20, 3)},
    "uneven shards": {"chunks": (8, 1), "shards": (32, 3)},
    "big-endian": {"serializer": {"name": "bytes", "configuration": {"endian": "big"}}},
}


@pytest.mark.parametrize("settings", FORMATS.values(), ids=FORMATS)
def test_whole_zarr_arrays_are_read_without_a_word(tmp_path, settings, caplog):
    zarr_of(tmp_path / "s.zarr", **settings)
    np.testing.assert_array_equal(read(tmp_path / "s.zarr"), X)
    assert not caplog.records


@pytest.mark.parametrize("settings", FORMATS.values(), ids=FORMATS)
def test_each_file_of_a_zarr_array_that_is_lost_is_told(tmp_path, settings, caplog):
    zarr_of(tmp_path / "s.zarr", **settings)
    files = [
        file for file in (tmp_path / "s.zarr/x").rglob("*") if file.is_file() and "zarr" not in file.name
    ]
    files = [file for file in files if not file.name.startswith(".z")]
    for file in (files[0], files[-1]):
        caplog.clear()
        content = file.read_bytes()
        file.unlink()
        read(tmp_path / "s.zarr")
        assert "chunks are not there (the first" in caplog.text
        assert "read as 0.0, its fill value" in caplog.text
        file.write_bytes(b"")
        with pytest.raises(SourceError, match="has 0 bytes; it is damaged"):
            read(tmp_path / "s.zarr")
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(SourceError, match="damaged"):
            read(tmp_path / "s.zarr")
        file.write_bytes(content)


def test_chunks_that_a_shard_lacks_are_counted(tmp_path, caplog):
    zarr_of(tmp_path / "s.zarr", np.where(np.arange(60)[:, None] // 10 % 2, X, 0), shards=(20, 3))
    read(tmp_path / "s.zarr")
    assert "3 of its 6 chunks are not there (the first in c/0/0)" in caplog.text


def test_chunks_that_are_not_there_are_gaps_where_the_fill_value_is_nan(tmp_path, caplog):
    zarr_of(tmp_path / "s.zarr", fill_value=np.nan)
    (tmp_path / "s.zarr/x/c/1/0").unlink()
    assert np.isnan(read(tmp_path / "s.zarr")).all(1).sum() == 10
    assert "1 of its 6 chunks are not there (the first c/1/0) and are read as missing values" in caplog.text


def test_chunks_without_a_fill_value_must_be_there(tmp_path):
    zarr_of(tmp_path / "s.zarr", zarr_format=2, fill_value=None)
    metadata = tmp_path / "s.zarr/x/.zarray"
    metadata.write_text(metadata.read_text().replace('"fill_value": 0.0', '"fill_value": null'))
    (tmp_path / "s.zarr/x/1.0").unlink()
    with pytest.raises(SourceError, match="it has no fill value; copy all"):
        read(tmp_path / "s.zarr")


def test_rows_appended_behind_old_consolidated_metadata_are_read(tmp_path):
    zarr_of(tmp_path / "s.zarr", X[:40], zarr_format=2)
    zarr.consolidate_metadata(tmp_path / "s.zarr", zarr_format=2)
    zarr.open_array(tmp_path / "s.zarr/x", mode="r+").append(X[40:])
    np.testing.assert_array_equal(read(tmp_path / "s.zarr"), X)


def test_a_zip_file_of_zarr_is_read_and_its_lost_chunks_are_told(tmp_path, caplog):
    with zarr.storage.ZipStore(tmp_path / "s.zarr.zip", mode="w") as store:
        group = zarr.create_group(store)
        group.create_array("x", shape=X.shape, chunks=(10, 3), dtype="f4")[:] = X
        group.create_array("deep/y", shape=(60,), chunks=(10,), dtype="f4")[:] = X[:, 0]
    np.testing.assert_array_equal(read(tmp_path / "s.zarr.zip"), X)
    np.testing.assert_array_equal(read(Path(f"{tmp_path}/s.zarr.zip:deep"), "y"), X[:, 0])
    assert not caplog.records
    with (
        zipfile.ZipFile(tmp_path / "s.zarr.zip") as old,
        zipfile.ZipFile(tmp_path / "t.zarr.zip", "w") as new,
    ):
        for name in old.namelist():
            if name != "x/c/2/0":
                new.writestr(name, old.read(name))
    read(tmp_path / "t.zarr.zip")
    assert "1 of its 6 chunks are not there (the first c/2/0)" in caplog.text


@pytest.mark.parametrize("lost", ["x/zarr.json", "x", "zarr.json"])
def test_a_zarr_group_that_lost_metadata_is_refused(tmp_path, lost):
    zarr_of(tmp_path / "s.zarr")
    path = tmp_path / "s.zarr" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(SourceError, match=r"s\.zarr"):
        read(tmp_path / "s.zarr")
