"""A short run of tools/fuzz.py, which runs by the hundred thousand; and that it finds what it looks for."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from ep3stream.errors import DamagedDataError

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(TOOLS)
    import fuzz

    yield fuzz
    sys.modules.pop("fuzz", None)


def test_damaged_and_hostile_inputs_end_in_a_clean_error_or_a_correct_load(fuzz, tmp_path):
    counts, bugs = fuzz.fuzz(tmp_path, n_inputs=3000, seed=0)
    assert bugs == []
    assert counts.total() > 2900
    refused = Counter({target: n for (target, outcome), n in counts.items() if outcome != "loaded"})
    loaded = Counter({target: n for (target, outcome), n in counts.items() if outcome == "loaded"})
    # Neither is the reader deaf, nor do all inputs fall at the first check.
    assert all(n > 10 for n in loaded.values())
    assert (
        len(loaded) == len(refused) + 1 == 11
    )  # metrics.jsonl is read leniently: a crash may have cut a line


def test_an_input_is_a_function_of_its_seed_target_and_number(fuzz, tmp_path):
    runs = [fuzz.fuzz(tmp_path / str(i), 200, 5)[0] for i in range(2) if (tmp_path / str(i)).mkdir() is None]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("error", "is_bug"), [(DamagedDataError("x"), False), (KeyError("x"), True), (DamagedDataError(""), True)]
)
def test_anything_but_an_error_that_says_something_is_a_bug(fuzz, tmp_path, monkeypatch, error, is_bug):
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(fuzz.Subjects, "use_model", refuse)
    counts, bugs = fuzz.fuzz(tmp_path, 300, 0, only="model:7")
    assert counts.total() == 1
    assert bool(bugs) == is_bug


def test_memory_that_an_input_takes_without_bound_is_a_bug(fuzz, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz.Subjects, "read_metrics", lambda self: bytearray(3 << 30))
    _, bugs = fuzz.fuzz(tmp_path, 300, 0, only="metrics:0")
    assert "MemoryError" in bugs[0]
