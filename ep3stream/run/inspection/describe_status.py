"""The words of `status` for people."""

from __future__ import annotations

from typing import Any

from ep3stream.run.records.quantities import clock_text, number_text


def describe_status(now: dict[str, Any]) -> str:
    """What `status` found, in a few lines."""
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
