"""A killed conversion of rows that can be read only once begins again: the next stream may be of other rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import ep3stream
from ep3stream import ConvertConfig

N = np.arange(3000)
CONFIG = {"memory_bytes": 1 << 14, "segment_bytes": 4096, "shuffle": False}


class Killed(BaseException):
    """Stands for a signal."""


def table(values: Any) -> pa.Table:
    return pa.table({"v": values, "y": values % 7 * 1.0})


ONCE: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "reader": (lambda values: table(values).to_reader(max_chunksize=100), {"target": "y"}),
    "iterator": (lambda values: iter([(part[:, None], part % 7 * 1.0) for part in np.split(values, 30)]), {}),
    "generator": (lambda values: ((part[:, None], part % 7 * 1.0) for part in np.split(values, 30)), {}),
}


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("name", ONCE)
def test_a_killed_conversion_of_what_is_read_once_begins_again(
    tmp_path: Path, name: str, shuffle: bool, at: int
) -> None:
    make, settings = ONCE[name]
    config = ConvertConfig(**(CONFIG | settings | {"shuffle": shuffle}))
    reports = 0

    def kill(_: object) -> None:
        nonlocal reports
        reports += 1
        if reports == at:
            raise Killed

    with pytest.raises(Killed):
        ep3stream.convert(make(N), tmp_path / "s.zarr", config, progress=kill)
    assert (tmp_path / ".s.zarr.convert").is_dir()
    ep3stream.convert(make(N + 10_000), tmp_path / "s.zarr", config)
    with ep3stream.open_store(tmp_path / "s.zarr") as store:
        x, _ = store.split("train").read_rows(N)
    np.testing.assert_array_equal(np.sort(x[:, 0]), N + 10_000)
    assert not (tmp_path / ".s.zarr.convert").exists()
