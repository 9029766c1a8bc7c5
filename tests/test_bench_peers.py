from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def bench_peers(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import bench_peers

    yield bench_peers
    for name in ("bench_peers", "bench_fashion"):
        sys.modules.pop(name, None)


def test_the_time_to_an_accuracy_is_that_of_the_fastest_point_that_reaches_it(bench_peers):
    points = [
        bench_peers.Point(1, seconds, seconds, accuracy, 0.1)
        for seconds, accuracy in ((2.0, 0.85), (9.0, 0.87), (5.0, 0.86))
    ]
    assert bench_peers.first_at(points, 0.86) == 5.0
    assert bench_peers.first_at(points, 0.88) is None


def test_the_ratio_to_a_time_never_reached_is_left_open(bench_peers):
    assert bench_peers.times(30.0, 4.0) == "7.5"
    assert bench_peers.times(30.0, None) == bench_peers.times(None, 4.0) == "-"
