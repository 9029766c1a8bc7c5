"""The report page: one self-contained HTML file drawn from whatever a run directory holds."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ep3stream.disk import no_link
from ep3stream.reporting import charts, words
from ep3stream.reporting.curves import DASH, number
from ep3stream.reporting.error_charts import diagnosis
from ep3stream.reporting.records import RunRecords, Table, real, reals, table, texts

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

    Missing or damaged inputs only leave their part of the page out. Raises InputError if `run` is none,
    and OSError if the page cannot be written; an older page then stays as it was.
    """
    target = run / "report.html"
    write_page(rendered("report.html.jinja", _view(RunRecords.read(run))), target)
    return target


def write_page(page: bytes, target: Path) -> None:
    """Replaces a page all or nothing; raises OSError."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(partial, "wb", opener=no_link) as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def rendered(template: str, view: dict[str, Any]) -> bytes:
    """A page of this package's templates, as UTF-8."""
    environment = Environment(
        loader=PackageLoader("ep3stream.reporting", ""),
        # Names of stores, targets and classes come from other people's files.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(view).encode("utf-8", errors="replace")


def _view(records: RunRecords) -> dict[str, Any]:
    """Everything the template shows, as text, charts and bars."""
    setup, memory = table(records.run.get("setup")), table(table(records.run.get("plan")).get("memory"))
    heads, rows = words.evaluation_table(records)
    return {
        "name": records.name,
        "created_by": str(records.run.get("created_by", "ep3stream")),
        "status": words.status(records),
        "headline": words.headline(records),
        "summary": words.summary(records),
        "tiles": words.tiles(records),
        "evaluation_heads": heads,
        "evaluation_rows": rows,
        "diagnosis": diagnosis(records),
        "loss_charts": [(key, chart) for key in charts.X_AXES if (chart := charts.loss_chart(records, key))],
        "accuracy_charts": [
            (key, chart) for key in charts.X_AXES if (chart := charts.accuracy_chart(records, key))
        ],
        "speed_charts": [
            chart for chart in (charts.rate_chart(records), charts.wait_chart(records)) if chart
        ],
        "limit": words.limit(records),
        "setup_bars": _bars(table(setup.get("elapsed_s")), words.duration),
        "setup_total": words.duration(words.setup_seconds(records)),
        "spectra": charts.spectra(records),
        "step_size_chart": charts.step_size_chart(records),
        "memory_bars": _bars(memory, words.size),
        "memory_total": words.size(math.fsum(b for b in map(real, memory.values()) if math.isfinite(b))),
        "events": _events(records),
        "columns": _columns(table(records.run.get("statistics"))),
        "class_bars": _class_bars(records.run),
        "tables": _tables(records),
        "config": records.config,
        "command": _commands(records.run),
    }


def _bars(quantities: Table, text: Callable[[float], str]) -> list[Bar]:
    """Bars for named quantities, in their order; what is not a number is left out."""
    known = {name: real(value) for name, value in quantities.items() if 0 <= real(value) < math.inf}
    longest = max(known.values(), default=0.0) or 1.0
    return [(name, text(value), round(100 * value / longest, 2)) for name, value in known.items()]


def _events(records: RunRecords) -> list[tuple[str, str, str, str]]:
    """The newest events as (time, step, event, message), only the last of the checkpoints."""
    last_checkpoint = [e for e in records.events if e.get("event") == "checkpoint"][-1:]
    told = [e for e in records.events if e.get("event") != "checkpoint" or e in last_checkpoint]
    return [
        (
            words.duration(real(e.get("elapsed_s"))),
            words.count(e.get("step")),
            str(e.get("event", DASH)),
            str(e.get("message") or ""),
        )
        for e in told[-_MOST_EVENTS:]
    ]


def _tables(records: RunRecords) -> list[tuple[str, list[tuple[str, str]]]]:
    """Titled name-value tables of the data, the plan, what the set-up measured and the environment."""
    names = {
        "targets": _names(texts(records.run.get("target_names"))),
        "classes": _names(texts(records.run.get("class_names"))),
    }
    titled = {
        "Data": {**table(records.run.get("store")), **names},
        "Plan": {**table(records.run.get("plan")), **table(records.run.get("setup"))},
        "Environment": table(records.run.get("environment")),
    }
    facts = {title: _facts(values) for title, values in titled.items()}
    return [(title, rows) for title, rows in facts.items() if rows]


def _columns(statistics: Table) -> list[tuple[str, ...]]:
    """(name, role, mean, std, min, max, missing) of targets and the first features."""
    told: list[tuple[str, Table]] = []
    for role in ("target", "feature"):
        found = statistics.get(f"{role}s")
        told += [(role, table(one)) for one in found] if isinstance(found, list) else []
    return [
        (
            str(one.get("name", DASH)),
            role,
            *(number(real(one.get(moment)), 4) for moment in ("mean", "std", "min", "max")),
            words.count(one.get("missing")),
        )
        for role, one in told[:_MOST_COLUMNS]
    ]


def _class_bars(run: Table) -> list[Bar]:
    counts = reals(table(run.get("statistics")).get("class_counts")).tolist()
    names = texts(run.get("class_names"))
    return _bars(dict(list(zip(names, counts, strict=False))[:_MOST_COLUMNS]), words.count)


def _commands(run: Table) -> str:
    """What makes the same fit again, and what it was made with."""
    store, environment = table(run.get("store")), table(run.get("environment"))
    path = shlex.quote(str(store.get("path", "STORE")))
    made_by = [str(run["created_by"])] if "created_by" in run else []
    made_by += [f"{_LABELS[name]} {environment[name]}" for name in ("torch", "python") if name in environment]
    lines = [f"# with {', '.join(made_by)}"] if made_by else []
    if "fingerprint" in store:
        lines.append(f"ep3stream inspect {path}  # must have the fingerprint {store['fingerprint']}")
    return "\n".join([*lines, f"ep3stream fit {path} RUN --config config.toml"])


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _facts(values: Table) -> list[tuple[str, str]]:
    """The texts and numbers among `values`, labelled; lists and tables are shown elsewhere."""
    rows = []
    for name, value in values.items():
        label = _LABELS.get(name, name.replace("_", " "))
        if isinstance(value, str) and value:
            rows.append((label, value))
        elif isinstance(value, int | float):
            rows.append((label, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"))
    return rows
