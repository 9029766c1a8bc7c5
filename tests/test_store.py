"""One suite that both formats of a store pass."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from ep3stream.conversion.spec import StoreSpec
from ep3stream.conversion.writer import create_store
from ep3stream.errors import DamagedDataError, InputError
from ep3stream.store.hdf5_store import Hdf5Writer
from ep3stream.store.reader import open_store
from ep3stream.store.verify import verify_store
from ep3stream.store.zarr_store import ZarrWriter

WRITERS = {"zarr": ZarrWriter, "hdf5": Hdf5Writer}
SPEC = StoreSpec(
    task="classification",
    n_features=5,
    n_outputs=3,
    x_dtype="float32",
    feature_names=tuple("abcde"),
    target_names=("label",),
    class_names=("x", "y", "z"),
    columns={"a": {"kind": "number"}},
    shuffle_seed=7,
    source=({"name": "rows.csv", "bytes": 1, "digest": "0"},),
    segment_bytes=5 * 4 * 16,
)
REGRESSION = replace(SPEC, task="regression", n_outputs=2, target_names=("u", "v"), class_names=None)


@pytest.fixture(params=["zarr", "hdf5"])
def format(request: pytest.FixtureRequest) -> Any:
    return request.param


def _rows(spec: StoreSpec, n_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n_rows, spec.n_features)).astype(spec.x_dtype)
    if spec.task == "classification":
        return x, rng.integers(0, spec.n_outputs, n_rows).astype(np.int32)
    return x, rng.normal(size=(n_rows, spec.n_outputs)).astype(np.float32)


def _write(path: Path, format: Any, spec: StoreSpec = SPEC, **n_rows: int) -> dict[str, Any]:
    rows = {split: _rows(spec, n, seed) for seed, (split, n) in enumerate(n_rows.items())}
    _write_rows(path, format, spec, rows)
    return rows


def _write_rows(path: Path, format: Any, spec: StoreSpec, rows: dict[str, Any]) -> None:
    with create_store(path, spec, format) as writer:
        for split, (x, y) in rows.items():
            writer.append(split, x, y)
        writer.commit()


def _assert_holds(path: Path, rows: dict[str, Any]) -> None:
    with open_store(path) as store:
        assert verify_store(store) == []
        assert set(store.manifest.splits) == set(rows)
        for split, (x, y) in rows.items():
            reader = store.split(split)
            parts = [reader.read_segment(i) for i in range(reader.info.n_segments)]
            np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), x)
            np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), y)
            assert (parts[0][0].dtype, parts[0][1].dtype) == (x.dtype, y.dtype)


@pytest.mark.parametrize("spec", [SPEC, REGRESSION], ids=["ids", "floats"])
@pytest.mark.parametrize("x_dtype", ["float32", "float16"])
@pytest.mark.parametrize("n_rows", [1, 16, 17, 100])
def test_rows_come_back_exactly(
    tmp_path: Path, format: Any, spec: StoreSpec, x_dtype: Any, n_rows: int
) -> None:
    rows = _write(tmp_path / "s", format, replace(spec, x_dtype=x_dtype), train=n_rows, test=3)
    _assert_holds(tmp_path / "s", rows)


def test_the_manifest_describes_the_rows(tmp_path: Path, format: Any) -> None:
    x, y = _rows(SPEC, 40)
    with create_store(tmp_path / "s", SPEC, format) as writer:
        missing = np.zeros(x.shape, np.bool_)
        missing[[3, 4, 20, 35], [1, 1, 4, 0]] = True
        writer.append("train", x[:30], y[:30], missing[:30])
        writer.append("train", x[30:], y[30:], missing[30:])
        manifest = writer.commit()
    info = manifest.splits["train"]
    assert open_store(tmp_path / "s").manifest == manifest
    assert (info.n_rows, info.segment_rows, info.n_segments) == (40, 16, 3)
    assert [info.rows_of_segment(i) for i in range(3)] == [16, 16, 8]
    assert info.class_counts == tuple(np.bincount(y, minlength=3))
    assert info.features.missing == (1, 2, 0, 0, 1)
    np.testing.assert_allclose(info.features.std, x.astype(np.float64).std(0), rtol=1e-12)
    assert (manifest.feature_names, manifest.shuffle_seed, manifest.codec) == (tuple("abcde"), 7, "none")


def test_both_formats_give_the_same_digests(tmp_path: Path) -> None:
    for kind in ("zarr", "hdf5"):
        _write(tmp_path / kind, kind, train=40)
    one, other = (open_store(tmp_path / kind).manifest for kind in ("zarr", "hdf5"))
    assert set(one.conversion) == {"codec_sample_ratio"}  # HDF5 is never compressed.
    assert replace(one, conversion={}) == other


@settings(max_examples=8)
@given(st.lists(st.tuples(st.sampled_from(["train", "test"]), st.integers(0, 50)), min_size=1, max_size=8))
def test_any_sizes_of_append_give_the_same_store(
    tmp_path_factory: pytest.TempPathFactory, format: Any, sizes: list[tuple[str, int]]
) -> None:
    path = tmp_path_factory.mktemp("any") / "s"
    rows = {split: _rows(REGRESSION, sum(n for name, n in sizes if name == split)) for split, _ in sizes}
    done = dict.fromkeys(rows, 0)
    with create_store(path, REGRESSION, format) as writer:
        for split, n in sizes:
            writer.append(split, *(array[done[split] : done[split] + n] for array in rows[split]))
            done[split] += n
        if any(done.values()):
            writer.commit()
            _assert_holds(path, {split: arrays for split, arrays in rows.items() if done[split]})
        else:
            with pytest.raises(InputError, match="no rows"):
                writer.commit()


def test_a_segment_is_read_into_the_callers_memory(tmp_path: Path, format: Any) -> None:
    x, y = _write(tmp_path / "s", format, train=20)["train"]
    x_out, y_out = np.empty((16, 5), np.float32), np.empty(16, np.int32)
    reader = open_store(tmp_path / "s").split("train")
    for index, n_rows in ((0, 16), (1, 4)):
        x_read, y_read = reader.read_segment(index, x_out, y_out)
        assert np.shares_memory(x_read, x_out)
        assert np.shares_memory(y_read, y_out)
        np.testing.assert_array_equal(x_out[:n_rows], x[index * 16 :][:16])
        np.testing.assert_array_equal(y_read, y[index * 16 :][:16])


@pytest.mark.parametrize(
    "x_out",
    [np.empty((15, 5), "f4"), np.empty((16, 5), "f2"), np.empty((16, 6), "f4"), np.empty((5, 16), "f4").T],
)
def test_memory_that_does_not_fit_is_refused(tmp_path: Path, format: Any, x_out: np.ndarray) -> None:
    _write(tmp_path / "s", format, train=20)
    with pytest.raises(InputError, match="x_out is"):
        open_store(tmp_path / "s").split("train").read_segment(0, x_out)


def test_rows_are_read_in_the_order_asked_for(tmp_path: Path, format: Any) -> None:
    x, y = _write(tmp_path / "s", format, REGRESSION, train=75)["train"]
    reader = open_store(tmp_path / "s").split("train")
    for rows in (
        np.random.default_rng(0).integers(0, 75, 200),
        np.array([74, 0, 74]),
        np.array([], np.int64),
    ):
        x_read, y_read = reader.read_rows(rows)
        np.testing.assert_array_equal(x_read, x[rows])
        np.testing.assert_array_equal(y_read, y[rows])
    for rows in (np.array([75]), np.array([-1])):
        with pytest.raises(InputError, match="use 0 to 74"):
            reader.read_rows(rows)


@pytest.mark.parametrize("codec", ["none", "lz4"])
def test_sharded_files_hold_several_segments(tmp_path: Path, codec: Any) -> None:
    spec = replace(SPEC, expected_rows=16 * 4096 * 3, codec=codec)
    rows = _write(tmp_path / "s", "zarr", spec, train=300, test=20, tiny=2)
    _assert_holds(tmp_path / "s", rows)
    infos = open_store(tmp_path / "s").manifest.splits
    assert {name: info.segments_per_file for name, info in infos.items()} == {
        "train": 3,
        "test": 2,
        "tiny": 1,
    }
    assert len(list((tmp_path / "s/train/x/c").iterdir())) == 7


def test_auto_compresses_only_what_shrinks(tmp_path: Path) -> None:
    x, y = _rows(SPEC, 4000)
    for name, rows, codec in (("noise", x, "none"), ("levels", np.round(x), "lz4")):
        with create_store(tmp_path / name, replace(SPEC, segment_bytes=1 << 16), "zarr") as writer:
            writer.append("train", rows, y)
            assert writer.commit().codec == codec
        _assert_holds(tmp_path / name, {"train": (rows, y)})


def test_other_tools_read_the_rows(tmp_path: Path) -> None:
    for kind in ("zarr", "hdf5"):
        rows = _write(tmp_path / kind, kind, train=20)
    group = zarr.open_group(str(tmp_path / "zarr"), mode="r")
    np.testing.assert_array_equal(group["train/x"][:], rows["train"][0])
    with h5py.File(tmp_path / "hdf5") as file:
        np.testing.assert_array_equal(file["train/y"][:], rows["train"][1])
        assert file["train/x"].fletcher32


def test_threads_share_a_reader(tmp_path: Path, format: Any) -> None:
    x, _ = _write(tmp_path / "s", format, train=16 * 40)["train"]
    reader = open_store(tmp_path / "s").split("train")
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(reader.read_segment, list(range(40)) * 3))
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts[80:]]), x)


def test_a_pickled_reader_reads_in_another_process(tmp_path: Path, format: Any) -> None:
    x, _ = _write(tmp_path / "s", format, train=20)["train"]
    reader = open_store(tmp_path / "s").split("train")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(reader.read_segment, (1,))[0], x[16:])


def test_a_pickled_reader_refuses_another_store(tmp_path: Path, format: Any) -> None:
    _write(tmp_path / "s", format, train=20)
    data = pickle.dumps(open_store(tmp_path / "s").split("train"))
    (tmp_path / "s").rename(tmp_path / "old")
    _write(tmp_path / "s", format, train=21)
    with pytest.raises(InputError, match="another store"):
        pickle.loads(data).read_segment(0)


def test_what_is_not_there_is_said(tmp_path: Path, format: Any) -> None:
    with pytest.raises(InputError, match="none does not exist"):
        open_store(tmp_path / "none")
    _write(tmp_path / "s", format, train=20, test=3)
    store = open_store(tmp_path / "s")
    with pytest.raises(InputError, match=r"no split 'valid'; it has test, train"):
        store.split("valid")
    with pytest.raises(InputError, match="segment 2 of split train does not exist; use 0 to 1"):
        store.split("train").read_segment(2)
    store.close()
    with pytest.raises(InputError, match="closed"):
        store.split("train").read_segment(0)


def test_what_was_not_committed_is_not_a_store(tmp_path: Path) -> None:
    zarr.create_group(str(tmp_path / "zarr"))
    h5py.File(tmp_path / "hdf5", "w").close()
    (tmp_path / "text").write_text("hello")
    for name, words in (
        ("zarr", "is not a finished store"),
        ("hdf5", "is a file, but no store"),
        ("text", "is a file, but no store"),
    ):
        with pytest.raises(InputError, match=f"{name} {words}"):
            open_store(tmp_path / name)


# What a writer refuses, and what it leaves behind.


@pytest.mark.parametrize(
    ("split", "x", "y", "message"),
    [
        ("train", [[0, 0, np.nan, 0, 0]], [0], "split train: row 3 has nan in column 'c'"),
        ("train", [[0, 0, 0, 0, 1e300]], [0], "row 3 has 1e.300 in column 'e'"),
        ("train", np.zeros((1, 4)), [0], r"x has shape \(1, 4\)"),
        ("train", np.zeros((1, 5)), [0, 1], r"y \(2,\)"),
        ("train", np.zeros((2, 5)), [0, 3], "row 4 has class id 3; use 0 to 2"),
        ("train", np.zeros((1, 5)), [-1], "row 3 has class id -1"),
        ("train", np.zeros((1, 5)), [0.5], "class ids must be integers"),
        ("train", np.array([["a"] * 5]), [0], "convert them to numbers"),
        ("../train", np.zeros((1, 5)), [0], "split name '../train' is not allowed"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, format: Any, split: str, x: Any, y: Any, message: str
) -> None:
    rows = _rows(SPEC, 3)
    with create_store(tmp_path / "s", SPEC, format) as writer:
        writer.append("train", *rows)
        with pytest.raises(InputError, match=message):
            writer.append(split, np.array(x), np.array(y))
        writer.commit()
    _assert_holds(tmp_path / "s", {"train": rows})


def test_a_target_that_is_not_finite_is_refused_by_name(tmp_path: Path, format: Any) -> None:
    x, y = _rows(REGRESSION, 3)
    y[1, 1] = np.inf
    with (
        create_store(tmp_path / "s", REGRESSION, format) as writer,
        pytest.raises(InputError, match=r"row 1 .*'v'"),
    ):
        writer.append("train", x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_features": 0}, "n_features is 0"),
        ({"feature_names": ("a",)}, "feature_names has 1 names"),
        ({"segment_bytes": 1 << 32}, "segment_bytes is 4294967296"),
        ({"columns": {"a": float("nan")}}, "what JSON can hold"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SPEC, **change)


def test_hdf5_does_not_compress() -> None:
    with pytest.raises(InputError, match="never compressed"):
        create_store("s", replace(SPEC, codec="lz4"), "hdf5")


def test_an_existing_destination_is_never_touched(tmp_path: Path, format: Any) -> None:
    rows = _write(tmp_path / "s", format, train=20)
    with pytest.raises(InputError, match="exists; remove it or choose another name"):
        create_store(tmp_path / "s", SPEC, format)
    with create_store(tmp_path / "t", SPEC, format) as writer:
        writer.append("train", *rows["train"])
        (tmp_path / "t").write_text("came meanwhile")
        with pytest.raises(InputError, match="exists"):
            writer.commit()
    assert (tmp_path / "t").read_text() == "came meanwhile"
    _assert_holds(tmp_path / "s", rows)
    assert sorted(os.listdir(tmp_path)) == ["s", "t"]


def test_a_writer_that_is_left_early_leaves_nothing(tmp_path: Path, format: Any) -> None:
    with create_store(tmp_path / "s", SPEC, format) as writer:
        writer.append("train", *_rows(SPEC, 100))
    with pytest.raises(ZeroDivisionError), create_store(tmp_path / "s", SPEC, format) as writer:  # noqa: PT012
        writer.append("train", *_rows(SPEC, 100))
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    with pytest.raises(InputError, match="closed"):
        writer.append("train", *_rows(SPEC, 1))


_KILLED = """
import sys, time; sys.path.insert(0, {tests!r})
from test_store import SPEC, _rows, create_store
with create_store({path!r}, SPEC, {format!r}) as writer:
    writer.append("train", *_rows(SPEC, 100))
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_no_store_and_the_next_one_cleans_up(tmp_path: Path, format: Any) -> None:
    code = _KILLED.format(tests=str(Path(__file__).parent), path=str(tmp_path / "s"), format=format)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    assert os.listdir(tmp_path) == [".s.partial"]
    with pytest.raises(InputError, match="does not exist"):
        open_store(tmp_path / "s")
    rows = _write(tmp_path / "s", format, train=20)
    assert os.listdir(tmp_path) == ["s"]
    _assert_holds(tmp_path / "s", rows)


@contextmanager
def _files_limited_to(n_bytes: int) -> Iterator[None]:
    """The kernel refuses writes beyond this size, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("n_bytes", [0, 1000, 3000, 100_000])
@pytest.mark.parametrize("n_segments", [1, 5])
def test_a_refused_write_ends_the_conversion_and_leaves_nothing(
    tmp_path: Path, format: Any, n_bytes: int, n_segments: int
) -> None:
    spec = replace(SPEC, segment_bytes=1 << 18)
    rows = _rows(spec, n_segments * spec.segment_rows)
    with _files_limited_to(n_bytes), pytest.raises(InputError, match=r"s cannot be written .*free space"):
        _write_rows(tmp_path / "s", format, spec, {"train": rows})
    assert os.listdir(tmp_path) == []


def test_a_refused_write_surfaces_soon_and_forbids_the_commit(tmp_path: Path, format: Any) -> None:
    spec = replace(SPEC, segment_bytes=1 << 18)
    writer = create_store(tmp_path / "s", spec, format)
    with _files_limited_to(100_000), pytest.raises(InputError, match="cannot be written"):  # noqa: PT012
        for _ in range(12):
            writer.append("train", *_rows(spec, spec.segment_rows))
    with pytest.raises(InputError, match="closed"):
        writer.commit()
    assert os.listdir(tmp_path) == []


def test_an_hdf5_file_that_lacks_its_last_bytes_is_not_committed(tmp_path: Path) -> None:
    _write(tmp_path / "s", "hdf5", train=100)
    n_bytes = (tmp_path / "s").stat().st_size
    (tmp_path / "s").unlink()
    with _files_limited_to(n_bytes - 1), pytest.raises(InputError, match="cannot be written"):
        _write(tmp_path / "s", "hdf5", train=100)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_at_the_manifest_leaves_nothing(
    tmp_path: Path, format: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(self: Any, manifest: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WRITERS[format], "finish", finish)
    with create_store(tmp_path / "s", SPEC, format) as writer:
        writer.append("train", *_rows(SPEC, 20))
        with pytest.raises(InputError, match="No space left"):
            writer.commit()
    assert os.listdir(tmp_path) == []


# Damage: whatever happens to the bytes, no wrong row is ever returned.


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def _assert_damage_is_named(path: Path, split: str, segment: int, detail: str = "") -> None:
    store = open_store(path)
    with pytest.raises(DamagedDataError, match=f"{path.name}: split {split}, segment {segment}.*{detail}"):
        store.split(split).read_segment(segment)
    assert [s for s in verify_store(store) if f"split {split}, segment {segment} " in s]


@pytest.mark.parametrize("array", ["x", "y"])
def test_a_flipped_byte_is_named_by_split_and_segment(tmp_path: Path, format: Any, array: str) -> None:
    rows = _write(tmp_path / "s", format, train=40, test=40)["test"]
    sought = rows["xy".index(array)][16:32].tobytes()
    for file in [p for p in [tmp_path / "s", *(tmp_path / "s").rglob("*")] if p.is_file()]:
        position = file.read_bytes().find(sought)
        if position >= 0:
            _flip(file, position + 11)
    _assert_damage_is_named(tmp_path / "s", "test", 1)
    assert len(verify_store(open_store(tmp_path / "s"))) == 1


def _swap(file: Path) -> None:
    other = (
        file.parent.parent / "0" / "0" if file.name == "0" and file.parent.name == "1" else file.parent / "0"
    )
    content = file.read_bytes(), other.read_bytes()
    other.write_bytes(content[0])
    file.write_bytes(content[1])


@pytest.mark.parametrize("file", ["train/x/c/1/0", "train/y/c/1"])
@pytest.mark.parametrize("codec", ["none", "lz4"])
@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        _swap,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-5]),
        lambda file: _flip(file, -1),
    ],
    ids=["deleted", "swapped", "emptied", "truncated", "flipped"],
)
def test_a_damaged_chunk_file_is_named(
    tmp_path: Path, file: str, codec: Any, damage: Callable[[Path], Any]
) -> None:
    _write(tmp_path / "s", "zarr", replace(SPEC, codec=codec), train=48)
    damage(tmp_path / "s" / file)
    _assert_damage_is_named(tmp_path / "s", "train", 1)


def test_a_missing_or_cut_shard_is_named(tmp_path: Path) -> None:
    rows = _write(tmp_path / "s", "zarr", replace(SPEC, expected_rows=16 * 4096 * 2), train=64)["train"]
    (tmp_path / "s/train/x/c/0/0").unlink()
    shard = tmp_path / "s/train/x/c/1/0"
    _flip(shard, shard.read_bytes().find(rows[0][48:].tobytes()))
    _assert_damage_is_named(tmp_path / "s", "train", 0, "train/x/c/0/0 is missing")
    _assert_damage_is_named(tmp_path / "s", "train", 1, "train/x/c/0/0 is missing")
    _assert_damage_is_named(tmp_path / "s", "train", 3)
    np.testing.assert_array_equal(
        open_store(tmp_path / "s").split("train").read_segment(2)[0], rows[0][32:48]
    )


@pytest.mark.parametrize("file", ["zarr.json", "train/zarr.json", "train/x/zarr.json", "train/y/zarr.json"])
def test_missing_metadata_and_strange_files_are_found(tmp_path: Path, file: str) -> None:
    _write(tmp_path / "s", "zarr", train=40)
    (tmp_path / "s" / file).unlink()
    (tmp_path / "s/train/x/c/7").mkdir()
    (tmp_path / "s/train/x/c/7/0").write_text("x")
    problems = verify_store(open_store(tmp_path / "s"))
    assert [p for p in problems if "train/x/c/7/0 does not belong" in p]
    assert len(problems) > 1


def test_a_changed_array_is_not_believed(tmp_path: Path) -> None:
    for kind in ("zarr", "hdf5"):
        _write(tmp_path / kind, kind, train=40)
    text = (tmp_path / "zarr/train/x/zarr.json").read_text()
    (tmp_path / "zarr/train/x/zarr.json").write_text(
        text.replace('"float32"', '"int32"').replace('"NaN"', "0")
    )
    with h5py.File(tmp_path / "hdf5", "r+") as file:
        file["train/x"].resize(30, axis=0)
        file["train/z"] = 1
    for kind in ("zarr", "hdf5"):
        _assert_damage_is_named(tmp_path / kind, "train", 0, "declares .* but the manifest")
    assert [p for p in verify_store(open_store(tmp_path / "hdf5")) if "train/z does not belong" in p]


def test_a_chunk_that_hdf5_would_fill_in_is_missing(tmp_path: Path) -> None:
    _write(tmp_path / "s", "hdf5", train=40)
    with h5py.File(tmp_path / "s", "r+") as file:
        file["train/x"].resize(16, axis=0)
        file["train/x"].resize(40, axis=0)
    _assert_damage_is_named(tmp_path / "s", "train", 2, "chunk 2 of train/x is missing")


def test_a_damaged_manifest_is_named(tmp_path: Path, format: Any) -> None:
    _write(tmp_path / "s", format, train=40)
    file = tmp_path / "s/manifest.json" if format == "zarr" else tmp_path / "s"
    _flip(file, file.read_bytes().find(b'"class_names"') + 20)
    with pytest.raises(DamagedDataError, match=r"s.*restore it or convert again"):
        open_store(tmp_path / "s")


def test_a_cut_hdf5_file_is_damaged(tmp_path: Path) -> None:
    _write(tmp_path / "s", "hdf5", train=400)
    data = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedDataError, match="s cannot be read"):
        open_store(tmp_path / "s")


def test_an_hdf5_file_cut_under_a_reader_is_damaged(tmp_path: Path) -> None:
    _write(tmp_path / "s", "hdf5", train=400)
    reader = open_store(tmp_path / "s").split("train")
    reader.read_segment(0)
    os.truncate(tmp_path / "s", 3000)
    with pytest.raises(DamagedDataError, match=r"segment 20 .*the file ends inside chunk 20 of train/x"):
        reader.read_segment(20)


def test_no_flipped_bit_anywhere_changes_a_row(tmp_path: Path, format: Any) -> None:
    x, y = _write(tmp_path / "s", format, train=40)["train"]
    rng = np.random.default_rng(0)
    for file in [p for p in [tmp_path / "s", *(tmp_path / "s").rglob("*")] if p.is_file()]:
        sound = file.read_bytes()
        for position in rng.integers(0, len(sound), max(10, len(sound) // 30)):
            _flip(file, position)
            with suppress(DamagedDataError, InputError):
                x_read, y_read = open_store(tmp_path / "s").split("train").read_rows(np.arange(40))
                np.testing.assert_array_equal(x_read, x)
                np.testing.assert_array_equal(y_read, y)
            file.write_bytes(sound)


def test_files_stay_few_when_rows_are_expected_to_be_many() -> None:
    spec = replace(SPEC, n_features=100, feature_names=("f",) * 100, segment_bytes=16 << 20)
    billion = replace(spec, expected_rows=10**9)
    assert spec.segments_per_file == 1
    assert billion.segment_rows * billion.segments_per_file * 4096 >= 10**9


def test_a_segment_of_targets_far_wider_than_the_features_has_fewer_rows():
    spec = StoreSpec(
        task="regression", n_features=1, n_outputs=1000, x_dtype="float32", feature_names=("a",),
        target_names=tuple(f"y{i}" for i in range(1000)), class_names=None, columns={}, shuffle_seed=None, source=(),
        segment_bytes=1 << 20, codec="none",
    )  # fmt: skip
    assert spec.segment_rows == (1 << 26) // 4000 < (1 << 20) // 4
