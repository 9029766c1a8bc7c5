from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep3stream.conversion import spill as spill_module
from ep3stream.conversion.rows import EncodedRows, RowLayout
from ep3stream.conversion.shuffle import RowSorter, random_order
from ep3stream.conversion.spill import SPLIT_SHIFT, Spill, read_spills, spill_path
from ep3stream.errors import DamagedDataError, DiskError

LAYOUT = RowLayout.of(n_numeric=2, n_codes=0, y_shape=(), x_dtype="float32", y_dtype="int32")
SMALL = 4096


def _rows(keys: np.ndarray) -> EncodedRows:
    rows = LAYOUT.empty(len(keys))
    rows.key[:] = keys
    rows.x[:] = np.column_stack([np.arange(len(keys)), -np.arange(len(keys))])
    rows.y[:] = np.arange(len(keys))
    return rows


def _keys(n_rows: int, n_splits: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 1 << SPLIT_SHIFT, n_rows, dtype=np.uint64)
    return low | rng.integers(0, n_splits, n_rows).astype(np.uint64) << np.uint64(SPLIT_SHIFT)


def _add(sorter: RowSorter, rows: EncodedRows, portion: int, begin: int = 0) -> None:
    for start in range(begin, len(rows), portion):
        part = rows[start : start + portion]
        mark = {"behind": start + len(part)}
        sorter.add(part, mark.copy)


def _ids(sorter: RowSorter, block_rows: int, done: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The original numbers and the splits of the rows as they come out."""
    blocks = [(split, rows.y.copy()) for split, rows in sorter.blocks(block_rows, done)]
    ids = np.concatenate([y for _, y in blocks]) if blocks else np.zeros(0, np.int32)
    return ids, np.repeat([split for split, _ in blocks], [len(y) for _, y in blocks])


@given(
    n_rows=st.integers(0, 3000),
    seed=st.integers(0, 99),
    # Keys that are equal, that differ in the last bits alone, and random ones.
    limit=st.sampled_from([1, 3, 1 << 10, 1 << 40, 1 << SPLIT_SHIFT]),
)
def test_random_keys_are_in_order_and_equal_ones_as_they_came(n_rows: int, seed: int, limit: int) -> None:
    keys = np.random.default_rng(seed).integers(0, limit, n_rows, dtype=np.uint64) | np.uint64(
        3 << SPLIT_SHIFT
    )
    np.testing.assert_array_equal(random_order(keys), np.argsort(keys, kind="stable"))


@settings(max_examples=40)
@given(
    n_rows=st.integers(1, 700),
    n_splits=st.sampled_from([1, 2, 16, 17, 200]),
    memory=st.sampled_from([SMALL, 1 << 15, 1 << 22]),
    portion=st.integers(1, 300),
    block_rows=st.integers(1, 300),
    shuffled=st.booleans(),
)
def test_rows_come_out_by_key_whatever_fits_in_memory(
    tmp_path_factory: pytest.TempPathFactory,
    n_rows: int,
    n_splits: int,
    memory: int,
    portion: int,
    block_rows: int,
    shuffled: bool,
) -> None:
    keys = _keys(n_rows, n_splits)
    if not shuffled:
        keys = keys >> np.uint64(SPLIT_SHIFT) << np.uint64(SPLIT_SHIFT)
    with RowSorter(tmp_path_factory.mktemp("rows"), LAYOUT, memory, n_splits, shuffled) as sorter:
        _add(sorter, _rows(keys), portion)
        sorter.finish()
        ids, splits = _ids(sorter, block_rows, [0] * n_splits)
    np.testing.assert_array_equal(ids, np.argsort(keys, kind="stable"))
    np.testing.assert_array_equal(splits, (keys >> np.uint64(SPLIT_SHIFT))[ids])


@pytest.mark.parametrize("memory", [SMALL, 1 << 22])
def test_rows_made_in_the_sorters_own_memory_come_out_as_copied_ones_do(tmp_path: Path, memory: int) -> None:
    keys = _keys(700, 2)
    rows = _rows(keys)
    with RowSorter(tmp_path, LAYOUT, memory, 2, True) as sorter:
        for start in range(0, 700, 30):
            part = rows[start : start + 30]
            room = sorter.room(len(part))
            room.copy_from(0, part)
            # Some are left out, as a row with a gap is, and made anew: those lie elsewhere.
            sorter.add(room if start % 60 else room.take(np.arange(len(part))), dict)
        sorter.finish()
        ids, _ = _ids(sorter, 37, [0, 0])
    np.testing.assert_array_equal(ids, np.argsort(keys, kind="stable"))


def test_rows_of_equal_keys_keep_the_source_order(tmp_path: Path) -> None:
    keys = np.repeat(np.uint64(7) << np.uint64(40), 1000)
    with RowSorter(tmp_path, LAYOUT, SMALL, 1, True) as sorter:
        _add(sorter, _rows(keys), 30)
        sorter.finish()
        assert sorter.n_spills > 5
        np.testing.assert_array_equal(_ids(sorter, 64, [0])[0], np.arange(1000))


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("done", [(0, 0), (1, 0), (250, 3), (300, 300), (10_000, 10_000)])
def test_rows_that_are_done_are_passed_over(tmp_path: Path, shuffled: bool, done: tuple[int, int]) -> None:
    keys = _keys(600, 2) if shuffled else np.arange(600, dtype=np.uint64) % 2 << np.uint64(SPLIT_SHIFT)
    with RowSorter(tmp_path, LAYOUT, SMALL, 2, shuffled) as sorter:
        _add(sorter, _rows(keys), 50)
        sorter.finish()
        ids, _ = _ids(sorter, 37, list(done))
    expected = np.argsort(keys, kind="stable")
    split = (keys >> np.uint64(SPLIT_SHIFT))[expected]
    wanted = [expected[split == s][done[s] :] for s in (0, 1)]
    np.testing.assert_array_equal(ids, np.concatenate(wanted))


@pytest.mark.parametrize("killed_behind", [0, 100, 333, 599])
def test_spilled_rows_are_taken_over_by_the_next_process(tmp_path: Path, killed_behind: int) -> None:
    rows = _rows(_keys(600, 2))
    with RowSorter(tmp_path, LAYOUT, SMALL, 2, True) as killed:
        _add(killed, rows[:killed_behind], 20)
    with RowSorter(tmp_path, LAYOUT, 3 * SMALL, 2, True) as sorter:
        mark = sorter.restore()
        _add(sorter, rows, 20, mark["behind"] if mark else 0)
        sorter.finish()
        ids, _ = _ids(sorter, 64, [0, 0])
    np.testing.assert_array_equal(ids, np.argsort(rows.key, kind="stable"))


@pytest.fixture
def three_spills(tmp_path: Path) -> list[Spill]:
    rows = _rows(_keys(300, 1))
    return [
        Spill.write(
            spill_path(tmp_path, i), LAYOUT, rows[100 * i : 100 * i + 100], 1, {"behind": 100 * i + 100}
        )
        for i in range(3)
    ]


def _flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("suffix", [".rows", ".json"])
@pytest.mark.parametrize(
    "damage", [lambda file: _flip(file, 50), lambda file: _flip(file, -3), _cut, Path.unlink]
)
def test_spills_from_a_damaged_one_on_are_not_believed(
    three_spills: list[Spill], tmp_path: Path, suffix: str, damage: Any
) -> None:
    damage(three_spills[1].path.with_suffix(suffix))
    left = read_spills(tmp_path, LAYOUT)
    assert [spill.read_state["behind"] for spill in left] == [100]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_spill_damaged_after_it_was_taken_over_is_never_rows(
    three_spills: list[Spill], tmp_path: Path
) -> None:
    with RowSorter(tmp_path, LAYOUT, SMALL, 1, True) as sorter:
        sorter.restore()
        sorter.finish()
        _flip(three_spills[2].path, 1000)
        with pytest.raises(DamagedDataError, match="not those written"):
            _ids(sorter, 64, [0])


def test_a_full_disk_is_an_error_that_names_the_file_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Iterator[None]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spill_module, "_write_section", refuse)
    with (
        RowSorter(tmp_path, LAYOUT, SMALL, 1, True) as sorter,
        pytest.raises(DiskError, match=r"000000\.rows: rows cannot be kept .*No space left.*free space"),
    ):
        _add(sorter, _rows(_keys(600, 1)), 20)


def test_every_row_is_equally_likely_in_every_place(tmp_path: Path) -> None:
    """Chi-square on (tenth of the source, tenth of the store): 81 degrees of freedom, 99.99% quantile 135."""
    n_rows = 50_000
    generator = np.random.PCG64([0, 1])
    keys = generator.random_raw(n_rows) >> np.uint64(8)
    with RowSorter(tmp_path, LAYOUT, 1 << 18, 1, True) as sorter:
        _add(sorter, _rows(keys), 1000)
        sorter.finish()
        assert sorter.n_spills > 3
        ids, _ = _ids(sorter, 4096, [0])
    counts = np.histogram2d(ids, np.arange(n_rows), bins=10)[0]
    assert np.square(counts - n_rows / 100).sum() / (n_rows / 100) < 135
