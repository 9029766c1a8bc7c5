from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep3stream.data import shuffle
from ep3stream.data.shuffle import KeyOrder, rows_by_split
from ep3stream.errors import InputError

DTYPE = np.dtype([("key", "<u8"), ("id", "<i8")])
ROW_MEMORY = 2 * (DTYPE.itemsize + 32)  # memory_bytes for a buffer of one row


def make_rows(keys: np.ndarray) -> np.ndarray:
    rows = np.empty(len(keys), DTYPE)
    rows["key"], rows["id"] = keys, np.arange(len(keys))
    return rows


def order_ids(
    directory: Path,
    rows: np.ndarray,
    buffer_rows: int,
    *,
    step: int = 7,
    progress: float = 1.0,
    shuffled: bool = True,
) -> np.ndarray:
    order = KeyOrder(directory, DTYPE, buffer_rows * ROW_MEMORY, shuffled)
    for start in range(0, len(rows), step):
        order.add(rows[start : start + step], progress)
    blocks = [block["id"].copy() for block in order.blocks(block_rows=5)]
    assert all(len(block) <= 5 for block in blocks)
    return np.concatenate(blocks)


@settings(deadline=None)
@given(
    n_rows=st.integers(1, 300),
    buffer_rows=st.integers(1, 400),
    progress=st.floats(1e-3, 1),
    seed=st.integers(0, 9),
)
def test_rows_come_out_by_key_whatever_fits_in_memory(
    tmp_path_factory: pytest.TempPathFactory, n_rows: int, buffer_rows: int, progress: float, seed: int
) -> None:
    keys = np.random.default_rng(seed).integers(0, 3 << 56, n_rows, dtype=np.uint64)
    directory = tmp_path_factory.mktemp("spill")
    ids = order_ids(directory, make_rows(keys), buffer_rows, progress=progress)
    np.testing.assert_array_equal(ids, np.argsort(keys, kind="stable"))
    assert not list(directory.iterdir())


@settings(deadline=None)
@given(n_rows=st.integers(1, 200), buffer_rows=st.integers(1, 250))
def test_rows_of_equal_keys_keep_the_source_order(
    tmp_path_factory: pytest.TempPathFactory, n_rows: int, buffer_rows: int
) -> None:
    splits = np.arange(n_rows, dtype=np.uint64) % np.uint64(3)
    rows = make_rows(splits << np.uint64(56))
    ids = order_ids(tmp_path_factory.mktemp("spill"), rows, buffer_rows, shuffled=False)
    np.testing.assert_array_equal(ids, np.argsort(splits, kind="stable"))


def test_a_range_larger_than_the_buffer_is_divided_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    divided: list[Path] = []
    divide = KeyOrder._divide
    monkeypatch.setattr(
        KeyOrder, "_divide", lambda self, file, shift: divided.append(file) or divide(self, file, shift)
    )
    # Keys that share the top 20 bits, in a source that claims to be almost read when the first row spills.
    keys = np.random.default_rng(0).integers(0, 1 << 36, 2000, dtype=np.uint64)
    ids = order_ids(tmp_path, make_rows(keys), buffer_rows=50)
    np.testing.assert_array_equal(ids, np.argsort(keys, kind="stable"))
    assert len({file.name[:2] for file in divided}) >= 2


def test_a_full_disk_is_an_error_that_names_the_spill_file_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    order = KeyOrder(tmp_path, DTYPE, ROW_MEMORY, shuffled=True)
    monkeypatch.setattr(shuffle.Path, "open", full)
    with pytest.raises(InputError, match=r"No space left on device.*free space"):
        order.add(make_rows(np.arange(3, dtype=np.uint64)), 0.5)


def test_rows_are_parted_by_split_in_their_order() -> None:
    rows = make_rows(np.array([1, 0, 1, 0, 3], np.uint64) << np.uint64(56))
    parts = {split: part["id"].tolist() for split, part in rows_by_split(rows)}
    assert parts == {0: [1, 3], 1: [0, 2], 3: [4]}
