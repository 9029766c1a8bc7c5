"""The comparison page: several runs on one page, with curves on shared axes; self-contained like a report."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ep3stream.disk import read_small_file
from ep3stream.errors import InputError
from ep3stream.reporting import summary
from ep3stream.reporting.charts import X_AXES, step_series, validation_series
from ep3stream.reporting.curves import Chart, axis, draw
from ep3stream.reporting.quantities import DASH, count, duration, number, percent, size
from ep3stream.reporting.records import RunRecords
from ep3stream.reporting.report import write_page
from ep3stream.reporting.run_json import as_float, column_shares

MOST_RUNS = 8
_MOST_POINTS = 600
_MOST_COLUMNS = 3
_HEAD_BYTES = 1 << 12

# Only a file with this title is replaced.
_MARK = b"<title>Comparison \xc2\xb7 ep3stream</title>"


def write_comparison(runs: Sequence[Path | str], out: Path | str = "comparison.html") -> Path:
    """Draws the page of 2 to 8 runs to `out` and returns its path; an older comparison there is replaced.

    Scores, times and sizes side by side, losses on shared axes, and the settings that differ. Raises InputError for
    too few or too many runs, for a directory that is no run, and for an `out` that holds anything but a comparison.
    """
    if not 2 <= len(runs) <= MOST_RUNS:
        raise InputError(f"{len(runs)} runs were given; compare 2 to {MOST_RUNS}")
    target = Path(out).absolute()
    _require_replaceable(target)
    records = [RunRecords.read(Path(run).absolute()) for run in runs]
    try:
        write_page("comparison.html.jinja", _view(records, _names(runs)), target)
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
    """The ends of the paths, as many components as it takes to tell them apart."""
    parts = [Path(run).absolute().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{Path(run).name} ({place + 1})" for place, run in enumerate(runs)]


def _view(records: Sequence[RunRecords], names: list[str]) -> dict[str, Any]:
    """All that the template shows."""
    return {
        "names": names,
        "headline": _headline(records, names),
        "warning": _warning(records),
        "statuses": [summary.status(run) for run in records],
        "rows": _rows(records),
        "loss_charts": [(key, chart) for key in X_AXES if (chart := _loss_chart(records, names, key))],
        "settings": _different_settings(records),
    }


def _headline(records: Sequence[RunRecords], names: list[str]) -> str:
    """Names the run with the best score, if there is a score that all runs have."""
    scores = [summary.headline_scores(run)[1] for run in records]
    for metric, best_of in (("accuracy", max), ("r2", max), ("mse", min)):
        values = [as_float(each.get(metric)) for each in scores]
        if all(map(math.isfinite, values)) and len(set(values)) > 1:
            best = best_of(values)
            text = f"{summary.METRICS[metric]} {summary.metric_text(metric, best)}"
            return f"{names[values.index(best)]} is the best of {len(names)} runs: {text}."
    return f"{len(names)} runs side by side."


def _warning(records: Sequence[RunRecords]) -> str:
    """Why the scores cannot be compared; empty if they can."""
    stores = {str(run.store.get("fingerprint")) for run in records}
    scored_rows = {summary.headline_scores(run)[0] for run in records}
    if len(scored_rows) > 1:
        listed = ", ".join(sorted(name or "none yet" for name in scored_rows))
        return f"The scores are not of the same rows: {listed}."
    return "The runs were fitted to different stores." if len(stores) > 1 else ""


def _rows(records: Sequence[RunRecords]) -> list[tuple[str, list[str]]]:
    """The rows of the table, each with its label and a cell for each run; none in which all cells are empty."""
    scores = [summary.headline_scores(run)[1] for run in records]
    rows = [
        ("scores of", [summary.headline_scores(run)[0] or DASH for run in records]),
        *(
            (summary.METRICS[name], [summary.metric_text(name, each.get(name)) for each in scores])
            for name in summary.metric_names(*scores)
        ),
        ("running loss", [number(run.steps.last("loss")) for run in records]),
        ("epochs", [number(run.steps.last("epoch")) for run in records]),
        ("fit time", [duration(run.steps.last("elapsed_s")) for run in records]),
        ("set-up time", [duration(run.setup_s) for run in records]),
        ("rows per second", [number(run.steps.rows_per_s()) for run in records]),
        ("waiting for data", [_waiting(run) for run in records]),
        ("store", [summary.store_name(run) for run in records]),
        ("centers", [count(run.plan.n_centers) for run in records]),
        ("kernel", [_kernel(run) for run in records]),
        ("what matters", [_what_matters(run) for run in records]),
        ("batch size", [count(run.plan.batch_size) for run in records]),
        ("memory planned", [_memory(run) for run in records]),
    ]
    return [(label, cells) for label, cells in rows if set(cells) != {DASH}]


def _waiting(run: RunRecords) -> str:
    elapsed = run.steps.last("elapsed_s")
    share = run.steps.last("wait_s") / elapsed if elapsed > 0 else math.nan
    return percent(share) if math.isfinite(share) else DASH


def _kernel(run: RunRecords) -> str:
    bandwidth = as_float(run.plan.bandwidth)
    return (run.plan.kernel or DASH) + (f", {number(bandwidth)}" if math.isfinite(bandwidth) else "")


def _what_matters(run: RunRecords) -> str:
    shares = list(column_shares(run.summary).items())[:_MOST_COLUMNS]
    return ", ".join(f"{name} {percent(share)}" for name, share in shares) or DASH


def _memory(run: RunRecords) -> str:
    return size(math.fsum(run.plan.memory.values())) if run.plan.memory else DASH


def _loss_chart(records: Sequence[RunRecords], names: list[str], x: str) -> Chart | None:
    """Running losses as lines and validations as points, of all runs on the same axes."""
    series = []
    for place, (run, name) in enumerate(zip(records, names, strict=True)):
        series.append(step_series(name, f"main run-{place}", run.steps, x, "loss", _MOST_POINTS))
        if run.validations:
            role = f"point run-{place}"
            series.append(validation_series(f"{name}, validation", role, run, x, "mse", _MOST_POINTS))
    losses = np.concatenate([one.y for one in series])
    if not np.any(losses > 0):
        return None
    label, units = X_AXES[x]
    across = axis(label, np.concatenate([one.x for one in series]), snug=True, units=units)
    shown = [one for one in series if len(one.x)]
    return draw(f"Loss against {label}", across, axis("mean squared error", losses, log=True), shown)


def _different_settings(records: Sequence[RunRecords]) -> list[tuple[str, list[str]]]:
    """(`table.setting`, the value in each run) for the settings that are not the same in all runs."""
    settings = [_settings(run.config) for run in records]
    rows = [
        (name, [str(each.get(name, DASH)) for each in settings]) for name in sorted(set().union(*settings))
    ]
    return [(name, cells) for name, cells in rows if len(set(cells)) > 1]


def _settings(config: str) -> dict[str, Any]:
    """`table.setting` -> value of a TOML file; empty if it cannot be parsed."""
    try:
        document = tomllib.loads(config)
    except (tomllib.TOMLDecodeError, RecursionError):
        return {}
    tables = {name: values for name, values in document.items() if isinstance(values, dict)}
    return {f"{name}.{key}": value for name, values in tables.items() for key, value in values.items()}
