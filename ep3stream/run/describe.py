"""The words of `inspect` and `evaluate` for people, in lines of 80 columns wherever names and paths allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ep3stream.run.inspect import inspect

_MAX_LINES = 20
_PLAN = (
    ("centers", "n_centers"),
    ("kernel", "kernel"),
    ("bandwidth", "bandwidth"),
    ("projection", "projection"),
    ("model rank", "model_rank"),
    ("data rank", "data_rank"),
    ("batch size", "batch_size"),
    ("step size", "step_size"),
    ("steps in all", "n_steps"),
)


def describe_path(path: Path) -> str:
    """A few lines about the store or the run at `path`."""
    content = inspect(path)
    return _describe_store(content) if content["what"] == "store" else _describe_run(content)


def describe_new_store(path: Path) -> str:
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


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _describe_store(content: dict[str, Any]) -> str:
    raw = sum(split["rows"] for split in content["splits"].values()) * content["n_features"]
    raw *= 2 if content["x_dtype"] == "float16" else 4
    on_disk, seed = content["bytes_on_disk"], content["shuffle_seed"]
    order = "in source order" if seed is None else f"shuffled with seed {seed}"
    lines = [
        content["path"],
        f"{content['task']}, {content['n_features']} features ({content['x_dtype']}), "
        f"{content['n_outputs']} outputs, {order}",
        f"{content['format']}, codec {content['codec']}, {on_disk / 1e6:.1f} MB on disk "
        f"({raw / max(on_disk, 1):.2f} times compressed), by {content['created_by']}",
        "",
        f"{'split':<24}{'rows':>16}{'segments':>12}",
    ]
    lines += [
        f"{name:<24}{split['rows']:>16,}{split['segments']:>12,}" for name, split in content["splits"].items()
    ]
    for name, split in content["splits"].items():
        lines += ["", *_describe_targets(name, split, content)]
        lines += ["", *_describe_columns(name, content["features"][name])]
    return "\n".join(lines)


def _describe_targets(name: str, split: dict[str, Any], content: dict[str, Any]) -> list[str]:
    if "class_counts" in split:
        counts = zip(content["class_names"], split["class_counts"], strict=True)
        lines = [f"  {label:<30.30}{n:>16,}{100 * n / split['rows']:>9.1f}%" for label, n in counts]
        return [f"classes of {content['target_names'][0]} in {name}", *_first(lines)]
    moments = zip(content["target_names"], split["target_mean"], split["target_std"], strict=True)
    lines = [f"  {label:<30.30}{mean:>16.6g}{std:>16.6g}" for label, mean, std in moments]
    return [f"{f'targets in {name}':<32}{'mean':>16}{'std':>16}", *_first(lines)]


def _describe_columns(name: str, columns: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"  {c['name']:<22.22}{c['mean']:>11.4g}{c['std']:>11.4g}{c['min']:>11.4g}{c['max']:>11.4g}{c['missing']:>11,}"
        for c in columns
    ]
    header = f"{f'features in {name}':<24}{'mean':>11}{'std':>11}{'min':>11}{'max':>11}{'missing':>11}"
    return [header, *_first(lines)]


def _first(lines: Sequence[str]) -> list[str]:
    more = [f"  and {len(lines) - _MAX_LINES} more (--json has them all)"] if len(lines) > _MAX_LINES else []
    return [*lines[:_MAX_LINES], *more]


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
    if event is not None:
        lines.append(f"last event: {event.get('message')}")
    lines.append(f"checkpoints at steps {', '.join(map(str, content['checkpoints'])) or 'none yet'}")
    lines += ["", *(f"{label:<14}{_number(plan[name])}" for label, name in _PLAN if name in plan)] * bool(
        plan
    )
    lines += [line for record in content["evaluations"] for line in _describe_record(record)]
    return "\n".join([*lines, "", content["config"].rstrip()])


def _describe_record(record: dict[str, Any]) -> list[str]:
    scores = {name: value for name, value in record.items() if isinstance(value, int | float)}
    return [
        "",
        f"evaluated on {record.get('split')} of {record.get('store')}",
        "  " + ", ".join(f"{name} {_number(value)}" for name, value in scores.items()),
    ]
