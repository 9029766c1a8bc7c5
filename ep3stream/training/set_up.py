"""The set-up of a fit, made once before its first step, for rows from any source.

`fit`, `KernelModel`, the estimators and the pilot run of `plan` all go through `set_up`. They differ in where the
rows come from: `Problem` says what is known of all rows, `SetUpRows` holds the points that are computed with. Rows of
a split (`problem_of_split`, `rows_of_split`) are drawn by seed and purpose, so that the same split, settings and seed
give the same set-up, bit for bit, whoever asks for it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.config import FitConfig, KernelConfig, Scale, SolverConfig, Task
from ep3stream.errors import ConfigError, InputError
from ep3stream.mesh import Mesh
from ep3stream.run.bundle import write_bundle
from ep3stream.run.directory import SETUP_KIND
from ep3stream.run.setup import STAGED, Setup, SetupPlan, StagePlan
from ep3stream.run.text import bytes_text
from ep3stream.solver.column_weights import CHECKED_ROWS, evaluations_of_learning
from ep3stream.solver.columns import COLUMN_KERNELS
from ep3stream.solver.eigenpro import EigenProProjection
from ep3stream.solver.exact import ExactProjection
from ep3stream.solver.gpu import float32_products
from ep3stream.solver.input_directions import narrowing
from ep3stream.solver.input_scaling import InputScaling
from ep3stream.solver.kernels import RADIAL_KERNELS, CallableKernel, Kernel, KernelFunction, RadialKernel
from ep3stream.solver.named_kernels import kernel_tensors, measured_kernel, named_kernel, with_precision
from ep3stream.solver.projection import NystromProjection, Spectra
from ep3stream.solver.set_up import Settled, SolverBuilder, n_probes, probes_of
from ep3stream.solver.step import Stage
from ep3stream.solver.tail import neighbour_order
from ep3stream.solver.targets import TargetCode, require_weights_of_task, weighted
from ep3stream.store.columns import code_features, columns_of, zero_one_features
from ep3stream.store.manifest import ColumnStatistics, Manifest, SplitInfo, told_two_valued
from ep3stream.store.reader import Split, SplitReader
from ep3stream.stream.order import NO_ROWS, Rows, sample_rows
from ep3stream.training.budget import Speed, measured_speed, most_distinct
from ep3stream.training.centers import CenterSource, drawn_centers
from ep3stream.training.column_kernel import (
    LearntColumns,
    learning_effort,
    learnt_columns,
    plain_kernel,
    pool_rows,
    tried_ridges,
)
from ep3stream.training.defaults import (
    choices_of,
    is_timed,
    size_limits,
    typical_kernel,
    with_kernel,
    with_sizes,
)
from ep3stream.training.plan import (
    ProblemSize,
    SizePlan,
    automatic_centers,
    memory_budget,
    on_device,
    require_machine,
)
from ep3stream.training.validation import NO_VALIDATION, ValidationRows

logger = logging.getLogger(__name__)

# Purposes of random numbers.
_SAMPLES, _ALGEBRA, _POOL, _DIRECTIONS = 2, 3, 4, 8

# Rows are drawn in excess by this factor, since some of them are centers.
_EXCESS = 1.1
_CHECKED_ROWS = 1 << 16

# Standard deviations from the mean, from which on values are told of, of so many columns.
_FAR, _TOLD_TAILS = 30, 5
_ROWS_PER_CENTER = 8
_COLUMNS_AT_ONCE = 16
_TIMED_ROWS = 4096
_NARROWED_ROWS = 4096

# Told where for this share of the rows neighbours nearer than this, in bandwidths, are lost to rounding. On two
# clusters with a smooth target in each, 0.1 did no harm and 0.2 did.
_LOST_SHARE, _LOST_DISTANCE = 0.02, 0.15


@dataclass(frozen=True, slots=True)
class Problem:
    """What a set-up must know of all rows, whatever their source.

    shape: sizes; names: of features, targets and classes (None for regression). inputs: the input transform of the
    model; targets: how targets are coded and weighted. feature_mean: (d,), float64, the mean of the inputs in the
    units of the data; radial kernels subtract it before distances are taken. None takes the mean of the centers.
    categories: the features that are codes of categories, by number, and how many codes each has.
    fingerprint, conversion: of the store, where the rows come from one.
    """

    shape: ProblemSize
    task: Task
    names: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...] | None]
    inputs: InputScaling
    targets: TargetCode
    feature_mean: Tensor | None = None
    categories: Mapping[int, int] = field(default_factory=dict)
    fingerprint: str = ""
    conversion: Any = None


@dataclass(frozen=True, slots=True)
class LearntMetric:
    """What a fit takes of the rounds before it (`training/metric.py`).

    directions: for scaled inputs, (D,) or (D, r); None for distances as they are. told: what to tell of it, as JSON.
    elapsed_s: seconds that the rounds have taken.
    """

    directions: Tensor | None
    told: dict[str, Any] = field(default_factory=dict)
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SetUpRows:
    """The points that a set-up computes with, in the units of the data, in host memory or on the device.

    centers: (p, d); the set-up may put them into another order, in place. excluded: sorted numbers of the rows that are
    not trained on: those that became centers, and those that are held out.
    sample: X_s, (s, d), the Nystrom sample; sample_y: its y, None where it is not known (then there is no head start).
    probes: (n, d), rows to measure the step size on; probe_y: their y, which only class weights ask for.
    pool: x, (n, d), and y of rows to learn the weights of columns from; None where the kernel has none, or weights are
    not to be learnt. learnt: a kernel on columns whose weights were learnt before.
    """

    centers: Tensor
    excluded: Rows
    sample: Tensor
    sample_y: Tensor | None
    probes: Tensor
    probe_y: Tensor | None
    pool: tuple[Tensor, Tensor] | None = None
    learnt: LearntColumns | None = None

    @classmethod
    def parted(cls, centers: Tensor, excluded: Rows, x: Tensor, y: Tensor, n_samples: int) -> SetUpRows:
        """Rows x and y in random order: the first `n_samples` are the sample, those behind them the probes."""
        probes, probe_y = (probes_of(each, n_samples) for each in (x, y))
        return cls(centers, excluded, x[:n_samples], y[:n_samples], probes, probe_y)


@dataclass(frozen=True, slots=True)
class SetUpResult:
    """A set-up in memory, and what measures step sizes of other batches later.

    On several ranks the tensors with a row for each center are whole on the leader and absent elsewhere.
    """

    setup: Setup
    builder: SolverBuilder
    settled: Settled
    probes: Tensor
    probe_y: Tensor | None


class StageTimes:
    """Seconds of each stage of a set-up, by its name. logs: whether the log tells of each as it ends."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, logs: bool = True) -> None:
        self.elapsed_s: dict[str, float] = {}
        self._clock, self._logs = clock, logs

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the seconds of the block and keeps them under `name`."""
        began = self._clock()
        yield
        self.elapsed_s[name] = self._clock() - began
        if self._logs:
            logger.info("set-up: %s, %.1f s", name, self.elapsed_s[name])


def write_setup(
    path: Path,
    split: SplitReader,
    config: FitConfig,
    function: KernelFunction | None,
    mesh: Mesh,
    validation: ValidationRows = NO_VALIDATION,
    metric: LearntMetric | None = None,
) -> None:
    """Makes the set-up of a fit to the split, all ranks together; the leader writes it to `path` as a bundle.

    validation: the rows that the fit will be validated on, which are recorded. metric: what the rounds before the fit
    have learnt. Raises ConfigError for settings that do
    not fit the data or the memory, DiskError where `path` cannot be written.
    """
    setup = set_up_split(split, config, function, mesh, validation, metric=metric).setup
    mesh.on_leader(lambda: write_bundle(path, SETUP_KIND, setup.tensors, setup.description))


@float32_products()
def set_up_split(
    split: SplitReader,
    config: FitConfig,
    function: KernelFunction | None,
    mesh: Mesh,
    validation: ValidationRows = NO_VALIDATION,
    clock: Callable[[], float] = time.perf_counter,
    metric: LearntMetric | None = None,
) -> SetUpResult:
    """The set-up of a fit to a split: sizes by memory and minutes, rows drawn by the seed, then `set_up`.

    Rows of the split that are held out for validation enter nothing but the split's statistics. What the settings leave
    open is recorded in the description as `choices`. clock: tells seconds, by which the minutes of the run are spent,
    those of learning the metric among them.
    """
    began = clock() - (0.0 if metric is None else metric.elapsed_s)
    times, asked = StageTimes(clock), config
    held = validation.held_rows(split.info, config.run.seed)
    if function is None:
        config = with_kernel(config, split.manifest.n_features, split.info.n_rows - len(held))
    shape = on_device(shape_of(split, config, validation), config.run, mesh.device)
    _tell_one_hot(split, config)
    source = CenterSource.of(config, split, automatic_centers(shape), held)
    memory_bytes = memory_budget(config.run.memory_bytes, mesh)
    require_varied_features(split)
    require_varied_targets(split)
    problem = replace(problem_of_split(split, config), shape=shape)
    tell_heavy_tails(split, config.data.scale, problem.inputs)
    if metric is not None:
        problem = replace(problem, inputs=problem.inputs.along(metric.directions))
    problem = _narrowed(problem, split, config, function, held, mesh, times)
    learnt, speed = None, None
    if is_timed(config):
        n_given = None if config.solver.centers == "auto" else source.n_centers
        learn = partial(_learnt_first, problem, split, config, function, validation, held, mesh, times)
        n_validated = validation.n_rows(split.manifest)
        config, learnt, speed = with_measured_sizes(
            problem,
            split,
            config,
            function,
            n_given,
            n_validated,
            memory_bytes,
            mesh,
            learn,
            began,
            times,
            clock,
        )
        source = CenterSource.of(config, split, automatic_centers(shape), held)
    require_enough_centers(source.n_centers, mesh.size)
    plan = SizePlan.of(shape, config.solver, source.n_centers, memory_bytes, mesh.size)
    require_machine(shape, config.solver, plan, mesh.device, mesh.local_size)
    if learnt is None:
        learnt = _learnt_first(
            problem, split, config, function, validation, held, mesh, times, source.n_centers
        )
    with times.stage("centers and samples"):
        rows = rows_of_split(split, source, problem.inputs, plan, config, mesh, held, learnt)
    logger.info(
        "plan: %s of memory, batches of up to %d rows; `ep3stream plan` tells more",
        bytes_text(sum(plan.memory.values())),
        plan.max_batch_size,
    )
    result = set_up(problem, rows, plan, config, function, mesh, memory_bytes, times)
    description = {**result.setup.description, "choices": choices_of(asked, config, source.n_centers, speed)}
    if metric is not None and metric.told:
        description["metric"] = metric.told
    setup = replace(result.setup, description=description)
    return replace(result, setup=validation.recorded(setup, held))


def with_measured_sizes(
    problem: Problem,
    split: Split,
    config: FitConfig,
    function: KernelFunction | None,
    n_centers: int | None,
    n_validated: int,
    memory_bytes: int,
    mesh: Mesh,
    learn: Callable[[int], LearntColumns | None],
    began: float,
    times: StageTimes,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[FitConfig, LearntColumns | None, Speed]:
    """The config with the sizes that its minutes allow, the weights of columns, and the speed of the fit on the device.

    n_centers: the number that is given, None to have it chosen. n_validated: rows that are scored after each epoch.
    learn: learns the weights for at most so many centers. began: when the clock of the minutes did.
    """
    first = cache(partial(first_rows, split))
    distinct = None if n_centers else mesh.broadcast_object(lambda: most_distinct(first()))
    limits = size_limits(problem.shape, config, n_centers, n_validated, memory_bytes, mesh.size, distinct)
    learnt = learn(limits.most_centers)
    with times.stage("speed"):
        speed = speed_of_fit(problem, first, config, function, learnt, mesh, clock)
    return with_sizes(config, limits, speed, clock() - began, mesh), learnt, speed


def _narrowed(
    problem: Problem,
    split: SplitReader,
    config: FitConfig,
    function: KernelFunction | None,
    held: Rows,
    mesh: Mesh,
    times: StageTimes,
) -> Problem:
    """The problem with the inputs along their leading directions, where `inputs_rank` and the kernel say so."""
    rank = config.data.inputs_rank
    is_of_distances = function is None and config.kernel.name in RADIAL_KERNELS
    if rank == "full" or (rank == "auto" and not is_of_distances):
        return problem
    if not is_of_distances:
        raise ConfigError(
            f"inputs_rank is {rank}, but the {config.kernel.name if function is None else 'callable'} kernel takes no "
            "distances; leave it out, or take a kernel such as laplacian"
        )
    inputs = problem.inputs

    def directions() -> Tensor | None:
        n_rows = min(_NARROWED_ROWS, split.info.n_rows - len(held))
        numbers = sample_rows(split.info, n_rows, config.run.seed, _DIRECTIONS, without=held)
        points = _require_in_range(inputs(_read_rows(split, None, numbers)[1]))
        return narrowing(points, rank, lambda some: measured_kernel(config.kernel, some, some.mean(0)))

    # The leader's directions on every rank: devices may differ in the last bit.
    with times.stage("input directions"):
        found = mesh.on_leader(directions)
    if not mesh.broadcast_object(lambda: found is not None):
        return problem
    inputs = inputs.further_along(mesh.replicate(found))
    logger.info("the kernel takes %d leading directions of %d inputs", inputs.n_inputs, inputs.n_scaled)
    return replace(problem, inputs=inputs)


def _learnt_first(
    problem: Problem,
    split: SplitReader,
    config: FitConfig,
    function: KernelFunction | None,
    validation: ValidationRows,
    held: Rows,
    mesh: Mesh,
    times: StageTimes,
    n_centers: int,
) -> LearntColumns | None:
    """The weights of a kernel on columns for at most `n_centers` centers, whose number may not be known yet.

    The rows to learn from are read by one rank of each machine. None where the kernel has no weights.
    """
    if function is not None or config.kernel.name not in COLUMN_KERNELS:
        return None
    with times.stage("column weights"):
        x, y, *checked = mesh.once_per_node(
            lambda: [*(read_pool(split, config, held) or ()), *_read_checked(split, validation, config)]
        )
        n_resolving = resolving_centers(n_centers, problem.shape.n_rows)
        of_split = (checked[0], checked[1]) if checked else None
        return learn_columns(problem, (x, y), config, n_resolving, mesh, of_split)


def _read_checked(split: SplitReader, validation: ValidationRows, config: FitConfig) -> tuple[Tensor, ...]:
    """x and y of rows of the split that the fit is validated on; nothing where that is the split it is fitted to."""
    if validation.split is None or validation.n_held or validation.split == split.info.name:
        return ()
    validated = split.beside(validation.split)
    n_rows = min(validated.info.n_rows, CHECKED_ROWS)
    numbers = sample_rows(validated.info, n_rows, config.run.seed, _POOL)
    return _read_rows(validated, None, numbers)[1:]


def first_rows(split: Split) -> NDArray[Any]:
    """x of the first 4096 rows, or of a segment where that is less, (n, d)."""
    return split.read_rows(np.arange(min(_TIMED_ROWS, split.info.n_rows, split.info.segment_rows)))[0]


def speed_of_fit(
    problem: Problem,
    rows: Callable[[], NDArray[Any]],
    config: FitConfig,
    function: KernelFunction | None,
    learnt: LearntColumns | None,
    mesh: Mesh,
    clock: Callable[[], float],
) -> Speed:
    """The speed of the fit with all devices at work, as the leader measures it. rows: gives it x, (n, d), of some."""

    def measure() -> list[float]:
        x = torch.from_numpy(rows()).float().to(mesh.device)
        x = problem.inputs.to(mesh.device)(x)
        kernel = (
            typical_kernel(config.kernel, function, x, problem.categories) if learnt is None else learnt.known
        )
        kernel = with_precision(kernel, config.solver.precision)
        found = measured_speed(kernel, x, problem.shape.n_columns, clock)
        return [found.evaluation_s / mesh.size, found.center_s / mesh.size]

    return Speed(*mesh.broadcast_object(measure))


def with_expected_sizes(
    split: SplitReader,
    config: FitConfig,
    function: KernelFunction | None,
    validation: ValidationRows,
    shape: ProblemSize,
    memory_bytes: int,
    device: torch.device,
    devices: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> FitConfig:
    """The config with the sizes that the minutes of the fit allow, as far as can be told without learning weights.

    A fit leaves out columns without weight, so that it may choose a few more centers. devices: so many like `device`.
    """
    if not is_timed(config):
        return config
    held = validation.held_rows(split.info, config.run.seed)
    n_given = None
    if config.solver.centers != "auto":
        n_given = CenterSource.of(config, split, automatic_centers(shape), held).n_centers
    x, n_validated = first_rows(split), validation.n_rows(split.manifest)
    limits = size_limits(shape, config, n_given, n_validated, memory_bytes, devices, most_distinct(x))
    mesh = Mesh(0, 1, device)
    speed = speed_of_fit(problem_of_split(split, config), lambda: x, config, function, None, mesh, clock)
    if device.type == "cuda":
        speed = Speed(speed.evaluation_s / devices, speed.center_s / devices)
    learning_s = 0.0
    if function is None and config.kernel.name in COLUMN_KERNELS:
        effort = learning_effort(config.run.minutes)
        learning_s = evaluations_of_learning(shape.n_features, effort) * speed.evaluation_s
    return with_sizes(config, limits, speed, learning_s, mesh)


@float32_products()
def set_up(
    problem: Problem,
    rows: SetUpRows,
    plan: SizePlan,
    config: FitConfig,
    function: KernelFunction | None,
    mesh: Mesh,
    memory_bytes: int,
    times: StageTimes | None = None,
) -> SetUpResult:
    """Kernel, preconditioner, stages, batch and step size, from the rows that were drawn.

    O(p (r' + s) d) kernel work, O(p r) memory. Raises ConfigError where inputs are out of range, the kernel cannot be
    used, or no row is left to train on. All ranks call it together.
    """
    times = times or StageTimes()
    settings, device, inputs = config.solver, mesh.device, problem.inputs
    for some in rows.centers.split(_CHECKED_ROWS):  # No scaled copy of all centers is ever held.
        _require_in_range(inputs.to(some.device)(some))
        _require_codes(some, problem)
    sample, probes = (
        _require_in_range(inputs.to(points.device)(points)).to(device)
        for points in (rows.sample, rows.probes)
    )
    is_of_columns = function is None and config.kernel.name in COLUMN_KERNELS
    learnt, n_resolving = None, resolving_centers(len(rows.centers), problem.shape.n_rows)
    if is_of_columns:
        with nullcontext() if rows.learnt else times.stage("column weights"):
            learnt = _learnt_columns(problem, rows, config, mesh)
        kernel: Kernel = learnt.for_centers(n_resolving)
    else:
        with times.stage("bandwidth"):
            kernel = _measured_kernel(problem, rows, config.kernel, function, sample, mesh)
    kernel = with_precision(kernel, settings.precision)
    if settings.ridge is None and settings.projection != "eigenpro":
        settings = replace(settings, ridge=0.0 if learnt is None else learnt.ridge(problem.shape.n_rows))
    _tell_lost_distances(
        kernel, sample, [problem.names[0][column] for column in inputs.main_columns.tolist()]
    )
    if plan.group_size:
        with times.stage("groups of centers"):
            _group(rows.centers, kernel, inputs, plan.group_size, mesh)
    builder = SolverBuilder(
        kernel=kernel,
        centers=rows.centers,
        sample=sample,
        sizes=plan,
        settings=settings,
        mesh=mesh,
        generator=torch.Generator().manual_seed((config.run.seed * 4 + _ALGEBRA) % 2**64),
        targets=problem.targets.to(device),
        inputs=inputs.to(device),
        sample_y=None if rows.sample_y is None else rows.sample_y.to(device),
        ridge_factors=problem.shape.ridge_factors,
    )
    with times.stage("preconditioner"):
        projection, spectra = builder.projection()
    epoch_rows = problem.shape.n_rows - len(rows.excluded)
    if epoch_rows < 1:
        raise ConfigError(
            f"centers is {len(rows.centers)}, which leaves no rows to train on; use fewer centers or more rows"
        )
    probe_y = None if rows.probe_y is None else rows.probe_y.to(device)
    with times.stage("step size"):
        settled = builder.settled(projection, spectra, probes, epoch_rows, probe_y)
    tensors = {
        "centers": rows.centers,
        "excluded_rows": torch.from_numpy(rows.excluded),
        **inputs.tensors(),
        "target_offset": problem.targets.offset,
        "target_scale": problem.targets.scale,
        **_gathered(settled, len(rows.centers), mesh),
    }
    if settled.start is not None:
        tensors["start"] = settled.start.coefficients.float()
    tensors |= kernel_tensors(kernel)
    if problem.targets.weights is not None:
        tensors["target_weights"] = problem.targets.weights
    setup_plan = _setup_plan(
        plan, kernel, settings, spectra, settled, mesh, memory_bytes, problem.shape.ridge_factors
    )
    if inputs.directions is not None:
        setup_plan = replace(setup_plan, n_directions=inputs.n_inputs)
    features, targets, classes = problem.names
    description = {
        "store_fingerprint": problem.fingerprint,
        "task": problem.task,
        "names": {
            "features": list(features),
            "targets": list(targets),
            "classes": None if classes is None else list(classes),
        },
        "conversion": problem.conversion,
        **inputs.description(),
        "plan": setup_plan.to_json(),
        "elapsed_s": times.elapsed_s,
        "data_eigenvalues": list(spectra.data),
        "model_eigenvalues": list(spectra.model),
        "lambda_max": settled.limits.lambda_max,
        "kappa_max": settled.limits.kappa_max,
    }
    if learnt is not None and (told := learnt.told_for(n_resolving)) is not None:
        description["column_weights"] = told
    return SetUpResult(Setup(tensors, description, setup_plan), builder, settled, probes, probe_y)


def _group(centers: Tensor, kernel: Kernel, inputs: InputScaling, group_size: int, mesh: Mesh) -> None:
    """Puts the centers, (p, d), in place, into an order in which groups of neighbours are next to each other.

    The ranks of a machine share the memory that the centers lie in.
    """

    def order() -> Tensor:
        scaling = inputs.to(mesh.device)
        return neighbour_order(kernel, centers, lambda some: scaling(some.to(mesh.device)), group_size)

    # The leader's order on every rank: devices may differ in the last bit.
    chosen = mesh.replicate(mesh.on_leader(order)).to(centers.device)

    def put_in_order() -> None:
        if mesh.is_reader:
            # Some columns at a time, so that there is no second copy of all.
            for columns in centers.split(_COLUMNS_AT_ONCE, dim=1):
                columns.copy_(columns[chosen])

    mesh.all_or_raise(put_in_order)  # Every rank waits for the reader of its machine.


def _tell_one_hot(split: Split, config: FitConfig) -> None:
    """Warns where a kernel on columns gets categories as one-hot features rather than codes."""
    manifest, name = split.manifest, config.kernel.name
    if name not in COLUMN_KERNELS or code_features(manifest):
        return
    if any(one["kind"] == "category" for one in manifest.columns.get("columns", ())):
        logger.warning(
            "the store has its categories as one-hot features, which the %s kernel takes for numbers, one by one; "
            "convert with --categories codes",
            name,
        )


def problem_of_split(split: Split, config: FitConfig) -> Problem:
    """What the manifest says of the split's rows, with the scaling and the weights of the settings."""
    manifest = split.manifest
    return Problem(
        shape=shape_of(split, config),
        task=manifest.task,
        names=(manifest.feature_names, manifest.target_names, manifest.class_names),
        inputs=input_scaling(split, config),
        targets=with_weights(target_code(split), split, config.solver),
        feature_mean=torch.tensor(split.info.features.mean, dtype=torch.float64),
        categories=code_features(manifest),
        fingerprint=manifest.fingerprint,
        conversion=columns_of(manifest),
    )


def rows_of_split(
    split: SplitReader,
    source: CenterSource,
    inputs: InputScaling,
    plan: SizePlan,
    config: FitConfig,
    mesh: Mesh,
    held: Rows,
    learnt: LearntColumns | None,
) -> SetUpRows:
    """Centers, sample and probes of a split, read once by one rank of each machine; a function of the seed.

    held: sorted numbers of the rows that are held out, of which none is taken. learnt: tells where centers are needed.
    """
    drawn = None
    if source.points is None:
        errors = None if learnt is None else learnt.errors
        drawn = drawn_centers(split, source.n_centers, errors, inputs, config, mesh, held)
    others = other_rows(split.info, drawn, plan, config, held)

    def read() -> list[Tensor]:
        given = None if source.points is None else source.points(inputs.along(None))
        centers, x, y = _read_rows(split, drawn, others)
        return [centers if given is None else given, x, y]

    centers, x, y = mesh.once_per_node(read)
    excluded = held
    if drawn is not None and not config.data.keep_center_rows:
        excluded = np.union1d(drawn, held)
    rows = SetUpRows.parted(centers, excluded, x, y, plan.nystrom_samples)
    return replace(rows, learnt=learnt)


def read_pool(split: Split, config: FitConfig, held: Rows = NO_ROWS) -> tuple[Tensor, Tensor] | None:
    """x, (n, d), and y of rows in random order to learn the weights of columns from; None where no kernel has any.

    held: numbers of rows that are not read.
    """
    manifest, n_left = split.manifest, split.info.n_rows - len(held)
    n_rows = pool_rows(
        config.kernel, n_left, manifest.n_features, manifest.n_outputs, config.run.memory_bytes
    )
    if not n_rows:
        return None
    numbers = sample_rows(split.info, n_rows, config.run.seed, _POOL, without=held)
    _, x, y = _read_rows(split, None, numbers)
    return x, y


def other_rows(
    info: SplitInfo, drawn: Rows | None, plan: SizePlan, config: FitConfig, held: Rows = NO_ROWS
) -> Rows:
    """Numbers of the rows for sample and probes, in random order; centers only where there are no other rows.

    A center leans far more on its own weight than the rows that are trained on. drawn: the rows that became centers.
    held: rows that are not taken.
    """
    n_drawn, n_left = 0 if drawn is None else len(drawn), info.n_rows - len(held)
    n_wanted = plan.nystrom_samples + n_probes(config.solver, plan.max_batch_size, n_left - n_drawn)
    # So many that enough are left without the centers among them, but for bad luck.
    share = 1 - n_drawn / n_left
    n_more = math.ceil(_EXCESS * n_wanted / share) if share > 0 else n_left
    others = sample_rows(info, min(n_left, n_more), config.run.seed, _SAMPLES, without=held)
    fresh = ~np.isin(others, () if drawn is None else drawn)
    return (others[fresh] if fresh.any() else others)[:n_wanted]


def require_enough_centers(n_centers: int, n_devices: int) -> None:
    """ConfigError where a device would have no center."""
    if n_devices > n_centers:
        raise ConfigError(
            f"devices is {n_devices}, but there are only {n_centers} centers to deal; use at most {n_centers} "
            "devices, or more centers"
        )


def expanded_codes(manifest: Manifest, config: FitConfig) -> dict[int, int]:
    """Features whose codes become 0/1 features, by number, and how many each; none for a kernel that compares codes."""
    return {} if config.kernel.name in COLUMN_KERNELS else code_features(manifest)


def shape_of(split: Split, config: FitConfig, validation: ValidationRows = NO_VALIDATION) -> ProblemSize:
    """The sizes of the problem that a split poses to a fit with this kernel, and with these rows to validate on."""
    manifest, info = split.manifest, split.info
    y_values = 1 if manifest.task == "classification" else manifest.n_outputs
    row_bytes = manifest.n_features * np.dtype(manifest.x_dtype).itemsize + 4 * y_values
    is_shuffled = manifest.shuffle_seed is not None
    codes = expanded_codes(manifest, config).values()
    return ProblemSize(
        info.n_rows,
        manifest.n_features,
        manifest.n_outputs,
        info.segment_rows,
        row_bytes,
        is_shuffled,
        validation.n_held,
        validation.split is not None,
        sum(codes) - len(codes),
        config.kernel.name in COLUMN_KERNELS,
        ridge_factors=tried_ridges(config, manifest.n_features, manifest.n_outputs)
        if validation.split is not None
        else (1.0,),
    )


def _measured_kernel(
    problem: Problem,
    rows: SetUpRows,
    settings: KernelConfig,
    function: KernelFunction | None,
    sample: Tensor,
    mesh: Mesh,
) -> Kernel:
    """The function as a kernel, or the kernel of the settings with its bandwidth measured on sample, (s, d), scaled."""
    if function is not None:
        return CallableKernel.checked(function, sample)
    mean = rows.centers.double().mean(0) if problem.feature_mean is None else problem.feature_mean
    centre = problem.inputs.of_mean(mean).float().to(sample.device)
    kernel = measured_kernel(settings, sample, centre)
    if mesh.size == 1:
        return kernel
    # What each rank has measured may differ in the last bit, where their devices do.
    parameters = mesh.broadcast_object(lambda: kernel.parameters)
    return named_kernel(kernel.name, parameters, kernel_tensors(kernel))


def _learnt_columns(problem: Problem, rows: SetUpRows, config: FitConfig, mesh: Mesh) -> LearntColumns:
    """`rows.learnt`, or what is learnt from `rows.pool`; with neither all columns weigh the same."""
    if rows.learnt is not None:
        return rows.learnt
    if rows.pool is None:
        return LearntColumns(plain_kernel(config.kernel, rows.centers.shape[1], problem.categories))
    n_centers = resolving_centers(len(rows.centers), problem.shape.n_rows)
    return learn_columns(problem, rows.pool, config, n_centers, mesh)


def resolving_centers(n_centers: int, n_rows: int) -> int:
    """For how many centers weights are learnt: centers with few rows each resolve no more than fewer centers do."""
    return max(1, min(n_centers, n_rows // _ROWS_PER_CENTER))


def learn_columns(
    problem: Problem,
    pool: tuple[Tensor, Tensor],
    config: FitConfig,
    n_centers: int,
    mesh: Mesh,
    checked: tuple[Tensor, Tensor] | None = None,
) -> LearntColumns:
    """The weights of a kernel on columns for up to `n_centers` centers, learnt from x, (n, d), and y of the pool.

    checked: such rows of the split that is validated, where that is another one.
    """

    def coded(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = (each.to(mesh.device) for each in rows)
        x = _require_in_range(problem.inputs.to(mesh.device)(x))
        code = problem.targets.to(mesh.device)
        negative = torch.zeros(code.n_outputs, len(x), device=mesh.device)
        code.subtract_(negative, y)
        return x, negative.neg_().T.contiguous()

    x, y = coded(pool)
    plain = plain_kernel(config.kernel, x.shape[1], problem.categories)
    effort = learning_effort(config.run.minutes)
    of_split = None if checked is None else coded(checked)
    learnt = learnt_columns(plain, x, y, problem.names[0], n_centers, mesh, of_split, effort)
    return replace(learnt, sharpness=config.kernel.sharpness)


def _setup_plan(
    plan: SizePlan,
    kernel: Kernel,
    settings: SolverConfig,
    spectra: Spectra,
    settled: Settled,
    mesh: Mesh,
    memory_bytes: int,
    ridge_factors: tuple[float, ...],
) -> SetupPlan:
    projection = settled.projection
    found = SetupPlan(
        n_centers=plan.n_centers,
        model_rank=plan.model_rank,
        data_rank=plan.data_rank,
        n_landmarks=plan.n_landmarks,
        nystrom_samples=plan.nystrom_samples,
        window_segments=plan.window_segments,
        memory=dict(plan.memory),
        kernel=kernel.name,
        kernel_parameters=kernel.parameters,
        projection=settings.projection,
        step_rule=settings.used_step,
        batch_size=settled.batch_size,
        step_size=settled.step_size,
        stages=tuple(_stage_plan(stage) for stage in settled.stages),
        momentum=settings.used_momentum,
        ridge=settings.used_ridge,
        ridge_factors=ridge_factors if len(ridge_factors) > 1 else (),
        mu=spectra.damping,
        devices=mesh.size,
        memory_bytes=memory_bytes,
    )
    if settled.start is not None:
        found = replace(found, start_rows=settled.start.n_rows, start_ridge=settled.start.rho)
    if isinstance(projection, EigenProProjection):
        passes = projection.passes
        found = replace(found, center_batch_size=passes.batch_size, center_step_size=passes.step_size)
    if isinstance(projection, NystromProjection):
        group_size = 0 if projection.tail is None else projection.tail.group_size
        found = replace(
            found, n_leading=projection.n_leading, model_rank=len(spectra.model), group_size=group_size
        )
    return found


def _stage_plan(stage: Stage) -> StagePlan:
    projection = stage.projection
    n_flattened = None
    if isinstance(projection, NystromProjection | ExactProjection):
        n_flattened = projection.n_flattened
    return StagePlan(stage.first_row, stage.step_scale, n_flattened)


def _gathered(settled: Settled, n_centers: int, mesh: Mesh) -> dict[str, Tensor]:
    """The projection's tensors by name: rows of all shards on the leader; what differs between stages, stacked."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in settled.projection.tensors().items():
        whole = mesh.gather(tensor, n_centers) if name in ("basis", "tempering", "tail") else tensor
        if whole is not None:
            tensors[name] = whole
    if STAGED in tensors:
        tensors[STAGED] = torch.stack([stage.projection.tensors()[STAGED] for stage in settled.stages])
    return tensors


def _tell_lost_distances(kernel: Kernel, sample: Tensor, names: Sequence[str]) -> None:
    """Warns where rounding makes one point of neighbours in the sample, (s, d), scaled, that the kernel should part.

    So it happens with clusters that lie 500 bandwidths or more apart, or with a bandwidth that is too small.
    """
    if not isinstance(kernel, RadialKernel):
        return
    lost = kernel.resolution(sample) > _LOST_DISTANCE
    if float(lost.double().mean()) < _LOST_SHARE:
        return
    far = sample[lost] - kernel.centre
    logger.warning(
        "%.0f%% of the rows lie about %.3g bandwidths from the mean, where float32 makes one point of rows nearer "
        "to each other than %.2g bandwidths; take a larger bandwidth, fit far clusters by themselves, or leave out "
        "or compress the column that parts them most, %r",
        100 * float(lost.double().mean()),
        float(far.norm(dim=1).median()) / kernel.bandwidth,
        float(kernel.resolution(sample)[lost].median()),
        names[int(far.square().mean(0).argmax())],
    )


def _require_in_range(x: Tensor) -> Tensor:
    """x, (m, d), scaled, if distances between its rows are finite in float32; else ConfigError."""
    if not bool(torch.isfinite(x.square().sum(1)).all()):
        raise ConfigError(
            f"inputs reach {float(x.abs().max()):.3g} after scaling, whose squares are not finite in float32; "
            "use --scale auto, or convert them in a larger unit"
        )
    return x


def _require_codes(centers: Tensor, problem: Problem) -> None:
    """ConfigError where a center, (p, d), has something else than a code, or -1 for none of them, for a category."""
    for feature, n_codes in problem.categories.items():
        values = centers[:, feature]
        wrong = (values != values.round()) | (values < -1) | (values >= n_codes)
        if bool(wrong.any()):
            raise ConfigError(
                f"centers have {float(values[wrong][0]):.6g} for {problem.names[0][feature]!r}, a category that is "
                f"stored as a code; use whole numbers from 0 to {n_codes - 1}, or -1 for no known category"
            )


def _read_rows(split: Split, drawn: Rows | None, others: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """x of the rows `drawn`, then x and y of the rows `others`; each segment is read once."""
    wanted = others if drawn is None else np.concatenate([drawn, others])
    unique, places = np.unique(wanted, return_inverse=True)
    read_x, read_y = split.read_rows(unique)
    x, n_drawn = torch.from_numpy(read_x), len(wanted) - len(others)
    drawn_x, other_x = (x[torch.from_numpy(part)].float() for part in (places[:n_drawn], places[n_drawn:]))
    return drawn_x, other_x, torch.from_numpy(read_y[places[n_drawn:]])


def input_scaling(split: Split, config: FitConfig) -> InputScaling:
    """The model's input transform: by the split's statistics, times the factors of `feature_scale`."""
    is_zero_one = zero_one_features(split.manifest)
    scaling = scaling_by(config.data.scale, split.info.features, is_zero_one, code_features(split.manifest))
    scaling = scaling.with_codes(expanded_codes(split.manifest, config))
    if config.data.feature_scale is None:
        return scaling
    return scaling.times(_feature_factors(Path(config.data.feature_scale), split.manifest.n_features))


def scaling_by(
    kind: Scale, features: ColumnStatistics, zero_one: Sequence[int], codes: Mapping[int, int]
) -> InputScaling:
    """The scaling of this kind by statistics; `codes` stay as they are, with `auto` the features `zero_one` too.

    With `auto` numbers with long tails are bent.
    Two rows then differ by 2 in the squared distance through a standardised number, on average, and by 2 through a
    category where theirs are not the same.
    """
    columns = (features.mean, features.std, features.minimum, features.maximum)
    statistics = [torch.tensor(column, dtype=torch.float64) for column in columns]
    scaling = InputScaling.of(kind, *statistics)
    if kind == "auto":
        scaling = scaling.bent(*statistics)
    return scaling.sparing([*codes, *(zero_one if kind == "auto" else ())])


def tell_heavy_tails(split: Split, scale: Scale, inputs: InputScaling) -> None:
    """Says which numbers are bent for their long tails, or lie more than 30 standard deviations from their mean."""
    names = split.manifest.feature_names
    if bent := [names[j] for j, bend in enumerate(inputs.bends) if bend]:
        logger.info(
            "%d of %d columns have long tails and are bent by asinh: %s%s",
            len(bent),
            len(names),
            ", ".join(bent[:_TOLD_TAILS]),
            ", ..." if len(bent) > _TOLD_TAILS else "",
        )
    if scale != "standard":
        return
    left_out = {*code_features(split.manifest), *zero_one_features(split.manifest)}
    features, far = split.info.features, []
    for number, name in enumerate(names):
        mean, std = features.mean[number], features.std[number]
        low, high = mean - features.minimum[number], features.maximum[number] - mean
        # Of two values only: then std^2 = low high.
        if number in left_out or not std or std**2 > (1 - 1e-3) * low * high:
            continue
        if (reach := max(low, high) / std) > _FAR:
            far.append((reach, name))
    if far:
        far.sort(reverse=True)
        shown = ", ".join(f"{name!r} ({reach:.0f})" for reach, name in far[:_TOLD_TAILS])
        logger.warning(
            "values lie more than %d standard deviations from the mean in %s%s; a distance sees little but these: "
            "--scale auto bends them",
            _FAR,
            shown,
            ", ..." if len(far) > _TOLD_TAILS else "",
        )


def require_varied_features(split: Split) -> None:
    """ConfigError where no feature varies over the split; the log names some that do not."""
    info = split.info
    ranges = zip(split.manifest.feature_names, info.features.minimum, info.features.maximum, strict=True)
    constant = [name for name, low, high in ranges if low == high]
    if len(constant) == split.manifest.n_features:
        raise ConfigError(
            f"every feature of split {info.name} is constant, so there is nothing to learn from; "
            "choose other columns or another split"
        )
    if constant:
        some = ", ".join(constant[:3]) + (", ..." if len(constant) > 3 else "")
        logger.warning(
            "%d features are constant in split %s and have no say: %s", len(constant), info.name, some
        )


def require_varied_targets(split: Split) -> None:
    """ConfigError where all rows have the same target or class: a fit would take its time to find that constant.

    The log tells of targets that look like classes.
    """
    info = split.info
    is_one_class = info.class_counts is not None and sum(count > 0 for count in info.class_counts) == 1
    if is_one_class or (info.targets is not None and info.targets.minimum == info.targets.maximum):
        raise ConfigError(
            f"every row of split {info.name} has the same {' and '.join(split.manifest.target_names)}, so there "
            "is nothing to learn; choose another target or split"
        )
    if told := told_two_valued(split.manifest, info.name):
        logger.info(told)


def target_code(split: Split) -> TargetCode:
    """How the split's targets enter the least-squares problem: classes by frequency, numbers by mean and spread."""
    info = split.info
    if info.class_counts is not None:
        counts = torch.tensor(info.class_counts, dtype=torch.float64)
        return TargetCode(True, (counts / counts.sum()).float(), torch.ones(len(counts)))
    assert info.targets is not None  # The manifest was checked.
    spread = torch.tensor(info.targets.std, dtype=torch.float64)
    offset = torch.tensor(info.targets.mean, dtype=torch.float64)
    return TargetCode(False, offset.float(), torch.where(spread > 0, spread, 1.0).float())


def _feature_factors(file: Path, n_features: int) -> Tensor:
    """(d,), float32; raises ConfigError unless each is positive and finite in float32."""
    # Few fits read an array, and readers take long to import.
    from ep3stream.formats.arrays import open_array

    try:
        stored = open_array(file)
    except InputError as error:
        raise ConfigError(
            f"feature_scale is {str(file)!r}, which is no NPY file of ({n_features},) numbers: {error}"
        ) from error
    if stored.shape != (n_features,):
        raise ConfigError(
            f"feature_scale in {file} has the shape {stored.shape}; it must be ({n_features},), "
            "one factor for each feature of the store"
        )
    with np.errstate(over="ignore"):  # What float32 cannot hold becomes infinite and is refused.
        factors = stored.astype(np.float32)
    wrong = np.flatnonzero(~(np.isfinite(factors) & (factors > 0)))
    if len(wrong):
        raise ConfigError(
            f"feature_scale in {file} is {stored[wrong[0]]} for feature {wrong[0]}; "
            "use positive, finite numbers"
        )
    return torch.from_numpy(factors)


def with_weights(code: TargetCode, split: Split, settings: SolverConfig) -> TargetCode:
    """`code` with the class or output weights of the settings; ConfigError where they do not fit the split's task."""
    manifest, counts = split.manifest, split.info.class_counts
    require_weights_of_task(counts is not None, settings)
    if settings.output_weights and not settings.used_ridge and not settings.used_patience:
        raise ConfigError(
            "output_weights are given, but each target has weights of its own in the model, so that without a ridge "
            "or patience they change nothing; give one of these, or leave output_weights out"
        )
    names = manifest.target_names if counts is None else manifest.class_names or ()
    return weighted(code, names, None if counts is None else torch.tensor(counts), settings)
