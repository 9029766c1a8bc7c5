"""`StoreDataset`: every row once over all workers and ranks, in a stated order, resumed in mid-epoch."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_stores import make_store
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from ep3stream import InputError, KernelModel, StoreDataset, open_store

SMALL = {"memory": "16KiB"}  # Two windows of two segments.
# `fork`, DataLoader's own way on Linux, of a process with threads is a warning from Python 3.12 on.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="module", params=["zarr", "h5"])
def store(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("torch") / f"rows.{request.param}"
    return open_store(make_store(path, "classification", n_rows=1000, split="train=1"))


@pytest.fixture(scope="module")
def zarr_path(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("torch") / "rows.zarr", n_rows=1000, split="train=1")


def rows_of(batches) -> np.ndarray:
    return np.concatenate([x.numpy() for x, _ in batches])


def in_any_order(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T)]


def stored(store) -> np.ndarray:
    return store.split("train").read_rows(np.arange(store.manifest.splits["train"].n_rows))[0]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("n_workers", "world_size"), [(0, 1), (2, 1), (0, 3)])
def test_an_epoch_gives_every_row_once_in_even_shares(store, shuffle, n_workers, world_size):
    sizes, parts = [], []
    for rank in range(world_size):
        data = StoreDataset(
            store.split("train"), 32, shuffle=shuffle, rank=rank, world_size=world_size, **SMALL
        )
        batches = list(DataLoader(data, batch_size=None, num_workers=n_workers))
        sizes.append(len(batches))
        assert {len(x) for x, _ in batches} <= {30, 31, 32}
        assert all(y.dtype == torch.int64 and x.dtype == torch.float32 for x, y in batches)
        parts.append(rows_of(batches))
    assert len(set(sizes)) == 1
    assert np.array_equal(*map(in_any_order, (np.concatenate(parts), stored(store))))


def test_without_shuffle_rows_come_as_they_lie_and_with_it_as_seed_and_epoch_say(store):
    assert np.array_equal(
        rows_of(StoreDataset(store.split("train"), 48, shuffle=False, **SMALL)), stored(store)
    )
    data = StoreDataset(store.split("train"), 48, seed=3, **SMALL)
    first, again = rows_of(data), rows_of(data)
    data.set_epoch(1)
    later = rows_of(data)
    other_seed = rows_of(StoreDataset(store.split("train"), 48, seed=4, **SMALL))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, later)
    assert not np.array_equal(first, other_seed)
    assert not np.array_equal(first, stored(store))


def test_kept_workers_hear_of_a_new_epoch(store):
    data = StoreDataset(store.split("train"), 64, **SMALL)
    loader = DataLoader(data, batch_size=None, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        epochs.append(rows_of(loader))
    assert np.array_equal(epochs[0], epochs[2])
    assert not np.array_equal(epochs[0], epochs[1])


@settings(max_examples=15)
@given(
    batch_size=st.integers(1, 300),
    stop=st.integers(0, 40),
    shuffle=st.booleans(),
    epoch=st.integers(0, 2**40),
)
def test_a_pass_resumed_anywhere_goes_on_with_the_rows_that_are_left(
    zarr_path, batch_size, stop, shuffle, epoch
):
    def dataset():
        return StoreDataset(open_store(zarr_path).split("train"), batch_size, shuffle=shuffle, **SMALL)

    whole = dataset()
    whole.set_epoch(epoch)
    expected = rows_of(whole)
    begun = dataset()
    begun.set_epoch(epoch)
    batches = iter(begun)
    given_rows = [x.numpy() for x, _ in islice(batches, stop)]
    state = begun.state_dict()
    batches.close()
    resumed = dataset()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    rest = [x.numpy() for x, _ in resumed]
    assert np.array_equal(np.concatenate([*given_rows, *rest]), expected)


# torchdata 0.11 calls what torch 2.13 asks it not to.
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 9])
def test_torchdatas_stateful_loader_resumes_in_mid_epoch(store, n_workers, stop):
    def loader():
        data = StoreDataset(store.split("train"), 50, **SMALL)
        data.set_epoch(2)
        return StatefulDataLoader(data, batch_size=None, num_workers=n_workers)

    whole = [x.numpy() for x, _ in loader()]
    begun = loader()
    batches = iter(begun)
    for _ in range(stop):
        next(batches)
    state = begun.state_dict()
    del batches
    resumed = loader()
    resumed.load_state_dict(state)
    rest = [x.numpy() for x, _ in resumed]
    assert len(rest) == len(whole) - stop
    assert all(map(np.array_equal, rest, whole[stop:]))
    again = [x.numpy() for x, _ in resumed]
    assert np.array_equal(*map(in_any_order, (np.concatenate(again), stored(store))))


def test_a_kernel_model_trains_on_it(zarr_path):
    rows = open_store(zarr_path)
    x, y = rows.split("train").read_rows(np.arange(1000))
    model = KernelModel(x[:60], n_outputs=2, nystrom_samples=200)
    data = StoreDataset(rows.split("train"), 128, **SMALL)
    losses = []
    for epoch in range(4):
        data.set_epoch(epoch)
        losses.append(model.fit_epoch(DataLoader(data, batch_size=None)))
    # The first epoch starts at the ridge regression of the sample, far below the variance of the targets.
    assert losses[-1] < y.var() / 4
    assert losses == sorted(losses, reverse=True)
    assert model.score(x, y)["r2"] > 0.7


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 16}, "batch_size is 16 but was 32"),
        ({"seed": 9}, "seed is 9 but was 0"),
        ({"world_size": 2}, "shards is 2 but was 1"),
        ({"shuffle": False}, "shuffle is False but was True"),
    ],
)
def test_a_state_of_other_settings_is_refused_by_name(zarr_path, changed, message):
    def dataset(**settings):
        return StoreDataset(open_store(zarr_path).split("train"), **{"batch_size": 32, **SMALL, **settings})

    with pytest.raises(InputError, match=message):
        dataset(**changed).load_state_dict(dataset().state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of 2"),
        ({"split": "none"}, "no split 'none'"),
        ({"world_size": 2000}, "2000 readers share 1000 rows"),
    ],
)
def test_impossible_settings_are_refused_by_name(zarr_path, settings, message):
    def dataset(split="train", batch_size=1024, **settings):
        return StoreDataset(open_store(zarr_path).split(split), batch_size, **settings)

    with pytest.raises(InputError, match=message):
        dataset(**settings)


@pytest.mark.slow
def test_spawned_workers_read_too(store):
    data = StoreDataset(store.split("train"), 50, **SMALL)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert np.array_equal(*map(in_any_order, (rows_of(loader), stored(store))))


def test_a_damaged_segment_reaches_the_loop_from_a_worker(tmp_path):
    path = make_store(tmp_path / "rows.zarr", n_rows=1000, split="train=1")
    chunk = max(
        (path / "train" / "x" / "c").rglob("*"), key=lambda file: file.is_file() and file.stat().st_size
    )
    os.truncate(chunk, chunk.stat().st_size // 2)
    with pytest.raises(Exception, match="segment"):
        list(DataLoader(StoreDataset(open_store(path).split("train"), 64), batch_size=None, num_workers=2))
