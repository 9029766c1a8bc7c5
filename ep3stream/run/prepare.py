"""The set-up of a fit: draws centers and samples, builds the preconditioner, measures the step. Done once a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.config import FitConfig
from ep3stream.data.npy import open_array
from ep3stream.data.sample import sample_rows
from ep3stream.data.store import SplitReader
from ep3stream.errors import ConfigError, InputError
from ep3stream.mesh import Mesh
from ep3stream.run.bundle import write_bundle
from ep3stream.run.plan import Plan, Shape, automatic_centers, describe
from ep3stream.run.setup import SETUP_KIND
from ep3stream.solver.exact import build_exact
from ep3stream.solver.kernels import CallableKernel, Kernel, KernelFunction, RadialKernel, median_bandwidth
from ep3stream.solver.model import InputScaling
from ep3stream.solver.projection import NystromProjection, Projection, Spectra, build_nystrom
from ep3stream.solver.step import Solver
from ep3stream.solver.stepsize import Stability, measure_stability
from ep3stream.solver.targets import TargetCode

logger = logging.getLogger(__name__)

_CENTERS, _SAMPLES, _ALGEBRA = 1, 2, 3
_PROBES = 3
_PROBE_ROWS = 1024
_MAX_PROBES = 64  # batches
_FEW_ROWS = 256
_MIN_AUTO_BATCH = 512


def write_setup(
    path: Path, reader: SplitReader, config: FitConfig, function: KernelFunction | None, mesh: Mesh
) -> None:
    """Does the set-up and writes it to `path` as a bundle."""
    tensors, description = _Preparation(reader, config, function, mesh).run()
    write_bundle(path, SETUP_KIND, tensors, description)


class _Preparation:
    """One pass through the stages of the set-up, each timed under its name."""

    def __init__(
        self, reader: SplitReader, config: FitConfig, function: KernelFunction | None, mesh: Mesh
    ) -> None:
        self.reader, self.config, self.function, self.mesh = reader, config, function, mesh
        self.elapsed_s: dict[str, float] = {}
        self.generator = torch.Generator().manual_seed((config.run.seed * 4 + _ALGEBRA) % 2**64)

    def run(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The set-up's tensors and description."""
        solver_config, seed = self.config.solver, self.config.run.seed
        shape = _shape(self.reader)
        file = _centers_file(solver_config.centers, shape.n_features)
        n_centers = _n_centers(solver_config.centers, file, shape)
        plan = Plan.of(shape, solver_config, n_centers, self.config.run.memory_bytes)
        given = None if file is None else _given_centers(file, str(solver_config.centers))
        inputs, targets = _scaling(self.reader, self.config), _target_code(self.reader)
        with self._stage("centers and samples"):
            drawn = None if given is not None else sample_rows(self.reader.info, n_centers, seed, _CENTERS)
            n_probes = max(_PROBES * plan.max_batch_size, _PROBE_ROWS)
            n_others = min(shape.n_rows, plan.nystrom_samples + n_probes)
            others = sample_rows(self.reader.info, n_others, seed, _SAMPLES)
            fresh = ~np.isin(others, () if drawn is None else drawn)
            if fresh.any():
                # A center leans far more on its own weight than the rows that are trained on.
                others = others[fresh]
            centers, rows = _read_rows(self.reader, drawn, others)
            centers = given if given is not None else centers
        excluded = np.empty(0, np.int64)
        if drawn is not None and not self.config.data.keep_center_rows:
            excluded = np.sort(drawn)
        scaled_rows = _in_range(inputs(rows)).to(self.mesh.device)
        with self._stage("bandwidth"):
            kernel = self._kernel(scaled_rows[: plan.nystrom_samples], inputs)
        with self._stage("preconditioner"):
            scaled_centers = _in_range(inputs(centers)).to(self.mesh.device)
            sample = scaled_rows[: plan.nystrom_samples]
            projection, spectra = self._projection(kernel, scaled_centers, sample, plan)
        with self._stage("step size"):
            solver = self._probing_solver(kernel, scaled_centers, projection, targets, plan)
            epoch_rows = shape.n_rows - len(excluded)
            stability = self._stability(solver, scaled_rows, plan, epoch_rows)
        tensors = {
            "centers": centers,
            "excluded_rows": torch.from_numpy(excluded),
            "input_shift": inputs.shift,
            "input_scale": inputs.scale,
            "target_offset": targets.offset,
            "target_scale": targets.scale,
            **_gathered(projection, n_centers, self.mesh),
        }
        if isinstance(kernel, RadialKernel):
            tensors["kernel_centre"] = kernel.centre
        return tensors, self._description(plan, kernel, projection, spectra, stability)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.elapsed_s[name] = time.perf_counter() - began
        logger.info("set-up: %s, %.1f s", name, self.elapsed_s[name])

    def _kernel(self, sample: Tensor, inputs: InputScaling) -> Kernel:
        if self.function is not None:
            return CallableKernel(self.function)
        choice = self.config.kernel
        bandwidth = median_bandwidth(sample) if choice.bandwidth == "median" else float(choice.bandwidth)
        mean = torch.tensor(self.reader.info.features.mean, dtype=torch.float64)
        return RadialKernel(choice.name, bandwidth, inputs(mean).float().to(sample.device))

    def _projection(
        self, kernel: Kernel, centers: Tensor, sample: Tensor, plan: Plan
    ) -> tuple[Projection, Spectra]:
        if self.config.solver.projection == "exact":
            return build_exact(kernel, centers, sample, plan.data_rank, self.mesh, self.generator)
        owned = self.mesh.owned(plan.n_centers)
        return build_nystrom(
            kernel,
            centers[owned.start : owned.stop],
            centers[: plan.n_landmarks],
            sample,
            plan.n_centers,
            plan.model_rank,
            plan.data_rank,
            self.mesh,
            self.generator,
        )

    def _probing_solver(
        self, kernel: Kernel, centers: Tensor, projection: Projection, targets: TargetCode, plan: Plan
    ) -> Solver:
        owned = self.mesh.owned(plan.n_centers)
        room = torch.zeros(len(owned) * max(plan.max_batch_size, 1), device=self.mesh.device)
        shard = kernel.left(centers[owned.start : owned.stop])
        return Solver(kernel, shard, projection, targets, 0.0, 0.0, self.mesh, room)

    def _stability(self, solver: Solver, rows: Tensor, plan: Plan, epoch_rows: int) -> Stability:
        """At the batch size asked for, or at the one that a first measurement finds critical."""
        if epoch_rows < 1:
            raise ConfigError(
                f"centers is {plan.n_centers}, which leaves no rows to train on; use fewer centers or more rows"
            )
        probes = rows[plan.nystrom_samples :] if len(rows) > plan.nystrom_samples + _FEW_ROWS else rows
        asked = self.config.solver.batch_size
        if asked:
            return self._measure(solver, probes, min(asked, epoch_rows))
        # A short epoch of few steps learns little, whatever the hardware prefers.
        largest = max(1, min(plan.max_batch_size, max(epoch_rows // 32, 16), epoch_rows))
        first = self._measure(solver, probes, min(_PROBE_ROWS, largest))
        critical = first.critical_batch_size(self.config.solver.momentum)
        # A quarter of it: rows are then what limits a step's progress, with room for batches worse than the probes.
        batch_size = min(1 << int(np.log2(max(critical / 4, _MIN_AUTO_BATCH))), largest)
        return first if batch_size == first.batch_size else self._measure(solver, probes, batch_size)

    def _measure(self, solver: Solver, probes: Tensor, batch_size: int) -> Stability:
        """On a few batches, on more of them if they are small: the worst of three single rows says little."""
        probed = min(batch_size, len(probes))
        n_batches = min(max(_PROBES, min(_PROBE_ROWS // probed, _MAX_PROBES)), len(probes) // probed)
        batches = probes[: n_batches * probed].split(probed)
        stability = measure_stability(solver.block, batches, solver.projection, self.mesh, self.generator)
        # With fewer rows at hand than a batch has, its leading eigenvalue is bounded by theirs in proportion.
        return replace(
            stability, batch_size=batch_size, lambda_max=stability.lambda_max * batch_size / probed
        )

    def _description(
        self, plan: Plan, kernel: Kernel, projection: Projection, spectra: Spectra, stability: Stability
    ) -> dict[str, Any]:
        settings, manifest = self.config.solver, self.reader.manifest
        extra = {
            "kernel": kernel.name,
            "bandwidth": kernel.bandwidth if isinstance(kernel, RadialKernel) else None,
            "projection": settings.projection,
            "batch_size": stability.batch_size,
            "step_size": stability.step_size(settings.momentum),
            "momentum": settings.momentum,
            "mu": spectra.damping,
            "n_leading": projection.n_leading if isinstance(projection, NystromProjection) else 0,
        }
        return {
            "store_fingerprint": manifest.fingerprint,
            "task": manifest.task,
            "names": {
                "features": list(manifest.feature_names),
                "targets": list(manifest.target_names),
                "classes": None if manifest.class_names is None else list(manifest.class_names),
            },
            "plan": describe(plan, extra),
            "elapsed_s": self.elapsed_s,
            "data_eigenvalues": list(spectra.data),
            "model_eigenvalues": list(spectra.model),
            "lambda_max": stability.lambda_max,
            "kappa_max": stability.kappa_max,
        }


def _shape(reader: SplitReader) -> Shape:
    manifest, info = reader.manifest, reader.info
    y_values = 1 if manifest.task == "classification" else manifest.n_outputs
    row_bytes = manifest.n_features * np.dtype(manifest.x_dtype).itemsize + 4 * y_values
    is_shuffled = manifest.shuffle_seed is not None
    return Shape(
        info.n_rows, manifest.n_features, manifest.n_outputs, info.segment_rows, row_bytes, is_shuffled
    )


def _centers_file(centers: int | str, n_features: int) -> NDArray[Any] | None:
    """The points of an NPY file, (p, d) in the units of the data, not read yet; None if rows are to be drawn."""
    if not isinstance(centers, str) or centers == "auto":
        return None
    try:
        points = open_array(Path(centers))
    except InputError as error:
        raise ConfigError(
            f"centers is {centers!r}, which is no NPY file of (p, {n_features}) numbers: {error}"
        ) from error
    if points.ndim != 2 or points.shape[1] != n_features or not len(points):
        raise ConfigError(
            f"centers in {centers} have the shape {points.shape}; they must be (p, {n_features})"
        )
    return points


def _given_centers(points: NDArray[Any], file: str) -> Tensor:
    with np.errstate(over="ignore"):  # What float32 cannot hold becomes infinite and is refused.
        centers = points.astype(np.float32)
    if not np.isfinite(centers).all():
        raise ConfigError(f"centers in {file} hold values that are not finite in float32; remove those rows")
    return torch.from_numpy(centers)


def _in_range(x: Tensor) -> Tensor:
    """x, (m, d), if distances between its rows are finite in float32."""
    if not bool(torch.isfinite(x.square().sum(1)).all()):
        raise ConfigError(
            f"inputs reach {float(x.abs().max()):.3g} after scaling, whose squares are not finite in float32; "
            "use --scale standard, or convert them in a larger unit"
        )
    return x


def _n_centers(centers: int | str, given: NDArray[Any] | None, shape: Shape) -> int:
    if given is not None:
        return len(given)
    n_centers = automatic_centers(shape) if centers == "auto" else int(centers)
    if n_centers >= shape.n_rows:
        raise ConfigError(
            f"centers is {n_centers} but the split has {shape.n_rows} rows, which are not trained on once they are "
            f"centers; use at most {max(1, shape.n_rows // 2)}, or give centers as a file"
        )
    return n_centers


def _read_rows(reader: SplitReader, drawn: Any, others: Any) -> tuple[Tensor, Tensor]:
    """Rows `drawn` and rows `others`, each segment read once."""
    wanted = others if drawn is None else np.concatenate([drawn, others])
    unique, places = np.unique(wanted, return_inverse=True)
    x = torch.from_numpy(reader.read_rows(unique)[0]).float()[torch.from_numpy(places)]
    n_drawn = len(wanted) - len(others)
    return x[:n_drawn].clone(), x[n_drawn:]


def _scaling(reader: SplitReader, config: FitConfig) -> InputScaling:
    features = reader.info.features
    columns = (features.mean, features.std, features.minimum, features.maximum)
    return InputScaling.of(config.data.scale, *(torch.tensor(c, dtype=torch.float64) for c in columns))


def _target_code(reader: SplitReader) -> TargetCode:
    info = reader.info
    if info.class_counts is not None:
        counts = torch.tensor(info.class_counts, dtype=torch.float64)
        return TargetCode(True, (counts / counts.sum()).float(), torch.ones(len(counts)))
    assert info.targets is not None  # the manifest was checked
    spread = torch.tensor(info.targets.std, dtype=torch.float64)
    offset = torch.tensor(info.targets.mean, dtype=torch.float64)
    return TargetCode(False, offset.float(), torch.where(spread > 0, spread, 1.0).float())


def _gathered(projection: Projection, n_centers: int, mesh: Mesh) -> dict[str, Tensor]:
    """A projection's tensors with the rows of all shards."""
    gather: Callable[[Tensor], Tensor] = lambda shard: mesh.gather_rows(shard, n_centers)  # noqa: E731
    return {name: gather(t) if name == "basis" else t for name, t in projection.tensors().items()}
