"""How a fit is doing, read from its files by another process; takes no lock and changes nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ep3stream.disk import Holder, holder_of
from ep3stream.reporting.run_json import PlanRecord
from ep3stream.run.directory import RunDirectory
from ep3stream.run.event_log import number_of, read_lines, starved_between
from ep3stream.run.state import is_finished, list_checkpoints, read_summary
from ep3stream.run.text import clock_text, number_text

Record = Mapping[str, Any]


def status(run: Path | str) -> dict[str, Any]:
    """The state of the fit in `run`, as JSON:

    state: `setting up`, `running`, `finished`, `stopped` (saved, and its lock given back), `died` (neither of these),
    or `unknown` if another machine holds the lock. holder: who holds it, in words.
    step, n_steps, epoch, loss, rows_per_s: from the last line of metrics, which is age_s old. starved: the share of
    the time spent waiting for data between the last two lines. eta_s: seconds from now; None unless running.
    validation, event: the last ones. checkpoint: step and age_s of the newest one.
    Raises InputError if `run` is no run.
    """
    directory = RunDirectory(Path(run).absolute())
    directory.read_config()
    now = time.time()
    records = read_lines(directory.metrics)
    steps = [record for record in records if record.get("kind") == "step"]
    last = steps[-1] if steps else {}
    plan = PlanRecord.of(read_summary(directory).get("plan"))
    step = max((int(number_of(record, "step")) for record in records), default=0)
    holder = holder_of(directory.path / "lock")
    state = _state(directory, holder, plan.n_steps is not None)
    age_s = _age_s(directory.metrics, now)
    checkpoint = max(list_checkpoints(directory.checkpoints), default=None)
    return {
        "run": str(directory.path),
        "state": state,
        "holder": None if holder is None else holder.words,
        "step": step,
        "n_steps": plan.n_steps,
        "epoch": step / plan.steps_per_epoch if plan.steps_per_epoch else None,
        "loss": last.get("loss"),
        "rows_per_s": last.get("rows_per_s"),
        # From the beginning of the fit where there is only one line.
        "starved": starved_between(steps[-2] if len(steps) > 1 else {}, last) if steps else None,
        "age_s": age_s if last else None,
        "eta_s": _eta_s(last, plan.n_steps, age_s) if state == "running" else None,
        "validation": _last(records, "validation"),
        "event": _last(records, "event"),
        "checkpoint": checkpoint and {"step": checkpoint[0], "age_s": _age_s(checkpoint[1], now)},
    }


def _state(directory: RunDirectory, holder: Holder | None, is_set_up: bool) -> str:
    if holder is None:
        return "finished" if is_finished(directory) else "stopped"
    if holder.is_alive is None:
        return "unknown"
    if not holder.is_alive:
        return "died"
    return "running" if is_set_up else "setting up"


def _eta_s(last: Record, n_steps: float | None, age_s: float | None) -> float | None:
    step, rows, rate = (number_of(last, name) for name in ("step", "rows", "rows_per_s"))
    if n_steps is None or not step or not rate:
        return None
    return max((n_steps - step) * rows / step / rate - (age_s or 0.0), 0.0)


def _last(records: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    return next((record for record in reversed(records) if record.get("kind") == kind), None)


def _age_s(path: Path, now: float) -> float | None:
    try:
        return max(now - path.stat().st_mtime, 0.0)
    except OSError:
        return None


def describe_status(now: dict[str, Any]) -> str:
    """The result of `status` in a few lines for people."""
    age = "" if now["age_s"] is None else f", as of {clock_text(now['age_s'])} ago"
    held = f" ({now['holder']})" if now["holder"] else ""
    lines = [f"{now['run']}: {now['state']}{held}{age}"]
    if now["n_steps"]:
        share = 100 * now["step"] / now["n_steps"]
        lines.append(
            f"step {now['step']:,} of {now['n_steps']:,} ({share:.1f}%), epoch {number_text(now['epoch'])}"
        )
    if now["loss"] is not None:
        lines.append(f"running loss {number_text(now['loss'])}")
    if now["rows_per_s"] is not None and now["state"] in ("running", "unknown"):
        starved = "" if now["starved"] is None else f", {100 * now['starved']:.0f}% of the time without data"
        to_go = "" if now["eta_s"] is None else f", {clock_text(now['eta_s'])} to go"
        lines.append(f"{now['rows_per_s']:,.0f} rows/s{starved}{to_go}")
    if (scores := now["validation"]) is not None:
        shown = {name: scores[name] for name in ("accuracy", "r2", "mse") if scores.get(name) is not None}
        words = ", ".join(f"{name} {number_text(value)}" for name, value in shown.items())
        lines.append(
            f"validation on {scores.get('split')} at epoch {number_text(scores.get('epoch'))}: {words}"
        )
    if (saved := now["checkpoint"]) is not None:
        age = "" if saved["age_s"] is None else f", {clock_text(saved['age_s'])} ago"
        lines.append(f"last checkpoint at step {saved['step']:,}{age}")
    if now["event"] is not None and now["state"] != "running":
        lines.append(f"last: {now['event'].get('message')}")
    if now["state"] in ("died", "stopped"):
        lines.append("the same fit command goes on from the last checkpoint")
    return "\n".join(lines)
