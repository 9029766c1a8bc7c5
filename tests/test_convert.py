from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep3stream.config import ConvertConfig, Format
from ep3stream.conversion import convert as convert_module
from ep3stream.conversion.convert import ConvertProgress, convert
from ep3stream.conversion.shuffle import SORTER_SHARE, RowSorter
from ep3stream.errors import InputError, SourceError
from ep3stream.store.manifest import Manifest
from ep3stream.store.reader import open_store
from ep3stream.store.verify import verify_store

SMALL = ConvertConfig(target="y", segment_bytes=4096, memory_bytes=4 * 4096)
HALVES = {"train": 0.5, "test": 0.5}


class Source(NamedTuple):
    """Arguments of `convert` for rows i = 0 .. n - 1 with features (i, -i) and target i."""

    tables: tuple[Path, ...] = ()
    x_file: Path | None = None
    y_file: Path | None = None


def numbered_arrays(directory: Path, n_rows: int) -> Source:
    i = np.arange(n_rows, dtype=np.float32)
    np.save(directory / "x.npy", np.column_stack([i, -i]))
    np.save(directory / "y.npy", i)
    return Source((), directory / "x.npy", directory / "y.npy")


def numbered_csv(directory: Path, n_rows: int) -> Source:
    lines = "".join(f"{i},{-i},{i}\n" for i in range(n_rows))
    (directory / "t.csv.gz").write_bytes(gzip.compress(b"a,b,y\n" + lines.encode()))
    return Source((directory / "t.csv.gz",))


def numbered_parquet(directory: Path, n_rows: int) -> Source:
    i = np.arange(n_rows)
    middle = n_rows // 2 + 1
    for name, rows in (("1.parquet", i[:middle]), ("2.parquet", i[middle:])):
        if len(rows):
            pq.write_table(pa.table({"a": rows, "b": -rows, "y": rows}), directory / name)
    return Source((directory,))


SOURCES = [numbered_arrays, numbered_csv, numbered_parquet]


def run(source: Source, store: Path, config: ConvertConfig) -> Manifest:
    if source.x_file is not None:
        config = replace(config, target=None)
    return convert(source.tables, store, config, x_file=source.x_file, y_file=source.y_file)


def read_split(store: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    with open_store(store) as opened:
        assert verify_store(opened) == []
        reader = opened.split(split)
        segments = [reader.read_segment(index) for index in range(reader.info.n_segments)]
    return np.concatenate([x for x, _ in segments]), np.concatenate([y for _, y in segments])


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if "store" in path.name]


def write_csv(path: Path, *lines: str) -> Source:
    path.write_text("".join(f"{line}\n" for line in lines))
    return Source((path,))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("format", ["zarr", "hdf5"])
@pytest.mark.parametrize("write", SOURCES)
@settings(max_examples=3)
@given(n_rows=st.integers(20, 2000), memory_kib=st.integers(16, 200))
def test_every_row_arrives_exactly_once_and_whole(
    tmp_path_factory: pytest.TempPathFactory,
    write: Callable[[Path, int], Source],
    format: Format,
    shuffle: bool,
    n_rows: int,
    memory_kib: int,
) -> None:
    directory = tmp_path_factory.mktemp("convert")
    (directory / "in").mkdir()
    config = replace(SMALL, format=format, shuffle=shuffle, splits=HALVES, memory_bytes=memory_kib << 10)
    manifest = run(write(directory / "in", n_rows), directory / "store", config)
    rows = [read_split(directory / "store", split) for split in HALVES]
    ids = np.concatenate([y[:, 0] for _, y in rows])
    for x, y in rows:
        np.testing.assert_array_equal(x, np.column_stack([y, -y]))
        assert shuffle or np.all(np.diff(y[:, 0]) > 0)
    np.testing.assert_array_equal(np.sort(ids), np.arange(n_rows))
    assert sum(info.n_rows for info in manifest.splits.values()) == n_rows
    assert leftovers(directory) == ["store"]


def test_the_order_is_uniformly_random_over_the_whole_split(tmp_path: Path) -> None:
    n_rows, n_cells = 40_000, 20
    run(numbered_arrays(tmp_path, n_rows), tmp_path / "store", replace(SMALL, memory_bytes=1 << 19))
    ids = read_split(tmp_path / "store", "train")[1][:, 0]
    counts = np.histogram2d(ids, np.arange(n_rows), bins=n_cells)[0]
    expected = n_rows / n_cells**2
    chi_square = np.sum((counts - expected) ** 2 / expected)
    degrees = (n_cells - 1) ** 2
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)
    assert abs(np.mean(np.diff(ids) > 0) - 0.5) < 0.02


def test_the_same_seed_gives_the_same_store_whatever_the_memory_and_another_seed_does_not(
    tmp_path: Path,
) -> None:
    source = numbered_arrays(tmp_path, 5000)
    config = replace(SMALL, splits=HALVES)
    configs = [config, config, replace(config, memory_bytes=1 << 24), replace(config, seed=1)]
    first, again, roomy, other = (run(source, tmp_path / f"store{i}", c) for i, c in enumerate(configs))
    assert first.fingerprint == again.fingerprint == roomy.fingerprint
    assert first.splits["train"].digests != other.splits["train"].digests


def test_a_row_stays_in_its_split_when_files_are_reordered_and_copies_stay_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colors = ["red", "green", "blue"]
    lines = [
        f"{a},{colors[a % 3]},{y}"
        for a, y in zip(rng.integers(0, 300, 900), rng.integers(0, 2, 900), strict=True)
    ]
    one = write_csv(tmp_path / "1.csv", "a,color,y", *lines[:500]).tables
    two = write_csv(tmp_path / "2.csv", "a,color,y", *lines[500:]).tables
    config = replace(SMALL, splits={"train": 0.7, "test": 0.3})
    found = []
    for name, tables in (("store1", one + two), ("store2", two + one)):
        manifest = convert(tables, tmp_path / name, config)
        splits = [
            {tuple(row) for row in np.column_stack(read_split(tmp_path / name, s))} for s in config.splits
        ]
        assert not splits[0] & splits[1]
        assert abs(manifest.splits["train"].n_rows - 630) < 60
        found.append(splits)
    assert found[0] == found[1]


def test_evenly_spaced_values_are_split_like_random_ones(tmp_path: Path) -> None:
    config = replace(SMALL, splits={"train": 0.8, "test": 0.2}, shuffle=False)
    run(numbered_arrays(tmp_path, 10_000), tmp_path / "store", config)
    ids = read_split(tmp_path / "store", "test")[1][:, 0]
    counts = np.histogram(ids, bins=50, range=(0, 10_000))[0]  # 200 rows each: 40 expected, variance 32
    assert abs(len(ids) - 2000) < 200
    assert 15 < counts.var() < 70


@pytest.mark.parametrize("shuffle", [True, False])
def test_categories_and_classes_are_named_sorted_and_recorded(tmp_path: Path, shuffle: bool) -> None:
    lines = [f"{i},{['red', 'green', 'blue'][i % 3]},{['no', 'maybe'][i % 2]}" for i in range(2000)]
    config = replace(SMALL, shuffle=shuffle, categories="onehot")
    manifest = run(write_csv(tmp_path / "t.csv", "n,color,y", *lines), tmp_path / "store", config)
    assert manifest.task == "classification"
    assert manifest.feature_names == ("n", "color=blue", "color=green", "color=red")
    assert (manifest.class_names, manifest.target_names, manifest.n_outputs) == (("maybe", "no"), ("y",), 2)
    recorded = {one["name"]: one.get("values") for one in manifest.columns["columns"]}
    assert recorded == {"n": None, "color": ["blue", "green", "red"]}
    x, y = read_split(tmp_path / "store", "train")
    n = x[:, 0].astype(int)
    assert shuffle == (n.tolist() != list(range(2000)))
    np.testing.assert_array_equal(np.argmax(x[:, 1:], axis=1), 2 - n % 3)
    np.testing.assert_array_equal(y, 1 - n % 2)
    assert manifest.shuffle_seed == (0 if shuffle else None)


def test_float16_keeps_what_it_can_and_names_what_it_cannot(tmp_path: Path) -> None:
    source = numbered_arrays(tmp_path, 3000)
    config = replace(SMALL, dtype="float16")
    run(source, tmp_path / "store", config)
    x, y = read_split(tmp_path / "store", "train")
    assert (x.dtype, y.dtype) == (np.float16, np.float32)
    np.testing.assert_array_equal(x[:, 0], y[:, 0].astype(np.float16))
    np.save(tmp_path / "x.npy", np.array([[0, 1], [2, -70000.0]]))
    np.save(tmp_path / "y.npy", np.zeros(2))
    with pytest.raises(SourceError, match=r"column 'x1', row 2: -70000.0 is beyond 65504.*--dtype float32"):
        run(source, tmp_path / "store2", config)


@pytest.mark.parametrize(
    ("name", "format", "is_file"),
    [
        ("store.h5", None, True),
        ("store.hdf5", None, True),
        ("store", None, False),
        ("store.h5", "zarr", False),
    ],
)
def test_the_name_decides_the_format_unless_one_is_given(
    tmp_path: Path, name: str, format: Format | None, is_file: bool
) -> None:
    run(numbered_arrays(tmp_path, 20), tmp_path / "new" / name, replace(SMALL, format=format))
    assert (tmp_path / "new" / name).is_file() == is_file


@pytest.mark.parametrize("shuffle", [True, False])
def test_progress_tells_rows_and_share_of_each_stage_up_to_all_of_them(tmp_path: Path, shuffle: bool) -> None:
    source = numbered_arrays(tmp_path, 5000)
    told: list[ConvertProgress] = []
    config = replace(SMALL, target=None, shuffle=shuffle)
    convert([], tmp_path / "store", config, x_file=source.x_file, y_file=source.y_file, progress=told.append)
    stages = ["read", "write", "sync"] if shuffle else ["read", "sync"]
    assert list(dict.fromkeys(p.stage for p in told)) == stages
    for stage in stages:
        rows, shares = zip(*((p.rows, p.share) for p in told if p.stage == stage), strict=True)
        assert list(rows) == sorted(rows)
        assert rows[-1] == 5000
        assert list(shares) == sorted(shares)
        assert shares[-1] > 0.9 or stage == "sync"
    assert all(p.elapsed_s >= 0 and p.eta_s >= 0 for p in told)


def test_the_memory_held_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    spill = RowSorter._spill_full

    def note(sorter: RowSorter) -> None:
        held.append(sum(part.nbytes for part in sorter._memory.parts.values()))
        spill(sorter)

    monkeypatch.setattr(RowSorter, "_spill_full", note)
    run(numbered_arrays(tmp_path, 20_000), tmp_path / "store", SMALL)
    assert len(held) > 10
    assert max(held) <= SMALL.memory_bytes * SORTER_SHARE


@pytest.mark.parametrize(
    ("lines", "config", "message"),
    [
        (["a,y", "1,x", "2,x"], SMALL, "every row has the label 'x' in 'y'"),
        (
            ["a,y", "1,1", "2,2"],
            replace(SMALL, splits={"train": 0.99, "test": 0.01}),
            "split test .* got none of the 2",
        ),
        (["a,y", "1,1", "2,nan"], replace(SMALL, missing="error"), "column 'y', row 2"),
        (["a,y", "1,1"], replace(SMALL, target="z"), "no column 'z'"),
    ],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_bad_source_leaves_nothing_behind(
    tmp_path: Path, lines: list[str], config: ConvertConfig, message: str, shuffle: bool
) -> None:
    source = write_csv(tmp_path / "t.csv", *lines)
    with pytest.raises(SourceError, match=message):
        run(source, tmp_path / "store", replace(config, shuffle=shuffle))
    assert leftovers(tmp_path) == []


def test_an_error_in_the_last_row_after_spilling_leaves_nothing_behind(tmp_path: Path) -> None:
    source = numbered_arrays(tmp_path, 5000)
    y = np.arange(5000.0)
    y[-1] = np.inf
    np.save(tmp_path / "y.npy", y)
    for shuffle in (True, False):
        with pytest.raises(SourceError, match=r"y.npy: column 'y', row 5000: .*\(inf\)"):
            run(source, tmp_path / "store", replace(SMALL, shuffle=shuffle))
    assert leftovers(tmp_path) == []


def test_an_existing_destination_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with pytest.raises(InputError, match="store exists; remove it"):
        convert([tmp_path / "missing.csv"], tmp_path / "store", SMALL)


def test_too_little_free_space_is_refused_before_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = numbered_arrays(tmp_path, 5000)
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        InputError, match=r"needs about 1\d{5} bytes more \(60000 in all .*100000 free; free space"
    ):
        run(source, tmp_path / "store", SMALL)
    run(source, tmp_path / "store", replace(SMALL, shuffle=False))


def test_the_manifest_names_its_source_files(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "t.csv", "a,y", "1,1", "2,2")
    (entry,) = run(source, tmp_path / "store", SMALL).source
    assert (entry["name"], entry["bytes"]) == ("t.csv", 12)
    other = write_csv(tmp_path / "t.csv", "a,y", "1,1", "2,3")
    assert run(other, tmp_path / "store2", SMALL).source[0]["digest"] != entry["digest"]


def test_a_later_file_keeps_its_order_unless_it_is_split_or_shuffled(tmp_path):
    """What `predict` writes for it then stands beside its rows."""
    x, y = np.arange(200, dtype=np.float32)[:, None], np.sin(np.arange(200.0))
    first = tmp_path / "first"
    convert((x, y), first, ConvertConfig())

    def order(**settings) -> list[float]:
        path = tmp_path / f"later{len(list(tmp_path.iterdir()))}"
        convert((x, y), path, ConvertConfig(like=first, **settings))
        with open_store(path) as store:
            parts = [store.split(name) for name in store.manifest.splits]
            return [float(v) for part in parts for v in part.read_rows(np.arange(part.info.n_rows))[0][:, 0]]

    assert order() == x[:, 0].tolist()
    assert order(shuffle=True) != x[:, 0].tolist()
    halves = order(splits={"train": 0.5, "test": 0.5})
    assert sorted(halves) == x[:, 0].tolist()
    assert np.any(np.diff(halves[:50]) < 0)
