"""The words of `inspect` and `evaluate` for people: stores in 80 columns, runs wherever names and paths allow."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from ep3stream.data.location import Location
from ep3stream.run.inspection.describe_store import describe_store
from ep3stream.run.inspection.inspect import inspect
from ep3stream.run.records.quantities import bytes_text, clock_text

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
    return "\n".join(f"{name:<9} {_number(value)}" for name, value in scores.items())


def describe_soundness(path: Location, bytes_read: int | None, elapsed_s: float) -> str:
    """One line about a path that `verify` found nothing wrong with; bytes_read is None when it was quick."""
    if bytes_read is None:
        return f"{path} is complete: all sizes are right ({elapsed_s:.1f} s; no row was read)"
    rate = bytes_read / max(elapsed_s, 1e-9)
    return (
        f"{path} is sound: every digest is right "
        f"({bytes_text(bytes_read)} read in {elapsed_s:.1f} s, {bytes_text(int(rate))}/s)"
    )


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _describe_run(content: dict[str, Any]) -> str:
    plan, last, event = content["plan"] or {}, content["last_step"], content["last_event"]
    lines = [content["path"], f"a fit, {'finished' if content['finished'] else 'unfinished'}"]
    if content["store"]:
        lines.append(f"of {content['store'].get('path')}, split {content['store'].get('split')}")
    if last is not None:
        lines.append(
            f"step {_number(last.get('step'))}, epoch {_number(last.get('epoch'))}, "
            f"running loss {_number(last.get('loss'))}"
        )
        if last.get("stalled_s") is not None:
            stalled, elapsed = _number(last["stalled_s"]), _number(last.get("elapsed_s"))
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
    values = {name: _number(plan[name]) for _, name in _PLAN if name in plan}
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
        "  " + ", ".join(f"{name} {_number(value)}" for name, value in scores.items()),
    ]


def describe_status(now: dict[str, Any]) -> str:
    """What `status` found, in a few lines."""
    age = "" if now["age_s"] is None else f", as of {clock_text(now['age_s'])} ago"
    held = f" ({now['holder']})" if now["holder"] else ""
    lines = [f"{now['run']}: {now['state']}{held}{age}"]
    if now["n_steps"]:
        share = 100 * now["step"] / now["n_steps"]
        lines.append(
            f"step {now['step']:,} of {now['n_steps']:,} ({share:.1f}%), epoch {_number(now['epoch'])}"
        )
    if now["loss"] is not None:
        lines.append(f"running loss {_number(now['loss'])}")
    if now["rows_per_s"] is not None and now["state"] in ("running", "unknown"):
        starved = "" if now["starved"] is None else f", {100 * now['starved']:.0f}% of the time without data"
        to_go = "" if now["eta_s"] is None else f", {clock_text(now['eta_s'])} to go"
        lines.append(f"{now['rows_per_s']:,.0f} rows/s{starved}{to_go}")
    if (scores := now["validation"]) is not None:
        shown = {name: scores[name] for name in ("accuracy", "r2", "mse") if scores.get(name) is not None}
        words = ", ".join(f"{name} {_number(value)}" for name, value in shown.items())
        lines.append(f"validation on {scores.get('split')} at epoch {_number(scores.get('epoch'))}: {words}")
    if (saved := now["checkpoint"]) is not None:
        age = "" if saved["age_s"] is None else f", {clock_text(saved['age_s'])} ago"
        lines.append(f"last checkpoint at step {saved['step']:,}{age}")
    if now["event"] is not None and now["state"] != "running":
        lines.append(f"last: {now['event'].get('message')}")
    if now["state"] in ("died", "stopped"):
        lines.append("the same fit command goes on from the last checkpoint")
    return "\n".join(lines)
