"""The fit loop: streams batches through the solver, checkpoints, resumes, and leaves a model behind."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ep3stream.config import FitConfig
from ep3stream.data.prefetch import BatchStream
from ep3stream.data.store import RowStore, open_store
from ep3stream.errors import DivergedError, InputError, Interrupted
from ep3stream.mesh import Mesh
from ep3stream.run.bundle import write_json
from ep3stream.run.checkpoint import Progress, load_newest_checkpoint, save_checkpoint
from ep3stream.run.clock import Clock
from ep3stream.run.clock import FitProgress as FitProgress
from ep3stream.run.directory import RunDirectory
from ep3stream.run.metrics import append_line, drop_after
from ep3stream.run.models import build_model, save_model
from ep3stream.run.prepare import write_setup
from ep3stream.run.report import write_report
from ep3stream.run.setup import Setup
from ep3stream.run.signals import StopRequest
from ep3stream.run.summary import summary
from ep3stream.run.validation import Validation, after_validation, require_validation
from ep3stream.solver.guard import Guard
from ep3stream.solver.kernels import KernelFunction
from ep3stream.solver.step import StepErrors

logger = logging.getLogger(__name__)

# Losses are read, and the guard acts, every so many steps of the whole fit: on a GPU each reading waits for it.
_WATCH_STEPS = 8
_METRIC_LINES = 1000
# The running loss is that of the averaged model on batches it has not seen, over the last this many watched ones.
_SCORED_MEMORY = 16


def fit(
    store: Path | str,
    run: Path | str,
    config: FitConfig | None = None,
    *,
    kernel: KernelFunction | None = None,
    observe: Callable[[FitProgress], None] | None = None,
) -> Path:
    """Fits a kernel machine to a split of `store` and writes it, with everything on the way, under `run`.

    The same call on an unfinished run resumes it from its newest sound checkpoint and ends with the same
    bytes as a fit never stopped. `kernel`: a callable k(x, z) -> matrix instead of a named one. Returns the
    run directory. Raises ConfigError, InputError, DamagedDataError, DivergedError; Interrupted after SIGTERM
    or SIGINT, once the checkpoint is saved.
    """
    config = config or FitConfig()
    require_validation(config)
    with ExitStack() as resources:
        rows = resources.enter_context(open_store(store))
        for split in filter(None, (config.data.split, config.data.validate)):
            rows.split(split)
        directory = RunDirectory(Path(run).absolute())
        resources.enter_context(directory.locked())
        stop = resources.enter_context(StopRequest())
        _Fit(directory, rows, directory.settle_config(config), kernel, observe).run(stop)
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

    def run(self, stop: StopRequest) -> None:
        """From the newest checkpoint, or from zero, to the model."""
        write_json(
            self.directory.summary, summary(self.setup, self.store, self.order, self.config, self.mesh)
        )
        progress = load_newest_checkpoint(self.directory.checkpoints, self.setup.digest, self.mesh.device)
        if progress is not None and self._is_over(progress) and self.directory.model.exists():
            logger.info("already finished after %d steps; raise the epochs to go on", progress.step)
            return
        progress = self._start() if progress is None else self._resume(progress)
        self.clock = Clock(progress)
        self.last_saved, self.last_saved_at = progress.step, time.monotonic()
        if stop.signal_name is not None:
            self._interrupt(progress, stop.signal_name)
        self._steps(progress, stop)
        if not bool(torch.isfinite(self._model_shard(progress)).all()):
            raise DivergedError(
                "the weights are not finite at the end; try a larger bandwidth or a smaller data_rank"
            )
        self._save(progress)
        save_model(
            self.directory, build_model(self.setup, self._whole(self._model_shard(progress)), self.kernel)
        )
        self._event("finish", progress, self._ending(progress))
        write_report(self.directory.path)

    def _set_up(self) -> Setup:
        path, fingerprint = self.directory.setup, self.reader.manifest.fingerprint
        if not path.exists():
            write_setup(path, self.reader, self.config, self.kernel, self.mesh)
        setup = Setup.load(path)
        if setup.description["store_fingerprint"] != fingerprint:
            raise InputError(
                f"{self.store.path} is not the store {self.directory.path} was started with (its fingerprint is "
                f"{fingerprint}, not {setup.description['store_fingerprint']}); use that one or a new RUN"
            )
        return setup

    def _resume(self, progress: Progress) -> Progress:
        drop_after(self.directory.metrics, progress.step)
        self._event("resume", progress, f"resumed at step {progress.step} of {self.n_steps}")
        return progress

    def _start(self) -> Progress:
        drop_after(self.directory.metrics, -1)
        state = self.solver.initial_state()
        progress = Progress(0, state, Guard.start(state, self.setup.plan["step_size"]), [])
        self._event("start", progress, f"started, {self.n_steps} steps to go")
        return progress

    def _steps(self, progress: Progress, stop: StopRequest) -> None:
        device, dask = self.mesh.device, self.config.run.dask
        unread: list[StepErrors] = []
        if self._is_over(progress):
            return
        with BatchStream(self.reader, self.order, progress.step, self.n_steps, device, dask) as stream:
            for batch in stream:
                x = self.inputs(batch.x)
                is_watched = (progress.step + 1) % _WATCH_STEPS == 0
                step_size = progress.guard.step_size
                unread.append(self.solver.step(progress.state, x, batch.y, step_size, score=is_watched))
                progress.step += 1
                self.clock.tick(progress, batch)
                if is_watched:
                    self._watch(progress, inexactness=_read(unread, progress))
                if self._validation_due(progress):
                    self._validate(progress)
                if stop.signal_name is not None or self._checkpoint_due(progress):
                    _read(unread, progress)
                    self._save(progress)
                if stop.signal_name is not None:
                    self._interrupt(progress, stop.signal_name)
                if self._is_over(progress):
                    break
            _read(unread, progress)

    def _watch(self, progress: Progress, inexactness: float) -> None:
        """Shows the guard the losses since the last time, and reports, with the last step's `inexactness`."""
        guard = progress.guard
        batch_loss = progress.unseen_losses[-1]
        losses, progress.unseen_losses = progress.unseen_losses, []
        try:
            rolled_back = guard.watch(progress.step, losses, progress.state)
        except DivergedError:
            self._save(progress)  # The guard has put the last good weights back.
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
                "elapsed_s": progress.elapsed_s,
                "loss": now.loss,
                "batch_loss": batch_loss,
                "rows_per_s": self.clock.lap_rows_per_s(progress),
                "wait_s": progress.waited_s,
                "step_size": guard.step_size,
            }
            if math.isfinite(inexactness):
                record["projection_error"] = inexactness
            append_line(self.directory.metrics, record)

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
        model = build_model(self.setup, self._whole(progress.state.average), self.kernel)
        scores = self.validation.score(model, self.setup.targets(), self.mesh.device)
        if self.config.solver.patience:
            progress.best = after_validation(progress.best, scores, progress.state.average, progress.step)
        split, epoch = self.config.data.validate, progress.step / self.order.steps_per_epoch
        position = {"step": progress.step, "epoch": epoch, "rows": round(epoch * self.order.epoch_rows)}
        record = {"kind": "validation", **position, "elapsed_s": progress.elapsed_s, "split": split, **scores}
        append_line(self.directory.metrics, record)
        logger.info("epoch %g on %s: %s", epoch, split, scores)

    def _checkpoint_due(self, progress: Progress) -> bool:
        steps, minutes = self.config.run.checkpoint_steps, self.config.run.checkpoint_minutes
        by_steps = steps > 0 and progress.step - self.last_saved >= steps
        return by_steps or (minutes > 0 and time.monotonic() - self.last_saved_at >= 60 * minutes)

    def _save(self, progress: Progress) -> None:
        if progress.step != self.last_saved:
            keep = self.config.run.keep_checkpoints
            path = save_checkpoint(self.directory.checkpoints, progress, self.setup.digest, keep)
            self._event("checkpoint", progress, f"saved {path.name}")
        self.last_saved, self.last_saved_at = progress.step, time.monotonic()

    def _interrupt(self, progress: Progress, signal_name: str) -> None:
        write_report(self.directory.path)
        raise Interrupted(
            f"{signal_name}: stopped at step {progress.step} of {self.n_steps}, all up to there is saved; "
            "the same command goes on"
        )

    def _model_shard(self, progress: Progress) -> Tensor:
        """The weights that become the model, (c, p_shard): the tail average, the best one if the fit keeps it."""
        return progress.state.average if progress.best is None else progress.best.weights

    def _whole(self, shard: Tensor) -> Tensor:
        """The weights of all shards, (p, c)."""
        return self.mesh.gather_rows(shard.T.contiguous(), self.setup.plan["n_centers"])

    def _event(self, event: str, progress: Progress, message: str) -> None:
        record = {"kind": "event", "event": event, "step": progress.step, "elapsed_s": progress.elapsed_s}
        append_line(self.directory.metrics, record | {"message": message})
        logger.log(logging.WARNING if event == "rollback" else logging.INFO, message)


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
