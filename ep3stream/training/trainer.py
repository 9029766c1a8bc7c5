"""One sitting of a fit: streams batches through the solver, checkpoints, resumes, and leaves a model behind."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from ep3stream.config import FitConfig
from ep3stream.disk import write_json
from ep3stream.errors import ConfigError, DamagedDataError, DiskError, DivergedError, InputError, Interrupted
from ep3stream.mesh import Mesh
from ep3stream.prediction.models import build_model, save_model
from ep3stream.reporting.report import write_report
from ep3stream.run.checkpoint import Progress, load_newest_checkpoint, require_shape, scattered
from ep3stream.run.clock import Clock, FitProgress, bottleneck, seconds_spent
from ep3stream.run.directory import Change, RunDirectory
from ep3stream.run.event_log import EventLog, curves, drop_after
from ep3stream.run.node_rows import NodeBatches
from ep3stream.run.setup import Setup
from ep3stream.run.state import model_step
from ep3stream.solver.guard import Guard
from ep3stream.solver.kernels import KernelFunction
from ep3stream.solver.model import ModelShard
from ep3stream.solver.step import StepErrors
from ep3stream.store.reader import RowStore
from ep3stream.stream.batch_slots import Batch
from ep3stream.stream.prefetch import BatchStream
from ep3stream.training.checkpoint_saver import CheckpointSaver
from ep3stream.training.set_up import require_enough_centers, write_setup
from ep3stream.training.signals import Signals
from ep3stream.training.summary import summary
from ep3stream.training.validation import Validation, after_validation

logger = logging.getLogger(__name__)

# Losses are read, and the guard acts, every so many steps of the whole fit: on a GPU each reading waits for it.
_WATCH_STEPS = 8

_METRIC_LINES = 1000


class Trainer:
    """One sitting of a fit, on every rank the same; the leader alone writes the run and is_main_process."""

    def __init__(
        self,
        directory: RunDirectory,
        store: RowStore,
        config: FitConfig,
        kernel: KernelFunction | None,
        observe: Callable[[FitProgress], None] | None,
        mesh: Mesh,
    ) -> None:
        self.directory, self.store, self.config = directory, store, config
        self.reader = store.split(config.data.split)
        self.kernel, self.observe = kernel, observe
        self.mesh = mesh
        setup = Setup.scattered(self._set_up(), mesh)
        require_enough_centers(setup.plan["n_centers"], mesh.size)
        self.solver = setup.solver(config, kernel, self.mesh)
        self.setup = setup.without_centers()
        del setup
        self.inputs = self.setup.inputs().to(self.mesh.device)
        self.order = self.setup.order(self.reader, config.run.seed)
        self.n_steps = config.solver.n_steps(self.order.steps_per_epoch)
        self.validation = Validation.of(store, config, self.order.steps_per_epoch)
        self.log_every = _WATCH_STEPS * max(1, self.n_steps // (_WATCH_STEPS * _METRIC_LINES))
        self.event_log = EventLog(directory.metrics, mesh.is_leader)

    def run(self, signals: Signals, changes: tuple[Change, ...]) -> None:
        """From the newest checkpoint, or from zero, to the model; `changes`: the settings changed by an override."""
        saved = scattered(self.mesh.on_leader(self._newest_checkpoint), self.mesh)
        step = 0 if saved is None else saved.step
        self._require_steps_ahead(step)
        if (
            saved is not None
            and self._is_over(saved)
            and self.mesh.broadcast_object(self._model_step) == step
        ):
            logger.info("already finished after %d steps; raise the epochs to go on", step)
            return
        self.mesh.on_leader(lambda: self._write_down(changes, step))
        progress = self._start() if saved is None else self._resume(saved)
        if changes:
            self.event_log.event("override", progress, "; ".join(map(str, changes)))
        self.clock = Clock(progress)
        checkpoints, digest = self.directory.checkpoints, self.setup.digest
        n_centers = self.setup.plan["n_centers"]
        with (
            curves(
                self.directory, self.mesh.is_leader and self.config.run.tensorboard, step
            ) as self.event_log.draw,
            CheckpointSaver(
                checkpoints, digest, self.config.run, step, self.event_log.event, n_centers, self.mesh
            ) as self.saver,
        ):
            self._steps(progress, signals)
            self._finish(progress)

    def _newest_checkpoint(self) -> Progress | None:
        directory, n_centers = self.directory.checkpoints, self.setup.plan["n_centers"]
        saved = load_newest_checkpoint(directory, self.setup.digest, torch.device("cpu"))
        if saved is not None:
            require_shape(saved, self.solver.targets.n_outputs, n_centers, directory)
        return saved

    def _model_step(self) -> int | None:
        return model_step(self.directory)

    def _write_down(self, changes: tuple[Change, ...], step: int) -> None:
        """What this sitting fits, and how; the metrics after `step` are its own."""
        self.directory.adopt_config(self.config, changes, step)
        whole = summary(self.setup, self.store, self.order, self.config, self.mesh)
        write_json(self.directory.summary, whole)
        drop_after(self.directory.metrics, step if step else -1)

    def _require_steps_ahead(self, step: int) -> None:
        if step > self.n_steps:
            raise ConfigError(
                f"epochs is {self.config.solver.epochs}, {self.n_steps} steps, but {self.directory.path} has done "
                f"{step}; use at least {step / self.order.steps_per_epoch:.6g}, or a new RUN"
            )

    def _finish(self, progress: Progress) -> None:
        """The last checkpoint, and the model."""
        weights = self._model_shard(progress)
        if any(self.mesh.all_reduce_max([not bool(torch.isfinite(weights).all())])):
            raise DivergedError(
                "the weights are not finite at the end; try a larger bandwidth or a smaller data_rank"
            )
        self.saver.save(progress)
        whole = self.mesh.gather(weights, self.setup.plan["n_centers"], dim=1)
        self.mesh.on_leader(lambda: self._save_model(whole, progress.step))
        self.event_log.event("finish", progress, self._ending(progress))
        if (warning := progress.running_score.warning) is not None:
            self.event_log.event("no_better", progress, warning)
        if told := bottleneck(seconds_spent(progress)):
            logger.info(told)
        self._report()

    def _save_model(self, weights: Tensor | None, step: int) -> None:
        assert weights is not None  # The leader has them.
        whole = self._load_setup()
        if whole.digest != self.setup.digest:
            raise DamagedDataError(
                f"{self.directory.setup} is not what this fit has read; restore it, then the same command"
            )
        model = build_model(whole, weights.T.contiguous(), self.kernel)
        save_model(self.directory, model, step, self.setup.description.get("conversion"))

    def _set_up(self) -> Setup | None:
        """The whole set-up, made before if need be; on the leader alone."""
        if not self.mesh.broadcast_object(self.directory.setup.exists):
            write_setup(self.directory.setup, self.reader, self.config, self.kernel, self.mesh)
        return self.mesh.on_leader(self._load_setup)

    def _load_setup(self) -> Setup:
        setup, fingerprint = Setup.load(self.directory.setup), self.reader.manifest.fingerprint
        if setup.description["store_fingerprint"] != fingerprint:
            raise InputError(
                f"{self.store.path} is not the store {self.directory.path} was started with (its fingerprint is "
                f"{fingerprint}, not {setup.description['store_fingerprint']}); use that one or a new RUN: "
                "no --override changes the data"
            )
        return setup

    def _resume(self, progress: Progress) -> Progress:
        if not self.config.solver.patience:
            progress.best = None  # Left by a patience that was overridden.
        self.event_log.event("resume", progress, f"resumed at step {progress.step} of {self.n_steps}")
        return progress

    def _start(self) -> Progress:
        state = self.setup.initial_state(self.solver)
        progress = Progress(0, state, Guard.start(state, self.setup.plan["step_size"]), [])
        self.event_log.event("start", progress, f"started, {self.n_steps} steps to go")
        return progress

    def _steps(self, progress: Progress, signals: Signals) -> None:
        unread: list[StepErrors] = []
        if (stop := self._orders(progress, signals)[0]) is not None:
            self._interrupt(progress, stop)
        if self._is_over(progress):
            return
        steps = range(progress.step, self.n_steps)
        with NodeBatches(
            self.mesh, self.reader.manifest, self.order, steps, lambda: self._stream(steps)
        ) as batches:
            for batch in self._batches(batches, progress, unread):
                x = self.inputs(batch.x)
                is_watched = (progress.step + 1) % _WATCH_STEPS == 0
                step_size, seen = progress.guard.step_size, self._rows_seen(progress)
                unread.append(self.solver.step(progress.state, x, batch.y, step_size, is_watched, seen))
                progress.step += 1
                self.clock.tick(progress, batch, batches.times)
                if is_watched:
                    self._watch(progress, inexactness=self._read(unread, progress))
                if self._validation_due(progress):
                    self._validate(progress)
                stop, save = self._orders(progress, signals)
                if stop is not None:
                    self._read(unread, progress)
                    self._interrupt(progress, stop)
                if save and not self._is_over(progress):  # Else it is saved at once, whatever is under way.
                    signals.wants_checkpoint = False
                    self._read(unread, progress)
                    self.saver.begin(progress)
                if self._is_over(progress):
                    break
            self._read(unread, progress)

    def _orders(self, progress: Progress, signals: Signals) -> tuple[str | None, bool]:
        """The signal to stop at, and whether to save: what any rank was sent, and all obey after the same step."""
        stop = 0 if signals.stop_name is None else signal.Signals[signals.stop_name].value
        wishes = [stop, signals.wants_checkpoint, self.saver.is_idle(), self.saver.is_due(progress.step)]
        stop, is_asked, is_idle, is_due = self.mesh.all_reduce_max(wishes)
        signals.wants_checkpoint = bool(is_asked)
        return signal.Signals(stop).name if stop else None, bool(is_idle and (is_asked or is_due))

    def _read(self, unread: list[StepErrors], progress: Progress) -> float:
        """Reads the errors of the steps since the last reading, on a GPU waiting for them; the last inexactness.

        The leader's count on every rank: where devices differ in the last bit the guards must not.
        """
        if not unread:
            return math.nan
        columns = self.mesh.broadcast_object(
            lambda: [torch.stack(column).tolist() for column in zip(*unread, strict=True)]
        )
        losses, averages, zeros, inexactness = columns
        progress.unseen_losses += losses
        unread.clear()
        for loss, zero_loss in zip(averages, zeros, strict=True):
            progress.running_score = progress.running_score.after(loss, zero_loss)
        return float(inexactness[-1])

    def _stream(self, steps: range) -> BatchStream:
        run, device = self.config.run, self.mesh.device
        timeout_s = run.read_timeout_s or math.inf
        return BatchStream(self.reader, self.order, steps.start, steps.stop, device, run.dask, timeout_s)

    def _batches(self, batches: NodeBatches, progress: Progress, unread: list[StepErrors]) -> Iterator[Batch]:
        """All of them; where one cannot be had, which every rank learns, the steps before are saved first."""
        try:
            yield from batches
        except DamagedDataError:
            self._read(unread, progress)
            with suppress(DiskError, DamagedDataError):  # The saver has told of them.
                self.saver.save(progress)
            raise

    def _rows_seen(self, progress: Progress) -> int:
        """About how many: the last batch of an epoch has fewer than others."""
        return progress.step * self.order.batch_size

    def _watch(self, progress: Progress, inexactness: float) -> None:
        """Shows the guard the losses since the last time, and reports, with the last step's `inexactness`."""
        guard = progress.guard
        batch_loss = progress.unseen_losses[-1]
        losses, progress.unseen_losses = progress.unseen_losses, []
        try:
            rolled_back = guard.watch(progress.step, losses, progress.state)
        except DivergedError:
            with suppress(DiskError, DamagedDataError):  # The saver has told of them.
                self.saver.save(progress)  # The guard has put the last good weights back.
            raise
        if rolled_back:
            message = (
                f"the loss blew up; back to step {guard.good_step}'s weights, step size {guard.step_size:.3g}"
            )
            self.event_log.event("rollback", progress, message)
        now = self.clock.report(progress, self.n_steps, self.order)
        if self.observe is not None and self.mesh.is_leader:
            self.observe(now)
        if progress.step % self.log_every == 0:
            record = {
                "kind": "step",
                "step": progress.step,
                "epoch": now.epoch,
                "rows": now.rows,
                "loss": now.loss,
                "batch_loss": batch_loss,
                "rows_per_s": self.clock.lap_rows_per_s(progress),
                **seconds_spent(progress),
                "step_size": guard.step_size * self.solver.stage(self._rows_seen(progress)).step_scale,
            }
            if math.isfinite(inexactness):
                record["projection_error"] = inexactness
            self.event_log.note(record)

    def _is_over(self, progress: Progress) -> bool:
        """At the last step, or out of patience."""
        best, patience = progress.best, self.config.solver.patience
        return progress.step >= self.n_steps or (best is not None and 0 < patience <= best.n_since)

    def _ending(self, progress: Progress) -> str:
        if (best := progress.best) is None:
            return f"finished after {progress.step} steps"
        early = ""
        if progress.step < self.n_steps:
            plural = "s" if best.n_since > 1 else ""
            early = f"stopped early: {best.n_since} validation{plural} without a better one; "
        return (
            f"{early}finished after {progress.step} steps with the model of step {best.step}, the best of all "
            f"validations (weighted error {best.error:.4g})"
        )

    def _validation_due(self, progress: Progress) -> bool:
        if self.validation is None:
            return False
        return progress.step % self.validation.every_steps == 0 or progress.step == self.n_steps

    def _validate(self, progress: Progress) -> None:
        assert self.validation is not None  # `_validation_due` has asked
        began = time.perf_counter()
        targets = self.setup.targets()
        solver, average = self.solver, progress.state.average
        model = ModelShard(
            solver.kernel, solver.centers, average, self.inputs, targets.to(self.mesh.device), self.mesh
        )
        scores = self.validation.score(model, targets)
        if self.config.solver.patience:
            progress.best = after_validation(progress.best, scores, progress.state.average, progress.step)
        split, epoch = self.config.data.validate, progress.step / self.order.steps_per_epoch
        position = {"step": progress.step, "epoch": epoch, "rows": round(epoch * self.order.epoch_rows)}
        record = {"kind": "validation", **position, "elapsed_s": progress.elapsed_s, "split": split, **scores}
        self.event_log.note(record)
        told = (
            f"{name} {value:.4g}" for name, value in scores.items() if name not in ("n", "weighted_error")
        )
        logger.info("epoch %g on %s: %s", epoch, split, ", ".join(told))
        progress.validated_s += time.perf_counter() - began

    def _interrupt(self, progress: Progress, signal_name: str) -> None:
        self.saver.save(progress)
        self._report()
        raise Interrupted(
            f"{signal_name}: stopped at step {progress.step} of {self.n_steps}, all up to there is saved; "
            "the same command goes on"
        )

    def _report(self) -> None:
        if not self.mesh.is_leader:
            return
        try:
            write_report(self.directory.path)
        except (OSError, InputError) as error:
            logger.warning("all is saved, but the report cannot be written: %s", error)

    def _model_shard(self, progress: Progress) -> Tensor:
        """The weights that become the model, (c, p_shard): the tail average, the best one if the fit keeps it."""
        return progress.state.average if progress.best is None else progress.best.weights
