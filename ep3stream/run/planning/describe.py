"""A fit's plan in words, for people."""

from __future__ import annotations

from ep3stream.run.planning.forecast import Expected, FitPlan
from ep3stream.run.records.quantities import bytes_text
from ep3stream.run.reporting.words import duration

_NAME_WIDTH = 52
_LIMITS = {
    "arithmetic": "arithmetic is the limit: a faster device or more of them would help, faster storage would not",
    "reading": "reading is the limit: faster storage or rows of fewer bytes would help, more devices would not",
    "links": "the links between the devices are the limit: larger batches or fewer devices would help",
}


def describe_plan(plan: FitPlan) -> str:
    """Some twenty lines: the sizes, memory by item, what is read and computed, and how long it takes."""
    sizes, total = plan.sizes, sum(plan.memory.values())
    many = f" on each of {sizes.devices} devices" if sizes.devices > 1 else ""
    batches = (
        f"batches of {sizes.batch_size:,}" if plan.expected else f"batches of up to {sizes.batch_size:,}"
    )
    lines = [
        f"{plan.store}, split {plan.split}: {sizes.n_rows:,} rows to train on, {sizes.n_features} features, "
        f"{_plural(sizes.n_outputs, 'output')}",
        f"{_plural(sizes.n_centers, 'center')}, projection {sizes.projection}, ranks {sizes.model_rank} (model) and "
        f"{sizes.data_rank} (data)",
        f"{batches} rows, {_plural(sizes.steps_per_epoch, 'step')} an epoch, {plan.n_steps:,} in all",
        "",
        *(f"{name:<{_NAME_WIDTH}}{bytes_text(n_bytes):>12}" for name, n_bytes in plan.memory.items()),
        f"{'memory' + many:<{_NAME_WIDTH}}{bytes_text(total):>12}",
        f"of {bytes_text(plan.memory_bytes)} allowed by --memory, in a machine of {bytes_text(plan.machine_bytes)}; "
        f"interpreter and libraries take {bytes_text(plan.process_bytes)} besides",
        f"the largest model in that memory has {_plural(plan.largest_centers, 'center')}",
        "",
        f"reads {bytes_text(plan.bytes_read)}; {plan.evaluations:.3g} kernel evaluations, {plan.flops:.3g} FLOPs"
        + (f", {bytes_text(plan.reduced_bytes)} all-reduced" if sizes.devices > 1 else ""),
    ]
    return "\n".join(lines + _expected(plan.expected, sizes.devices))


def _expected(expected: Expected | None, devices: int) -> list[str]:
    if expected is None:
        return []
    per_second = f"{expected.rows_per_s:,.0f} rows/s"
    is_counted = devices == 1 or expected.link_bytes_per_s is not None
    links = "" if is_counted else "; without the links between devices, whose --link-gb-per-s is not given"
    return [
        f"measured here: {1000 * expected.step_s:.3g} ms a step, {bytes_text(int(expected.read_bytes_per_s))}/s read",
        f"takes about {duration(expected.setup_s)} of set-up and {duration(expected.fit_s)} of steps, {per_second}, "
        f"starved {100 * expected.starved:.0f}%{links}",
        f"resident memory{' of each' if devices > 1 else ''} peaks at about {bytes_text(expected.peak_bytes)}",
        _LIMITS[expected.limit],
    ]


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
