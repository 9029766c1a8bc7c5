"""What a store must hold, worked out from the known rows alone, and where a store differs from it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fuzz_cases.cases import Settings
from fuzz_cases.known_tables import EPOCH, Column, Table
from fuzz_cases.written import Written

GAP = "(missing)"
DAY_US = 86_400_000_000
# The features that a date or time becomes unless --dates says otherwise, and those that each kind has.
DEFAULT_PARTS = ("days", "yearday", "minute", "month", "weekday", "hour")
DEFAULT_NUMBERS = ("days", "month", "weekday", "hour")
PARTS = {
    "date": ("days", "yearday", "month", "day", "weekday"),
    "timestamp": ("days", "yearday", "month", "day", "weekday", "minute", "hour"),
    "zoned": ("days", "yearday", "month", "day", "weekday", "minute", "hour"),
    "time": ("minute", "hour"),
}


# -- what must come out


@dataclass(frozen=True)
class Expected:
    """kept: the rows of the truth that the store must have. must_refuse: a pattern; then there is to be no store."""

    kept: np.ndarray
    must_refuse: str | None
    may_refuse: tuple[str, ...]
    later_kept: np.ndarray | None = None

    def beside(self, later: Expected) -> Expected:
        """With the rows of a later file, which may have categories that the first one has not."""
        return Expected(
            self.kept,
            self.must_refuse or later.must_refuse,
            (*self.may_refuse, *later.may_refuse, r"is not among"),
            later.kept,
        )


def expected(written: Written, settings: Settings) -> Expected:
    """What must become of a written table under the settings."""
    truth, n_rows = written.truth, written.truth.n_rows
    refusals = list(written.may_refuse)
    must = None
    left_out = np.zeros(n_rows, bool)
    gaps = {column.name: column.gaps.copy() for column in truth.columns}
    for name, row, word in written.strays:
        gaps[name][row] = False
        if settings.invalid == "drop":
            left_out[row] = True
            refusals.append(r"every row|none of|only text")
        else:
            must = rf"(?s)row \d.*{re.escape(word.strip()[:5])}|{re.escape(word.strip()[:5])}.*row \d"
    policies, for_strays = settings.policies(truth), left_out.copy()
    for column in truth.columns:
        if policies[column.name] == "error" and (gaps[column.name] & ~for_strays).any():
            must = must or r"missing"
        if policies[column.name] == "drop" or column in truth.targets:
            left_out |= gaps[column.name]
    kept = np.flatnonzero(~left_out)
    rows = truth.rows(kept)
    if not len(kept):
        refusals.append(r"every row|none of the|no row")
    if truth.is_classification and len({str(v) for v in rows.targets[0].values}) < 2:
        refusals.append(r"at least two classes|needs at least two|every row")
    for column in rows.columns:
        if all(value is None for value in column.values):
            refusals.append(r"no value|is empty")
        if column.kind == "category" and GAP in column.values:
            refusals.append(r"\(missing\)")
    if settings.splits > 1:
        refusals.append(r"got none of|first split")
    return Expected(kept, must, tuple(refusals))


def _exact(column: Column) -> np.ndarray:
    """The values as long doubles, which hold every int64 and float64; NaN for gaps."""
    values = [_as_number(value) for value in column.values]
    made = np.full(len(values), np.nan, np.longdouble)
    for row, value in enumerate(values):
        if value is not None:
            made[row] = np.longdouble(str(value)) if isinstance(value, int) else value
    return made


def _distinct(column: Column) -> int:
    """How many distinct values; whole numbers beside floats count as the floats they would be in one array.

    Of float32 the same, numbers with fractions that differ by 1e-12 of the largest are taken as computed in two ways.
    """
    values = {_as_number(value) for value in column.values if value is not None}
    if not any(isinstance(value, float) for value in values):
        return len(values)
    ordered = np.unique(np.array([float(value) for value in values]))
    if (ordered == np.rint(ordered)).all():
        return len(ordered)
    with np.errstate(over="ignore", under="ignore"):
        stored = ordered.astype(np.float32)
    noise = 1e-12 * np.abs(ordered).max()
    return 1 + np.count_nonzero((np.diff(ordered) > noise) | (stored[1:] != stored[:-1]))


def _as_number(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return None if value is None else int(value)
    return value.total_seconds() if hasattr(value, "total_seconds") else value


def _part(column: Column, part: str) -> np.ndarray:
    """A part of each date or time as float64, by Python's own calendar; NaN for gaps."""
    made = np.full(len(column.values), np.nan)
    for row, value in enumerate(column.values):
        if value is None:
            continue
        if part in ("month", "day"):
            made[row] = getattr(value, part)
        elif part == "weekday":
            made[row] = value.weekday()
        elif part == "yearday":
            made[row] = value.timetuple().tm_yday
        elif part in ("hour", "minute"):
            seconds = (value.hour * 60 + value.minute) * 60 + value.second + value.microsecond / 1e6
            made[row] = seconds / (3600 if part == "hour" else 60)
        elif column.kind == "date":
            made[row] = (value - EPOCH.date()).days
        else:
            since = value - EPOCH
            made[row] = ((since.days * 86400 + since.seconds) * 10**6 + since.microseconds) / DAY_US
    return made


@dataclass
class Comparison:
    """The rows of a store against the truth, feature by feature.

    fills_are_means: whether gaps were filled with the means of these rows. dates: the parts that were asked for.
    is_later: whether the columns were decided by other rows. all_labels: those of the rows left out, too.
    problems: the column and what is wrong with it.
    """

    manifest: Any
    x: np.ndarray
    y: np.ndarray
    truth: Table
    is_ordered: bool
    fills_are_means: bool
    dates: tuple[str, ...] = DEFAULT_PARTS
    is_later: bool = False
    all_labels: frozenset[str] = frozenset()
    problems: list[tuple[str, str]] = field(default_factory=list)

    def run(self) -> list[tuple[str, str]]:
        """Every difference as (column, what)."""
        if len(self.x) != self.truth.n_rows:
            return [("", f"{len(self.x)} rows instead of {self.truth.n_rows}")]
        self.names = list(self.manifest.feature_names)
        self.used: set[str] = set()
        self.stored: list[np.ndarray] = []
        self.wanted: list[np.ndarray] = []
        self.of: list[str] = []
        described = [one for one in self.manifest.columns["columns"] if one["kind"] != "indicator"]
        for column in self.truth.features:
            mine = [one for one in described if one.get("source", one["name"]) == column.name]
            if not mine:
                self._wrong(column, "is not in the store")
            elif column.kind == "category":
                self._category(column, mine[0])
            else:
                self._numeric(column, mine)
        for name in self.names:
            if name not in self.used:
                self.problems.append((name, "a feature that no column has"))
        self._targets()
        self._rows()
        return self.problems

    def _wrong(self, column: Column, what: str) -> None:
        self.problems.append((column.name, what))

    def _put(self, name: str, stored: np.ndarray, wanted: np.ndarray) -> None:
        self.of.append(name)
        self.stored.append(stored)
        self.wanted.append(wanted)

    def _feature(self, column: Column, name: str) -> np.ndarray | None:
        if name not in self.names:
            self._wrong(column, f"there is no feature {name!r}")
            return None
        self.used.add(name)
        return self.x[:, self.names.index(name)]

    def _category(self, column: Column, described: dict[str, Any]) -> None:
        if described["kind"] != "category":
            self._wrong(column, f"became {described['kind']}, read as {described.get('type')}")
            self.used |= {name for name in self.names if name.startswith(described["name"])}
            return
        texts = np.array([GAP if value is None else text_of(value) for value in column.values], object)
        values, known = [text_of(value) for value in described["values"]], set(texts)
        if self.is_later and set(values) >= known:
            pass
        elif set(values) != known:
            self._wrong(column, f"values {sorted(values)[:6]} instead of {sorted(known)[:6]}")
        if described["encoding"] == "codes":
            stored = self._feature(column, described["name"])
            place = {value: index for index, value in enumerate(values)}
            if stored is not None:
                self._put(column.name, stored, np.array([place.get(text, -1) for text in texts], np.float32))
            return
        for value in described["values"]:
            stored = self._feature(column, f"{described['name']}={value}")
            if stored is not None:
                self._put(column.name, stored, (texts == text_of(value)).astype(np.float32))

    def _numeric(self, column: Column, described: list[dict[str, Any]]) -> None:
        for one in described:
            if one["kind"] != "numeric" and one.get("part") is None:
                self._wrong(column, f"became a {one['kind']} of {one.get('values', [])[:4]}")
                self.used |= {name for name in self.names if name.startswith(one["name"])}
                return
        wanted: tuple[str | None, ...] = (None,)
        if column.kind in PARTS:
            wanted = tuple(part for part in self.dates if part in PARTS[column.kind])
        found = tuple(one.get("part") for one in described)
        if sorted(map(str, found)) != sorted(map(str, wanted)):
            self._wrong(
                column, f"became the parts {found} instead of {wanted}, read as {described[0].get('type')}"
            )
            self.used |= {one["name"] for one in described}
            return
        for one in described:
            stored = self._feature(column, one["name"])
            if stored is not None:
                exact = _exact(column) if one.get("part") is None else _part(column, one["part"])
                if one["kind"] == "category":
                    codes = np.floor(exact) - one["values"][0]
                    self._put(column.name, stored, np.where(column.gaps, -1, codes).astype(np.float32))
                    continue
                self._number(column, one, stored, exact, column.gaps)
        self._indicator(column, [one["name"] for one in described])
        distinct = _distinct(column)
        features = [
            self.x[:, self.names.index(one["name"])] for one in described if one["name"] in self.names
        ]
        if "days" in found or column.kind not in PARTS or column.kind == "time":
            self._merged(column, distinct, features)

    def _merged(self, column: Column, distinct: int, stored: list[np.ndarray]) -> None:
        known = ~column.gaps
        left = (
            len(np.unique(np.column_stack([feature[known] for feature in stored]), axis=0)) if stored else 0
        )
        if self.is_ordered and left < distinct:
            self._wrong(column, f"merged: {distinct} different values became {left}")

    def _number(
        self,
        column: Column,
        described: dict[str, Any],
        stored: np.ndarray,
        exact: np.ndarray,
        gaps: np.ndarray,
    ) -> None:
        offset = float(described.get("offset", 0.0))
        wanted, stored = self._snapped(
            stored, exact, offset, described.get("part") in ("days", "hour", "minute")
        )
        if gaps.any():
            fill = described.get("fill", np.nan)
            wanted[gaps] = stored.dtype.type(fill)
            known = exact[~gaps] - np.longdouble(offset)
            if self.fills_are_means and len(known):
                mean, scale = float(np.mean(known)), float(np.max(np.abs(known)))
                # Whole numbers with gaps may come as float64.
                scale += np.spacing(float(np.max(np.abs(exact[~gaps])))) * 1e6
                if not abs(fill - mean) <= 1e-6 * scale + 1e-37:
                    self._wrong(
                        column, f"is filled with {fill} + {offset} where the mean is {mean} + {offset}"
                    )
        self._put(column.name, stored, wanted)

    def _snapped(
        self, stored: np.ndarray, exact: np.ndarray, offset: float, is_reckoned: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """What is wanted, and the stored values with those right to the last bit set to what is wanted.

        A whole number beyond 2^53 may be rounded once or, by way of float64, twice; the fraction of a day depends
        on the order of the operations.
        """
        dtype = stored.dtype.type
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            float64 = exact.astype(np.float64)
            wanted = (float64 - offset).astype(dtype)
            others = (exact - np.longdouble(offset)).astype(dtype)
            slack = np.spacing(np.abs(wanted)) if is_reckoned else np.zeros_like(wanted)
        if self.is_ordered:
            near = (stored == others) | (np.abs(stored - wanted) <= slack)
            return wanted, np.where(near, wanted, stored)
        wanted = np.where(np.isin(others, stored), others, wanted)
        snapped, strange = stored.copy(), ~np.isin(stored, wanted)
        for value, width in zip(wanted, slack, strict=True):
            if not np.isnan(value):
                snapped[strange & (np.abs(stored - value) <= width)] = value
        return wanted, snapped

    def _indicator(self, column: Column, names: list[str]) -> None:
        found = [
            name
            for name in (f"{base} {GAP}" for base in dict.fromkeys((*names, column.name)))
            if name in self.names
        ]
        if column.gaps.any() and not found and not self.is_later:
            self._wrong(column, "has gaps, but no indicator tells where")
        for name in found:
            stored = self._feature(column, name)
            assert stored is not None
            self._put(column.name, stored, column.gaps.astype(np.float32))

    def _targets(self) -> None:
        if (self.manifest.class_names is not None) != self.truth.is_classification:
            classes = self.manifest.class_names
            self._wrong(
                self.truth.targets[0],
                f"is learned as {'numbers' if classes is None else f'classes {classes[:5]}'}",
            )
            return
        if self.truth.is_classification:
            (column,) = self.truth.targets
            labels = np.array([text_of(value) for value in column.values], object)
            names = [text_of(name) for name in self.manifest.class_names]
            if column.kind == "boolean":
                names = [{"1": "true", "0": "false"}.get(name.lower(), name.lower()) for name in names]
            if self.is_later:  # In a later file 1.0 is the class 1, if that is the only one of this number.
                labels = np.array([_known_as(label, names) for label in labels], object)
            # Of arrays, the labels of rows that are left out are classes too.
            is_known = self.is_later or set(names) <= self.all_labels
            if len(set(names)) < len(names) or not (set(names) >= set(labels) and is_known):
                self._wrong(column, f"classes {names[:6]} instead of {sorted(set(labels))[:6]}")
                return
            place = {name: index for index, name in enumerate(names)}
            self._put(column.name, self.y, np.array([place[label] for label in labels], self.y.dtype))
            return
        recorded = {one.get("source", one["name"]): one for one in self.manifest.columns.get("targets", [])}
        if self.y.shape[1] != len(self.truth.targets):
            self._wrong(self.truth.targets[0], f"became {self.y.shape[1]} targets")
            return
        for j, column in enumerate(self.truth.targets):
            offset = float(recorded.get(column.name, {}).get("offset", 0.0))
            wanted, stored = self._snapped(self.y[:, j], _exact(column), offset, False)
            self._put(column.name, stored, wanted)
            self._merged(column, _distinct(column), [self.y[:, j]])

    def _rows(self) -> None:
        """Value by value; rows in any order as sorted lists of rows."""
        if not self.wanted:
            return
        wanted, stored = (np.column_stack([*map(np.float64, one)]) for one in (self.wanted, self.stored))
        if not self.is_ordered:
            wanted, stored = (rows[np.lexsort(rows.T[::-1])] for rows in (wanted, stored))
        differs = ~((wanted == stored) | (np.isnan(wanted) & np.isnan(stored)))
        for name in dict.fromkeys(self.of):
            columns = [j for j, of in enumerate(self.of) if of == name]
            rows = np.flatnonzero(differs[:, columns].any(axis=1))
            if len(rows):
                got, right = stored[rows[0], columns], wanted[rows[0], columns]
                self.problems.append(
                    (name, f"{len(rows)} rows differ, the first at {rows[0]}: {got} for {right}")
                )


def _known_as(text: str, names: list[str]) -> str:
    """The name that is the text, or else the only one that is the same number."""
    if text in names:
        return text
    same = [name for name in names if (number := _float(name)) is not None and number == _float(text)]
    return same[0] if len(same) == 1 else text


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def text_of(value: Any) -> str:
    """The text of a category; 1.0 is the same as 1 if both are numbers."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return ("true" if value else "false") if isinstance(value, bool) else str(value)
