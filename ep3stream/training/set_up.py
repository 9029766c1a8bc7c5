"""The set-up of a fit, made once before its first step, for rows from any source.

`fit`, `KernelModel`, the estimators and the pilot run of `plan` all go through `set_up`. They differ in where the
rows come from: `Problem` says what is known of all rows, `SetUpRows` holds the points that are computed with. Rows of
a split (`problem_of_split`, `rows_of_split`) are drawn by seed and purpose, so that the same split, settings and seed
give the same set-up, bit for bit, whoever asks for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ep3stream.config import FitConfig, KernelConfig, SolverConfig
from ep3stream.errors import ConfigError
from ep3stream.mesh import Mesh
from ep3stream.run.bundle import write_bundle
from ep3stream.run.directory import SETUP_KIND
from ep3stream.run.setup import STAGED, Setup, SetupPlan, StagePlan
from ep3stream.run.text import bytes_text
from ep3stream.solver.columns import COLUMN_KERNELS
from ep3stream.solver.eigenpro import EigenProProjection
from ep3stream.solver.exact import ExactProjection
from ep3stream.solver.gpu import float32_products
from ep3stream.solver.input_directions import LeadingDirections, leading, may_narrow, narrowing
from ep3stream.solver.input_scaling import InputScaling
from ep3stream.solver.kernels import RADIAL_KERNELS, CallableKernel, Kernel, KernelFunction, RadialKernel
from ep3stream.solver.named_kernels import kernel_tensors, measured_kernel, named_kernel, with_precision
from ep3stream.solver.projection import NystromProjection, Spectra
from ep3stream.solver.set_up import Settled, SolverBuilder
from ep3stream.solver.step import Stage
from ep3stream.solver.tail import neighbour_order
from ep3stream.store.reader import Split, SplitReader
from ep3stream.stream.order import SAMPLED_SEGMENTS, Rows, sample_rows
from ep3stream.training.budget import StageTimes
from ep3stream.training.centers import CenterSource
from ep3stream.training.column_kernel import (
    LearntColumns,
    learning_effort,
    learnt_columns,
    learnt_linear,
    plain_kernel,
    wants_linear,
)
from ep3stream.training.defaults import MOST_COLUMNS, choices_of, is_timed, with_kernel
from ep3stream.training.measured_sizes import with_measured_sizes
from ep3stream.training.plan import SizePlan, automatic_centers, memory_budget, on_device, require_machine
from ep3stream.training.precision import found_precision
from ep3stream.training.problem import (
    Problem,
    input_scaling,
    problem_of_split,
    require_codes,
    require_in_range,
    require_varied_features,
    require_varied_targets,
    shape_of,
    tell_heavy_tails,
    tell_one_hot,
)
from ep3stream.training.set_up_rows import SetUpRows, read_checked, read_pool, read_rows, rows_of_split
from ep3stream.training.validation import NO_VALIDATION, ValidationRows

logger = logging.getLogger(__name__)

# Purposes of random numbers; others have set_up_rows.py and centers.py.
_ALGEBRA, _DIRECTIONS = 3, 8

_CHECKED_ROWS = 1 << 16
_ROWS_PER_CENTER = 8
_COLUMNS_AT_ONCE = 16
_NARROWED_ROWS = 4096

# Told where for this share of the rows neighbours nearer than this, in bandwidths, are lost to rounding. On two
# clusters with a smooth target in each, 0.1 did no harm and 0.2 did.
_LOST_SHARE, _LOST_DISTANCE = 0.02, 0.15


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
class SetUpResult:
    """A set-up in memory, and what measures step sizes of other batches later.

    On several ranks the tensors with a row for each center are whole on the leader and absent elsewhere.
    """

    setup: Setup
    builder: SolverBuilder
    settled: Settled
    probes: Tensor
    probe_y: Tensor | None


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
    tell_one_hot(split, config)
    _tell_wide(split, asked, config)
    source = CenterSource.of(config, split, automatic_centers(shape), held)
    memory_bytes = memory_budget(config.run.memory_bytes, mesh)
    require_varied_features(split)
    require_varied_targets(split)
    problem = replace(problem_of_split(split, config, input_scaling(split, config, held)), shape=shape)
    tell_heavy_tails(split, config.data.scale, problem.inputs)
    if metric is not None:
        problem = replace(problem, inputs=problem.inputs.along(metric.directions))

    problem = narrowed(problem, config, function, mesh, times, partial(random_rows, split, config, held))
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


def _tell_wide(split: Split, asked: FitConfig, config: FitConfig) -> None:
    """Says that columns are too many for a kernel that learns what each is worth, where that is why there is none."""
    n_features = split.manifest.n_features
    if asked.kernel.name == "auto" and config.kernel.name == "laplacian" and n_features > MOST_COLUMNS:
        logger.info(
            "of %d features each has the same say; --kernel product or --metric diagonal learns what each is worth, "
            "and takes longer",
            n_features,
        )


def random_rows(split: Split, config: FitConfig, held: Rows, n_rows: int) -> tuple[Tensor, Tensor]:
    """x, (n, d), and y of so many rows of the split that are not held out, or of all there are, in random order."""
    # A read of every segment of a small store would take half as long as finding directions in the rows.
    n_segments = SAMPLED_SEGMENTS if split.manifest.shuffle_seed is None else 1
    n_rows = min(n_rows, split.info.n_rows - len(held))
    numbers = sample_rows(
        split.info, n_rows, config.run.seed, _DIRECTIONS, without=held, n_segments=n_segments
    )
    return read_rows(split, None, numbers)[1:]


def narrowed(
    problem: Problem,
    config: FitConfig,
    function: KernelFunction | None,
    mesh: Mesh,
    times: StageTimes,
    read: Callable[[int], tuple[Tensor, Tensor]],
) -> Problem:
    """The problem with the inputs along their leading directions, where `inputs_rank` and the kernel say so.

    read: gives the leader x, (n, d), and y of so many rows, or of all there are, in random order.
    """
    rank = config.data.inputs_rank
    is_of_distances = function is None and config.kernel.name in RADIAL_KERNELS
    if rank == "full":
        return problem
    if rank == "auto" and not (is_of_distances and may_narrow(problem.inputs.n_inputs)):
        return problem
    if not is_of_distances:
        raise ConfigError(
            f"inputs_rank is {rank}, but the {config.kernel.name if function is None else 'callable'} kernel takes no "
            "distances; leave it out, or take a kernel such as laplacian"
        )

    def directions() -> LeadingDirections | None:
        points, targets = _coded_rows(problem, *read(_NARROWED_ROWS))
        if rank == "auto":
            return narrowing(points, targets, _kernel_of(config.kernel))
        return leading(points, rank)

    # The leader's directions on every rank: devices may differ in the last bit.
    with times.stage("input directions"):
        found = mesh.on_leader(directions)
    stretch = mesh.broadcast_object(lambda: None if found is None else found.stretch)
    if stretch is None:
        return problem
    parts = (None, None) if found is None else (found.basis, found.origin)
    basis, origin = (mesh.replicate(part) for part in parts)
    logger.info(
        "the kernel takes %d leading directions of %d inputs, and how far rows lie from them (inputs_rank full takes "
        "all inputs)",
        basis.shape[1],
        len(basis),
    )
    return replace(problem, inputs=replace(problem.inputs, leading=LeadingDirections(basis, origin, stretch)))


def _kernel_of(settings: KernelConfig) -> Callable[[Tensor], Kernel]:
    """The kernel of the settings for given points, with its bandwidth measured on them."""
    return lambda points: measured_kernel(settings, points, points.mean(0))


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
    """A linear part, and weights of columns for at most `n_centers` centers, whose number may not be known yet.

    The rows to learn from are read by one rank of each machine. None where there is nothing to learn.
    """
    if function is not None or not (config.kernel.name in COLUMN_KERNELS or wants_linear(config)):
        return None
    with times.stage("column weights" if config.kernel.name in COLUMN_KERNELS else "linear part"):
        x, y, *checked = mesh.once_per_node(
            lambda: [*(read_pool(split, config, held) or ()), *read_checked(split, validation, config)]
        )
        n_resolving = resolving_centers(n_centers, problem.shape.n_rows)
        of_split = (checked[0], checked[1]) if checked else None
        return learn_columns(problem, (x, y), config, n_resolving, mesh, of_split)


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
    narrow = _checked_centers(rows.centers, problem)
    sample, probes = (
        require_in_range(inputs.to(points.device)(points)).to(device) for points in (rows.sample, rows.probes)
    )
    is_of_columns = function is None and config.kernel.name in COLUMN_KERNELS
    n_resolving = resolving_centers(len(rows.centers), problem.shape.n_rows)
    with times.stage("column weights") if is_of_columns and not rows.learnt else nullcontext():
        learnt = _learnt(problem, rows, config, n_resolving, mesh)
    if is_of_columns:
        kernel: Kernel = learnt.for_centers(n_resolving)
    else:
        with times.stage("bandwidth"):
            kernel = _measured_kernel(problem, rows, config.kernel, function, sample, mesh)
    with times.stage("precision") if device.type == "cuda" else nullcontext():
        n_columns, share = problem.shape.n_columns, -(-len(rows.centers) // mesh.size)
        # That of the leader's device on every rank.
        precision = mesh.broadcast_object(
            lambda: found_precision(settings.precision, kernel, sample, n_columns, share, times.clock)
        )
    kernel = with_precision(kernel, precision)
    if settings.ridge is None and settings.projection != "eigenpro":
        settings = replace(settings, ridge=learnt.ridge(problem.shape.n_rows))
    _tell_lost_distances(
        kernel, sample, [problem.names[0][column] for column in inputs.main_columns.tolist()]
    )
    points, scaling = (rows.centers, inputs.to(device)) if narrow is None else (narrow, None)
    if plan.group_size:
        with times.stage("groups of centers"):
            order = _group(rows.centers, points, kernel, scaling, plan.group_size, mesh)
            points = rows.centers if narrow is None else narrow[order]
    builder = SolverBuilder(
        kernel=kernel,
        centers=points,
        sample=sample,
        sizes=plan,
        settings=settings,
        mesh=mesh,
        generator=torch.Generator().manual_seed((config.run.seed * 4 + _ALGEBRA) % 2**64),
        targets=problem.targets.to(device),
        inputs=scaling,
        sample_y=None if rows.sample_y is None else rows.sample_y.to(device),
        linear=None if learnt.linear is None else learnt.linear.to(device),
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
    if learnt.linear is not None:
        tensors |= learnt.linear.tensors()
    if problem.targets.weights is not None:
        tensors["target_weights"] = problem.targets.weights
    setup_plan = _setup_plan(
        plan, kernel, settings, spectra, settled, mesh, memory_bytes, problem.shape.ridge_factors
    )
    if inputs.leading is not None:
        setup_plan = replace(setup_plan, n_directions=inputs.leading.n_features - 1)
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
    if (told := learnt.told_for(n_resolving)) is not None:
        description["column_weights"] = told
    if learnt.linear is not None:
        description["linear"] = learnt.linear.description() | (learnt.told_linear or {})
    return SetUpResult(Setup(tensors, description, setup_plan), builder, settled, probes, probe_y)


def _checked_centers(centers: Tensor, problem: Problem) -> Tensor | None:
    """The centers, (p, d), along their leading directions, (p, k + 1), where there are such: every use needs them so.

    ConfigError for centers out of range. Otherwise no scaled copy of all centers is ever held.
    """
    inputs, parts = problem.inputs.to(centers.device), []
    for some in centers.split(_CHECKED_ROWS):
        scaled = require_in_range(inputs(some))
        require_codes(some, problem)
        if inputs.leading is not None:
            parts.append(scaled)
    return torch.cat(parts) if parts else None


def _group(
    centers: Tensor,
    points: Tensor,
    kernel: Kernel,
    inputs: InputScaling | None,
    group_size: int,
    mesh: Mesh,
) -> Tensor:
    """Puts the centers, (p, d), in place, into an order in which groups of neighbours are next to each other.

    points: the centers, which `inputs` scales, or which are scaled. Returns the order, (p,), where the centers are. The
    ranks of a machine share the memory that the centers lie in.
    """

    def scaled(some: Tensor) -> Tensor:
        here = some.to(mesh.device)
        return here if inputs is None else inputs(here)

    def order() -> Tensor:
        return neighbour_order(kernel, points, scaled, group_size)

    # The leader's order on every rank: devices may differ in the last bit.
    chosen = mesh.replicate(mesh.on_leader(order)).to(centers.device)

    def put_in_order() -> None:
        if mesh.is_reader:
            # Some columns at a time, so that there is no second copy of all.
            for columns in centers.split(_COLUMNS_AT_ONCE, dim=1):
                columns.copy_(columns[chosen])

    mesh.all_or_raise(put_in_order)  # Every rank waits for the reader of its machine.
    return chosen


def require_enough_centers(n_centers: int, n_devices: int) -> None:
    """ConfigError where a device would have no center."""
    if n_devices > n_centers:
        raise ConfigError(
            f"devices is {n_devices}, but there are only {n_centers} centers to deal; use at most {n_centers} "
            "devices, or more centers"
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


def _learnt(
    problem: Problem, rows: SetUpRows, config: FitConfig, n_centers: int, mesh: Mesh
) -> LearntColumns:
    """`rows.learnt`, or what is learnt from `rows.pool`; with neither all columns weigh the same."""
    if rows.learnt is not None:
        return rows.learnt
    if rows.pool is not None:
        return learn_columns(problem, rows.pool, config, n_centers, mesh)
    is_of_columns = config.kernel.name in COLUMN_KERNELS
    d = rows.centers.shape[1]
    return LearntColumns(plain_kernel(config.kernel, d, problem.categories) if is_of_columns else None)


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
    """A linear part, and weights of columns for up to `n_centers` centers, learnt from x, (n, d), and y of the pool.

    checked: such rows of the split that is validated, where that is another one.
    """
    x, y = _coded_rows(problem, *(each.to(mesh.device) for each in pool))
    of_split = None
    if checked is not None:
        of_split = _coded_rows(problem, *(each.to(mesh.device) for each in checked))
    names = problem.names[0]
    if config.kernel.name not in COLUMN_KERNELS:
        inputs = [names[column] for column in problem.inputs.main_columns.tolist()]
        return learnt_linear(x, y, _kernel_of(config.kernel), inputs, n_centers, mesh, of_split)
    plain = plain_kernel(config.kernel, x.shape[1], problem.categories)
    effort = learning_effort(config.run.minutes)
    learnt = learnt_columns(
        plain, x, y, names, n_centers, mesh, of_split, effort, tries_linear=wants_linear(config)
    )
    return replace(learnt, sharpness=config.kernel.sharpness)


def _coded_rows(problem: Problem, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Points, (n, D), and coded targets, (n, c), of rows x, (n, d), and y; ConfigError for points out of range."""
    points, code = require_in_range(problem.inputs.to(x.device)(x)), problem.targets.to(x.device)
    negative = torch.zeros(code.n_outputs, len(x), device=x.device)
    code.subtract_(negative, y)
    return points, negative.neg_().T.contiguous()


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
        precision=kernel.precision if isinstance(kernel, RadialKernel) else "float32",
        averaging=settings.default_averaging,
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
