"""What a fit will take, said before the fit: memory, bytes, arithmetic and time.

A fit's plan in words, for people.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ep3stream.config import FitConfig, SolverConfig
from ep3stream.mesh import Mesh
from ep3stream.planning.costs import (
    Rates,
    Sizes,
    compute_seconds_of_step,
    evaluations_of_step,
    flops_of_setup,
    flops_of_step,
    link_seconds_of_step,
    read_seconds_of_step,
    reduced_bytes_of_step,
    seconds_of_step,
)
from ep3stream.planning.pilot import PilotRun, run_pilot, sizes_of
from ep3stream.reporting.quantities import duration
from ep3stream.run.text import bytes_text
from ep3stream.solver.column_weights import evaluations_of_learning
from ep3stream.solver.columns import COLUMN_KERNELS
from ep3stream.solver.gpu import usual_device
from ep3stream.solver.kernels import KernelFunction
from ep3stream.solver.set_up import n_probes
from ep3stream.store.reader import RowStore, open_store
from ep3stream.stream.order import SAMPLED_SEGMENTS
from ep3stream.training.centers import CenterSource
from ep3stream.training.column_kernel import learning_effort
from ep3stream.training.defaults import with_kernel
from ep3stream.training.measured_sizes import with_expected_sizes
from ep3stream.training.metric import ROUNDS_SHARE, require_metric, round_settings
from ep3stream.training.plan import (
    BATCHES,
    LOCAL_TAIL,
    WIDER_BASIS,
    ProblemSize,
    SizePlan,
    automatic_centers,
    host_bytes,
    largest_model,
    machine_bytes,
    memory_budget,
    on_device,
    require_machine,
)
from ep3stream.training.problem import shape_of
from ep3stream.training.validation import ValidationRows


@dataclass(frozen=True, slots=True)
class Expected:
    """Times and rates of a fit, computed from what a pilot run has measured.

    metric_s: all rounds of learning a metric, which may end sooner; setup_s: drawing rows, preconditioner, step size;
    fit_s: all steps. limit: `arithmetic`, `reading` or `links`; starved: the share of fit_s that is spent waiting for
    data. peak_bytes: on each device, of what the plan sets aside that which the batch and the rank found leave room
    for, with interpreter and libraries. step_s, read_bytes_per_s: as measured and scaled; link_bytes_per_s: as stated.
    """

    setup_s: float
    fit_s: float
    rows_per_s: float
    step_s: float
    read_bytes_per_s: float
    limit: str
    starved: float
    peak_bytes: int
    link_bytes_per_s: float | None = None
    metric_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FitPlan:
    """What a fit will take.

    sizes: in the letters of `costs.py`; batch_size is the largest that fits while nothing was measured.
    memory: bytes by item on each device, memory_bytes of them allowed, in a machine or GPU that has machine_bytes;
    process_bytes: what interpreter and libraries take beside. largest_centers: the largest model within that memory.
    bytes_read, evaluations, flops, reduced_bytes: of the whole fit, the last between devices. expected: None
    unless it was measured. host_bytes: what rows read ahead take of the memory of a GPU's host, host_memory_bytes of
    which are allowed; None where the device is the host.
    """

    store: str
    split: str
    epochs: float
    sizes: Sizes
    n_steps: int
    memory: Mapping[str, int]
    memory_bytes: int
    machine_bytes: int
    process_bytes: int
    largest_centers: int
    bytes_read: int
    evaluations: int
    flops: int
    reduced_bytes: int
    expected: Expected | None
    host_bytes: int | None = None
    host_memory_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        return asdict(self)


def plan(
    store: Path | str,
    config: FitConfig | None = None,
    *,
    kernel: KernelFunction | None = None,
    devices: int | None = None,
    link_bytes_per_s: float | None = None,
    measure: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> FitPlan:
    """What `fit` with this config would take, without fitting.

    measure: read a few segments and take some steps, for a few seconds, so as to tell times and the batch size.
    devices: GPUs like the one at hand, or where there is none, shares of this machine's cores; as many as the config
    says unless given. link_bytes_per_s: between two of them, each way, stated since it cannot be measured from one;
    None leaves links out of the times. clock: time.process_time tells what a machine would take that has nothing
    else to do, on one thread. Of a metric to learn, all rounds are counted.

    Raises ConfigError where the fit would not start, naming what would fit, and InputError for the store.
    """
    config = config or FitConfig()
    device = usual_device()
    budget = memory_budget(config.run.memory_bytes, Mesh(0, 1, device))
    config = replace(config, run=replace(config.run, memory_bytes=budget))
    if devices is None:
        asked = config.run.devices
        devices = max(1, torch.cuda.device_count()) if asked == "auto" else int(asked)
    with open_store(store, config.run.read_timeout_s) as rows:
        reader = rows.split(config.data.split)
        require_metric(config, kernel, reader)

        def planned(config: FitConfig) -> FitPlan:
            return _planned(
                rows, config, kernel, device, devices, link_bytes_per_s, measure=measure, clock=clock
            )

        if config.data.metric == "none":
            return planned(config)
        n_rounds, of_round = config.data.metric_rounds + 1, planned(round_settings(config, reader))
        left = (1 - ROUNDS_SHARE) * config.run.minutes
        behind = planned(replace(config, run=replace(config.run, minutes=left)))
        return _with_rounds(behind, of_round, n_rounds)


def _planned(
    rows: RowStore,
    config: FitConfig,
    kernel: KernelFunction | None,
    device: torch.device,
    devices: int,
    link_bytes_per_s: float | None,
    *,
    measure: bool,
    clock: Callable[[], float],
) -> FitPlan:
    """The plan of one fit, without rounds of learning a metric before it."""
    reader = rows.split(config.data.split)
    validation = ValidationRows.of(config, rows.manifest)
    held = validation.held_rows(reader.info, config.run.seed)
    if kernel is None:
        config = with_kernel(config, reader.manifest.n_features, reader.info.n_rows - len(held))
    shape = on_device(shape_of(reader, config, validation), config.run, device)
    config = with_expected_sizes(
        reader, config, kernel, validation, shape, config.run.memory_bytes, device, devices, clock
    )
    source = CenterSource.of(config, reader, automatic_centers(shape), held)
    process_bytes = _resident_bytes()
    planned = SizePlan.of(shape, config.solver, source.n_centers, config.run.memory_bytes, devices)
    require_machine(shape, config.solver, planned, device, devices)
    sizes = sizes_of(shape, planned, config, planned.max_batch_size, devices)
    pilot_run = run_pilot(reader, shape, config, kernel, planned, clock) if measure else None
    if pilot_run is not None:
        sizes = _as_measured(sizes, pilot_run.sizes)
    n_steps = config.solver.n_steps(sizes.steps_per_epoch)
    expected = None
    if pilot_run is not None:
        peak_bytes = process_bytes + _used(planned, sizes, config.solver)
        expected = _expected(sizes, n_steps, pilot_run, link_bytes_per_s, shape, peak_bytes)
        if kernel is None and config.kernel.name in COLUMN_KERNELS:
            # The leader learns, with one device, while the others wait.
            effort = learning_effort(config.run.minutes)
            learning_s = evaluations_of_learning(shape.n_features, effort) * pilot_run.rates.evaluation_s
            expected = replace(expected, setup_s=expected.setup_s + learning_s)
    most = largest_model(shape, config.solver, config.run.memory_bytes, devices)
    return FitPlan(
        store=str(rows.path),
        split=config.data.split,
        epochs=config.solver.used_epochs,
        sizes=sizes,
        n_steps=n_steps,
        memory=dict(planned.memory),
        memory_bytes=config.run.memory_bytes,
        machine_bytes=machine_bytes(device),
        process_bytes=process_bytes,
        largest_centers=min(most, shape.n_left - 1) if source.points is None else most,
        bytes_read=_setup_segments(sizes, shape) * shape.segment_rows * shape.row_bytes
        + math.ceil(n_steps / sizes.steps_per_epoch * shape.n_rows) * shape.row_bytes,
        evaluations=n_steps * evaluations_of_step(sizes),
        flops=n_steps * flops_of_step(sizes),
        reduced_bytes=n_steps * reduced_bytes_of_step(sizes),
        expected=expected,
        host_bytes=host_bytes(shape, planned),
        host_memory_bytes=shape.host_bytes,
    )


def _with_rounds(plan: FitPlan, of_round: FitPlan, n_rounds: int) -> FitPlan:
    """The plan with what so many rounds of a metric add."""
    expected = plan.expected
    if expected is not None and of_round.expected is not None:
        expected = replace(
            expected, metric_s=n_rounds * (of_round.expected.setup_s + of_round.expected.fit_s)
        )
    return replace(
        plan,
        bytes_read=plan.bytes_read + n_rounds * of_round.bytes_read,
        evaluations=plan.evaluations + n_rounds * of_round.evaluations,
        flops=plan.flops + n_rounds * of_round.flops,
        reduced_bytes=plan.reduced_bytes + n_rounds * of_round.reduced_bytes,
        expected=expected,
    )


def _as_measured(sizes: Sizes, measured: Sizes) -> Sizes:
    """`sizes` with the batch, rank, inputs and passes of the pilot run, which had the same memory for fewer centers."""
    batch_size = min(sizes.batch_size, measured.batch_size)
    return replace(
        sizes,
        batch_size=batch_size,
        model_rank=measured.model_rank,
        passes=measured.passes,
        group_size=sizes.group_size if measured.group_size else 0,
        n_expanded=measured.n_expanded,
    )


def _expected(
    sizes: Sizes,
    n_steps: int,
    pilot_run: PilotRun,
    link_bytes_per_s: float | None,
    shape: ProblemSize,
    peak_bytes: int,
) -> Expected:
    rates = _of_each_device(pilot_run.rates, sizes.devices, link_bytes_per_s)
    step_s = seconds_of_step(sizes, rates)
    return Expected(
        setup_s=_setup_seconds(sizes, pilot_run, rates, shape),
        fit_s=n_steps * step_s,
        rows_per_s=sizes.batch_size / step_s,
        step_s=step_s,
        read_bytes_per_s=rates.read_bytes_per_s,
        limit=_limit(sizes, rates),
        starved=1 - min(1.0, _solver_seconds(sizes, rates) / step_s),
        peak_bytes=peak_bytes,
        link_bytes_per_s=link_bytes_per_s,
    )


def _used(planned: SizePlan, sizes: Sizes, config: SolverConfig) -> int:
    """Bytes of the planned memory that the fit will touch: less a basis or tail not needed, and spare rows."""
    memory = dict(planned.memory)
    if sizes.model_rank <= planned.model_rank:
        memory.pop(WIDER_BASIS, None)
    if not sizes.group_size:
        memory.pop(LOCAL_TAIL, None)
    columns = sizes.batch_size
    if config.projection != "eigenpro" and not config.data_rank:
        # The step size is measured on blocks that are kept, as many as the largest batch has room for.
        probed = n_probes(config, planned.max_batch_size, sizes.n_rows)
        columns = max(columns, min(probed, planned.max_batch_size))
    memory[BATCHES] = memory[BATCHES] * columns // planned.max_batch_size
    return sum(memory.values())


def _of_each_device(rates: Rates, devices: int, link_bytes_per_s: float | None) -> Rates:
    """The rates of one device. A device that is a share of a CPU has its part of the rates of the whole CPU."""
    parts = 1 if torch.cuda.is_available() else devices
    return replace(
        rates,
        evaluation_s=rates.evaluation_s * parts,
        flop_s=rates.flop_s * parts,
        link_bytes_per_s=link_bytes_per_s,
    )


def _solver_seconds(sizes: Sizes, rates: Rates) -> float:
    return compute_seconds_of_step(sizes, rates) + link_seconds_of_step(sizes, rates)


def _limit(sizes: Sizes, rates: Rates) -> str:
    """`arithmetic`, `links` or `reading`: the part of a step that takes longest."""
    parts = {
        "arithmetic": compute_seconds_of_step(sizes, rates),
        "links": link_seconds_of_step(sizes, rates),
        "reading": read_seconds_of_step(sizes, rates),
    }
    return max(parts, key=lambda name: parts[name])


def _setup_seconds(sizes: Sizes, pilot_run: PilotRun, rates: Rates, shape: ProblemSize) -> float:
    """Seconds of the set-up: each stage of the pilot run's set-up, scaled by the work of that stage."""
    small = pilot_run.sizes
    preconditioner = flops_of_setup(sizes) / flops_of_setup(small)
    blocks = compute_seconds_of_step(sizes, rates) / compute_seconds_of_step(small, pilot_run.rates)
    return (
        _setup_segments(sizes, shape) * pilot_run.segment_s
        + pilot_run.preconditioner_s * preconditioner
        + pilot_run.step_size_s * blocks
    )


def _setup_segments(sizes: Sizes, shape: ProblemSize) -> int:
    """How many segments the set-up reads: `sample_rows` draws from 64 segments, or more for many centers."""
    n_segments = -(-shape.n_rows // shape.segment_rows)
    drawn = max(SAMPLED_SEGMENTS, 2 * sizes.n_centers // shape.segment_rows)
    return min(n_segments, drawn + SAMPLED_SEGMENTS)


def _resident_bytes() -> int:
    """Resident memory of this process now, in bytes; 0 where the system does not say."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * 4096


_NAME_WIDTH = 52

_LIMITS = {
    "arithmetic": "arithmetic is the limit: a faster device or more of them would help, faster storage would not",
    "reading": "reading is the limit: faster storage or rows of fewer bytes would help, more devices would not",
    "links": "the links between the devices are the limit: larger batches or fewer devices would help",
}


def describe_plan(plan: FitPlan) -> str:
    """The plan as about twenty lines of text: sizes, memory by item, bytes read, arithmetic and time."""
    sizes, total = plan.sizes, sum(plan.memory.values())
    place = "machine" if plan.host_bytes is None else "GPU"
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
        f"of {bytes_text(plan.memory_bytes)} allowed by --memory, in a {place} of {bytes_text(plan.machine_bytes)}; "
        f"interpreter and libraries take {bytes_text(plan.process_bytes)} besides",
        *_host_lines(plan),
        f"the largest model in that memory has {_plural(plan.largest_centers, 'center')}",
        "",
        f"reads {bytes_text(plan.bytes_read)}; {plan.evaluations:.3g} kernel evaluations, {plan.flops:.3g} FLOPs"
        + (f", {bytes_text(plan.reduced_bytes)} all-reduced" if sizes.devices > 1 else ""),
    ]
    return "\n".join(lines + _expected_lines(plan.expected, sizes.devices))


def _host_lines(plan: FitPlan) -> list[str]:
    if plan.host_bytes is None or plan.host_memory_bytes is None:
        return []
    taken, allowed = bytes_text(plan.host_bytes), bytes_text(plan.host_memory_bytes)
    return [f"rows read ahead take {taken} of the host's memory, of {allowed} allowed by --host-memory"]


def _expected_lines(expected: Expected | None, devices: int) -> list[str]:
    if expected is None:
        return []
    per_second = f"{expected.rows_per_s:,.0f} rows/s"
    is_counted = devices == 1 or expected.link_bytes_per_s is not None
    links = "" if is_counted else "; without the links between devices, whose --link-gb-per-s is not given"
    rounds = f"up to {duration(expected.metric_s)} of learning the metric, " if expected.metric_s else ""
    return [
        f"measured here: {1000 * expected.step_s:.3g} ms a step, {bytes_text(int(expected.read_bytes_per_s))}/s read",
        f"takes {rounds}about {duration(expected.setup_s)} of set-up and {duration(expected.fit_s)} of steps, "
        f"{per_second}, starved {100 * expected.starved:.0f}%{links}",
        f"resident memory{' of each' if devices > 1 else ''} peaks at about {bytes_text(expected.peak_bytes)}",
        _LIMITS[expected.limit],
    ]


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
