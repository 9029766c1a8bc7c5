"""Tries cases: write, convert, compare; reduces those that end in a fault; counts outcomes.

Outcomes: `same`; `told`, where a warning names the column whose values differ; `refused` with an error that says
something, where the table or the settings give a reason for it; anything else is a bug.
"""

from __future__ import annotations

import logging
import re
import shutil
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

import ep3stream
from ep3stream.config import ConvertConfig
from ep3stream.errors import Ep3streamError
from fuzz_cases.cases import Case, Settings, case_of, format_of
from fuzz_cases.known_tables import Column
from fuzz_cases.predictions import differences
from fuzz_cases.text_files import CsvWay
from fuzz_cases.truth import DEFAULT_NUMBERS, DEFAULT_PARTS, Comparison, Expected, expected, text_of
from fuzz_cases.written import Written, folders

MAX_TRIES = 150


_TELLS = re.compile(
    r"distinct|different|2\^53|moves values|same number|taken as|read as|look like|does not have|differ in blanks|"
    r"stored as 0|becomes categories"
)


class Killed(BaseException):
    """Stands for a signal that ends the process."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended; `detail` is the reason of a refusal, or what is wrong."""

    name: str
    detail: str = ""

    @property
    def is_bug(self) -> bool:
        """Whether it is neither right nor a clean refusal."""
        return self.name.startswith("BUG")

    @property
    def signature(self) -> str:
        """The same for faults of the same kind."""
        return self.name + ": " + reason(self.detail)


def reason(detail: str) -> str:
    """The message without what differs from table to table."""
    first = detail.partition("; said: ")[0].strip().split("\n")[-1]
    first = re.sub(r"(/dev/shm|/tmp)/\S+?(?=[:, ]|$)", "FILE", first)
    first = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", first)
    first = re.sub(r"'\.\.\.'(, '\.\.\.')+", "'...'", first)
    return re.sub(r"[-+]?\d[\d.e+]*", "N", first)[:160]


class _Messages(logging.Handler):
    """What the package says."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def telling(self, column: str) -> str:
        """The message that names the column, or a part of it, and says that values change or merge; else nothing."""
        named = re.compile(rf"(?s)['\"]{re.escape(column)}(\.\w+)?['\"]|{re.escape(repr(column))}")
        return next((said for said in self.said if named.search(said) and _TELLS.search(said)), "")


@contextmanager
def _listening() -> Iterator[_Messages]:
    logger, messages = logging.getLogger("ep3stream"), _Messages()
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(messages)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield messages
    finally:
        logger.removeHandler(messages)
        logger.setLevel(level)
        logger.propagate = propagate


def try_case(case: Case, folder: Path, convert: Callable[..., Any] = ep3stream.convert) -> Outcome:
    """Write, convert and compare one case in an empty folder."""
    try:
        return _tried(case, folder, convert)
    except Exception as error:
        return Outcome("BUG of the fuzzer", "".join(traceback.format_exception(error)[-3:]))


def _tried(case: Case, folder: Path, convert: Callable[..., Any]) -> Outcome:
    (folder / "source").mkdir()
    table, way, later = case.table, case.way, None
    if case.settings.split_file:
        (folder / "later").mkdir()
        n_first = table.n_rows * 2 // 3
        way = replace(way, partitioned=False) if hasattr(way, "partitioned") else way
        later = _plain_marks(way, way).write(table.rows(np.arange(n_first, table.n_rows)), folder / "later")
        table = table.rows(np.arange(n_first))
    written = replace(way.write(table, folder / "source"), later=later)
    more = {"split_files": {"later": later.source()}} if later else {}
    config = case.settings.config(written.truth, written.options, format=case.settings.format, **more)
    store = folder / ("s.h5" if case.settings.format == "hdf5" else "s.zarr")
    outcome = _converted(written, case.settings, config, store, convert, case.settings.kill_at)
    is_over = outcome.is_bug or outcome.name == "refused" or bool(written.strays)
    if is_over:
        return outcome
    if wrong := _predicted(written, case, store):
        return Outcome("BUG predicted", wrong)
    if case.settings.like is None:
        return outcome
    return _like(case, store, folder, outcome, convert)


def _predicted(written: Written, case: Case, store: Path) -> str:
    """What is wrong with the features of which the rows would be predicted."""
    settings, truth = case.settings, written.truth
    is_array = truth.dtype is not None or getattr(case.way, "integer_names", False)
    if is_array or settings.shuffle or settings.splits > 1 or settings.split_file:
        return ""
    policies = settings.policies(truth)
    dropping = [column.gaps for column in truth.features if policies[column.name] == "drop"]
    is_unusable = np.logical_or.reduce([*dropping, np.zeros(truth.n_rows, bool)])
    try:
        return differences(written, store, expected(written, settings).kept, is_unusable)
    except Ep3streamError as error:
        # Of a category that only rows without a target have, there is no code.
        has_codes = settings.categories != "onehot" and "is not among" in str(error)
        return "" if has_codes else f"{type(error).__name__}: {error}"


def _plain_marks(way: Any, first: Any) -> Any:
    """A way for a later file: which words are gaps, and how dates are written, is as in the first file."""
    if not isinstance(way, CsvWay):
        return way
    first = first if isinstance(first, CsvWay) else CsvWay()
    return replace(way, has_stray=False, gap_marker=first.gap_marker, date_format=first.date_format)


def _like(case: Case, store: Path, folder: Path, first: Outcome, convert: Callable[..., Any]) -> Outcome:
    """The same rows, written once more in another way, converted like the first store."""
    (folder / "again").mkdir()
    table = case.table
    way = _plain_marks(case.settings.like, case.way)
    if getattr(way, "integer_names", False) or getattr(case.way, "integer_names", False):
        return first
    written = way.write(table, folder / "again")
    settings = replace(case.settings, like=None, kill_at=0, shuffle=False, splits=1)
    crossed = type(way) is not type(case.way)
    refusals = written.may_refuse + ((r"but was",) if crossed else ())
    # 0 and 1 are no booleans, `true` is no number.
    if any(column.kind == "boolean" for column in table.columns):
        if settings.invalid == "drop":
            return first
        refusals += (r"holds bool|read as (bool|double)|is no (number|truth value)",)
    # With a gap, pandas has floats for whole numbers, which are others beyond 2^53.
    if any(_may_be_rounded(column) for column in table.columns):
        refusals += (r"is not among",)
    config = replace(settings, missing=None, dates=(), categories=None).config(written.truth, {"like": store})
    written = replace(written, may_refuse=refusals, fills_are_means=False)
    outcome = _converted(written, settings, config, folder / "t.zarr", convert, 0)
    if outcome.name == "BUG merged untold":  # The first conversion has told.
        return first
    if outcome.is_bug:
        return Outcome(f"{outcome.name} (like)", outcome.detail)
    return outcome if outcome.name == "refused" else first


def _may_be_rounded(column: Column) -> bool:
    known = [value for value in column.values if isinstance(value, int)]
    return bool(column.gaps.any()) and max(map(abs, known), default=0) > 2**53


def _converted(
    written: Written,
    settings: Settings,
    config: ConvertConfig,
    store: Path,
    convert: Callable[..., Any],
    kill_at: int,
) -> Outcome:
    want = expected(written, settings)
    if written.later is not None:
        want = want.beside(expected(written.later, settings))
    with _listening() as messages:
        try:
            if kill_at:
                _cut_off(written, store, config, convert, kill_at)
            convert(written.source(), store, config, **written.call)
        except Ep3streamError as error:
            return _refusal(str(error), type(error).__name__, want, store)
        except Exception as error:
            where = "".join(line[:400] for line in traceback.format_exception(error)[-4:])
            return Outcome("BUG traceback", where)
        if left := _left_over(store, True):
            return Outcome("BUG left over", left)
        if kill_at and (difference := _differs_from_one_go(written, store, config, convert)):
            return Outcome("BUG not the same twice", difference)
    if want.must_refuse is not None:
        return _not_refused(written, want, messages)
    return _compared(written, settings, want, store, messages)


def _not_refused(written: Written, want: Expected, messages: _Messages) -> Outcome:
    for name, _, _ in written.strays:
        if said := messages.telling(name):
            return Outcome("told", f"a stray text: {said}")
    return Outcome("BUG not refused", f"{want.must_refuse}; {written.strays}; said: {messages.said}")


def _refusal(message: str, error: str, want: Expected, store: Path) -> Outcome:
    if not message or len(message) > 2000 or "\n" in message:
        return Outcome("BUG refused without a sentence", f"{error}: {message[:3000]}")
    if left := _left_over(store, False):
        return Outcome("BUG left over", left)
    patterns = (*want.may_refuse, *([want.must_refuse] if want.must_refuse else []))
    if any(re.search(pattern, message) for pattern in patterns):
        return Outcome("refused", message)
    return Outcome("BUG refused", f"{error}: {message}")


def _left_over(store: Path, is_made: bool) -> str:
    """What lies beside the store that should not, or the store if there should be none."""
    here = sorted(path.name for path in store.parent.iterdir())
    allowed = {"source", "again", "later", "s.zarr", "s.h5", "once"} - (
        {store.name} if not is_made else set()
    )
    allowed |= {store.name} if is_made else set()
    return ", ".join(name for name in here if name not in allowed)


def _cut_off(
    written: Written, store: Path, config: ConvertConfig, convert: Callable[..., Any], at: int
) -> None:
    reports = 0

    def kill(_: object) -> None:
        nonlocal reports
        reports += 1
        if reports == at:
            raise Killed

    try:
        convert(written.source(), store, config, progress=kill, **written.call)
    except Killed:
        return
    (shutil.rmtree if store.is_dir() else Path.unlink)(store)  # It had fewer reports.


def _differs_from_one_go(
    written: Written, store: Path, config: ConvertConfig, convert: Callable[..., Any]
) -> str:
    """A conversion in one go, with another memory, against the one that was killed and went on."""
    once = store.parent / "once"
    once.mkdir()
    other = replace(config, memory_bytes=3 * config.memory_bytes)
    whole = convert(written.source(), once / store.name, other, **written.call)
    with ep3stream.open_store(store) as made:
        if made.manifest.to_json() != whole.to_json():
            return "killed and resumed, the store has another manifest"
    return ""


def _compared(
    written: Written, settings: Settings, want: Expected, store: Path, messages: _Messages
) -> Outcome:
    parts = [(written, want.kept), *([(written.later, want.later_kept)] if written.later else [])]
    problems: list[tuple[str, str]] = []
    flavours: dict[str, str] = {}
    with ep3stream.open_store(store) as made:
        for part, kept in parts:
            is_later = part is written.later
            names = [name for name in made.manifest.splits if (name == "later") == is_later]
            blocks = [_rows_of(made, name) for name in names]
            x, y = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
            truth = part.truth.rows(kept)
            problems += Comparison(
                made.manifest,
                x,
                y,
                truth,
                is_ordered=not settings.shuffle and len(blocks) == 1,
                fills_are_means=part.fills_are_means and len(blocks) == 1 and not is_later,
                dates=settings.dates
                or (DEFAULT_NUMBERS if settings.categories == "onehot" else DEFAULT_PARTS),
                is_later=is_later,
                all_labels=frozenset(map(text_of, part.truth.targets[0].values)),
            ).run()
            flavours |= {column.name: f"{column.kind}, {column.flavour}" for column in truth.columns}
            n_dropped = part.truth.n_rows - truth.n_rows
            if n_dropped and not any(re.search(r"drop|left out|leave", said) for said in messages.said):
                problems.append(("", f"{n_dropped} rows are left out untold"))
    for name, what in problems:
        if not name or not messages.telling(name):
            kind = "BUG merged untold" if what.startswith("merged") else "BUG different"
            said = [one[:200] for one in messages.said]
            return Outcome(kind, f"({flavours.get(name, '')}) {name!r}: {what}; said: {said}"[:900])
    if problems:
        return Outcome("told", f"{problems[0][1][:40]}: {messages.telling(problems[0][0])}")
    return Outcome("same")


def _rows_of(store: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    reader = store.split(split)
    x, y = reader.read_rows(np.arange(reader.info.n_rows))
    return x, y


# -- reducing


def reduced(case: Case, folder: Path, convert: Callable[..., Any] = ep3stream.convert) -> Case:
    """A smaller case, plainer in its ways, that ends as this one does."""
    places = folders(folder)
    wanted, tries = _quiet(case, next(places), convert).signature, 0

    def still(smaller: Case) -> bool:
        nonlocal tries
        tries += 1
        return tries <= MAX_TRIES and _quiet(smaller, next(places), convert).signature == wanted

    changed = True
    while changed and tries < MAX_TRIES:
        changed = False
        for smaller in _smaller(case):
            if still(smaller):
                case, changed = smaller, True
                break
    return case


def _quiet(case: Case, folder: Path, convert: Callable[..., Any]) -> Outcome:
    try:
        return try_case(case, folder, convert)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _smaller(case: Case) -> Iterator[Case]:
    table, n_rows = case.table, case.table.n_rows
    for part in ("settings", "way"):
        held = getattr(case, part)
        for one in fields(held):
            if (
                one.name != "seed"
                and (part, one.name) != ("way", "format")
                and getattr(held, one.name) != one.default
            ):
                yield replace(case, **{part: replace(held, **{one.name: one.default})})
    if len(table.features) > 1:
        for j in range(len(table.features)):
            yield replace(case, table=replace(table, features=table.features[:j] + table.features[j + 1 :]))
    for step in sorted({n_rows // 2, n_rows // 8, 1} - {0}, reverse=True):
        for start in range(0, n_rows, step):
            kept = np.r_[0:start, min(start + step, n_rows) : n_rows]
            if len(kept):
                yield replace(case, table=table.rows(kept))


def shown(case: Case) -> str:
    """A case in a few lines: columns, way, settings but for those that are plain."""

    def odd(held: Any) -> str:
        stated = [
            f"{one.name}={getattr(held, one.name)!r}"
            for one in fields(held)
            if getattr(held, one.name) != one.default
        ]
        return f"{type(held).__name__}({', '.join(stated)})"

    columns = [
        f"  {c.name!r} {c.kind}{' (stated)' if c.is_stated else ''} {c.flavour}: {str(c.values[:8])[:300]}"
        for c in case.table.columns
    ]
    return "\n".join([f"  {odd(case.way)} {odd(case.settings)}, {case.table.n_rows} rows", *columns])


def fuzz_tables(
    directory: Path,
    numbers: Sequence[int],
    seed: int,
    without: frozenset[str] = frozenset(),
    convert: Callable[..., Any] = ep3stream.convert,
    max_reduced: int = 10,
) -> tuple[Counter[tuple[str, str]], list[str], Counter[str]]:
    """(format, outcome) -> how many; a report of each fault, the first of a kind reduced; reasons of refusals."""
    counts: Counter[tuple[str, str]] = Counter()
    reasons: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    bugs: list[str] = []
    places = folders(directory)
    for number in numbers:
        case, folder = case_of(seed, number, without), next(places)
        outcome = try_case(case, folder, convert)
        shutil.rmtree(folder)
        counts[f"tables, {format_of(number)}", outcome.name] += 1
        if outcome.name in ("refused", "told"):
            reasons[f"{outcome.name}: {reason(outcome.detail)}"] += 1
        if outcome.is_bug:
            kinds[outcome.signature] += 1
            report = f"--seed {seed} --only 'tables:{number}' {outcome.name}\n  {outcome.detail}"
            if kinds[outcome.signature] == 1 and len(kinds) <= max_reduced:
                report += f"\n{shown(reduced(case, next(places), convert))}"
            bugs.append(report)
    return counts, bugs, reasons
