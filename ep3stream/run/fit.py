"""The fit loop: streams batches through the solver, checkpoints, resumes, and leaves a model behind."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ep3stream.config import FitConfig
from ep3stream.data.order import RowOrder
from ep3stream.data.prefetch import Batch, BatchStream
from ep3stream.data.store import RowStore, open_store
from ep3stream.errors import DivergedError, InputError, Interrupted
from ep3stream.mesh import Mesh
from ep3stream.run.bundle import write_json
from ep3stream.run.checkpoint import Progress, load_newest_checkpoint, save_checkpoint
from ep3stream.run.directory import RunDirectory
from ep3stream.run.evaluate import score
from ep3stream.run.metrics import append_line, drop_after
from ep3stream.run.models import build_model, save_model
from ep3stream.run.prepare import write_setup
from ep3stream.run.report import write_report
from ep3stream.run.setup import Setup
from ep3stream.run.signals import StopRequest
from ep3stream.run.summary import summary
from ep3stream.solver.guard import Guard
from ep3stream.solver.kernels import KernelFunction

logger = logging.getLogger(__name__)

# Losses are read, and the guard acts, every so many steps of the whole fit: on a GPU each reading waits for it.
_WATCH_STEPS = 8
_METRIC_LINES = 1000
# The running loss is that of the averaged model on batches it has not seen, over the last this many watched ones.
_SCORED_MEMORY = 16


@dataclass(frozen=True, slots=True)
class FitProgress:
    """How far a fit is.

    loss: mean squared error of the model so far on rows before they are used, over the last 128 steps; starved:
    share of the time spent waiting for data.
    """

    step: int
    n_steps: int
    epoch: float
    rows: int
    rows_per_s: float
    loss: float
    starved: float
    eta_s: float


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
        self.n_steps = self.order.steps_per_epoch * config.solver.epochs
        self.log_every = _WATCH_STEPS * max(1, self.n_steps // (_WATCH_STEPS * _METRIC_LINES))

    def run(self, stop: StopRequest) -> None:
        """From the newest checkpoint, or from zero, to the model."""
        write_json(
            self.directory.summary, summary(self.setup, self.store, self.order, self.config, self.mesh)
        )
        progress = load_newest_checkpoint(self.directory.checkpoints, self.setup.digest, self.mesh.device)
        if progress is not None and progress.step >= self.n_steps and self.directory.model.exists():
            logger.info("already finished after %d steps; raise the epochs to go on", progress.step)
            return
        progress = self._start() if progress is None else self._resume(progress)
        self.clock = _Clock(progress)
        self.last_saved, self.last_saved_at = progress.step, time.monotonic()
        if stop.signal_name is not None:
            self._interrupt(progress, stop.signal_name)
        self._steps(progress, stop)
        if not bool(torch.isfinite(progress.state.average).all()):
            raise DivergedError(
                "the weights are not finite at the end; try a larger bandwidth or a smaller data_rank"
            )
        self._save(progress)
        save_model(self.directory, build_model(self.setup, self._weights(progress), self.kernel))
        self._event("finish", progress, f"finished after {self.n_steps} steps")
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
        unread: list[tuple[Tensor, Tensor]] = []
        with BatchStream(self.reader, self.order, progress.step, self.n_steps, device, dask) as stream:
            for batch in stream:
                x = self.inputs(batch.x)
                is_watched = (progress.step + 1) % _WATCH_STEPS == 0
                step_size = progress.guard.step_size
                unread.append(self.solver.step(progress.state, x, batch.y, step_size, score=is_watched))
                progress.step += 1
                self.clock.tick(progress, batch)
                if is_watched:
                    _read(unread, progress)
                    self._watch(progress)
                if progress.step % self.order.steps_per_epoch == 0:
                    self._validate(progress)
                if stop.signal_name is not None or self._checkpoint_due(progress):
                    _read(unread, progress)
                    self._save(progress)
                if stop.signal_name is not None:
                    self._interrupt(progress, stop.signal_name)
            _read(unread, progress)

    def _watch(self, progress: Progress) -> None:
        """Shows the guard the losses since the last time, and reports."""
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
            append_line(self.directory.metrics, record)

    def _validate(self, progress: Progress) -> None:
        split = self.config.data.validate
        if split is None:
            return
        model = build_model(self.setup, self._weights(progress), self.kernel)
        scores = score(model, self.store.split(split), self.mesh.device)
        epoch = progress.step // self.order.steps_per_epoch
        position = {"step": progress.step, "epoch": epoch, "rows": epoch * self.order.epoch_rows}
        record = {"kind": "validation", **position, "elapsed_s": progress.elapsed_s, "split": split, **scores}
        append_line(self.directory.metrics, record)
        logger.info("epoch %d on %s: %s", epoch, split, scores)

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

    def _weights(self, progress: Progress) -> Tensor:
        """The tail average of all shards, (p, c)."""
        return self.mesh.gather_rows(progress.state.average.T.contiguous(), self.setup.plan["n_centers"])

    def _event(self, event: str, progress: Progress, message: str) -> None:
        record = {"kind": "event", "event": event, "step": progress.step, "elapsed_s": progress.elapsed_s}
        append_line(self.directory.metrics, record | {"message": message})
        logger.log(logging.WARNING if event == "rollback" else logging.INFO, message)


def _read(unread: list[tuple[Tensor, Tensor]], progress: Progress) -> None:
    """Reads the losses of the steps since the last reading; on a GPU this waits for them."""
    if not unread:
        return
    losses, averages = (torch.stack(column).tolist() for column in zip(*unread, strict=True))
    progress.unseen_losses += losses
    unread.clear()
    for loss in averages:
        if math.isfinite(loss):
            progress.n_scored += 1
            share = 1 / min(progress.n_scored, _SCORED_MEMORY)
            progress.model_loss += share * (loss - progress.model_loss)


class _Clock:
    """Times of this sitting, added to those of the sittings before."""

    def __init__(self, progress: Progress) -> None:
        self.began, self.before_s = time.perf_counter(), progress.elapsed_s
        self.waited_before_s = progress.waited_s
        self.rows = self.lap_rows = 0
        self.lap_began = self.began

    def tick(self, progress: Progress, batch: Batch) -> None:
        """After each step."""
        progress.elapsed_s = self.before_s + time.perf_counter() - self.began
        progress.waited_s += batch.waited_s
        self.rows += len(batch.x)
        self.lap_rows += len(batch.x)

    def lap_rows_per_s(self, progress: Progress) -> float:
        """Since it was last asked."""
        now = time.perf_counter()
        rate = self.lap_rows / max(now - self.lap_began, 1e-9)
        self.lap_rows, self.lap_began = 0, now
        return rate

    def report(self, progress: Progress, n_steps: int, order: RowOrder) -> FitProgress:
        """How far the fit is."""
        here_s = max(progress.elapsed_s - self.before_s, 1e-9)
        rate = self.rows / here_s
        epoch = progress.step / order.steps_per_epoch
        rows = round(epoch * order.epoch_rows)
        to_go = order.epoch_rows * n_steps / order.steps_per_epoch - rows
        starved = (progress.waited_s - self.waited_before_s) / here_s
        loss = progress.model_loss
        return FitProgress(progress.step, n_steps, epoch, rows, rate, loss, starved, to_go / max(rate, 1e-9))
