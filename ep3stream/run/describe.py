"""The words of `inspect` and `evaluate` for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ep3stream.run.inspect import inspect

_MAX_COLUMNS = 20


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
    return "\n".join(
        f"{name:<9} {value}" if isinstance(value, int) else f"{name:<9} {value:.6g}"
        for name, value in scores.items()
    )


def _describe_store(content: dict[str, Any]) -> str:
    raw = sum(split["rows"] for split in content["splits"].values()) * content["n_features"]
    raw *= 2 if content["x_dtype"] == "float16" else 4
    order = (
        "in source order"
        if content["shuffle_seed"] is None
        else f"shuffled with seed {content['shuffle_seed']}"
    )
    lines = [
        f"{content['path']}: {content['task']}, {content['n_features']} features ({content['x_dtype']}), "
        f"{content['n_outputs']} outputs",
        f"{content['format']}, codec {content['codec']}, {content['bytes_on_disk'] / 1e6:.1f} MB on disk "
        f"({raw / max(content['bytes_on_disk'], 1):.2f} times compressed), {order}, by {content['created_by']}",
        "",
        f"{'split':<12}{'rows':>14}{'segments':>10}",
    ]
    lines += [
        f"{name:<12}{split['rows']:>14,}{split['segments']:>10}" for name, split in content["splits"].items()
    ]
    for name, split in content["splits"].items():
        lines += ["", *_describe_targets(name, split, content)]
        lines += ["", *_describe_columns(name, content["features"][name])]
    return "\n".join(lines)


def _describe_targets(name: str, split: dict[str, Any], content: dict[str, Any]) -> list[str]:
    if "class_counts" in split:
        rows = zip(content["class_names"], split["class_counts"], strict=True)
        lines = [
            f"  {label:<24.24}{n:>12,}{100 * n / split['rows']:>7.1f}%"
            for label, n in list(rows)[:_MAX_COLUMNS]
        ]
        return [f"classes of {content['target_names'][0]} in {name}", *lines]
    means = zip(content["target_names"], split["target_mean"], split["target_std"], strict=True)
    return [
        f"targets in {name}",
        *(f"  {label:<24.24} mean {mean:<12.6g} std {std:.6g}" for label, mean, std in means),
    ]


def _describe_columns(name: str, columns: list[dict[str, Any]]) -> list[str]:
    lines = [f"{f'features in {name}':<26}{'mean':>12}{'std':>12}{'min':>12}{'max':>12}{'missing':>9}"]
    lines += [
        f"  {c['name']:<24.24}{c['mean']:>12.5g}{c['std']:>12.5g}{c['min']:>12.5g}{c['max']:>12.5g}{c['missing']:>9}"
        for c in columns[:_MAX_COLUMNS]
    ]
    if len(columns) > _MAX_COLUMNS:
        lines.append(f"  and {len(columns) - _MAX_COLUMNS} more (--json has them all)")
    return lines


def _describe_run(content: dict[str, Any]) -> str:
    last, event = content["last_step"], content["last_event"]
    lines = [f"{content['path']}: a fit, {'finished' if content['finished'] else 'unfinished'}"]
    if last is not None:
        lines.append(f"step {last['step']}, epoch {last['epoch']:.2f}, running loss {last['loss']:.6g}")
    if event is not None:
        lines.append(f"last event: {event['message']}")
    lines.append(f"checkpoints at steps {', '.join(map(str, content['checkpoints'])) or 'none yet'}")
    lines += [f"evaluated: {record}" for record in content["evaluations"]]
    return "\n".join([*lines, "", content["config"]])
