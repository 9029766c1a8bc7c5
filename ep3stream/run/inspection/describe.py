"""The words of `inspect` and `evaluate` for people: stores in 80 columns, runs wherever names and paths allow."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from ep3stream.data.location import Location
from ep3stream.run.inspection.describe_store import describe_store
from ep3stream.run.inspection.inspect import inspect
from ep3stream.run.records.quantities import bytes_text, number_text

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
