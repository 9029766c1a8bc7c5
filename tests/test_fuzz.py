"""A short run of tools/fuzz.py, which runs by the hundred thousand; and that it finds what it looks for."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

import ep3stream
from ep3stream.errors import DamagedDataError, SourceError

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(TOOLS)
    import fuzz

    yield fuzz
    sys.modules.pop("fuzz", None)


def test_damaged_and_hostile_inputs_end_in_a_clean_error_or_a_correct_load(fuzz, tmp_path):
    counts, bugs = fuzz.fuzz(tmp_path, n_inputs=1000, seed=0)
    assert bugs == []
    assert counts.total() > 950
    refused = Counter({target: n for (target, outcome), n in counts.items() if outcome != "loaded"})
    loaded = Counter({target: n for (target, outcome), n in counts.items() if outcome == "loaded"})
    # Neither is the reader deaf, nor do all inputs fall at the first check.
    assert all(n > 3 for n in loaded.values())
    assert (
        len(loaded) == len(refused) + 1 == 11
    )  # metrics.jsonl is read leniently: a crash may have cut a line


def test_an_input_is_a_function_of_its_seed_target_and_number(fuzz, tmp_path):
    runs = [fuzz.fuzz(tmp_path / str(i), 60, 5)[0] for i in range(2) if (tmp_path / str(i)).mkdir() is None]
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


# -- known tables in odd files

SEED = 2


@pytest.fixture
def cases(fuzz):
    from fuzz_cases import tries

    yield tries
    for name in [name for name in sys.modules if name.startswith("fuzz_cases")]:
        sys.modules.pop(name)


@pytest.fixture
def memory_path(tmp_path: Path):
    """A directory in memory, where the system has one: a store is brought to the disk, which takes time."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else tmp_path) as directory:
        yield Path(directory)


def test_known_tables_in_odd_files_come_out_as_they_were_or_with_a_word(cases, memory_path):
    counts, bugs, _ = cases.fuzz_tables(memory_path, range(60), SEED)
    assert bugs == []
    assert len({name for name, _ in counts}) == 10
    same = sum(n for (_, outcome), n in counts.items() if outcome == "same")
    assert same > 0.8 * counts.total()


def test_a_table_is_a_function_of_its_seed_and_number(cases):
    assert all(cases.case_of(3, number) == cases.case_of(3, number) for number in range(30))
    assert cases.case_of(3, 0) != cases.case_of(4, 0)


def _changing(change):
    """A converter that hands a changed table to the real one."""

    def convert(source, *arguments, **options):
        return ep3stream.convert(change(source), *arguments, **options)

    return convert


def _one_value_more(table: pa.Table) -> pa.Table:
    values = table.column("n").cast(pa.float64()).to_pylist()
    return table.set_column(0, "n", pa.array([*values[:-1], values[-1] + 1]))


def _two_categories_in_one(table: pa.Table) -> pa.Table:
    merged = ["red" if value == "green" else value for value in table.column("k").to_pylist()]
    return table.set_column(table.column_names.index("k"), "k", pa.array(merged))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_one_value_more, "1 rows differ"),
        (_two_categories_in_one, "values"),
        (lambda table: table.slice(0, 19), "19 rows instead of 20"),
        (lambda table: table.take([1, 0, *range(2, 20)]), "rows differ"),
        (lambda table: table.drop(["n"]), "is not in the store"),
        (lambda table: table.append_column("z", table.column("n")), "a feature that no column has"),
    ],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_converter_that_changes_loses_or_merges_a_value_is_reported(
    cases, tmp_path, change, problem, shuffle
):
    case = _case(cases, shuffle=shuffle)
    (tmp_path / "sound").mkdir()
    assert cases.try_case(case, tmp_path / "sound").name == "same"
    (tmp_path / "changed").mkdir()
    outcome = cases.try_case(case, tmp_path / "changed", _changing(change))
    # In random order nobody can tell that two rows changed places.
    is_hidden = shuffle and problem == "rows differ"
    assert outcome.name == ("same" if is_hidden else "BUG different")
    assert is_hidden or problem in outcome.detail


def _case(cases, **settings):
    from fuzz_cases.cases import Case, Settings
    from fuzz_cases.known_tables import Column, Table
    from fuzz_cases.table_files import FrameWay

    n = tuple(row / 4 for row in range(20))
    k = tuple(("red", "green", "blue")[row % 3] for row in range(20))
    table = Table((Column("n", "number", n), Column("k", "category", k)), (Column("y", "number", n[::-1]),))
    return Case(table, FrameWay(kind="arrow table"), Settings(**settings))


def test_a_refusal_of_a_sound_table_is_a_bug(cases, tmp_path):
    def refuse(*_: object, **__: object) -> None:
        raise SourceError("t.csv: no.")

    assert cases.try_case(_case(cases), tmp_path, refuse).name == "BUG refused"


def test_any_other_exception_is_a_bug_and_is_reported_with_its_table(cases, tmp_path):
    def fail(*_: object, **__: object) -> None:
        raise KeyError("n")

    counts, bugs, _ = cases.fuzz_tables(tmp_path, range(2), seed=0, convert=fail)
    assert {outcome for _, outcome in counts} == {"BUG traceback"}
    assert "--seed 0 --only 'tables:0' BUG traceback" in bugs[0]
    assert "KeyError" in bugs[0]


def test_something_left_half_written_is_a_bug(cases, tmp_path):
    def leave(source, store, *_: object, **__: object) -> None:
        (store.parent / f".{store.name}.convert").mkdir()
        raise SourceError("t.csv: no.")

    assert cases.try_case(_case(cases), tmp_path, leave).name == "BUG left over"


def test_a_table_that_shows_a_bug_is_reduced_to_the_column_and_the_row_that_do(cases, tmp_path):
    small = cases.reduced(
        _case(cases, shuffle=True, format="hdf5"), tmp_path, _changing(_two_categories_in_one)
    )
    assert small.settings == type(small.settings)()
    assert [column.name for column in small.table.features] == ["k"]
    assert small.table.n_rows <= 2
