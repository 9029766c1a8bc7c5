"""A store's contents, as `inspect` gives them, in tables for people.

The words of `inspect` and `evaluate` for people: stores in 80 columns, runs wherever names and paths allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ep3stream.inspection.inspect import inspect
from ep3stream.run.text import bytes_text, number_text
from ep3stream.store.files import Location

_MAX_LINES = 20

_MAX_NAMES = 6

_NAME_WIDTH = 20

_BAR_WIDTH = 24

_MOMENTS = ("mean", "std", "min", "max")


def describe_store(content: Mapping[str, Any], bar: str = "#") -> RenderableType:
    """What `inspect` told of a store; 20 lines a table, bars made of the letter `bar`."""
    parts: list[RenderableType] = [Text(_plain(content["path"]), style="bold", overflow="fold")]
    parts.append(_pairs(_summary(content)))
    parts += ["", _splits(content)]
    for name, split in content["splits"].items():
        parts += ["", _targets(name, split, content, bar)]
    largest = max(content["splits"], key=lambda name: content["splits"][name]["rows"])
    parts += ["", _statistics(f"features in {largest}", content["features"][largest])]
    parts += ["", _pairs(_rows_told(content))]
    parts += ["", _sources(content["source"])]
    return Group(*parts)


def _summary(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs of a word and what stands behind it."""
    raw, on_disk, seed = content["bytes_raw"], content["bytes_on_disk"], content["shuffle_seed"]
    targets = _first(_short(name) for name in content["target_names"])
    outputs = f"{content['n_outputs']:,} {'classes' if content['task'] == 'classification' else 'outputs'}"
    yield "task", f"{content['task']} of {targets}, {outputs}"
    yield "inputs", f"{content['n_features']:,} features, {content['x_dtype']}"
    yield "size", f"{bytes_text(raw)} raw, {bytes_text(on_disk)} on disk, ratio {raw / max(on_disk, 1):.2f}"
    yield "format", f"{content['format']}, version {content['format_version']}, codec {content['codec']}"
    yield "order", "as in the source" if seed is None else f"random, seed {seed}"
    yield "made by", content["created_by"]
    yield "fingerprint", content["fingerprint"]


def _splits(content: Mapping[str, Any]) -> Table:
    table = _table("split", "rows", "share", "segments", "rows each")
    n_rows = sum(split["rows"] for split in content["splits"].values())
    for name, split in content["splits"].items():
        cells = (split["rows"], split["segments"], min(split["segment_rows"], split["rows"]))
        rows, segments, each = (f"{cell:,}" for cell in cells)
        table.add_row(_short(name), rows, f"{100 * split['rows'] / n_rows:.1f}%", segments, each)
    return table


def _targets(name: str, split: Mapping[str, Any], content: Mapping[str, Any], bar: str) -> Table:
    if "class_counts" not in split:
        return _statistics(f"targets in {name}", split["targets"])
    counts = split["class_counts"]
    names = content["class_names"] or [str(number) for number in range(len(counts))]
    table = _table(f"classes in {name}", "rows", "share")
    table.add_column("")
    for label, count in zip(names[:_MAX_LINES], counts, strict=False):
        length = round(_BAR_WIDTH * count / max(counts))
        table.add_row(_short(label), f"{count:,}", f"{100 * count / split['rows']:.1f}%", bar * length)
    return _with_rest(table, len(counts))


def _statistics(title: str, columns: list[dict[str, Any]]) -> Table:
    table = _table(title, *_MOMENTS, "missing")
    for column in columns[:_MAX_LINES]:
        moments = (f"{column[moment]:.4g}" for moment in _MOMENTS)
        table.add_row(_short(column["name"]), *moments, f"{column['missing']:,}")
    return _with_rest(table, len(columns))


def _rows_told(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the conversion left out, filled in or rounded, as far as the manifest has it."""
    told = content["conversion"]
    missing = told.get("missing")
    if missing is None:
        missing = {}
        for columns in content["features"].values():
            for column in columns:
                missing[column["name"]] = missing.get(column["name"], 0) + column["missing"]
    missing = {name: count for name, count in missing.items() if count}
    yield "missing values", _first(f"{_short(name)} {count:,}" for name, count in missing.items()) or "none"
    if told.get("fills"):
        yield (
            "filled with",
            _first(f"{_short(name)} = {_value(value)}" for name, value in told["fills"].items()),
        )
    if "dropped_rows" in told:
        yield "dropped rows", _value(told["dropped_rows"])
    for name, values in (told.get("unknown") or {}).items():
        yield f"unknown in {_short(name)}", _first(f"{_short(value)} {n:,}" for value, n in values.items())
    if told.get("rounding"):
        yield "rounding", _first(f"{_words(key)} {_value(value)}" for key, value in told["rounding"].items())
    if told.get("codec_sample_ratio") is not None:
        yield "sample", f"compresses {_value(told['codec_sample_ratio'])} times"
    if told.get("options"):
        yield "options", _first((f"{_words(k)} {_value(v)}" for k, v in told["options"].items()), 99)
    known = {"missing", "fills", "dropped_rows", "unknown", "rounding", "codec_sample_ratio", "options"}
    yield from ((_words(key), _value(value)) for key, value in told.items() if key not in known)


def _sources(files: list[dict[str, Any]]) -> Table:
    """Name, size, digest of each file, and what else is recorded of it."""
    table = _table("source", "size", "digest")
    for file in files[:_MAX_LINES]:
        rest = [f"{_words(key)} {_value(value)}" for key, value in file.items() if key not in _FILE_KEYS]
        size = file.get("bytes")
        table.add_row(
            "\n".join([_short(str(file.get("name", "?"))), *(_short(text) for text in rest)]),
            bytes_text(size) if isinstance(size, int) else "?",
            _plain(file.get("digest", "?")),
        )
    return _with_rest(table, len(files))


_FILE_KEYS = ("name", "bytes", "digest")


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column(_short(title, _NAME_WIDTH + 4), no_wrap=True, min_width=_NAME_WIDTH + 2)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True, overflow="fold")
    return table


def _pairs(pairs: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for word, text in pairs:
        table.add_row(_plain(word), _plain(text))
    return table


def _with_rest(table: Table, n_lines: int) -> Table:
    if n_lines > _MAX_LINES:
        table.add_row(f"and {n_lines - _MAX_LINES:,} more (--json)")
    return table


def _first(texts: Iterable[str], limit: int = _MAX_NAMES) -> str:
    every = list(texts)
    more = [f"and {len(every) - limit:,} more (--json)"] if len(every) > limit else []
    return ", ".join([*every[:limit], *more])


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _words(key: str) -> str:
    return key.replace("_", " ")


def _short(name: str, width: int = _NAME_WIDTH) -> str:
    name = _plain(name)
    return name if len(name) <= width else f"{name[: width - 3]}..."


def _plain(text: object) -> str:
    """Names come from data: nothing in them may steer a terminal, or be what no terminal can print."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


_WIDTH = 80

_PLAN = (
    ("centers", "n_centers"),
    ("kernel", "kernel"),
    ("bandwidth", "bandwidth"),
    ("projection", "projection"),
    ("model rank", "model_rank"),
    ("data rank", "data_rank"),
    ("ridge", "ridge"),
    ("step rule", "step_rule"),
    ("batch size", "batch_size"),
    ("step size", "step_size"),
    ("steps in all", "n_steps"),
)


def describe_path(path: Location, *, width: int = _WIDTH, is_terminal: bool = False) -> str:
    """What lies at `path`, store or run, in tables; on a terminal with its styles and finer bars."""
    content = inspect(path)
    if content["what"] == "run":
        return _describe_run(content)
    console = Console(
        file=StringIO(),
        width=min(width, _WIDTH),
        force_terminal=is_terminal,
        markup=False,
        emoji=False,
        highlight=False,
    )
    with console.capture() as capture:
        console.print(describe_store(content, "\u2588" if is_terminal else "#"))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def describe_new_store(path: Location) -> str:
    """One line about a store just made."""
    content = inspect(path)
    splits = ", ".join(f"{name} {split['rows']:,} rows" for name, split in content["splits"].items())
    return (
        f"{path}: {content['task']}, {content['n_features']} features, {splits}, "
        f"{content['bytes_on_disk'] / 1e6:.1f} MB"
    )


def describe_evaluation(scores: dict[str, Any]) -> str:
    """One score a line."""
    return "\n".join(f"{name:<9} {number_text(value)}" for name, value in scores.items())


def describe_soundness(path: Location, bytes_read: int | None, elapsed_s: float) -> str:
    """One line about a path that `verify` found nothing wrong with; bytes_read is None when it was quick."""
    if bytes_read is None:
        return f"{path} is complete: all sizes are right ({elapsed_s:.1f} s; no row was read)"
    rate = bytes_read / max(elapsed_s, 1e-9)
    return (
        f"{path} is sound: every digest is right "
        f"({bytes_text(bytes_read)} read in {elapsed_s:.1f} s, {bytes_text(int(rate))}/s)"
    )


def _describe_run(content: dict[str, Any]) -> str:
    plan, last, event = content["plan"] or {}, content["last_step"], content["last_event"]
    lines = [content["path"], f"a fit, {'finished' if content['finished'] else 'unfinished'}"]
    if content["store"]:
        lines.append(f"of {content['store'].get('path')}, split {content['store'].get('split')}")
    if last is not None:
        lines.append(
            f"step {number_text(last.get('step'))}, epoch {number_text(last.get('epoch'))}, "
            f"running loss {number_text(last.get('loss'))}"
        )
        if last.get("stalled_s") is not None:
            stalled, elapsed = number_text(last["stalled_s"]), number_text(last.get("elapsed_s"))
            lines.append(f"held up by checkpoints {stalled} s of {elapsed} s")
    lines += _describe_checkpoints(content["checkpoints"])
    lines += [
        f"override at step {change.get('step')}: {change.get('setting')} from {change.get('from')!r} "
        f"to {change.get('to')!r}"
        for change in content["overrides"]
    ]
    if event is not None:
        lines.append(f"last event: {event.get('message')}")
    lines += _describe_plan(plan)
    lines += [line for record in content["evaluations"] for line in _describe_record(record)]
    return "\n".join([*lines, "", content["config"].rstrip()])


def _describe_plan(plan: dict[str, Any]) -> list[str]:
    values = {name: number_text(plan[name]) for _, name in _PLAN if name in plan}
    stages = [stage for stage in plan.get("stages", []) if "n_flattened" in stage]
    if stages:
        # What was planned is how many directions there are to choose from.
        first, *later = stages
        told = (f"{stage['n_flattened']:,} from row {stage['first_row']:,}" for stage in later)
        values["data_rank"] = ", ".join([f"{first['n_flattened']:,}", *told])
    lines = [f"{label:<14}{values[name]}" for label, name in _PLAN if name in values]
    return ["", *lines] if lines else []


def _describe_checkpoints(checkpoints: list[dict[str, Any]]) -> list[str]:
    return [
        f"checkpoint at step {item['step']}, {bytes_text(item['bytes'])}, {item['state']}"
        for item in checkpoints
    ] or ["no checkpoint yet"]


def _describe_record(record: dict[str, Any]) -> list[str]:
    scores = {name: value for name, value in record.items() if isinstance(value, int | float)}
    return [
        "",
        f"evaluated on {record.get('split')} of {record.get('store')}",
        "  " + ", ".join(f"{name} {number_text(value)}" for name, value in scores.items()),
    ]
