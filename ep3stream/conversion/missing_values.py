"""What becomes of missing values: a policy for each column, and the lines that tell what was done.

A value is missing if it is NaN, null or an empty text. `auto` and `mean` fill a number with its column's mean over the
first split and mark it in a feature of its own, `COL (missing)`, which exists only if a row has such a gap; a text
becomes the category `(missing)`; a row without a target is left out. `drop` leaves the row out, `error` stops.

The parts of a date share their gaps: they count as one column, called what the date's column is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ep3stream.config import OTHER_COLUMNS, Missing
from ep3stream.conversion.categories import MISSING_CATEGORY
from ep3stream.conversion.columns import choose
from ep3stream.errors import ConfigError
from ep3stream.formats.source import FeatureColumn, RowSource

DEFAULT_POLICY: Missing = "auto"

# Columns told in a line of their own; the others share one.
_MAX_LINES = 20


def whole_name(column: FeatureColumn) -> str:
    """What the column is called in the store; for a part of a date without the part."""
    return column.name.removesuffix(f".{column.part}") if column.part else column.name


def indicator_name(column: str) -> str:
    """The name of the 0/1 feature that marks the gaps of a column."""
    return f"{column} {MISSING_CATEGORY}"


def is_filled(policy: Missing) -> bool:
    """Whether a feature's gaps are filled under this policy."""
    return policy in ("auto", "mean")


def policies_of(
    source: RowSource,
    stated: Missing | Mapping[str, Missing] | None,
    recorded: Mapping[str, Missing] | None = None,
) -> dict[str, Missing]:
    """The policy of each feature and target, by the `whole_name` in the store.

    stated: the setting `missing`; its columns are those of the source's files, or patterns of them.
    recorded: the policies of the store that is followed, by name; they hold for columns that are not stated.
    Raises SourceError for an unknown column, ConfigError for a target that is to be filled.
    """
    by_column = dict(stated) if isinstance(stated, Mapping) else {}
    others = by_column.pop(OTHER_COLUMNS, stated if isinstance(stated, str) else None)
    names = {column.source or column.name: whole_name(column) for column in source.columns}
    names |= dict(zip(source.target.sources or source.target.names, source.target.names, strict=True))
    policies = {name: others or (recorded or {}).get(name, DEFAULT_POLICY) for name in names.values()}
    # A name goes before a pattern that matches it too, whatever their order.
    for is_name in (False, True):
        for column, policy in by_column.items():
            if (column in names) == is_name:
                for each in choose(source.name, [column], list(names), "--missing"):
                    policies[names[each]] = policy
    for column, policy in by_column.items():
        if policy == "mean" and names.get(column) in source.target.names:
            raise ConfigError(
                f"missing of the target {column!r} is mean, but no target is made up; use auto, drop or error"
            )
    return policies


def told_fills(
    counts: Mapping[str, int], n_rows: int, means: Mapping[str, Sequence[float]], indicators: Sequence[str]
) -> Iterator[str]:
    """A line for each column with filled gaps in the n rows that were kept, and one line for those beyond the first 20.

    counts: gaps by column. means: the numbers they became, one for each part of a date; none for a text.
    indicators: the columns whose gaps are marked.
    """
    for column, count in list(counts.items())[:_MAX_LINES]:
        filled = means.get(column)
        if filled is None:
            became = f"they become the category {MISSING_CATEGORY!r}"
        elif len(filled) == 1:
            became = f"they become the mean {filled[0]:.6g}"
        else:
            became = "each part becomes its mean"
        marked = f", and {indicator_name(column)!r} is 1 there" if column in indicators else ""
        yield f"column {column!r}: {count} of {n_rows} values are missing; {became}{marked}"
    rest = dict(list(counts.items())[_MAX_LINES:])
    if rest:
        n_values = sum(rest.values())
        yield f"{len(rest)} more columns miss {n_values} values; they become means or {MISSING_CATEGORY!r} too"


def told_targets(counts: Mapping[str, int]) -> Iterator[str]:
    """A line for each target without which rows were left out."""
    for name, count in counts.items():
        yield f"target {name!r}: {count} rows without a value are left out"


def told_drops(counts: Mapping[str, int], dropped: int, n_rows: int) -> Iterator[str]:
    """The line about `dropped` of n rows, left out for a gap in one of the columns."""
    if dropped:
        named = [f"{name!r} {count}" for name, count in list(counts.items())[:_MAX_LINES]]
        more = ", ..." * (len(counts) > _MAX_LINES)
        yield f"{dropped} of {n_rows} rows are left out for missing values ({', '.join(named)}{more})"
