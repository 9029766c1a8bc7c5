"""What `inspect`, `convert`, `evaluate` and `verify` print for people.

Stores are shown in at most 80 columns; for runs, paths and settings are not broken into lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ep3stream.inspection.columns_taken import columns_taken
from ep3stream.inspection.inspect import inspect
from ep3stream.reporting.run_json import (
    PlanRecord,
    column_shares,
    crossed_columns,
    linear_explained,
    linear_sizes,
)
from ep3stream.run.text import bytes_text, number_text, table_text
from ep3stream.store.files import Location
from ep3stream.store.reader import open_store

_WIDTH = 80
_MAX_LINES = 20
_MAX_NAMES = 6
_NAME_WIDTH = 20
_BAR_WIDTH = 24
_MOMENTS = ("mean", "std", "min", "max")
_SOURCE_KEYS = ("name", "bytes", "digest")


def describe_path(path: Location, *, width: int = _WIDTH, is_terminal: bool = False) -> str:
    """The store or the run at `path`, in tables; on a terminal with styles and finer bars."""
    content = inspect(path)
    if content["what"] == "run":
        return _describe_run(content)
    tables = describe_store(content, "\u2588" if is_terminal else "#")
    return table_text(tables, min(width, _WIDTH), is_terminal)


def describe_new_store(path: Location) -> str:
    """One line about a store just made, and one about what its columns were taken for, if they have names."""
    content = inspect(path)
    splits = ", ".join(f"{name} {split['rows']:,} rows" for name, split in content["splits"].items())
    with open_store(path) as store:
        columns = _printable(columns_taken(store.manifest.columns, content["class_names"]))
    return (
        f"{path}: {content['task']}, {content['n_features']} features, {splits}, "
        f"{content['bytes_on_disk'] / 1e6:.1f} MB"
    ) + (f"\n{columns}" if columns else "")


def describe_evaluation(scores: Mapping[str, Any]) -> str:
    """One score a line."""
    return "\n".join(f"{name:<9} {number_text(value)}" for name, value in scores.items())


def describe_soundness(path: Location, bytes_read: int | None, elapsed_s: float) -> str:
    """One line about a path in which `verify` found nothing damaged; bytes_read is None for a quick check."""
    if bytes_read is None:
        return f"{path} is complete: all sizes are right ({elapsed_s:.1f} s; no row was read)"
    rate = bytes_read / max(elapsed_s, 1e-9)
    return (
        f"{path} is sound: every digest is right "
        f"({bytes_text(bytes_read)} read in {elapsed_s:.1f} s, {bytes_text(int(rate))}/s)"
    )


# A store.


def describe_store(content: Mapping[str, Any], bar: str = "#") -> RenderableType:
    """The tables of a store, from what `inspect` returns; 20 lines each, with bars made of the letter `bar`."""
    parts: list[RenderableType] = [Text(_printable(content["path"]), style="bold", overflow="fold")]
    parts += [_pairs(_store_facts(content)), "", _split_table(content)]
    for name, split in content["splits"].items():
        parts += ["", _target_table(name, split, content["class_names"], bar)]
    largest = max(content["splits"], key=lambda name: content["splits"][name]["rows"])
    parts += ["", _column_table(f"features in {largest}", content["features"][largest])]
    parts += ["", _pairs(_conversion_facts(content)), "", _source_table(content["source"])]
    return Group(*parts)


def _store_facts(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    raw, on_disk, seed = content["bytes_raw"], content["bytes_on_disk"], content["shuffle_seed"]
    targets = _listed(_short(name) for name in content["target_names"])
    outputs = f"{content['n_outputs']:,} {'classes' if content['task'] == 'classification' else 'outputs'}"
    yield "task", f"{content['task']} of {targets}, {outputs}"
    yield "inputs", f"{content['n_features']:,} features, {content['x_dtype']}"
    yield "size", f"{bytes_text(raw)} raw, {bytes_text(on_disk)} on disk, ratio {raw / max(on_disk, 1):.2f}"
    yield "format", f"{content['format']}, version {content['format_version']}, codec {content['codec']}"
    yield "order", "as in the source" if seed is None else f"random, seed {seed}"
    yield "made by", content["created_by"]
    yield "fingerprint", content["fingerprint"]


def _split_table(content: Mapping[str, Any]) -> Table:
    table = _table("split", "rows", "share", "segments", "rows each")
    n_rows = sum(split["rows"] for split in content["splits"].values())
    for name, split in content["splits"].items():
        rows_each = min(split["segment_rows"], split["rows"])
        share = f"{100 * split['rows'] / n_rows:.1f}%"
        table.add_row(_short(name), f"{split['rows']:,}", share, f"{split['segments']:,}", f"{rows_each:,}")
    return table


def _target_table(name: str, split: Mapping[str, Any], class_names: Sequence[str] | None, bar: str) -> Table:
    if "class_counts" not in split:
        return _column_table(f"targets in {name}", split["targets"])
    counts = split["class_counts"]
    labels = class_names or list(map(str, range(len(counts))))
    table = _table(f"classes in {name}", "rows", "share")
    table.add_column("")
    for label, count in zip(labels[:_MAX_LINES], counts, strict=False):
        length = round(_BAR_WIDTH * count / max(counts))
        table.add_row(_short(label), f"{count:,}", f"{100 * count / split['rows']:.1f}%", bar * length)
    return _with_rest(table, len(counts))


def _column_table(title: str, columns: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(title, *_MOMENTS, "missing")
    for column in columns[:_MAX_LINES]:
        moments = (f"{column[moment]:.4g}" for moment in _MOMENTS)
        table.add_row(_short(column["name"]), *moments, f"{column['missing']:,}")
    return _with_rest(table, len(columns))


def _conversion_facts(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the conversion has left out, filled in or rounded, as far as the manifest says it."""
    record = dict(content["conversion"])
    missing = record.pop("missing", None)
    if missing is None:
        missing = {}
        for columns in content["features"].values():
            for column in columns:
                missing[column["name"]] = missing.get(column["name"], 0) + column["missing"]
    counted = (f"{_short(name)} {count:,}" for name, count in missing.items() if count)
    yield "missing values", _listed(counted) or "none"
    if fills := record.pop("fills", None):
        yield "filled with", _listed(f"{_short(name)} = {_value(value)}" for name, value in fills.items())
    if "dropped_rows" in record:
        yield "dropped rows", _value(record.pop("dropped_rows"))
    for name, values in (record.pop("unknown", None) or {}).items():
        yield f"unknown in {_short(name)}", _listed(f"{_short(value)} {n:,}" for value, n in values.items())
    for split, columns in (record.pop("unknown_by_split", None) or {}).items():
        for name, values in columns.items():
            counts = _listed(f"{_short(value)} {n:,}" for value, n in values.items())
            yield f"unknown in {_short(name)} of {_short(split)}", counts
    if rounding := record.pop("rounding", None):
        yield "rounding", _listed(_named_values(rounding))
    if (ratio := record.pop("codec_sample_ratio", None)) is not None:
        yield "sample", f"compresses {_value(ratio)} times"
    if options := record.pop("options", None):
        yield "options", ", ".join(_named_values(options))
    # What newer versions of the package record.
    yield from ((_spaced(key), _value(value)) for key, value in record.items())


def _source_table(files: Sequence[Mapping[str, Any]]) -> Table:
    """Name, size and digest of each file, with the other things that are recorded of it below its name."""
    table = _table("source", "size", "digest")
    for file in files[:_MAX_LINES]:
        others = _named_values({key: value for key, value in file.items() if key not in _SOURCE_KEYS})
        size = file.get("bytes")
        table.add_row(
            "\n".join(map(_short, [str(file.get("name", "?")), *others])),
            bytes_text(size) if isinstance(size, int) else "?",
            _printable(file.get("digest", "?")),
        )
    return _with_rest(table, len(files))


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column(_short(title, _NAME_WIDTH + 4), no_wrap=True, min_width=_NAME_WIDTH + 2)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True, overflow="fold")
    return table


def _with_rest(table: Table, n_lines: int) -> Table:
    if n_lines > _MAX_LINES:
        table.add_row(f"and {n_lines - _MAX_LINES:,} more (--json)")
    return table


def _pairs(pairs: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in pairs:
        table.add_row(_printable(name), _printable(text))
    return table


def _listed(texts: Iterable[str]) -> str:
    every = list(texts)
    more = [f"and {len(every) - _MAX_NAMES:,} more (--json)"] if len(every) > _MAX_NAMES else []
    return ", ".join([*every[:_MAX_NAMES], *more])


def _named_values(record: Mapping[str, Any]) -> list[str]:
    return [f"{_spaced(key)} {_value(value)}" for key, value in record.items()]


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else number_text(value)


def _spaced(key: str) -> str:
    return key.replace("_", " ")


def _short(name: str, width: int = _NAME_WIDTH) -> str:
    name = _printable(name)
    return name if len(name) <= width else f"{name[: width - 3]}..."


def _printable(text: object) -> str:
    """Names come from data: nothing in them may steer a terminal, or be what no terminal can print."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


# A run.


def _describe_run(content: Mapping[str, Any]) -> str:
    store, step, event = content["store"], content["last_step"], content["last_event"]
    lines = [content["path"], f"a fit, {'finished' if content['finished'] else 'unfinished'}"]
    if store:
        lines.append(f"of {store.get('path')}, split {store.get('split')}")
    if step is not None:
        number, epoch, loss = (number_text(step.get(key)) for key in ("step", "epoch", "loss"))
        lines.append(f"step {number}, epoch {epoch}, running loss {loss}")
        if step.get("stalled_s") is not None:
            stalled, elapsed = number_text(step["stalled_s"]), number_text(step.get("elapsed_s"))
            lines.append(f"held up by checkpoints {stalled} s of {elapsed} s")
    lines += [
        f"checkpoint at step {item['step']}, {bytes_text(item['bytes'])}, {item['state']}"
        for item in content["checkpoints"]
    ] or ["no checkpoint yet"]
    lines += [
        f"override at step {change.get('step')}: {change.get('setting')} from {change.get('from')!r} "
        f"to {change.get('to')!r}"
        for change in content["overrides"]
    ]
    if event is not None:
        lines.append(f"last event: {event.get('message')}")
    lines += _describe_plan(PlanRecord.of(content["plan"]))
    if shares := column_shares(content):
        lines += ["", "what matters"]
        lines += [f"  {_printable(name)} {100 * share:.1f}%" for name, share in shares.items()]
    if math.isfinite(explained := linear_explained(content)):
        lines += ["", f"linear part, which explains {100 * explained:.1f}% of the variance of rows left out"]
        lines += [f"  {_printable(name)} {size:.2g}" for name, size in linear_sizes(content).items()]
    if crosses := crossed_columns(content):
        lines += ["", "columns crossed, and what that explains of the kernel's squared error"]
        lines += [f"  {_printable(' x '.join(c.columns))} {100 * c.explained:.1f}%" for c in crosses]
    for record in content["evaluations"]:
        scores = {name: value for name, value in record.items() if isinstance(value, int | float)}
        lines += [
            "",
            f"evaluated on {record.get('split')} of {record.get('store')}",
            "  " + ", ".join(f"{name} {number_text(value)}" for name, value in scores.items()),
        ]
    return "\n".join([*lines, "", content["config"].rstrip()])


def _describe_plan(plan: PlanRecord) -> list[str]:
    staged = [stage for stage in plan.stages if math.isfinite(stage.n_flattened)]
    data_rank: object = plan.data_rank
    if staged:
        # The plan's own rank is only the number of directions that the stages choose from.
        later = (f"{stage.n_flattened:,.0f} from row {stage.first_row:,.0f}" for stage in staged[1:])
        data_rank = ", ".join([f"{staged[0].n_flattened:,.0f}", *later])
    rows = (
        ("centers", plan.n_centers),
        ("kernel", plan.kernel),
        ("bandwidth", plan.bandwidth),
        ("directions", plan.n_directions),
        ("projection", plan.projection),
        ("model rank", plan.model_rank),
        ("data rank", data_rank),
        ("ridge", plan.ridge),
        ("step rule", plan.step_rule),
        ("batch size", plan.batch_size),
        ("step size", plan.step_size),
        ("steps in all", plan.n_steps),
    )
    lines = [f"{label:<14}{number_text(value)}" for label, value in rows if value not in (None, "")]
    return ["", *lines] if lines else []
