"""The fit loop: streams batches through the solver, checkpoints, resumes, and leaves a model behind."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from torch import Tensor

from ep3stream.config import FitConfig
from ep3stream.data.location import ObjectUrl
from ep3stream.data.store import RowStore, open_store
from ep3stream.data.streaming.prefetch import BatchStream
from ep3stream.errors import ConfigError, DamagedDataError, DiskError, DivergedError, InputError, Interrupted
from ep3stream.mesh import Mesh
from ep3stream.run.bottleneck import bottleneck
from ep3stream.run.bundle import write_json
from ep3stream.run.changes import Change
from ep3stream.run.checkpoint import Progress, load_newest_checkpoint, require_shape
from ep3stream.run.clock import Clock, seconds_spent
from ep3stream.run.clock import FitProgress as FitProgress
from ep3stream.run.directory import RunDirectory
from ep3stream.run.metrics import Journal, drop_after
from ep3stream.run.models import build_model, model_step, save_model
from ep3stream.run.prepare import write_setup
from ep3stream.run.report import write_report
from ep3stream.run.saver import CheckpointSaver
from ep3stream.run.setup import Setup
from ep3stream.run.signals import Signals
from ep3stream.run.summary import summary
from ep3stream.run.validation import Validation, after_validation, require_validation
from ep3stream.solver.guard import Guard
from ep3stream.solver.kernels import KernelFunction
from ep3stream.solver.step import StepErrors

logger = logging.getLogger(__name__)

# Losses are read, and the guard acts, every so many steps of the whole fit: on a GPU each reading waits for it.
_WATCH_STEPS = 8
_METRIC_LINES = 1000
_WARNINGS = {"rollback", "checkpoint_failed"}
# The running loss is that of the averaged model on batches it has not seen, over the last this many watched ones.
_SCORED_MEMORY = 16


def fit(
    store: Path | str | ObjectUrl,
    run: Path | str,
    config: FitConfig | None = None,
    *,
    kernel: KernelFunction | None = None,
    observe: Callable[[FitProgress], None] | None = None,
    override: bool = False,
) -> Path:
    """Fits a kernel machine to a split of `store` and writes it, with everything on the way, under `run`.

    The same call on an unfinished run resumes it from its newest sound checkpoint and ends with the same
    bytes as a fit never stopped. `kernel`: a callable k(x, z) -> matrix instead of a named one. `override` goes
    on with changed settings, where the set-up does not depend on them, and records them. Returns the run directory.

    Raises ConfigError, InputError, DamagedDataError, DivergedError; DiskError when the last checkpoint or the model
    cannot be written; Interrupted after SIGTERM or SIGINT, once the checkpoint is saved, and KeyboardInterrupt
    after a second SIGINT. In each case the same call goes on from the last checkpoint.
    """
    config = config or FitConfig()
    require_validation(config)
    with ExitStack() as resources:
        rows = resources.enter_context(open_store(store))
        for split in filter(None, (config.data.split, config.data.validate)):
            rows.split(split)
        directory = RunDirectory(Path(run).absolute())
        resources.enter_context(directory.locked())
        signals = resources.enter_context(Signals())
        changes = directory.settle_config(config, override)
        _Fit(directory, rows, config, kernel, observe).run(signals, changes)
    return directory.path


class _Fit:
    """One sitting of a fit."""

    def __init__(
        self,
        directory: RunDirectory,
        store: RowStore,
        config: FitConfig,
        kernel: KernelFunction | None,
        observe: Callable[[FitProgress], None] | None,
    ) -> None:
        self.directory, self.store, self.config = directory, store, config
        self.reader = store.split(config.data.split)
        self.kernel, self.observe = kernel, observe
        self.mesh = Mesh.of_this_process(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.setup = self._set_up()
        self.solver = self.setup.solver(config, kernel, self.mesh)
        self.inputs = self.setup.inputs().to(self.mesh.device)
        self.order = self.setup.order(self.reader, config.run.seed)
        self.n_steps = config.solver.n_steps(self.order.steps_per_epoch)
        self.validation = Validation.of(store, config, self.order.steps_per_epoch)
        self.log_every = _WATCH_STEPS * max(1, self.n_steps // (_WATCH_STEPS * _METRIC_LINES))
        self.journal = Journal(directory.metrics)

    def run(self, signals: Signals, changes: tuple[Change, ...]) -> None:
        """From the newest checkpoint, or from zero, to the model; `changes`: the settings changed by an override."""
        directory, digest = self.directory, self.setup.digest
        saved = load_newest_checkpoint(directory.checkpoints, digest, self.mesh.device)
        step = 0 if saved is None else saved.step
        if saved is not None:
            n_outputs, n_centers = self.solver.targets.n_outputs, self.setup.plan["n_centers"]
            require_shape(saved, n_outputs, n_centers, directory.checkpoints)
        self._require_steps_ahead(step)
        if saved is not None and self._is_over(saved) and model_step(directory) == step:
            logger.info("already finished after %d steps; raise the epochs to go on", step)
            return
        directory.adopt_config(self.config, changes, step)
        write_json(directory.summary, summary(self.setup, self.store, self.order, self.config, self.mesh))
        progress = self._start() if saved is None else self._resume(saved)
        if changes:
            self._event("override", progress, "; ".join(map(str, changes)))
        self.clock = Clock(progress)
        with CheckpointSaver(directory.checkpoints, digest, self.config.run, step, self._event) as self.saver:
            self._steps(progress, signals)
            self._finish(progress)

    def _require_steps_ahead(self, step: int) -> None:
        if step > self.n_steps:
            raise ConfigError(
                f"epochs is {self.config.solver.epochs}, {self.n_steps} steps, but {self.directory.path} has done "
                f"{step}; use at least {step / self.order.steps_per_epoch:.6g}, or a new RUN"
            )

    def _finish(self, progress: Progress) -> None:
        """The last checkpoint, and the model."""
        weights = self._model_shard(progress)
        if not bool(torch.isfinite(weights).all()):
            raise DivergedError(
                "the weights are not finite at the end; try a larger bandwidth or a smaller data_rank"
            )
        self.saver.save(progress)
        model = build_model(self.setup, self._whole(weights), self.kernel)
        save_model(self.directory, model, progress.step, self.setup.description.get("conversion"))
        self._event("finish", progress, self._ending(progress))
        logger.info(bottleneck(seconds_spent(progress)))
        self._report()

    def _set_up(self) -> Setup:
        path, fingerprint = self.directory.setup, self.reader.manifest.fingerprint
        if not path.exists():
            write_setup(path, self.reader, self.config, self.kernel, self.mesh)
        setup = Setup.load(path)
        if setup.description["store_fingerprint"] != fingerprint:
            raise InputError(
                f"{self.store.path} is not the store {self.directory.path} was started with (its fingerprint is "
                f"{fingerprint}, not {setup.description['store_fingerprint']}); use that one or a new RUN: "
                "no --override changes the data"
            )
        return setup

    def _resume(self, progress: Progress) -> Progress:
        drop_after(self.directory.metrics, progress.step)
        if not self.config.solver.patience:
            progress.best = None  # Left by a patience that was overridden.
        self._event("resume", progress, f"resumed at step {progress.step} of {self.n_steps}")
        return progress

    def _start(self) -> Progress:
        drop_after(self.directory.metrics, -1)
        state = self.solver.initial_state()
        progress = Progress(0, state, Guard.start(state, self.setup.plan["step_size"]), [])
        self._event("start", progress, f"started, {self.n_steps} steps to go")
        return progress

    def _steps(self, progress: Progress, signals: Signals) -> None:
        device, dask = self.mesh.device, self.config.run.dask
        unread: list[StepErrors] = []
        if signals.stop_name is not None:
            self._interrupt(progress, signals.stop_name)
        if self._is_over(progress):
            return
        with BatchStream(self.reader, self.order, progress.step, self.n_steps, device, dask) as stream:
            for batch in stream:
                x = self.inputs(batch.x)
                is_watched = (progress.step + 1) % _WATCH_STEPS == 0
                step_size, seen = progress.guard.step_size, self._rows_seen(progress)
                unread.append(self.solver.step(progress.state, x, batch.y, step_size, is_watched, seen))
                progress.step += 1
                self.clock.tick(progress, batch, stream.times)
                if is_watched:
                    self._watch(progress, inexactness=_read(unread, progress))
                if self._validation_due(progress):
                    self._validate(progress)
                if signals.stop_name is not None:
                    _read(unread, progress)
                    self._interrupt(progress, signals.stop_name)
                if self.saver.is_idle() and (signals.wants_checkpoint or self.saver.is_due(progress.step)):
                    signals.wants_checkpoint = False
                    _read(unread, progress)
                    self.saver.begin(progress)
                if self._is_over(progress):
                    break
            _read(unread, progress)

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
            self._event("rollback", progress, message)
        now = self.clock.report(progress, self.n_steps, self.order)
        if self.observe is not None:
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
                "step_size": guard.step_size * self.solver.stage(self._rows_seen(progress)).pace,
            }
            if math.isfinite(inexactness):
                record["projection_error"] = inexactness
            self.journal.append(record)

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
        model = build_model(self.setup, self._whole(progress.state.average), self.kernel)
        scores = self.validation.score(model, self.setup.targets(), self.mesh.device)
        if self.config.solver.patience:
            progress.best = after_validation(progress.best, scores, progress.state.average, progress.step)
        split, epoch = self.config.data.validate, progress.step / self.order.steps_per_epoch
        position = {"step": progress.step, "epoch": epoch, "rows": round(epoch * self.order.epoch_rows)}
        record = {"kind": "validation", **position, "elapsed_s": progress.elapsed_s, "split": split, **scores}
        self.journal.append(record)
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
        try:
            write_report(self.directory.path)
        except (OSError, InputError) as error:
            logger.warning("all is saved, but the report cannot be written: %s", error)

    def _model_shard(self, progress: Progress) -> Tensor:
        """The weights that become the model, (c, p_shard): the tail average, the best one if the fit keeps it."""
        return progress.state.average if progress.best is None else progress.best.weights

    def _whole(self, shard: Tensor) -> Tensor:
        """The weights of all shards, (p, c)."""
        return self.mesh.gather_rows(shard.T.contiguous(), self.setup.plan["n_centers"])

    def _event(self, event: str, progress: Progress, message: str) -> None:
        record = {"kind": "event", "event": event, "step": progress.step, "elapsed_s": progress.elapsed_s}
        self.journal.append(record | {"message": message})
        logger.log(logging.WARNING if event in _WARNINGS else logging.INFO, message)


def _read(unread: list[StepErrors], progress: Progress) -> float:
    """Reads the errors of the steps since the last reading, on a GPU waiting for them; the last inexactness."""
    if not unread:
        return math.nan
    losses, averages, inexactness = (torch.stack(column).tolist() for column in zip(*unread, strict=True))
    progress.unseen_losses += losses
    unread.clear()
    for loss in averages:
        if math.isfinite(loss):
            progress.n_scored += 1
            share = 1 / min(progress.n_scored, _SCORED_MEMORY)
            progress.model_loss += share * (loss - progress.model_loss)
    return float(inexactness[-1])
