"""The columns of tables: the kind of values each holds, which are read, and the features they become.

A number stays a number, a text becomes a category, a date becomes its parts (`when.month`), a boolean 0 or 1.
`text_rules` says what the settings state of columns before their types are known. `plan_columns` decides from the
types of a file and the options of the config. `ColumnPlan.cells` then turns each batch of rows into arrays: null
and an empty cell become NaN or null, and the encoder decides about them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ep3stream.config import ConvertConfig, DatePart, DateParts, Task
from ep3stream.conversion.date_parts import CODED_PARTS, Times, seconds
from ep3stream.errors import SourceError
from ep3stream.formats.source import Family, FeatureColumn, TargetColumns
from ep3stream.formats.text_cells import TextRules, is_text

# The parts of a date or time that become features unless --dates says otherwise.
_DEFAULT_PARTS: dict[DateParts, tuple[DatePart, ...]] = {
    "codes": ("days", "yearday", "minute", "month", "weekday", "hour"),
    "numbers": ("days", "month", "weekday", "hour"),
}

# The parts that each kind of date or time has.
_OF_DAY: tuple[DatePart, ...] = ("days", "yearday", "month", "day", "weekday")
_PARTS: dict[Family, tuple[DatePart, ...]] = {
    "date": _OF_DAY,
    "timestamp": (*_OF_DAY, "minute", "hour"),
    "zoned timestamp": (*_OF_DAY, "minute", "hour"),
    "time of day": ("minute", "hour"),
}

# The arrow type as which columns of each kind are read.
_READ_TYPES: dict[Family, pa.DataType] = {
    "number": pa.float64(),
    "integer": pa.int64(),
    "boolean": pa.bool_(),
    "text": pa.string(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
    "zoned timestamp": pa.timestamp("us", "UTC"),
    "time of day": pa.time64("us"),
    "duration": pa.duration("us"),
}

# Which arrow types belong to which kind; the first test that holds decides.
_TESTS: tuple[tuple[Callable[[pa.DataType], bool], Family], ...] = (
    (pa.types.is_boolean, "boolean"),
    (pa.types.is_integer, "integer"),
    (pa.types.is_floating, "number"),
    (pa.types.is_decimal, "number"),
    (pa.types.is_string, "text"),
    (pa.types.is_large_string, "text"),
    (lambda dtype: bool(dtype == pa.string_view()), "text"),
    (pa.types.is_date, "date"),
    (pa.types.is_time, "time of day"),
    (pa.types.is_duration, "duration"),
    (lambda dtype: pa.types.is_timestamp(dtype) and dtype.tz is None, "timestamp"),
    (pa.types.is_timestamp, "zoned timestamp"),
)

# Below this float64 holds every whole number.
_FLOAT64_WHOLE = 2.0**53

# A name given for an option is a pattern if it has one of these letters.
_MAGIC = frozenset("*?[")

Cells = tuple[tuple[NDArray[Any], ...], tuple[pa.DictionaryArray, ...], NDArray[Any] | pa.DictionaryArray]


def family_of(
    dtype: pa.DataType, where: str, remedy: str = "convert it, or leave it out with --drop"
) -> Family:
    """The kind of values that an arrow type holds.

    Raises SourceError, in which `where` names file and column, for a type of another kind or an empty column.
    """
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    if pa.types.is_null(dtype):
        raise SourceError(f"{where} is empty from row 1 on; fill it in or leave it out with --drop")
    for test, family in _TESTS:
        if test(dtype):
            return family
    raise SourceError(f"{where} holds {dtype}, neither numbers nor UTF-8 text; {remedy}")


def read_type(family: Family, dtype: pa.DataType | None = None) -> pa.DataType:
    """The type as which columns of the family are read if the file states none and `dtype` was inferred."""
    if dtype is not None and (
        dtype == pa.uint64() or dtype == pa.timestamp("ns", getattr(dtype, "tz", None))
    ):
        return dtype  # Beyond int64, or with more digits than microseconds have.
    return _READ_TYPES[family]


def is_time(family: Family) -> bool:
    """Whether the family is one of dates or times, which have parts."""
    return family in _PARTS


def _parts_of(family: Family, wanted: Sequence[DatePart], stored: DateParts) -> tuple[DatePart, ...]:
    """The parts among those wanted that the family has; none for a family that is no date or time."""
    fitting = _PARTS.get(family, ())
    return tuple(part for part in wanted or _DEFAULT_PARTS[stored] if part in fitting)


def numbers(values: pa.Array) -> NDArray[Any]:
    """The values with their own precision, durations in seconds, (b,); missing ones become NaN."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    elif pa.types.is_decimal(values.type):
        values = _decimals(values)
    elif pa.types.is_duration(values.type):
        return seconds(values)
    if values.null_count and pa.types.is_integer(values.type) and values.type.bit_width == 64:
        return _whole_numbers_with_gaps(values)
    array: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return array


def _decimals(values: pa.Array) -> pa.Array:
    """Decimals as float64; as int64 where float64 would change whole numbers."""
    array = values.cast(pa.float64())
    largest = pc.max(pc.abs(array)).as_py()
    if largest is None or largest < _FLOAT64_WHOLE:
        return array
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid:  # Fractions, or beyond int64.
        return array


def _beyond_float64(column: NDArray[Any]) -> bool:
    """Whether float64 may change numbers of the column."""
    if column.dtype.kind in "iu" and column.dtype.itemsize == 8 and len(column):
        return bool(max(abs(int(column.min())), abs(int(column.max()))) > _FLOAT64_WHOLE)
    return bool(column.dtype == np.longdouble)


def _whole_numbers_with_gaps(values: pa.Array) -> NDArray[Any]:
    """64-bit integers with NaN for nulls, (b,): as float64, or as long doubles where float64 would change them.

    Whether a number keeps its digits must not depend on whether a gap lies in the same block.
    """
    array: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    if np.nanmax(np.abs(array), initial=0) < _FLOAT64_WHOLE:
        return array
    exact: NDArray[Any] = pc.fill_null(values, 0).to_numpy().astype(np.longdouble)
    exact[np.isnan(array)] = np.nan
    return exact


@dataclass(frozen=True, slots=True)
class ColumnPlan:
    """Which columns of a table are read, and the features and targets that they become.

    types: for each needed column, by its name in the file, the arrow type as which it is read if the file
    states none. columns: the features, in the store's order. target: the columns to learn.
    rules: what is stated, or was found out, of columns of texts.
    """

    types: dict[str, pa.DataType]
    columns: tuple[FeatureColumn, ...]
    target: TargetColumns
    rules: TextRules = field(default_factory=TextRules)

    @property
    def families(self) -> dict[str, Family]:
        """The kind of values that each needed column must hold, by its name in the files."""
        pairs = [(column.source, column.family) for column in self.columns]
        pairs += zip(self.target.sources, self.target.families, strict=True)
        return {source: family for source, family in pairs if family is not None}

    @property
    def category_sources(self) -> frozenset[str]:
        """The columns, by their names in the files, whose values are categories or labels, of whatever kind."""
        labels = self.target.sources if self.target.kind != "number" else ()
        return frozenset((*labels, *(column.source for column in self.columns if column.kind == "category")))

    def cells(self, rows: pa.RecordBatch, where: str) -> Cells:
        """`numeric`, `texts` and `target` of a SourceBatch; raises SourceError for values that do not convert."""
        numeric: list[NDArray[Any]] = []
        texts: list[pa.DictionaryArray] = []
        times: dict[str, Times] = {}
        for column in self.columns:
            values = rows.column(column.source)
            if column.kind == "category":
                texts.append(self._categories(values, column.source, where))
            elif column.part is None:
                numeric.append(numbers(values))
            else:
                if column.source not in times:
                    times[column.source] = Times.of(values)
                numeric.append(times[column.source].part(column.part, as_code=column.is_code))
        return tuple(numeric), tuple(texts), self._targets(rows, where)

    def _targets(self, rows: pa.RecordBatch, where: str) -> NDArray[Any] | pa.DictionaryArray:
        if self.target.kind != "number":
            (source,) = self.target.sources
            return self._categories(rows.column(source), source, where)
        columns = [numbers(rows.column(source)) for source in self.target.sources]
        if len(columns) == 1:
            return columns[0]
        # A plan for predictions has no target.
        dtype = np.longdouble if any(map(_beyond_float64, columns)) else np.float64
        alike = [column.astype(dtype, copy=False) for column in columns]
        return np.column_stack(alike) if alike else np.empty((rows.num_rows, 0))

    def _categories(self, values: pa.Array, source: str, where: str) -> pa.DictionaryArray:
        """The distinct values, numbers as they are read and all others as text, and each row's index, (b,)."""
        dtype = self.types[source]
        as_numbers = pa.types.is_integer(dtype) or pa.types.is_floating(dtype)
        try:
            if pa.types.is_dictionary(values.type):
                # A dictionary may hold values that other rows have, so many that to encode anew is cheaper.
                if (
                    pa.types.is_string(dtype)
                    and is_text(values.type)
                    and len(values.dictionary) <= len(values)
                ):
                    texts = values.dictionary.cast(pa.string())
                    return pa.DictionaryArray.from_arrays(values.indices, texts)
                values = values.dictionary_decode()
            if as_numbers and (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
                return values.dictionary_encode()  # Parts may have integers of other widths.
            values = values.cast(dtype)
            return (values if as_numbers else values.cast(pa.string())).dictionary_encode()
        except pa.ArrowInvalid as error:
            raise SourceError(
                f"{where}: column {source!r} is read as {dtype}, which does not hold "
                f"all of its {values.type} ({str(error)[:100]}); convert the file by itself"
            ) from error


def text_rules(config: ConvertConfig) -> TextRules:
    """What the config states of columns whose files do not state their types."""
    labels = config.targets if config.task == "classification" else ()
    stated = {*config.number, *config.date}
    return TextRules(
        texts=frozenset(name for name in (*config.category, *labels) if name not in stated),
        numbers=frozenset(config.number),
        formats=dict(config.date),
        missing_words=tuple(config.missing_words),
        drops_strays=config.invalid == "drop",
    )


def plan_columns(
    where: str,
    schema: Mapping[str, pa.DataType],
    config: ConvertConfig,
    rules: TextRules | None = None,
    has_target: bool = True,
) -> ColumnPlan:
    """The plan for a file with columns of these types, as the config asks.

    rules: what is known of columns of texts; by default what the config states. has_target: whether the config must
    choose a target; else all columns may be features. Raises SourceError, in which `where` names the file, if no target
    is chosen, a name is unknown, a type is of no use, or two columns would have the same name.
    """
    targets = require_known(where, config.targets, list(schema), "--target") if config.targets else ()
    if has_target and not targets:
        shown = ", ".join(list(schema)[-5:])
        dots = "..., " * (len(schema) > 5)
        raise SourceError(f"{where}: no target column was chosen; give --target NAME, one of {dots}{shown}")
    features = _chosen(where, list(schema), targets, config)
    if not features:
        raise SourceError(f"{where}: has no column beside the target {targets[0]!r}; add the features")
    for name in ("category", "number", "date"):
        require_known(where, tuple(getattr(config, name)), [*features, *targets], f"--{name}")
    require_known(where, tuple(config.rename), [*features, *targets], "--rename")
    target = TargetColumns((), "number")
    if targets:
        target = _target(where, {name: schema[name] for name in targets}, config)
    columns = [column for name in features for column in _feature_columns(where, name, schema[name], config)]
    types = {
        column.source: read_type(column.family, schema[column.source])
        for column in columns
        if column.family is not None
    }
    types |= {
        name: read_type(family, schema[name])
        for name, family in zip(target.sources, target.families, strict=True)
    }
    target = rename_target(target, config.rename)
    plan = ColumnPlan(types, tuple(columns), target, rules or text_rules(config))
    require_distinct(where, plan.columns, plan.target)
    return plan


def close_to(name: str, names: Sequence[str]) -> str:
    """`did you mean ...?` with the names most like `name`, or with the last ones if none is like it."""
    if not names:
        return "no column has a name"
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[-5:]
    return f"did you mean {' or '.join(close)}?"


def choose(where: str, patterns: Sequence[str], names: Sequence[str], option: str) -> list[str]:
    """The names given for an option; a pattern stands for all names it matches that were not given before."""
    chosen: dict[str, None] = {}
    for pattern in patterns:
        if pattern in names:
            matching = [pattern]
        elif _MAGIC & set(pattern):
            matching = [name for name in names if fnmatchcase(name, pattern)]
            if not matching:
                raise SourceError(f"{where}: no column matches {pattern!r} of {option}; correct the pattern")
        else:
            matching = list(require_known(where, (pattern,), names, option))
        chosen |= dict.fromkeys(matching)
    return list(chosen)


def require_known(where: str, names: Sequence[str], known: Sequence[str], option: str) -> tuple[str, ...]:
    """The names themselves, if all are known; raises SourceError, which proposes the closest known ones."""
    for name in names:
        if name not in known:
            raise SourceError(f"{where}: there is no column {name!r} for {option}; {close_to(name, known)}")
    return tuple(names)


def rename_target(target: TargetColumns, rename: Mapping[str, str]) -> TargetColumns:
    """The target with the new names of its columns."""
    return replace(target, names=tuple(rename.get(name, name) for name in target.names))


def require_distinct(where: str, columns: Sequence[FeatureColumn], target: TargetColumns) -> None:
    """Raises SourceError if two columns would have the same name in the store."""
    seen: set[str] = set()
    for name in (*(column.name for column in columns), *target.names):
        if name in seen:
            raise SourceError(
                f"{where}: two columns would be called {name!r} in the store; give one another --rename"
            )
        seen.add(name)


def _chosen(where: str, names: list[str], targets: Sequence[str], config: ConvertConfig) -> list[str]:
    """The feature columns in the order of the options, or of the file."""
    dropped = choose(where, config.drop, names, "--drop")
    for target in targets:
        if target in dropped:
            raise SourceError(f"{where}: {target!r} is both a target and dropped; leave it out of --drop")
        if target in config.columns:
            raise SourceError(
                f"{where}: {target!r} is both a target and a feature; leave it out of --columns"
            )
    chosen = choose(where, config.columns, names, "--columns") if config.columns else names
    return [name for name in chosen if name not in targets and name not in dropped]


def _feature_columns(
    where: str, name: str, dtype: pa.DataType, config: ConvertConfig
) -> Iterator[FeatureColumn]:
    """One numeric or category column, or one numeric column for each part of a date."""
    family = family_of(dtype, f"{where}: column {name!r}")
    new = config.rename.get(name, name)
    if family == "text" or name in config.category:
        is_stated = name in config.category
        yield FeatureColumn(
            new, "category", name, family, encoding=config.categories or "codes", is_stated=is_stated
        )
    elif family in ("number", "integer"):
        # Whole numbers in one file, or block, may go on as fractions in the next.
        yield FeatureColumn(new, "numeric", name, "number")
    elif family in ("boolean", "duration"):
        yield FeatureColumn(new, "numeric", name, family)
    else:
        stored = config.date_parts or ("numbers" if config.categories == "onehot" else "codes")
        parts = _parts_of(family, config.dates, stored)
        if not parts:
            raise SourceError(
                f"{where}: column {name!r} is a {family}, of which --dates {','.join(config.dates)} "
                "says nothing; ask for another part or leave it out with --drop"
            )
        for part in parts:
            is_code = stored == "codes" and part in CODED_PARTS
            yield FeatureColumn(f"{new}.{part}", "numeric", name, family, part=part, is_code=is_code)


def _target(where: str, types: Mapping[str, pa.DataType], config: ConvertConfig) -> TargetColumns:
    """Texts and booleans are labels, numbers are labels only when classification was asked for."""
    names = tuple(types)
    stated = [name for name in names if name in config.category]
    if stated and config.task == "regression":
        raise SourceError(
            f"{where}: target {stated[0]!r} is named by --category, but regression needs numbers; "
            "leave one of the two out"
        )
    task: Task | None = "classification" if stated else config.task
    if len(names) > 1 and task == "classification":
        raise SourceError(
            f"{where}: --task classification takes one column of labels but --target names {len(names)}; "
            "choose one, or take --task regression"
        )
    families = tuple(family_of(dtype, f"{where}: column {name!r}") for name, dtype in types.items())
    for name, family in zip(names, families, strict=True):
        if is_time(family) or (family == "duration" and task == "classification"):
            raise SourceError(
                f"{where}: target {name!r} is a {family}; turn it into a number of days, hours or seconds first"
            )
        if family == "text" and (task == "regression" or len(names) > 1):
            remedy = "or --task classification" if len(names) == 1 else "or take it as the only target"
            raise SourceError(f"{where}: target {name!r} is text; regression needs numbers, {remedy}")
    is_stated = task == "classification"
    if families[0] in ("text", "boolean") and len(names) == 1 and task != "regression":
        return TargetColumns(names, "text", names, families, is_stated)
    if task == "classification":
        return TargetColumns(names, "integer", names, families, is_stated)
    return TargetColumns(names, "number", names, tuple("number" if f == "integer" else f for f in families))
