"""The store of the large benchmark: a function of its seed, with the noise it says, whole after a kill."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ep3stream

TOOLS = Path(__file__).parents[1] / "tools"
ROWS = 550_000  # Three blocks.


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The tool, with a process and small segments."""
    monkeypatch.syspath_prepend(TOOLS)
    import make_billion

    monkeypatch.setattr(make_billion, "SEGMENT_BYTES", 1 << 18)
    monkeypatch.setattr(make_billion, "_SAVE_EVERY_S", 0.0)
    yield make_billion
    sys.modules.pop("make_billion")


def rows_of(tool: Any, seed: int, split: str, block: int) -> tuple[Any, Any]:
    x, y = np.empty((20_000, 9), np.float32), np.empty((20_000, 1), np.float32)
    tool.rides(seed, split, block, x, y)
    return x, y


def test_a_block_is_a_function_of_seed_split_and_number(tool: Any) -> None:
    x, y = rows_of(tool, 0, "train", 5)
    again_x, again_y = rows_of(tool, 0, "train", 5)
    assert (x == again_x).all()
    assert (y == again_y).all()
    for other in ((1, "train", 5), (0, "test", 5), (0, "train", 6)):
        assert not np.isin(y, rows_of(tool, *other)[1]).all()


def test_the_noise_is_what_it_says_and_all_else_can_be_learnt(tool: Any) -> None:
    x, y = rows_of(tool, 0, "train", 0)
    assert np.isfinite(x).all()
    noise = y[:, 0] - tool.log_seconds(x)
    assert abs(float(noise.mean())) < 0.01
    assert float(noise.std()) == pytest.approx(tool.NOISE_STD, rel=0.03)
    design = np.c_[x, np.ones(len(x))]
    linear = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    assert float(np.var(y - linear)) > 1.5 * tool.NOISE_STD**2


def test_a_killed_one_is_gone_on_with_to_the_same_store(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool.make_store(tmp_path / "whole", ROWS, 1000, processes=1)
    told: list[int] = []
    tell = tool.Teller.tell

    def stop(teller: Any, rows: int, at_once: bool = False) -> None:
        told.append(rows)
        if len(told) == 3:
            raise KeyboardInterrupt
        tell(teller, rows, at_once)

    monkeypatch.setattr(tool.Teller, "tell", stop)
    with pytest.raises(KeyboardInterrupt):
        tool.make_store(tmp_path / "killed", ROWS, 1000, processes=1)
    assert not (tmp_path / "killed").exists()
    with pytest.raises(ep3stream.InputError, match=r"has rows of .*'seed': 0"):
        tool.make_store(tmp_path / "killed", ROWS, 1000, seed=1, processes=1)
    told.clear()
    monkeypatch.setattr(tool.Teller, "tell", tell)
    tool.make_store(tmp_path / "killed", ROWS, 1000, processes=1)
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("whole", "killed")]
    assert manifests[0] == manifests[1]
    assert ep3stream.verify(tmp_path / "killed") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]
    with pytest.raises(ep3stream.InputError, match="is another store"):
        tool.make_store(tmp_path / "killed", ROWS, 2000, processes=1)
