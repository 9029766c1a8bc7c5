"""The set-up of a fit: draws centers and samples, builds the preconditioner, measures the step. Done once a run."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ep3stream.config import FitConfig, SolverConfig
from ep3stream.conversion.recorded_columns import columns_of
from ep3stream.errors import ConfigError, InputError
from ep3stream.formats.arrays import open_array
from ep3stream.mesh import Mesh
from ep3stream.run.bundle import write_bundle
from ep3stream.run.setup import SETUP_KIND, STAGED
from ep3stream.run.text import bytes_text
from ep3stream.solver.eigenpro import EigenProProjection
from ep3stream.solver.exact import ExactProjection
from ep3stream.solver.kernels import CallableKernel, Kernel, KernelFunction, RadialKernel
from ep3stream.solver.model import InputScaling
from ep3stream.solver.named_kernels import measured_kernel, named_kernel, with_precision
from ep3stream.solver.projection import NystromProjection, Spectra
from ep3stream.solver.set_up import Settled, SolverBuilder, n_probes, probes_of
from ep3stream.solver.step import Stage
from ep3stream.solver.targets import TargetCode, require_weights_of_task, weighted
from ep3stream.store.reader import SplitReader
from ep3stream.stream.order import Rows
from ep3stream.stream.scan import sample_rows
from ep3stream.training.centers import CenterSource
from ep3stream.training.plan import Plan, Shape, automatic_centers, describe, memory_budget, require_machine

logger = logging.getLogger(__name__)

_CENTERS, _SAMPLES, _ALGEBRA = 1, 2, 3

_MORE = 1.1


def write_setup(
    path: Path, reader: SplitReader, config: FitConfig, function: KernelFunction | None, mesh: Mesh
) -> None:
    """Does the set-up, all ranks together; the leader writes it to `path` as a bundle."""
    tensors, description = _Preparation(reader, config, function, mesh).run()
    mesh.on_leader(lambda: write_bundle(path, SETUP_KIND, tensors, description))


def require_enough_centers(n_centers: int, n_devices: int) -> None:
    """ConfigError where a device would have none."""
    if n_devices > n_centers:
        raise ConfigError(
            f"devices is {n_devices}, but there are only {n_centers} centers to deal; use at most {n_centers} "
            "devices, or more centers"
        )


class _Preparation:
    """One pass through the stages of the set-up, each timed under its name."""

    def __init__(
        self, reader: SplitReader, config: FitConfig, function: KernelFunction | None, mesh: Mesh
    ) -> None:
        self.reader, self.config, self.function, self.mesh = reader, config, function, mesh
        self.elapsed_s: dict[str, float] = {}
        self.generator = torch.Generator().manual_seed((config.run.seed * 4 + _ALGEBRA) % 2**64)

    def run(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The set-up's tensors, those with a row for each center on the leader alone, and its description."""
        solver_config, seed = self.config.solver, self.config.run.seed
        shape = shape_of(self.reader)
        source = CenterSource.of(self.config, self.reader, automatic_centers(shape))
        n_centers = source.n_centers
        require_enough_centers(n_centers, self.mesh.size)
        self.memory_bytes = memory_budget(self.config.run.memory_bytes, self.mesh)
        plan = Plan.of(shape, solver_config, n_centers, self.memory_bytes, self.mesh.size)
        require_machine(shape, solver_config, plan, self.mesh.device, self.mesh.local_size)
        inputs = input_scaling(self.reader, self.config)
        targets = with_weights(target_code(self.reader), self.reader, solver_config)
        with self._stage("centers and samples"):
            drawn = None
            if source.points is None:
                drawn = sample_rows(self.reader.info, n_centers, seed, _CENTERS)
            others = self._others(drawn, plan)
            centers, rows, y = self.mesh.once_a_node(lambda: self._points(source, drawn, others, inputs))
        logger.info(
            "plan: %s of memory, batches of up to %d rows; `ep3stream plan` tells more",
            bytes_text(sum(plan.memory.values())),
            plan.max_batch_size,
        )
        excluded = np.empty(0, np.int64)
        if drawn is not None and not self.config.data.keep_center_rows:
            excluded = np.sort(drawn)
        scaled_rows = _in_range(inputs(rows)).to(self.mesh.device)
        with self._stage("bandwidth"):
            found = self._kernel(scaled_rows[: plan.nystrom_samples], inputs)
            kernel = with_precision(found, solver_config.precision)
        sample = scaled_rows[: plan.nystrom_samples]
        device = self.mesh.device
        builder = SolverBuilder(
            kernel,
            centers,
            sample,
            plan,
            solver_config,
            self.mesh,
            self.generator,
            targets.to(device),
            inputs,
            y[: plan.nystrom_samples].to(device),
        )
        with self._stage("preconditioner"):
            projection, spectra = builder.projection()
        with self._stage("step size"):
            epoch_rows = shape.n_rows - len(excluded)
            if epoch_rows < 1:
                raise ConfigError(
                    f"centers is {n_centers}, which leaves no rows to train on; use fewer centers or more rows"
                )
            probes, probe_y = (probes_of(each, plan.nystrom_samples) for each in (scaled_rows, y.to(device)))
            settled = builder.settled(projection, spectra, probes, epoch_rows, probe_y)
        tensors = {
            "centers": centers,
            "excluded_rows": torch.from_numpy(excluded),
            "input_shift": inputs.shift,
            "input_scale": inputs.scale,
            "target_offset": targets.offset,
            "target_scale": targets.scale,
            **_gathered(settled, n_centers, self.mesh),
        }
        if settled.start is not None:
            tensors["start"] = settled.start.coefficients.float()
        if isinstance(kernel, RadialKernel):
            tensors["kernel_centre"] = kernel.centre
        if targets.weights is not None:
            tensors["target_weights"] = targets.weights
        return tensors, self._description(plan, kernel, spectra, settled)

    def _others(self, drawn: Rows | None, plan: Plan) -> Rows:
        """Rows of the sample and to measure the step size on, in random order; centers only where there are no others.

        A center leans far more on its own weight than the rows that are trained on.
        """
        info, n_drawn = self.reader.info, 0 if drawn is None else len(drawn)
        wanted = plan.nystrom_samples + n_probes(
            self.config.solver, plan.max_batch_size, info.n_rows - n_drawn
        )
        # So many that, without the centers among them, there are enough but for bad luck.
        share = 1 - n_drawn / info.n_rows
        more = math.ceil(_MORE * wanted / share) if share > 0 else info.n_rows
        others = sample_rows(info, min(info.n_rows, more), self.config.run.seed, _SAMPLES)
        fresh = ~np.isin(others, () if drawn is None else drawn)
        return (others[fresh] if fresh.any() else others)[:wanted]

    def _points(
        self, source: CenterSource, drawn: Rows | None, others: Rows, inputs: InputScaling
    ) -> list[Tensor]:
        """Centers, in the units of the data; x and y of the rows `others`."""
        given = None if source.points is None else source.points(inputs)
        centers, rows, y = _read_rows(self.reader, drawn, others)
        centers = centers if given is None else given
        _in_range(inputs(centers))
        return [centers, rows, y]

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.elapsed_s[name] = time.perf_counter() - began
        logger.info("set-up: %s, %.1f s", name, self.elapsed_s[name])

    def _kernel(self, sample: Tensor, inputs: InputScaling) -> Kernel:
        kernel = chosen_kernel(self.reader, self.config, self.function, sample, inputs)
        if self.mesh.size == 1 or isinstance(kernel, CallableKernel):
            return kernel
        # What each rank has measured may differ in the last bit, where their devices do.
        parameters = self.mesh.broadcast_object(lambda: kernel.parameters)
        centre = kernel.centre if isinstance(kernel, RadialKernel) else None
        return named_kernel(kernel.name, parameters, centre)

    def _description(self, plan: Plan, kernel: Kernel, spectra: Spectra, settled: Settled) -> dict[str, Any]:
        settings, manifest, projection = self.config.solver, self.reader.manifest, settled.projection
        extra: dict[str, Any] = {
            "kernel": kernel.name,
            "bandwidth": None,
            **kernel.parameters,
            "projection": settings.projection,
            "step_rule": settings.used_step,
            "batch_size": settled.batch_size,
            "step_size": settled.step_size,
            "stages": [_described(stage) for stage in settled.stages],
            "momentum": settings.used_momentum,
            "ridge": settings.ridge,
            "mu": spectra.damping,
            "devices": self.mesh.size,
            "memory_bytes": self.memory_bytes,
            "n_leading": projection.n_leading if isinstance(projection, NystromProjection) else 0,
        }
        if isinstance(projection, EigenProProjection):
            extra["center_batch_size"] = projection.passes.batch_size
            extra["center_step_size"] = projection.passes.step_size
        if settled.start is not None:
            extra |= {"start_rows": settled.start.n_rows, "start_ridge": settled.start.rho}
        if isinstance(projection, NystromProjection):
            extra["model_rank"] = len(spectra.model)
        return {
            "store_fingerprint": manifest.fingerprint,
            "task": manifest.task,
            "names": {
                "features": list(manifest.feature_names),
                "targets": list(manifest.target_names),
                "classes": None if manifest.class_names is None else list(manifest.class_names),
            },
            "conversion": columns_of(manifest),
            "plan": describe(plan, extra),
            "elapsed_s": self.elapsed_s,
            "data_eigenvalues": list(spectra.data),
            "model_eigenvalues": list(spectra.model),
            "lambda_max": settled.limits.lambda_max,
            "kappa_max": settled.limits.kappa_max,
        }


def _described(stage: Stage) -> dict[str, Any]:
    projection = stage.projection
    described = {"first_row": stage.first_row, "pace": stage.step_scale}
    if isinstance(projection, NystromProjection | ExactProjection):
        described["n_flattened"] = projection.n_flattened
    return described


def chosen_kernel(
    reader: SplitReader,
    config: FitConfig,
    function: KernelFunction | None,
    sample: Tensor,
    inputs: InputScaling,
) -> Kernel:
    """The function as a kernel, or that of the settings, its bandwidth measured on sample, (s, d), scaled inputs."""
    if function is not None:
        return CallableKernel.checked(function, sample)
    mean = torch.tensor(reader.info.features.mean, dtype=torch.float64, device=inputs.shift.device)
    return measured_kernel(config.kernel, sample, inputs(mean).float().to(sample.device))


def shape_of(reader: SplitReader) -> Shape:
    """Of the problem that a split poses."""
    manifest, info = reader.manifest, reader.info
    y_values = 1 if manifest.task == "classification" else manifest.n_outputs
    row_bytes = manifest.n_features * np.dtype(manifest.x_dtype).itemsize + 4 * y_values
    is_shuffled = manifest.shuffle_seed is not None
    return Shape(
        info.n_rows, manifest.n_features, manifest.n_outputs, info.segment_rows, row_bytes, is_shuffled
    )


def _in_range(x: Tensor) -> Tensor:
    """x, (m, d), if distances between its rows are finite in float32."""
    if not bool(torch.isfinite(x.square().sum(1)).all()):
        raise ConfigError(
            f"inputs reach {float(x.abs().max()):.3g} after scaling, whose squares are not finite in float32; "
            "use --scale standard, or convert them in a larger unit"
        )
    return x


def _read_rows(reader: SplitReader, drawn: Any, others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x of the rows `drawn`, x and y of the rows `others`, each segment read once."""
    wanted = others if drawn is None else np.concatenate([drawn, others])
    unique, places = np.unique(wanted, return_inverse=True)
    read_x, read_y = reader.read_rows(unique)
    x, n_drawn = torch.from_numpy(read_x), len(wanted) - len(others)
    drawn_x, other_x = (x[torch.from_numpy(part)].float() for part in (places[:n_drawn], places[n_drawn:]))
    return drawn_x, other_x, torch.from_numpy(read_y[places[n_drawn:]])


def input_scaling(reader: SplitReader, config: FitConfig) -> InputScaling:
    """The model's input transform: by the split's statistics, times the factors of `feature_scale`."""
    _look_for_constants(reader)
    features = reader.info.features
    columns = (features.mean, features.std, features.minimum, features.maximum)
    scaling = InputScaling.of(config.data.scale, *(torch.tensor(c, dtype=torch.float64) for c in columns))
    if config.data.feature_scale is None:
        return scaling
    factors = _feature_factors(Path(config.data.feature_scale), reader.manifest.n_features)
    return InputScaling(scaling.shift, scaling.scale * factors)


def _look_for_constants(reader: SplitReader) -> None:
    """ConfigError where no feature varies over the split; some that do not are named in the log."""
    info = reader.info
    ranges = zip(reader.manifest.feature_names, info.features.minimum, info.features.maximum, strict=True)
    constant = [name for name, low, high in ranges if low == high]
    if len(constant) == reader.manifest.n_features:
        raise ConfigError(
            f"every feature of split {info.name} is constant, so there is nothing to learn from; "
            "choose other columns or another split"
        )
    if constant:
        some = ", ".join(constant[:3]) + (", ..." if len(constant) > 3 else "")
        logger.warning(
            "%d features are constant in split %s and have no say: %s", len(constant), info.name, some
        )


def _feature_factors(file: Path, n_features: int) -> Tensor:
    """(d,), float32; raises ConfigError unless each is positive and finite in float32."""
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


def target_code(reader: SplitReader) -> TargetCode:
    """How the split's targets enter the least-squares problem, and come out of it.

    ConfigError where all rows have the same: a fit would take its time to find that constant.
    """
    info = reader.info
    is_one_class = info.class_counts is not None and sum(count > 0 for count in info.class_counts) == 1
    if is_one_class or (info.targets is not None and info.targets.minimum == info.targets.maximum):
        raise ConfigError(
            f"every row of split {info.name} has the same {' and '.join(reader.manifest.target_names)}, so there "
            "is nothing to learn; choose another target or split"
        )
    if info.class_counts is not None:
        counts = torch.tensor(info.class_counts, dtype=torch.float64)
        return TargetCode(True, (counts / counts.sum()).float(), torch.ones(len(counts)))
    assert info.targets is not None  # the manifest was checked
    spread = torch.tensor(info.targets.std, dtype=torch.float64)
    offset = torch.tensor(info.targets.mean, dtype=torch.float64)
    return TargetCode(False, offset.float(), torch.where(spread > 0, spread, 1.0).float())


def _gathered(settled: Settled, n_centers: int, mesh: Mesh) -> dict[str, Tensor]:
    """The projection's tensors, on the leader with the rows of all shards; what differs between stages, stacked."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in settled.projection.tensors().items():
        whole = mesh.gather(tensor, n_centers) if name in ("basis", "tempering") else tensor
        if whole is not None:
            tensors[name] = whole
    if STAGED in tensors:
        tensors[STAGED] = torch.stack([stage.projection.tensors()[STAGED] for stage in settled.stages])
    return tensors


def with_weights(code: TargetCode, reader: SplitReader, settings: SolverConfig) -> TargetCode:
    """`code` with the weights of the settings, for the split's rows; as it is where there are none. ConfigError."""
    manifest, counts = reader.manifest, reader.info.class_counts
    require_weights_of_task(counts is not None, settings)
    if settings.output_weights and not settings.ridge and not settings.patience:
        raise ConfigError(
            "output_weights are given, but each target has weights of its own in the model, so that without a ridge "
            "or patience they change nothing; give one of these, or leave output_weights out"
        )
    names = manifest.target_names if counts is None else manifest.class_names or ()
    return weighted(code, names, None if counts is None else torch.tensor(counts), settings)
