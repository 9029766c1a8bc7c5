"""`predict` on a Dask array: block by block, nothing before it is asked for."""

from __future__ import annotations

from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import Client
from small_stores import make_store, plain_config, smooth_rows

import ep3stream
from ep3stream import InputError

X, _ = smooth_rows(600)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for task in ("regression", "classification"):
        store = make_store(folder / f"{task}.zarr", task)
        made[task] = ep3stream.fit(store, folder / task, plain_config(solver={"centers": 40}))
    return made


@pytest.mark.parametrize("task", ["regression", "classification"])
@pytest.mark.parametrize("scores", [False, True])
def test_the_blocks_are_what_the_model_says_of_all_rows(runs, task, scores):
    model = ep3stream.load(runs[task])
    lazy = ep3stream.predict(runs[task], da.from_array(X, chunks=(170, 2)), scores=scores)
    expected = model.decision_function(X) if scores else model.predict(X)
    found = lazy.compute()
    assert (lazy.shape, lazy.dtype) == (expected.shape, expected.dtype)
    assert (
        (found == expected).mean() > 0.99
        if expected.dtype.kind == "U"
        else np.allclose(found, expected, atol=1e-4)
    )


def test_nothing_is_computed_before_it_is_asked_for_and_then_only_what_is(runs):
    seen: list[tuple[int, int]] = []

    def block(_, block_info=None):
        seen.append(block_info[None]["chunk-location"])
        return X[:100]

    x = da.map_blocks(block, da.zeros((600, 5), chunks=(100, 5)), dtype=np.float32, meta=X[:0])
    seen.clear()
    lazy = ep3stream.predict(runs["classification"], x)
    assert not seen
    with dask.config.set(scheduler="synchronous"):
        lazy[250:290].compute()
    assert seen == [(2, 0)]


def test_the_model_goes_to_the_workers_of_a_cluster(runs):
    x = da.from_array(X, chunks=200)
    with Client(processes=False, dashboard_address="127.0.0.1:0", n_workers=1, threads_per_worker=1):
        found = ep3stream.predict(runs["regression"], x).compute()
    assert np.allclose(found, ep3stream.load(runs["regression"]).predict(X), atol=1e-4)


def test_other_columns_and_mixed_up_calls_are_refused(runs, tmp_path):
    with pytest.raises(InputError, match=r"takes \(n, 5\)"):
        ep3stream.predict(runs["regression"], da.from_array(X[:, :3]))
    with pytest.raises(InputError, match="Dask array are returned"):
        ep3stream.predict(runs["regression"], da.from_array(X), tmp_path / "out.npy")
    with pytest.raises(InputError, match="store go to `out`"):
        ep3stream.predict(runs["regression"], tmp_path / "rows.zarr")
