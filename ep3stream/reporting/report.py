"""The report page: one self-contained HTML file drawn from whatever a run directory holds."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ep3stream.disk import replacing, write
from ep3stream.reporting import charts, summary
from ep3stream.reporting.error_charts import diagnosis
from ep3stream.reporting.quantities import DASH, TIMES, count, duration, number, percent, size
from ep3stream.reporting.records import RunRecords, as_floats
from ep3stream.reporting.run_json import (
    Record,
    as_float,
    as_list,
    as_record,
    column_shares,
    crossed_columns,
    linear_explained,
    linear_sizes,
)

Bar = tuple[str, str, float]
"""A name, its quantity as text and its length in percent of the longest bar."""

_MOST_NAMES = 40
_MOST_EVENTS = 40
_MOST_COLUMNS = 40

_LABELS = {
    "path": "store", "n_rows": "rows", "n_features": "features", "n_outputs": "outputs",
    "n_centers": "centers", "n_steps": "steps in all", "nystrom_samples": "Nyström samples",
    "mu": "μ of the model preconditioner", "lambda_max": "λ max of the step's operator",
    "torch": "PyTorch", "python": "Python",
}  # fmt: skip


def write_report(run: Path) -> Path:
    """Draws RUN/report.html and returns its path; the same run directory gives the same bytes.

    A file that is missing or damaged only leaves its part of the page out. Raises InputError if `run` is no run, and
    OSError if the page cannot be written; an older page then stays as it was.
    """
    target = run / "report.html"
    write_page("report.html.jinja", _view(RunRecords.read(run)), target)
    return target


def write_page(template: str, view: Mapping[str, Any], target: Path) -> None:
    """Writes a page of this package's templates, all or nothing, to a place that others may replace as well.

    Raises OSError.
    """
    page = compiled(template).render(view).encode("utf-8", errors="replace")
    with replacing(target, is_shared=True) as partial:
        write(partial, [page])


@cache
def compiled(template: str) -> Template:
    """A template of this package, compiled once in a process: that takes 0.2 s, as long as a small fit."""
    environment = Environment(
        loader=PackageLoader("ep3stream.reporting", ""),
        # Names of stores, targets and classes come from other people's files.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template)


def _view(records: RunRecords) -> dict[str, Any]:
    """All that the template shows, as text, charts and bars."""
    memory = records.plan.memory
    heads, rows = summary.evaluation_table(records)
    return {
        "name": records.name,
        "created_by": str(records.summary.get("created_by", "ep3stream")),
        "status": summary.status(records),
        "headline": summary.headline(records),
        "summary": summary.summary(records),
        "tiles": summary.tiles(records),
        "evaluation_heads": heads,
        "evaluation_rows": rows,
        "diagnosis": diagnosis(records),
        "is_by_gradients": "metric" in records.summary,
        "column_bars": _bars(column_shares(records.summary), percent),
        "linear_bars": _bars(linear_sizes(records.summary), lambda value: number(value, 2)),
        "linear_explained": percent(linear_explained(records.summary)),
        "crosses": [
            (_crossed(cross.columns), _crossed(map(str, cross.levels)), percent(cross.explained))
            for cross in crossed_columns(records.summary)
        ],
        "loss_charts": [(key, chart) for key in charts.X_AXES if (chart := charts.loss_chart(records, key))],
        "accuracy_charts": [
            (key, chart) for key in charts.X_AXES if (chart := charts.accuracy_chart(records, key))
        ],
        "speed_charts": [
            chart for chart in (charts.rate_chart(records), charts.wait_chart(records)) if chart
        ],
        "limit": summary.limit(records),
        "setup_bars": _bars(as_record(records.setup.get("elapsed_s")), duration),
        "setup_total": duration(records.setup_s),
        "spectra": charts.spectrum_charts(records),
        "step_size_chart": charts.step_size_chart(records),
        "memory_bars": _bars(memory, size),
        "memory_total": size(math.fsum(memory.values())),
        "events": _events(records),
        "columns": _columns(records.statistics),
        "class_bars": _class_bars(records),
        "tables": _tables(records),
        "config": records.config,
        "command": _commands(records),
    }


def _crossed(parts: Iterable[str]) -> str:
    return f" {TIMES} ".join(parts)


def _bars(quantities: Mapping[str, object], text: Callable[[float], str]) -> list[Bar]:
    """Bars for named quantities, in their order, without those that are no number."""
    known = {name: as_float(value) for name, value in quantities.items() if 0 <= as_float(value) < math.inf}
    longest = max(known.values(), default=0.0) or 1.0
    return [(name, text(value), round(100 * value / longest, 2)) for name, value in known.items()]


def _events(records: RunRecords) -> list[tuple[str, str, str, str]]:
    """The newest events as (time, step, event, message); of the checkpoints only the last."""
    last_checkpoint = [e for e in records.events if e.get("event") == "checkpoint"][-1:]
    shown = [e for e in records.events if e.get("event") != "checkpoint" or e in last_checkpoint]
    return [
        (
            duration(as_float(e.get("elapsed_s"))),
            count(e.get("step")),
            str(e.get("event", DASH)),
            str(e.get("message") or ""),
        )
        for e in shown[-_MOST_EVENTS:]
    ]


def _tables(records: RunRecords) -> list[tuple[str, list[tuple[str, str]]]]:
    """The non-empty ones of the tables of names and values, with their titles."""
    names = {"targets": _listed(records.target_names), "classes": _listed(records.class_names)}
    contents = {
        "Data": {**records.store, **names},
        "Plan": {**as_record(records.summary.get("plan")), **records.setup},
        "Environment": records.environment,
    }
    return [(title, rows) for title, values in contents.items() if (rows := _facts(values))]


def _columns(statistics: Record) -> list[tuple[str, ...]]:
    """(name, role, mean, std, min, max, missing) of the targets and of the first features."""
    columns = [
        (role, as_record(column))
        for role in ("target", "feature")
        for column in as_list(statistics.get(f"{role}s"))
    ]
    return [
        (
            str(column.get("name", DASH)),
            role,
            *(number(as_float(column.get(moment)), 4) for moment in ("mean", "std", "min", "max")),
            count(column.get("missing")),
        )
        for role, column in columns[:_MOST_COLUMNS]
    ]


def _class_bars(records: RunRecords) -> list[Bar]:
    counts = as_floats(records.statistics.get("class_counts")).tolist()
    named = list(zip(records.class_names, counts, strict=False))
    return _bars(dict(named[:_MOST_COLUMNS]), count)


def _commands(records: RunRecords) -> str:
    """The shell commands that make the same fit again, with the versions it was made with as a comment."""
    store, environment = records.store, records.environment
    path = shlex.quote(str(store.get("path", "STORE")))
    versions = [str(records.summary["created_by"])] if "created_by" in records.summary else []
    versions += [
        f"{_LABELS[name]} {environment[name]}" for name in ("torch", "python") if name in environment
    ]
    lines = [f"# with {', '.join(versions)}"] if versions else []
    if "fingerprint" in store:
        lines.append(f"ep3stream inspect {path}  # must have the fingerprint {store['fingerprint']}")
    return "\n".join([*lines, f"ep3stream fit {path} RUN --config config.toml"])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _facts(values: Record) -> list[tuple[str, str]]:
    """The texts and numbers among `values`, with labels; other parts of the page show the lists and objects."""
    rows = []
    for name, value in values.items():
        label = _LABELS.get(name, name.replace("_", " "))
        if isinstance(value, str) and value:
            rows.append((label, value))
        elif isinstance(value, int | float):
            rows.append((label, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"))
    return rows
