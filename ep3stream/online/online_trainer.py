"""The trainer of `KernelModel` and of the estimators: a fit in memory, to which rows come in epochs or in batches.

Set-up and steps are those of `fit`: the same split, settings and seed end with the same bytes of weights. Batches of
the user's own may be of any size. A batch above the safe size is split into equal parts, and one below it takes a
longer step, measured for its size when such a batch first comes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.config import FitConfig, earlier_averaging
from ep3stream.mesh import Mesh
from ep3stream.online.sources import NumberedSource
from ep3stream.prediction.evaluate import score_ridges
from ep3stream.run.checkpoint import Best, Progress
from ep3stream.solver.columns import COLUMN_KERNELS, ColumnKernel
from ep3stream.solver.guard import RunningLoss, RunningScore
from ep3stream.solver.input_scaling import InputScaling
from ep3stream.solver.kernels import KernelFunction
from ep3stream.solver.linear_part import LINEAR_TENSORS, LinearPart
from ep3stream.solver.model import Predictor
from ep3stream.solver.named_kernels import kernel_tensors
from ep3stream.solver.set_up import probes_of
from ep3stream.solver.step_size import PublishedStep
from ep3stream.solver.targets import TargetCode
from ep3stream.store.reader import Split
from ep3stream.stream.batch_slots import Batch
from ep3stream.stream.order import RowOrder, Rows
from ep3stream.training.column_kernel import LearntColumns, tried_ridges
from ep3stream.training.plan import ProblemSize, SizePlan, memory_budget, on_device
from ep3stream.training.problem import Problem
from ep3stream.training.set_up import set_up
from ep3stream.training.set_up_rows import SetUpRows, other_rows, read_pool
from ep3stream.training.trainer import Trainer
from ep3stream.training.validation import after_validation, best_ridge
from ep3stream.values.offsets import Offsets

logger = logging.getLogger(__name__)

_LEAST_MEASURED_ROWS = 16
_BEST_NUMBERS = ("error", "step", "n_since", "ridge")
_GUARD_NUMBERS = ("step_size", "good_averaged", "good_step", "due_step", "n_cuts")

# What a saved state has of the rows of the set-up, where they are known.
_SETUP_TENSORS = ("sample", "sample_y", "probes", "probe_y")


@dataclass(frozen=True, slots=True)
class OnlineSpec:
    """What is fixed before any row is seen.

    config: kernel, solver, seed and memory. function: a callable kernel, in place of the config's. centers: (p, d),
    in the units of the data. sample: X_s, (s, d), where the user gives it. inputs: the input transform of the model.
    drawn: the rows of the first source that became centers; excluded: those that are not trained on, sorted, be it for
    that or because they are held out. held: rows that choose the best model and its ridge, sorted; none without
    validations. learnt: what was learnt from rows before.
    offsets: what centers, sample and rows are less than the user's values. categories: the features that are codes,
    by number, and how many codes each has; `inputs` makes 0/1 features of them, but for a kernel that compares codes.
    """

    config: FitConfig
    function: KernelFunction | None
    centers: Tensor
    sample: Tensor | None
    inputs: InputScaling
    drawn: Rows | None = None
    excluded: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    held: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    offsets: Offsets | None = None
    categories: Mapping[int, int] = field(default_factory=dict)
    learnt: LearntColumns | None = None

    @property
    def is_of_columns(self) -> bool:
        """Whether the kernel compares columns, and codes of categories as they are."""
        return self.function is None and self.config.kernel.name in COLUMN_KERNELS

    def with_categories(self, categories: Mapping[int, int]) -> OnlineSpec:
        """The same, where these features are codes."""
        inputs = (
            self.inputs if self.is_of_columns or self.inputs.n_codes else self.inputs.with_codes(categories)
        )
        return replace(self, inputs=inputs, categories=dict(categories))

    def problem(self, known: Problem) -> Problem:
        """What is known of the rows, with the inputs and categories of this model."""
        n_expanded = self.inputs.n_inputs - len(self.inputs.shift)
        shape = replace(known.shape, n_expanded=n_expanded, of_columns=self.is_of_columns)
        if len(self.held):
            factors = tried_ridges(self.config, shape.n_features, shape.n_outputs)
            shape = replace(shape, is_validated=True, ridge_factors=factors)
        return replace(known, shape=shape, inputs=self.inputs, categories=self.categories)

    def plan(self, shape: ProblemSize, mesh: Mesh) -> tuple[SizePlan, int]:
        """Sizes within the memory budget, and the budget in bytes; ConfigError where the model does not fit it."""
        memory_bytes = memory_budget(self.config.run.memory_bytes, mesh)
        shape = on_device(shape, self.config.run, mesh.device)
        return SizePlan.of(shape, self.config.solver, len(self.centers), memory_bytes), memory_bytes


class OnlineTrainer:
    """A trainer whose set-up is done; it is the recorder of its own losses."""

    def __init__(
        self,
        spec: OnlineSpec,
        problem: Problem,
        rows: SetUpRows,
        planned: tuple[SizePlan, int] | None = None,
    ) -> None:
        # The set-up may put the centers into another order.
        rows = replace(rows, centers=rows.centers.clone(), learnt=rows.learnt or spec.learnt)
        self.spec, self.problem, self.rows = spec, problem, rows
        mesh = Mesh(0, 1, spec.centers.device)
        plan, memory_bytes = planned or spec.plan(problem.shape, mesh)
        self.result = set_up(problem, rows, plan, spec.config, spec.function, mesh, memory_bytes)
        self.trainer = Trainer(self.result.setup, spec.config, spec.function, mesh)
        self.trainer.start()
        settled = self.result.settled
        logger.info("set-up: batches of up to %d rows, step size %.3g", settled.batch_size, settled.step_size)
        # By power of two, each measured when a batch of that size first comes.
        self._step_sizes: dict[int, float] = {}
        self._loss_sum, self._loss_rows = 0.0, 0
        self._validated_step = -1

    @classmethod
    def of_split(cls, spec: OnlineSpec, problem: Problem, split: Split) -> OnlineTrainer:
        """Draws the rows of the set-up from a split, as `fit` draws them."""
        planned = spec.plan(problem.shape, Mesh(0, 1, spec.centers.device))
        plan, _ = planned
        numbers = other_rows(split.info, spec.drawn, plan, spec.config, spec.held)
        x, y = (torch.from_numpy(part) for part in split.read_rows(numbers))
        rows = set_up_rows(spec, x.float(), y, plan.nystrom_samples)
        if spec.function is None and spec.learnt is None:
            rows = replace(rows, pool=read_pool(split, spec.config, spec.held))
        return cls(spec, problem, rows, planned)

    @property
    def spare_bytes(self) -> int:
        """Host memory beside the solver's arrays."""
        return self.result.setup.plan.spare_bytes(self.spec.config.run, self.trainer.mesh.device)

    @property
    def progress(self) -> Progress:
        """State, guard and running scores of the trainer."""
        return self.trainer.progress

    def train_epoch(self, source: NumberedSource, epoch: int, excluded: Rows, share: float = 1.0) -> int:
        """Trains on every row of the source but the excluded ones, sorted, once; returns how many steps that took.

        The order is that of epoch `epoch`, counted from 0, of a fit; share: of its steps that are taken.
        """
        order = self.order(source.n_rows, source.segment_rows, excluded)
        first = epoch * order.steps_per_epoch
        steps = range(first, first + max(1, round(share * order.steps_per_epoch)))
        with source.batches(order, steps, self.trainer.mesh.device) as batches:
            self.trainer.train(batches, self, rows_per_step=order.batch_size)
        return len(steps)

    def order(self, n_rows: int, segment_rows: int, excluded: Rows) -> RowOrder:
        """The order of so many rows in segments, with the batches and windows of the set-up, or what there is."""
        plan = self.result.setup.plan
        n_segments = -(-n_rows // segment_rows)
        return RowOrder(
            self.spec.config.run.seed,
            n_rows,
            segment_rows,
            min(plan.window_segments, n_segments),
            min(plan.batch_size, n_rows),
            excluded,
        )

    def train_rows(self, x: Tensor, y: Tensor) -> None:
        """One step on the rows, or one on each of equal parts; DivergedError when the guard gives up."""
        n_parts = -(-len(x) // self.result.settled.batch_size)
        largest = -(-len(x) // n_parts)
        step_scale = self.step_size(largest) / self.result.settled.step_size
        self.trainer.train(self._parts(x, y, n_parts), self, step_scale=step_scale)

    def _parts(self, x: Tensor, y: Tensor, n_parts: int) -> Iterator[Batch]:
        for part, targets in zip(x.tensor_split(n_parts), y.tensor_split(n_parts), strict=True):
            yield Batch(self.progress.step, part, targets, 0.0)

    def step_size(self, n_rows: int) -> float:
        """The first stage's step size for a batch of so many rows: that of the next power of two.

        The leading eigenvalue of a part of a batch is at most that of the whole, so that the step of the whole is safe.
        """
        size = max(_LEAST_MEASURED_ROWS, 1 << (n_rows - 1).bit_length())
        if size >= self.result.settled.batch_size:
            return self.result.settled.step_size
        if size not in self._step_sizes:
            self._step_sizes[size] = self._measured_step_size(size)
        return self._step_sizes[size]

    def _measured_step_size(self, size: int) -> float:
        result, settled = self.result, self.result.settled
        settings = result.builder.settings
        if settings.used_step == "published":
            next_eigenvalue = result.setup.description["data_eigenvalues"][-1]
            rule = PublishedStep.of(result.builder.kernel, result.builder.sample, next_eigenvalue)
            return rule.step_size(size)
        limits, last = settled.limits, settled.stages[-1].projection
        if limits.step_size * limits.lambda_max < 1:
            return settled.step_size  # The leverage limits it, which is the same for every size.
        # A generator for each size: nothing depends on which sizes came before.
        seed = (self.spec.config.run.seed * 8192 + size) % 2**64
        builder = replace(result.builder, generator=torch.Generator().manual_seed(seed))
        found = builder.stability(last, result.probes, size, result.probe_y)
        # What is safe for the largest batch is so for its parts, which the probes may by chance show as worse.
        # Earlier stages gain no less: the leverage limits the last one most.
        return max(found.step_size(settings.used_momentum) / limits.step_size, 1.0) * settled.step_size

    def after_step(self, batch: Batch) -> None:
        """Nothing: there is no clock."""

    def after_watch(
        self, losses: list[float], rows: list[int], inexactness: float, rolled_back: bool
    ) -> None:
        """Sums the losses, and logs a roll-back."""
        self._loss_sum += sum(loss * n_rows for loss, n_rows in zip(losses, rows, strict=True))
        self._loss_rows += sum(rows)
        if rolled_back:
            guard = self.progress.guard
            logger.warning(
                "the loss blew up; back to step %d's weights, step size %.3g",
                guard.good_step,
                guard.step_size,
            )

    def on_divergence(self) -> None:
        """Nothing: the guard has put the last good weights back."""

    def is_over(self) -> bool:
        """Never: the rows end by themselves."""
        return False

    def validate(self, x: NDArray[Any], y: NDArray[Any], classes: tuple[str, ...] | None) -> int:
        """Keeps the model of now, with the ridge that suits these rows best, if it is the best one so far.

        x: (h, d), y: (h,) or (h, c); classes: their names, None for regression. `predictor` is the best model until the
        next step. Returns how many validations there were after the best one.
        """
        self.trainer.watch(self)
        progress = self.progress
        scores, number = best_ridge(score_ridges(self.trainer.model_shard(), classes, lambda: [(x, y)]))
        average = progress.average_weights(self.trainer.solver.targets.n_outputs, number)
        progress.best = after_validation(progress.best, scores, average, progress.step, ridge=number)
        self._validated_step = progress.step
        return progress.best.n_since

    def mean_loss(self) -> float:
        """Mean squared error over the rows trained on since this was last asked, each before its step; nan for none."""
        self.trainer.watch(self)
        mean = self._loss_sum / self._loss_rows if self._loss_rows else math.nan
        self._loss_sum, self._loss_rows = 0.0, 0
        return mean

    def predictor(self, names: tuple[Any, Any, Any]) -> Predictor:
        """The model as it is now; further training does not change it."""
        self.trainer.watch(self)
        solver, device = self.trainer.solver, self.trainer.mesh.device
        progress = self.progress
        if progress.best is not None and self._validated_step == progress.step:
            weights = progress.best.weights
        else:
            weights = progress.average_weights(solver.targets.n_outputs)
        weights = weights.T.contiguous().clone()
        inputs = self.spec.inputs.to(device)
        offsets = self.spec.offsets if self.spec.offsets else None
        # In the order of the set-up, which is not that of the user's centers where it has a local tail.
        centers = self.result.setup.tensors["centers"]
        return Predictor(
            solver.kernel,
            centers,
            weights,
            inputs,
            self.problem.targets.to(device),
            *names,
            offsets,
            linear=solver.linear,
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers from which `load` goes on with the same bits. The tensors are copies."""
        self.trainer.watch(self)
        progress, problem = self.progress, self.problem
        rows = {name: getattr(self.rows, name) for name in _SETUP_TENSORS}
        tensors = {name: tensor for name, tensor in rows.items() if tensor is not None}
        tensors |= kernel_tensors(self.result.builder.kernel)
        if (linear := self.trainer.solver.linear) is not None:
            tensors |= linear.tensors()
        tensors |= {"target_offset": problem.targets.offset, "target_scale": problem.targets.scale}
        if problem.targets.weights is not None:
            tensors["target_weights"] = problem.targets.weights
        if problem.feature_mean is not None:
            tensors["feature_mean"] = problem.feature_mean
        tensors |= progress.state.tensors() | progress.guard.tensors()
        guard, validated = progress.guard, dict[str, Any]()
        if (best := progress.best) is not None:
            tensors["best_weights"] = best.weights
            validated["best"] = {name: getattr(best, name) for name in _BEST_NUMBERS}
            validated["validated_step"] = self._validated_step
        numbers = {name: getattr(guard, name) for name in _GUARD_NUMBERS}
        return {
            **{name: tensor.clone() for name, tensor in tensors.items()},
            "shape": asdict(problem.shape),
            "n_excluded": len(self.rows.excluded),
            "ridge": self.result.setup.plan.ridge,
            "precision": self.result.setup.plan.precision,
            "averaging": self.trainer.solver.averaging,
            "step": progress.step,
            "rows_seen": self.trainer.rows_seen,
            "averaged": progress.state.averaged,
            "scored": asdict(progress.running_score),
            "guard": {**numbers, "loss": asdict(guard.loss), "good_loss": asdict(guard.good_loss)},
            **validated,
        }

    @classmethod
    def load(cls, spec: OnlineSpec, task: Any, names: Any, saved: Mapping[str, Any]) -> OnlineTrainer:
        """Makes the set-up again from the rows in `saved`, and takes over the rest."""
        device = spec.centers.device
        tensors = {name: value.to(device) for name, value in saved.items() if isinstance(value, Tensor)}
        targets = TargetCode(
            task == "classification",
            tensors["target_offset"],
            tensors["target_scale"],
            tensors.get("target_weights"),
        )
        problem = Problem(
            shape=_saved_shape(saved["shape"]),
            task=task,
            names=names,
            inputs=spec.inputs,
            targets=targets,
            feature_mean=tensors.get("feature_mean"),
            categories=spec.categories,
        )
        rows = _saved_rows(spec, targets, tensors, saved.get("n_excluded", 0))
        kernel, solver = spec.config.kernel, spec.config.solver
        metric, known = tensors.get("kernel_metric"), None
        if metric is not None:
            known = ColumnKernel.of(kernel.name, metric, kernel.parameters()["power"])
        told = LinearPart.description() if LINEAR_TENSORS[0] in tensors else None
        linear = LinearPart.described(tensors, told, spec.inputs.n_inputs, targets.n_outputs)
        rows = replace(rows, learnt=LearntColumns(known, linear=linear))
        # What the set-up has settled; earlier versions settled none.
        solver = replace(solver, ridge=saved.get("ridge", solver.ridge))
        choices = {
            "precision": saved.get("precision", "float32"),
            "averaging": saved.get("averaging", earlier_averaging(solver.projection)),
        }
        config = replace(spec.config, solver=solver).settled(choices)
        made = cls(replace(spec, config=config), problem, rows)
        progress, guard = made.progress, saved["guard"]
        for name, tensor in (progress.state.tensors() | progress.guard.tensors()).items():
            tensor.copy_(tensors[name])
        progress.state.averaged, progress.step = saved["averaged"], saved["step"]
        made.trainer.rows_seen = saved["rows_seen"]
        progress.running_score = RunningScore(
            **saved.get("scored", {})
        )  # The first versions did not keep it.
        for name in _GUARD_NUMBERS:
            setattr(progress.guard, name, guard[name])
        progress.guard.loss = RunningLoss(**guard["loss"])
        progress.guard.good_loss = RunningLoss(**guard["good_loss"])
        if (best := saved.get("best")) is not None:
            progress.best = Best(tensors["best_weights"], **best)
            made._validated_step = saved["validated_step"]
        return made


def set_up_rows(spec: OnlineSpec, x: Tensor, y: Tensor, n_samples: int) -> SetUpRows:
    """The rows of a set-up from rows in random order: sample, unless the user gave one, then probes."""
    if spec.sample is None:
        return SetUpRows.parted(spec.centers, spec.excluded, x, y, n_samples)
    # The y of a sample that was given is not known, so there is no head start.
    if spec.config.solver.class_weights != "none":
        return SetUpRows(spec.centers, spec.excluded, spec.sample, None, x, y)
    probes = probes_of(torch.cat([spec.sample, x.to(spec.sample)]), len(spec.sample))
    return SetUpRows(spec.centers, spec.excluded, spec.sample, None, probes, None)


def _saved_shape(saved: Mapping[str, Any]) -> ProblemSize:
    """The sizes that a state holds; before version 7 there was one ridge, whose number may be told."""
    sizes = {name: value for name, value in saved.items() if name != "n_ridges"}
    return ProblemSize(**sizes | {"ridge_factors": tuple(sizes.get("ridge_factors", (1.0,)))})


def _saved_rows(
    spec: OnlineSpec, targets: TargetCode, tensors: Mapping[str, Tensor], n_excluded: int
) -> SetUpRows:
    """The rows of the set-up that a state holds; of version 3 and before, without the y of the sample."""
    excluded = np.arange(n_excluded)  # Only their number counts.
    if "sample" in tensors:
        sample_y, probe_y = tensors.get("sample_y"), tensors.get("probe_y")
        return SetUpRows(spec.centers, excluded, tensors["sample"], sample_y, tensors["probes"], probe_y)
    rows, y = tensors["rows"], tensors.get("row_targets")
    parted = set_up_rows(spec, rows, rows[:, 0] if y is None else y, spec.config.solver.nystrom_samples)
    has_row_weights = targets.weights is not None and targets.is_classification
    return replace(parted, sample_y=None, probe_y=parted.probe_y if has_row_weights else None)
