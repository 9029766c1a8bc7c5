"""The columns of a store as its manifest records them, and how a later file is read with the same columns.

`describe_columns` writes the record, `RecordedColumns` reads it, `take_over` and `plan_like` apply it to a file
that is converted `--like` a store or predicted by its model. A file's missing values are treated as the store's
were: refused, dropped, or filled with the recorded means.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa

from ep3stream.config import ConvertConfig, Missing, Task, XDtype
from ep3stream.conversion.columns import (
    ColumnPlan,
    close_to,
    family_of,
    read_type,
    require_known,
)
from ep3stream.conversion.conform import family_or_none, fits, misfit
from ep3stream.conversion.date_parts import CODED_PARTS
from ep3stream.conversion.missing_values import indicator_name, whole_name
from ep3stream.errors import ConfigError, SourceError
from ep3stream.formats.source import Family, FeatureColumn, TargetColumns
from ep3stream.formats.svmlight import SparseLayout
from ep3stream.formats.text_cells import TextRules
from ep3stream.store.columns import columns_of
from ep3stream.store.reader import open_store

# Version 2 added types, sources and targets; version 3 what `RowSource.recorded` says of arrays and svmlight,
# and offsets; version 4 parts of dates that are codes.
COLUMNS_VERSION = 4
_WITHOUT_CODED_PARTS = 3

# Settings that choose or shape columns. Under `like` they are those of the other store.
_TAKEN_OVER = (
    "columns", "drop", "categories", "category", "number", "date", "dates", "date_parts", "missing_words",
)  # fmt: skip
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RecordedColumns:
    """The parts of a store that a later conversion takes over: columns, values of categories, fills, classes.

    values: the values of each category column by its name, in the order of its features or codes.
    fills: the number that the missing values of each numeric column became. offsets: what is subtracted from the
    numbers of columns and targets, fills included, before they are stored, by name; others have none.
    n_source_features: of arrays and svmlight files, how many features they had before any was chosen.
    index_base: of svmlight files, the index of the first feature.
    policies: what becomes of missing values, by column and target; the parts of a date are one column.
    indicators: the columns whose gaps a feature of their own marks.
    rules: which texts are gaps, how dates are written, and whether rows with strays are dropped.
    left_out: names and patterns of further columns that a file may have without a word.
    """

    store: Path
    task: Task
    dtype: XDtype
    columns: tuple[FeatureColumn, ...]
    values: Mapping[str, tuple[Any, ...]]
    fills: Mapping[str, float]
    policies: Mapping[str, Missing]
    indicators: tuple[str, ...]
    target: TargetColumns
    class_names: tuple[str, ...] | None
    offsets: Mapping[str, float] = field(default_factory=dict)
    n_source_features: int | None = None
    index_base: int | None = None
    rules: TextRules = field(default_factory=TextRules)
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(cls, path: Path) -> RecordedColumns:
        """The columns of the store at `path`; raises ConfigError if its manifest records none."""
        with open_store(path) as store:
            manifest = store.manifest
        reason = unreadable_columns(manifest.columns)
        if reason is not None:
            raise ConfigError(f"like is {path}, which {reason}; name a store that this version can convert")
        try:
            return cls.read(path, columns_of(manifest), manifest.target_names, manifest.class_names)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"like is {path}, whose columns are not as recorded: {error!r}") from error

    @classmethod
    def read(
        cls,
        origin: Path,
        record: Mapping[str, Any],
        target_names: tuple[str, ...],
        class_names: tuple[str, ...] | None,
    ) -> RecordedColumns:
        """From the JSON of `columns_of`; raises KeyError, TypeError or AttributeError for any other JSON."""
        document: Mapping[str, Any] = record["columns"]
        described: list[Mapping[str, Any]] = [
            one for one in document["columns"] if one["kind"] != "indicator"
        ]
        target = document.get("targets") or [{"name": name} for name in target_names]
        task: Task = "regression" if class_names is None else "classification"
        columns = tuple(_column(one) for one in described)
        policy: Missing = document.get("missing", "error")
        policies = {
            whole_name(column): one.get("missing", policy)
            for column, one in zip(columns, described, strict=True)
        }
        return cls(
            store=origin,
            task=task,
            dtype=record["x_dtype"],
            columns=columns,
            values={one["name"]: tuple(one["values"]) for one in described if "values" in one},
            fills={one["name"]: float(one["fill"]) for one in described if "fill" in one},
            policies=policies | {one["name"]: one.get("missing", policy) for one in target},
            indicators=tuple(one["of"] for one in document["columns"] if one["kind"] == "indicator"),
            target=TargetColumns(
                names=tuple(one["name"] for one in target),
                kind=document.get("kind") or ("number" if task == "regression" else "text"),
                sources=tuple(one.get("source", one["name"]) for one in target),
                families=tuple(one["type"] for one in target if "type" in one),
            ),
            class_names=class_names,
            offsets={one["name"]: float(one["offset"]) for one in [*described, *target] if "offset" in one},
            n_source_features=_optional_integer(document, "source_features"),
            index_base=_optional_integer(document, "index_base"),
            rules=TextRules.of_json(document),
        )

    @property
    def sources(self) -> dict[str, str]:
        """The name of each column in the store's files, by its name in the store; for a date, without the part."""
        names = {
            column.name.removesuffix(f".{column.part}") if column.part else column.name: column.source
            for column in self.columns
        }
        return names | dict(zip(self.target.names, self.target.sources, strict=True))

    @property
    def sparse_layout(self) -> SparseLayout:
        """How later svmlight files are read."""
        return SparseLayout(self.store, self.n_source_features or len(self.columns), self.index_base)

    def without_target(self) -> RecordedColumns:
        """The same for files whose target is not known, or does not matter."""
        return replace(self, task="regression", target=TargetColumns((), "number"), class_names=None)

    @property
    def labels(self) -> tuple[int | str, ...]:
        """The classes in the order of their ids: as whole numbers if the store's labels were, else as texts."""
        names = self.class_names or ()
        is_whole = self.target.kind == "integer" and all(map(_is_whole, names))
        return tuple(map(int, names)) if is_whole else names


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def unreadable_columns(document: Mapping[str, Any]) -> str | None:
    """Why files cannot be converted by this record of columns, in words; None if they can."""
    version = document.get("version")
    if version in range(1, COLUMNS_VERSION + 1):
        return None
    return "holds no converted columns" if version is None else f"has columns of version {version}"


def describe_columns(
    columns: Sequence[FeatureColumn],
    target: TargetColumns,
    values: Mapping[str, Sequence[Any]],
    fills: Mapping[str, float],
    policies: Mapping[str, Missing],
    indicators: Sequence[str],
    of_source: Mapping[str, Any],
    offsets: Mapping[str, float],
) -> dict[str, Any]:
    """The record of the columns as JSON for the manifest; `values` of categories and `fills` by column name.

    policies, indicators: as in `RecordedColumns`. of_source: `RowSource.recorded`. offsets: what is subtracted from
    columns and targets, by name.
    """
    names = list(target.names)
    general = Counter(policies.values()).most_common(1)[0][0]
    described = []
    for column, following in zip(columns, [*columns[1:], None], strict=True):
        whole = whole_name(column)
        described.append(
            _described(column, values, fills)
            | _offset_of(column.name, offsets)
            | _own_policy(policies[whole], general)
        )
        is_last = following is None or whole_name(following) != whole
        if is_last and whole in indicators:
            described.append(
                {
                    "name": indicator_name(whole),
                    "kind": "indicator",
                    "source": column.source or whole,
                    "of": whole,
                }
            )
    return {
        "version": COLUMNS_VERSION if any(column.is_code for column in columns) else _WITHOUT_CODED_PARTS,
        "target": names[0] if len(names) == 1 else names,
        "kind": target.kind,
        "targets": [
            {"name": name, "source": source, "type": family}
            | _offset_of(name, offsets)
            | _own_policy(policies[name], general)
            for name, source, family in zip(
                names,
                target.sources or names,
                target.families or [target.kind] * len(names),
                strict=True,
            )
        ],
        "missing": general,
        **of_source,
        "columns": described,
    }


def _own_policy(policy: Missing, general: Missing) -> dict[str, Missing]:
    """The policy of a column as JSON if it is not that of most columns."""
    return {} if policy == general else {"missing": policy}


def take_over(config: ConvertConfig) -> tuple[ConvertConfig, RecordedColumns | None]:
    """The config with dtype and shuffle decided: as in the store it is `like`, or by default.

    Also returns the columns of that store, if there is one. Raises ConfigError, which names the setting, if the
    config contradicts the store.
    """
    if config.like is None:
        return replace(config, dtype=config.dtype or "float32", shuffle=config.shuffle is not False), None
    recorded = RecordedColumns.of(Path(config.like))
    like = f"contradicts like, whose store {recorded.store}"
    for name in _TAKEN_OVER:
        if getattr(config, name):
            raise ConfigError(f"{name} {like} has its own; leave {name} out")
    known: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("target", config.targets, (recorded.target.names, recorded.target.sources)),
        ("task", config.task, (recorded.task,)),
        ("dtype", config.dtype, (recorded.dtype,)),
    )
    for name, given, allowed in known:
        if given and given not in allowed:
            shown, stored = (", ".join(v) if isinstance(v, tuple) else v for v in (given, allowed[0]))
            raise ConfigError(f"{name} {shown} {like} has {stored}; leave {name} out")
    shuffle = len(config.splits) > 1 if config.shuffle is None else config.shuffle
    return replace(config, task=recorded.task, dtype=recorded.dtype, shuffle=shuffle), recorded


def plan_like(
    where: str,
    schema: Mapping[str, pa.DataType],
    has_types: bool,
    like: RecordedColumns,
    rename: Mapping[str, str] | None = None,
) -> ColumnPlan:
    """The plan by which the store's columns are read from a file with the columns of `schema`.

    rename: a column's name in the file -> its name in the store, or in the files that the store was made of.
    Without `has_types` the schema is a guess from the first rows: the file is read with the recorded types, and
    a value of another type is an error then. Raises SourceError, which names a column that does not match.
    """
    if rename:
        like = _under_the_files_names(where, like, rename, list(schema))

    categories = frozenset(column.source for column in like.columns if column.kind == "category")
    if like.target.kind != "number":
        categories |= {*like.target.sources}

    def family(source: str, recorded: Family | None) -> Family:
        is_category = source in categories and recorded is not None
        return _family(where, source, recorded, schema, has_types, like, is_category)

    columns = []
    for column in like.columns:
        found = family(column.source, column.family)
        if column.family is None and (found == "text") != (column.kind == "category"):
            raise SourceError(
                f"{where}: column {column.source!r} holds {found} but is {column.kind} in {like.store}; "
                "convert it to what it was"
            )
        columns.append(replace(column, family=_plain(found) if column.kind == "numeric" else found))
    target = like.target
    recorded = target.families or (None,) * len(target.sources)
    learned = list(map(family, target.sources, recorded))
    if learned and not target.families and learned[0] in ("integer", "number") and target.kind == "text":
        target = replace(target, kind="integer")  # Version 1 does not tell labels of text from integers.
    if target.kind == "number":
        learned = [_plain(family) for family in learned]
    target = replace(target, families=tuple(learned))
    families = [(column.source, column.family) for column in columns if column.family is not None]
    families += zip(target.sources, learned, strict=True)
    types = {
        source: _read_as(family, schema[source], source in categories, has_types)
        for source, family in families
    }
    extra = [
        name
        for name in schema
        if name not in types and not any(fnmatchcase(name, one) for one in like.left_out)
    ]
    if extra and target.names:
        _LOGGER.warning("%s: not in %s, so left out: %s", where, like.store, ", ".join(extra))
    return ColumnPlan(types, tuple(columns), target, like.rules)


def _under_the_files_names(
    where: str, like: RecordedColumns, rename: Mapping[str, str], names: Sequence[str]
) -> RecordedColumns:
    """The recorded columns with the names that the file has for them as their sources."""
    require_known(where, tuple(rename), names, "--rename")
    known = {source: source for source in (*like.sources.values(), *like.target.sources)}
    known |= like.sources  # A store's own name goes before one of the files it was made of.
    theirs = {known.get(new, new): old for old, new in rename.items()}
    for old, new in rename.items():
        if new not in known and like.target.sources:
            raise ConfigError(
                f"rename has {old}={new}, but {like.store} has no column {new!r}; {close_to(new, list(known))}"
            )
    target = replace(like.target, sources=tuple(theirs.get(name, name) for name in like.target.sources))
    columns = tuple(
        replace(column, source=theirs.get(column.source, column.source)) for column in like.columns
    )
    rules = like.rules.renamed(theirs)
    return replace(like, columns=columns, target=target, rules=rules)


def _plain(family: Family) -> Family:
    """Numbers for integers: amounts are read as float64, for other rows may have fractions."""
    return "number" if family == "integer" else family


def _read_as(family: Family, found: pa.DataType, is_category: bool, has_types: bool) -> pa.DataType:
    """The type as which a column is read, where the file has or suggests `found`.

    Categories are compared as the file has them, numbers of a typed file or texts. The digits of a nanosecond are
    read where the first rows have them, and a CSV column of true and false may become numbers.
    """
    if pa.types.is_dictionary(found):
        found = found.value_type
    if is_category:
        is_number = pa.types.is_integer(found) or pa.types.is_floating(found)
        return found if has_types and is_number else pa.string()
    if family == "number" and pa.types.is_boolean(found):
        return found
    if {family, _naive_family(found)} == {"date", "timestamp"} and not has_types:
        return pa.timestamp(found.unit if pa.types.is_timestamp(found) else "us")
    return read_type(family, found)


def _naive_family(dtype: pa.DataType) -> Family | None:
    if pa.types.is_date(dtype):
        return "date"
    return "timestamp" if pa.types.is_timestamp(dtype) and dtype.tz is None else None


def _family(
    where: str,
    source: str,
    recorded: Family | None,
    schema: Mapping[str, pa.DataType],
    has_types: bool,
    like: RecordedColumns,
    is_category: bool,
) -> Family:
    """The kind of values as which a column is read: the recorded one. A file that states types must fit it."""
    if source not in schema:
        # What is to be predicted has no target yet: that is no slip of the pen.
        remedy = f"{close_to(source, list(schema))} --rename OTHER={source} takes another"
        if source in like.target.sources:
            remedy = "a store needs its target; `ep3stream predict RUN FILE OUT.csv` takes a table without"
        raise SourceError(f"{where}: has no column {source!r}, which {like.store} has; {remedy}")
    if recorded == "duration" and not has_types and not pa.types.is_null(schema[source]):
        raise SourceError(
            f"{where}: column {source!r} was a duration for {like.store}, which text cannot state; "
            "give a Parquet or Arrow file"
        )
    if recorded is not None and not has_types:
        return recorded
    found = family_or_none(schema[source], f"{where}: column {source!r}")
    if recorded is None:
        return found or family_of(schema[source], f"{where}: column {source!r}")
    if fits(found, recorded, is_category):
        return recorded
    raise SourceError(f"{where}: column {source!r} {misfit(schema[source], recorded, str(like.store))}")


def _offset_of(name: str, offsets: Mapping[str, float]) -> dict[str, float]:
    return {"offset": offsets[name]} if offsets.get(name) else {}


def _optional_integer(document: Mapping[str, Any], name: str) -> int | None:
    """The number of this name, if there is one; raises TypeError for anything else."""
    value = document.get(name)
    if value is not None and type(value) is not int:
        raise TypeError(f"{name} is {value!r:.40}, no whole number")
    return value


def _column(described: Mapping[str, Any]) -> FeatureColumn:
    is_code = described["kind"] == "category" and "part" in described
    return FeatureColumn(
        name=described["name"],
        kind="numeric" if is_code else described["kind"],
        source=described.get("source", described["name"]),
        family=described.get("type"),
        part=described.get("part"),
        encoding=described.get("encoding", "onehot"),
        is_code=is_code,
    )


def _described(
    column: FeatureColumn, values: Mapping[str, Sequence[Any]], fills: Mapping[str, float]
) -> dict[str, Any]:
    """One column as JSON: part, encoding, values and fill only if the column has them."""
    described: dict[str, Any] = {
        "name": column.name,
        "kind": column.kind,
        "source": column.source or column.name,
        "type": column.family or "number",
    }
    if column.part is not None:
        described["part"] = column.part
        if column.is_code:
            described |= {"kind": "category", "encoding": "codes", "values": list(CODED_PARTS[column.part])}
    if column.kind == "category":
        described |= {"encoding": column.encoding, "values": list(values[column.name])}
    if column.name in fills:
        described["fill"] = fills[column.name]
    return described
