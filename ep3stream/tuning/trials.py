"""Small fits to rows of a split, scored on held-out rows, for `tune`.

A trial is a fit as `fit` makes it, with its set-up, steps and average, to fewer rows and centers that are held in
memory. So it tells what `fit` would reach, and not what an exact solution would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ep3stream.config import FitConfig, KernelConfig
from ep3stream.mesh import Mesh
from ep3stream.run.setup import Setup
from ep3stream.solver.columns import COLUMN_KERNELS
from ep3stream.solver.gpu import usual_device
from ep3stream.solver.named_kernels import measured_kernel
from ep3stream.solver.set_up import n_probes
from ep3stream.store.reader import SplitReader
from ep3stream.stream.batch_slots import Batch
from ep3stream.stream.order import Rows
from ep3stream.training.budget import StageTimes
from ep3stream.training.column_kernel import LearntColumns, pool_rows, tried_ridges
from ep3stream.training.plan import SizePlan, memory_budget
from ep3stream.training.problem import input_scaling, problem_of_split, target_code, with_weights
from ep3stream.training.set_up import learn_columns, resolving_centers, set_up
from ep3stream.training.set_up_rows import SetUpRows
from ep3stream.training.trainer import Trainer

_MEDIAN_ROWS = 2000
_SCORED_ROWS = 8192
# Of kernels without weights, which share a linear part.
_OTHER_FORM = ("", 0.0)


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is tried: a kernel, and n lambda, the noise variance of a Gaussian process, which does not depend on n.

    noise: None for what a fit takes where no ridge is given.
    """

    kernel: KernelConfig
    noise: float | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a trial. The rows are the first ones of the sample; its centers are the first ones of these."""

    n_centers: int
    n_rows: int

    def shrunk(self, factor: float) -> Size:
        """The size with rows and centers times `factor`."""
        return Size(max(1, int(self.n_centers * factor)), int(self.n_rows * factor))


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A candidate fitted to rows and scored.

    losses: (h,), float64, of the held-out rows: their shares of 1 - R2, of the mse of classes, or of 1 - accuracy;
    infinite where the fit failed. mse is in the squared unit of y; r2 is None for classes, accuracy for numbers.
    """

    candidate: Candidate
    size: Size
    losses: Tensor
    mse: float
    r2: float | None
    accuracy: float | None
    elapsed_s: float

    @property
    def loss(self) -> float:
        """The mean loss."""
        return float(self.losses.mean())

    def excess(self, other: Trial) -> tuple[float, float]:
        """By how much the loss is above the other's, and the standard error of that: paired, row by row."""
        return paired(self.losses, other.losses)


def paired(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The mean of one - other, (h,) each, and its standard error."""
    difference = one - other
    return float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))


@dataclass(slots=True)
class TrialFits:
    """Makes trials. Rows are read when a trial first needs them.

    reader, numbers: the split to fit, and which of its rows, in random order. held: x and y of the held-out rows.
    config: the settings of the fit. n_centers: of the largest trial. learnt: kernels on columns by name and power.
    learning_s: seconds that learning took, in those of the cheapest form.
    """

    reader: SplitReader
    numbers: Rows
    held: tuple[Tensor, Tensor]
    config: FitConfig
    by_accuracy: bool
    n_centers: int
    clock: Callable[[], float] = time.monotonic
    mesh: Mesh = field(default_factory=lambda: Mesh(0, 1, usual_device()))
    learnt: dict[tuple[str, float], LearntColumns] = field(default_factory=dict)
    learning_s: float = 0.0
    _rows: tuple[Tensor, Tensor] | None = None

    def fit(self, candidate: Candidate, size: Size) -> Trial:
        """Fits and scores; raises what a fit would: ConfigError, DivergedError.

        elapsed_s leaves out what happens once: reading rows, and learning weights of columns.
        """
        x, y = self._read(size.n_rows)
        learnt = self._learnt(candidate.kernel)
        began = self.clock()
        config = self._settings(candidate, size)
        setup = self._set_up(config, size, learnt)
        trainer = Trainer(setup, config, None, self.mesh)
        trainer.start()
        first = 0 if config.data.keep_center_rows else size.n_centers
        batch_size = setup.plan.batch_size
        steps_per_epoch = max(1, -(-(size.n_rows - first) // batch_size))
        batches = self._batches(x[first : size.n_rows], y[first : size.n_rows], steps_per_epoch)
        n_steps = config.solver.n_steps(steps_per_epoch)
        trainer.train(islice(batches, n_steps), _NoRecords(), rows_per_step=batch_size)
        model = trainer.model_shard()
        scored = [
            model.outputs(part.to(self.mesh.device)).double().cpu()
            for part in self.held[0].split(_SCORED_ROWS)
        ]
        # As a fit does, of all ridges the one that suits the held-out rows best.
        of_ridges = torch.cat(scored).chunk(len(model.targets.ridge_factors), dim=1)
        outputs = min(of_ridges, key=lambda some: float(self._losses(some).mean()))
        return self._trial(candidate, size, outputs, self.clock() - began)

    def constant_losses(self) -> Tensor:
        """The losses, (h,), of what knows no input: the mean of the targets, or the frequencies of the classes."""
        y = self.held[1]
        targets = with_weights(target_code(self.reader), self.reader, self.config.solver)
        return self._losses(targets.offset.double().expand(len(y), -1))

    def learning_seconds(self, kernel: KernelConfig) -> float:
        """How long it is likely to take until weights for this kernel are learnt; 0 where there is nothing to learn."""
        is_known = kernel.name not in COLUMN_KERNELS or _form(kernel) in self.learnt
        return 0.0 if is_known else self.learning_s * _learning_cost(kernel)

    def bandwidth(self, kernel: KernelConfig) -> float:
        """The bandwidth, measured on rows of the sample where it is the median."""
        if kernel.bandwidth != "median":
            return float(kernel.bandwidth)
        x, _ = self._read(min(_MEDIAN_ROWS, len(self.numbers)))
        scaled = input_scaling(self.reader, replace(self.config, kernel=kernel))(x[:_MEDIAN_ROWS])
        return float(measured_kernel(kernel, scaled, scaled.mean(0)).parameters["bandwidth"])

    def has_one_ridge(self, candidate: Candidate) -> bool:
        """Whether trials of the candidate have one ridge, which may be another one."""
        if self.config.solver.projection == "eigenpro":
            return False
        manifest = self.reader.manifest
        config = self._settings(candidate, Size(1, 1))
        return len(tried_ridges(config, manifest.n_features, manifest.n_outputs)) == 1

    def _settings(self, candidate: Candidate, size: Size) -> FitConfig:
        ridge = None if candidate.noise is None else candidate.noise / size.n_rows
        solver = replace(self.config.solver, centers=size.n_centers, ridge=ridge)
        return replace(self.config, kernel=candidate.kernel, solver=solver)

    def _read(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """x and y of at least so many rows of the sample; twice as many are read at once."""
        if self._rows is None or len(self._rows[0]) < n_rows:
            x, y = self.reader.read_rows(self.numbers[: 2 * n_rows])
            self._rows = torch.from_numpy(x).float(), torch.from_numpy(y)
        return self._rows

    def _learnt(self, kernel: KernelConfig) -> LearntColumns | None:
        """A linear part and the weights of columns, learnt once for each form; None where there is nothing to learn."""
        config = replace(self.config, kernel=replace(kernel, sharpness=1.0))
        manifest, is_of_columns = self.reader.manifest, kernel.name in COLUMN_KERNELS
        n_rows = pool_rows(config, len(self.numbers), manifest.n_features, manifest.n_outputs)
        if not n_rows:
            return None
        form = _form(kernel) if is_of_columns else _OTHER_FORM
        if form not in self.learnt:
            pool = self._read(n_rows)
            began = self.clock()
            problem = problem_of_split(self.reader, config, input_scaling(self.reader, config))
            pool = (pool[0][:n_rows], pool[1][:n_rows])
            n_resolving = resolving_centers(self.n_centers, len(self.numbers))
            self.learnt[form] = learn_columns(problem, pool, config, n_resolving, self.mesh)
            if is_of_columns:
                self.learning_s = max(self.learning_s, (self.clock() - began) / _learning_cost(kernel))
        return replace(self.learnt[form], sharpness=kernel.sharpness)

    def _set_up(self, config: FitConfig, size: Size, learnt: LearntColumns | None) -> Setup:
        problem = problem_of_split(self.reader, config, input_scaling(self.reader, config))
        shape = replace(
            problem.shape,
            n_rows=size.n_rows,
            segment_rows=size.n_rows,
            is_validated=True,
            ridge_factors=tried_ridges(config, problem.shape.n_features, problem.shape.n_outputs),
        )
        memory_bytes = memory_budget(config.run.memory_bytes, self.mesh)
        p = size.n_centers
        plan = SizePlan.of(shape, config.solver, p, memory_bytes)
        n_more = plan.nystrom_samples + n_probes(config.solver, plan.max_batch_size, size.n_rows - p)
        x, y = self._read(size.n_rows)
        more = slice(p, min(p + n_more, size.n_rows))
        # The set-up puts the centers into another order, in place.
        rows = SetUpRows.parted(x[:p].clone(), np.arange(p), x[more], y[more], plan.nystrom_samples)
        rows = replace(rows, learnt=learnt)
        times = StageTimes(logs=False)
        problem = replace(problem, shape=shape)
        return set_up(problem, rows, plan, config, None, self.mesh, memory_bytes, times).setup

    def _batches(self, x: Tensor, y: Tensor, steps_per_epoch: int) -> Iterator[Batch]:
        """Epoch after epoch in random order, the same for every candidate."""
        generator = torch.Generator().manual_seed(self.config.run.seed)
        while True:
            for rows in torch.randperm(len(x), generator=generator).tensor_split(steps_per_epoch):
                yield Batch(0, x[rows].to(self.mesh.device), y[rows].to(self.mesh.device), 0.0)

    def _trial(self, candidate: Candidate, size: Size, outputs: Tensor, elapsed_s: float) -> Trial:
        losses, y = self._losses(outputs), self.held[1]
        if self.reader.manifest.task == "classification":
            accuracy = float((outputs.argmax(1) == y).double().mean())
            mse = float(_class_squares(outputs, y).mean())
            return Trial(candidate, size, losses, mse, None, accuracy, elapsed_s)
        mse = float((outputs - y).square().mean())
        return Trial(candidate, size, losses, mse, 1 - float(losses.mean()), None, elapsed_s)

    def _losses(self, outputs: Tensor) -> Tensor:
        """The losses, (h,), float64, of outputs, (h, c), in the unit of y."""
        y = self.held[1]
        if self.by_accuracy:
            return (outputs.argmax(1) != y).double()
        if self.reader.manifest.task == "classification":
            return _class_squares(outputs, y)
        variances = y.double().var(0, unbiased=False)
        return ((outputs - y).square() / variances.clamp_min(torch.finfo(torch.float64).tiny)).mean(1)


class _NoRecords:
    """A recorder that keeps nothing."""

    def after_step(self, batch: Batch) -> None: ...

    def after_watch(
        self, losses: list[float], rows: list[int], inexactness: float, rolled_back: bool
    ) -> None: ...

    def on_divergence(self) -> None: ...

    def is_over(self) -> bool:
        return False


def _class_squares(outputs: Tensor, y: Tensor) -> Tensor:
    """The mean over the classes of the squared error against one-hot rows, (h,)."""
    of_class = outputs.gather(1, y.long()[:, None])[:, 0]
    return (outputs.square().sum(1) - 2 * of_class + 1) / outputs.shape[1]


def _learning_cost(kernel: KernelConfig) -> float:
    """How long learning is likely to take, against `product` with the power 1; other powers take slow functions."""
    of_power = 1.0 if kernel.parameters()["power"] in (1.0, 2.0) else 4.0
    return of_power * (2.0 if kernel.name == "anova" else 1.0)


def _form(kernel: KernelConfig) -> tuple[str, float]:
    return kernel.name, kernel.parameters()["power"]
