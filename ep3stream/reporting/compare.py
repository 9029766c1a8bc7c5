"""The comparison page: several runs on one page, whose curves share their axes; self-contained like a report."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ep3stream.disk import read_small_file
from ep3stream.errors import InputError
from ep3stream.reporting import words
from ep3stream.reporting.charts import X_AXES
from ep3stream.reporting.curves import DASH, Chart, Series, axis, draw, number, thin
from ep3stream.reporting.records import RunRecords, Table, real, table
from ep3stream.reporting.report import rendered, write_page

MOST_RUNS = 8

_POINTS = 600

_HEAD_BYTES = 1 << 12

_MARK = b"<title>Comparison \xc2\xb7 ep3stream</title>"


def write_comparison(runs: Sequence[Path | str], out: Path | str = "comparison.html") -> Path:
    """Draws the page of 2 to 8 runs to `out` and returns its path; an older comparison there is replaced.

    Scores, times and sizes side by side, losses on shared axes, and the settings in which they differ. Raises
    InputError for a run that is no directory, for one or too many, and for an `out` that is another file.
    """
    if not 2 <= len(runs) <= MOST_RUNS:
        raise InputError(f"{len(runs)} runs were given; compare 2 to {MOST_RUNS}")
    target = Path(out).absolute()
    _require_replaceable(target)
    records = [RunRecords.read(Path(run).absolute()) for run in runs]
    try:
        write_page(rendered("comparison.html.jinja", _view(records, _names(runs))), target)
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error}); choose another --out") from error
    return target


def _require_replaceable(target: Path) -> None:
    try:
        head = read_small_file(target, 1 << 28)[:_HEAD_BYTES]
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{target} cannot be replaced ({error}); choose another --out") from error
    if _MARK not in head:
        raise InputError(f"{target} is there and no comparison of runs; choose another --out")


def _names(runs: Sequence[Path | str]) -> list[str]:
    """As short as they differ: the ends of the paths."""
    parts = [Path(run).absolute().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{Path(run).name} ({place + 1})" for place, run in enumerate(runs)]


def _view(records: Sequence[RunRecords], names: list[str]) -> dict[str, Any]:
    return {
        "names": names,
        "headline": _headline(records, names),
        "warning": _warning(records),
        "statuses": [words.status(each) for each in records],
        "rows": _rows(records),
        "loss_charts": [(key, chart) for key in X_AXES if (chart := _chart(records, names, key))],
        "settings": _different_settings(records),
    }


def _headline(records: Sequence[RunRecords], names: list[str]) -> str:
    """Which is the best, by the figure that all have."""
    figures = [words.judgement(each)[1] for each in records]
    for metric, is_better in (("accuracy", max), ("r2", max), ("mse", min)):
        values = [real(each.get(metric)) for each in figures]
        if all(map(math.isfinite, values)) and len(set(values)) > 1:
            best = is_better(values)
            return (
                f"{names[values.index(best)]} is the best of {len(names)} runs: {words.scored(metric, best)}."
            )
    return f"{len(names)} runs side by side."


def _warning(records: Sequence[RunRecords]) -> str:
    """What makes the scores not comparable."""
    stores = {str(table(each.run.get("store")).get("fingerprint")) for each in records}
    judged = {words.judgement(each)[0] for each in records}
    if len(judged) > 1:
        return f"The scores are not of the same rows: {', '.join(sorted(each or 'none yet' for each in judged))}."
    return "The runs were fitted to different stores." if len(stores) > 1 else ""


def _rows(records: Sequence[RunRecords]) -> list[tuple[str, list[str]]]:
    """Labels with a cell for each run."""
    figures = [words.judgement(each)[1] for each in records]
    shown = [name for name in words.METRICS if any(math.isfinite(real(f.get(name))) for f in figures)]
    plans = [table(each.run.get("plan")) for each in records]
    rows = [
        ("scores of", [words.judgement(each)[0] or DASH for each in records]),
        *((words.METRICS[name], [words.metric(name, f.get(name)) for f in figures]) for name in shown),
        ("running loss", [number(each.steps.last("loss")) for each in records]),
        ("epochs", [number(each.steps.last("epoch")) for each in records]),
        ("fit time", [words.duration(each.steps.last("elapsed_s")) for each in records]),
        ("set-up time", [words.duration(words.setup_seconds(each)) for each in records]),
        ("rows per second", [number(_rate(each)) for each in records]),
        ("waiting for data", [_waiting(each) for each in records]),
        ("store", [words.store_name(each) for each in records]),
        ("centers", [words.count(plan.get("n_centers")) for plan in plans]),
        ("kernel", [_kernel(plan) for plan in plans]),
        ("batch size", [words.count(plan.get("batch_size")) for plan in plans]),
        ("memory planned", [_memory(plan) for plan in plans]),
    ]
    return [(label, cells) for label, cells in rows if set(cells) != {DASH}]


def _rate(records: RunRecords) -> float:
    elapsed = records.steps.last("elapsed_s")
    return records.steps.last("rows") / elapsed if elapsed > 0 else math.nan


def _waiting(records: RunRecords) -> str:
    elapsed = records.steps.last("elapsed_s")
    waited = records.steps.last("wait_s") / elapsed if elapsed > 0 else math.nan
    return words.share(waited) if math.isfinite(waited) else DASH


def _kernel(plan: Table) -> str:
    bandwidth = real(plan.get("bandwidth"))
    return f"{plan.get('kernel', DASH)}" + (f", {number(bandwidth)}" if math.isfinite(bandwidth) else "")


def _memory(plan: Table) -> str:
    parts = [value for value in map(real, table(plan.get("memory")).values()) if math.isfinite(value)]
    return words.size(math.fsum(parts)) if parts else DASH


def _chart(records: Sequence[RunRecords], names: list[str], x: str) -> Chart | None:
    """Running losses as lines, validations as points, of all runs on the same axes."""
    series = []
    for place, (each, name) in enumerate(zip(records, names, strict=True)):
        at, mse = (np.array([real(v.get(key)) for v in each.validations]) for key in (x, "mse"))
        lines = thin(each.steps[x], each.steps["loss"], _POINTS)
        series += [Series(name, f"main run-{place}", *lines)]
        series += [Series(f"{name}, validation", f"point run-{place}", *thin(at, mse))] if len(at) else []
    up = np.concatenate([one.y for one in series])
    if not np.any(up > 0):
        return None
    label, units = X_AXES[x]
    across = axis(label, np.concatenate([one.x for one in series]), snug=True, units=units)
    shown = [one for one in series if len(one.x)]
    return draw(f"Loss against {label}", across, axis("mean squared error", up, log=True), shown)


def _different_settings(records: Sequence[RunRecords]) -> list[tuple[str, list[str]]]:
    """`table.setting` with each run's value, for those that are not the same in all."""
    settings = [_flat(each.config) for each in records]
    every = sorted(set().union(*settings))
    rows = [(name, [str(each.get(name, DASH)) for each in settings]) for name in every]
    return [(name, cells) for name, cells in rows if len(set(cells)) > 1]


def _flat(config: str) -> dict[str, Any]:
    try:
        document = tomllib.loads(config)
    except (tomllib.TOMLDecodeError, RecursionError):
        return {}
    tables = {name: values for name, values in document.items() if isinstance(values, dict)}
    return {f"{name}.{key}": value for name, values in tables.items() for key, value in values.items()}
