"""`fit`: from a store and settings to a model, on as many devices as are asked for."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ep3stream.config import FitConfig
from ep3stream.disk import write_json
from ep3stream.errors import ConfigError, DamagedDataError, DiskError, DivergedError, InputError, Interrupted
from ep3stream.mesh import Mesh, joined
from ep3stream.prediction.models import build_model, save_model
from ep3stream.reporting.report import write_report
from ep3stream.run.bottleneck import bottleneck
from ep3stream.run.checkpoint import Best, Progress, load_newest_checkpoint, require_shape, scattered
from ep3stream.run.clock import Clock, seconds_spent
from ep3stream.run.clock import FitProgress as FitProgress
from ep3stream.run.directory import Change, RunDirectory, settled_choices
from ep3stream.run.event_log import EventLog, drop_after
from ep3stream.run.launch import Job, n_ranks_to_launch, run_on_ranks
from ep3stream.run.node_rows import NodeBatches, node_pieces
from ep3stream.run.setup import Setup
from ep3stream.run.signals import Signals
from ep3stream.run.state import model_step, open_store_of, read_summary
from ep3stream.run.tensorboard import curves, require_tensorboard
from ep3stream.solver.kernels import KernelFunction
from ep3stream.store.columns import code_features
from ep3stream.store.files import ObjectUrl
from ep3stream.store.reader import RowStore
from ep3stream.stream.batch_slots import Batch
from ep3stream.stream.prefetch import BatchStream
from ep3stream.training.checkpoint_saver import CheckpointSaver
from ep3stream.training.effects import LearntEffects, Scored, learn_effects, most_rows, wants_effects
from ep3stream.training.metric import learn_metric, require_metric
from ep3stream.training.set_up import LearntMetric, require_enough_centers, write_setup
from ep3stream.training.summary import summary
from ep3stream.training.trainer import WATCH_STEPS, Trainer
from ep3stream.training.validation import Validation, ValidationRows, after_validation

logger = logging.getLogger(__name__)

# A fit writes about so many lines of metrics, however many steps it has.
_METRIC_LINES = 1000


def fit(
    store: Path | str | ObjectUrl,
    run: Path | str,
    config: FitConfig | None = None,
    *,
    kernel: KernelFunction | None = None,
    observe: Callable[[FitProgress], None] | None = None,
    override: bool = False,
    devices: int | Literal["auto"] | None = None,
) -> Path:
    """Fits a kernel machine to a split of `store` and writes it, with everything on the way, under `run`.

    The same call on an unfinished run resumes it from its newest sound checkpoint and ends with the same
    bytes as a fit never stopped. `kernel`: a callable k(x, z) -> matrix instead of a named one. `override` goes
    on with changed settings, where the set-up does not depend on them, and records them. Returns the run directory.

    `devices`, in place of the setting: with more than one, a process is started for each, by torch's elastic
    launcher, and started again if one dies. In processes that torchrun has started, all of which call it, they are
    the devices.

    Raises ConfigError, InputError, DamagedDataError, DivergedError; DiskError when the last checkpoint or the model
    cannot be written; RankError when a device's process died once more than it may; Interrupted after SIGTERM or
    SIGINT, once the checkpoint is saved, and KeyboardInterrupt after a second SIGINT. In each case the same call goes
    on from the last checkpoint.
    """
    config = config or FitConfig()
    if devices is not None:
        config = replace(config, run=replace(config.run, devices=devices))
    require_tensorboard(config)
    n_ranks = n_ranks_to_launch(config.run.devices)
    if n_ranks > 1:
        if isinstance(config.solver.centers, int):  # Else it is known later, and looked at then.
            require_enough_centers(config.solver.centers, n_ranks)
        paths = {"store": str(store), "run": str(run)}
        job = Job.of("fit", kernel, **paths, config=config.to_toml(), override=override)
        run_on_ranks(job, n_ranks, config.run.max_restarts, observe)
        return Path(run).absolute()
    with ExitStack() as resources:
        signals = resources.enter_context(Signals())
        mesh = resources.enter_context(joined(60 * config.run.rank_timeout_minutes))
        rows = resources.enter_context(
            mesh.all_or_raise(lambda: open_store_of(run, store, config.run.read_timeout_s))
        )
        mesh.all_or_raise(lambda: _require_splits(rows, config, mesh))
        mesh.all_or_raise(lambda: require_metric(config, kernel, rows.split(config.data.split)))
        directory = RunDirectory(Path(run).absolute())
        mesh.on_leader(lambda: resources.enter_context(directory.locked()))
        changes = mesh.on_leader(lambda: directory.settle_config(config, override))
        metric = None
        if config.data.metric != "none" and not mesh.broadcast_object(directory.setup.exists):

            def fit_round(place: RunDirectory, settings: FitConfig, metric: LearntMetric) -> None:
                mesh.on_leader(lambda: place.path.mkdir(parents=True, exist_ok=True))
                mesh.on_leader(lambda: place.settle_config(settings))
                FitRun(place, rows, settings, None, observe, mesh, signals, metric).run(())

            metric = learn_metric(directory, rows.split(config.data.split), config, fit_round, mesh)
        FitRun(directory, rows, config, kernel, observe, mesh, signals, metric).run(changes or ())
    return directory.path


def _require_splits(store: RowStore, config: FitConfig, mesh: Mesh) -> None:
    """Before a run directory is made: the splits are there, and as many devices as were asked for."""
    store.split(config.data.split)
    if (validated := ValidationRows.of(config, store.manifest).split) is not None:
        store.split(validated)
    if config.run.devices not in ("auto", mesh.local_size):
        raise ConfigError(
            f"devices is {config.run.devices}, but {mesh.local_size} processes were started on this machine; "
            "under torchrun leave devices out"
        )


class FitRun:
    """One process's work on a run: set up or resume, train, keep records, and leave a model behind.

    It is the recorder of its trainer. Every rank has one and calls its methods at the same steps; the leader alone
    writes the run and logs.
    """

    def __init__(
        self,
        directory: RunDirectory,
        store: RowStore,
        config: FitConfig,
        kernel: KernelFunction | None,
        observe: Callable[[FitProgress], None] | None,
        mesh: Mesh,
        signals: Signals,
        metric: LearntMetric | None = None,
    ) -> None:
        self.directory, self.store = directory, store
        self.kernel, self.observe, self.mesh, self.signals = kernel, observe, mesh, signals
        self.reader = store.split(config.data.split)
        if not mesh.broadcast_object(directory.setup.exists):
            chosen = ValidationRows.of(config, store.manifest)
            if config.data.validate == "auto":
                chosen.tell()
            write_setup(directory.setup, self.reader, config, kernel, mesh, chosen, metric)
        setup = Setup.scattered(mesh.on_leader(self._load_setup), mesh)
        # As the user has given it, and with what it leaves open settled.
        self.asked, self.config = config, config.settled(settled_choices(setup.description))
        config = self.config
        require_enough_centers(setup.plan.n_centers, mesh.size)
        self.trainer = Trainer(setup, config, kernel, mesh)
        self.setup = self.trainer.setup
        del setup  # Its centers: the solver holds them prepared.
        self.order = self.setup.order(self.reader.info, config.run.seed)
        self.n_steps = config.solver.n_steps(self.order.steps_per_epoch)
        self.validation = Validation.of(store, config, self.setup, self.order.steps_per_epoch)
        self.log_every = WATCH_STEPS * max(1, self.n_steps // (WATCH_STEPS * _METRIC_LINES))
        self.event_log = EventLog(directory.metrics, mesh.is_leader)

    @property
    def progress(self) -> Progress:
        """State, guard and running scores of the trainer: what a checkpoint saves."""
        return self.trainer.progress

    def run(self, changes: tuple[Change, ...]) -> None:
        """Trains from the newest checkpoint, or from the start, to the model.

        changes: the settings that an override has changed.
        """
        mesh = self.mesh
        saved = scattered(mesh.on_leader(self._newest_checkpoint), mesh)
        step = 0 if saved is None else saved.step
        if step > self.n_steps:
            raise ConfigError(
                f"epochs is {self.config.solver.used_epochs}, {self.n_steps} steps, but {self.directory.path} has done "
                f"{step}; use at least {step / self.order.steps_per_epoch:.6g}, or a new RUN"
            )
        is_over = saved is not None and self._is_at_end(saved)
        if is_over and mesh.broadcast_object(lambda: model_step(self.directory)) == step:
            remedy = "raise the epochs"
            if saved is not None and saved.best is not None and step < self.n_steps:
                remedy = f"{saved.best.n_since} validations gave no better model: add --patience 0 --override"
            logger.info("already finished after %d steps; %s to go on", step, remedy)
            return
        mesh.on_leader(lambda: self._write_down(changes, step))
        if saved is None:
            self.trainer.start()
            self.event_log.event("start", self.progress, f"started, {self.n_steps} steps to go")
        else:
            if saved.best is not None and not self._is_comparable(saved.best):
                saved.best = None
            self.trainer.resume(saved, step * self.order.batch_size)
            self.event_log.event("resume", saved, f"resumed at step {step} of {self.n_steps}")
        if changes:
            self.event_log.event("override", self.progress, "; ".join(map(str, changes)))
        self.clock = Clock(self.progress)
        draws = mesh.is_leader and self.config.run.tensorboard
        with (
            curves(self.directory, draws, step) as self.event_log.draw,
            CheckpointSaver(
                self.directory.checkpoints,
                self.setup.digest,
                self.config.run,
                step,
                self.event_log.event,
                self.setup.plan.n_centers,
                mesh,
            ) as self.saver,
        ):
            self._train()
            self._finish()

    def _is_comparable(self, best: Best) -> bool:
        """Whether the best model so far was validated on the rows of now, which an override may have changed."""
        # Earlier versions did not record the rows.
        return self.validation is not None and best.rows in ("", self.validation.name)

    def _load_setup(self) -> Setup:
        setup, fingerprint = Setup.load(self.directory.setup), self.reader.manifest.fingerprint
        if setup.description["store_fingerprint"] != fingerprint:
            raise InputError(
                f"{self.store.path} is not the store {self.directory.path} was started with (its fingerprint is "
                f"{fingerprint}, not {setup.description['store_fingerprint']}); use that one or a new RUN: "
                "no --override changes the data"
            )
        return setup

    def _newest_checkpoint(self) -> Progress | None:
        directory = self.directory.checkpoints
        saved = load_newest_checkpoint(directory, self.setup.digest, torch.device("cpu"))
        if saved is not None:
            require_shape(saved, self.trainer.solver.targets, self.setup.plan.n_centers, directory)
        return saved

    def _write_down(self, changes: tuple[Change, ...], step: int) -> None:
        """Writes what this process fits, and how, and drops the metrics after `step`, which are to be made again."""
        self.directory.adopt_config(self.asked, changes, step)
        content = summary(self.setup, self.store, self.order, self.config, self.mesh)
        write_json(self.directory.summary, content)
        drop_after(self.directory.metrics, step if step else -1)

    def _train(self) -> None:
        """All steps that are left."""
        if (stop := self._agreed_wishes()[0]) is not None:
            self._interrupt(stop)
        if self._is_at_end(self.progress):
            return
        steps = range(self.progress.step, self.n_steps)
        with NodeBatches(
            self.mesh, self.reader.manifest, self.order, steps, lambda: self._stream(steps)
        ) as self.batches:
            self.trainer.train(self._batches(), self, rows_per_step=self.order.batch_size)

    def _stream(self, steps: range) -> BatchStream:
        """The batches of these steps, read by this process or its Dask cluster."""
        device, dask = self.mesh.device, self.config.run.dask
        return BatchStream(self.reader, self.order, steps.start, steps.stop, device, dask)

    def _batches(self) -> Iterator[Batch]:
        """All batches. Where one cannot be had, which every rank learns, the steps before it are saved first."""
        try:
            yield from self.batches
        except DamagedDataError:
            self.trainer.read_losses()
            with suppress(DiskError, DamagedDataError):  # The saver has told of them.
                self.saver.save(self.progress)
            raise

    def after_step(self, batch: Batch) -> None:
        """Counts rows and seconds."""
        self.clock.tick(self.progress, batch, self.batches.times)

    def after_watch(
        self, losses: list[float], rows: list[int], inexactness: float, rolled_back: bool
    ) -> None:
        """Reports how far the fit is, and a roll-back of the guard."""
        progress, guard = self.progress, self.progress.guard
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
                "batch_loss": losses[-1],
                "rows_per_s": self.clock.lap_rows_per_s(),
                **seconds_spent(progress),
                "step_size": self.trainer.step_size(),
            }
            if math.isfinite(inexactness):
                record["projection_error"] = inexactness
            self.event_log.note(record)

    def on_divergence(self) -> None:
        """Saves the last good weights."""
        with suppress(DiskError, DamagedDataError):  # The saver has told of them.
            self.saver.save(self.progress)

    def is_over(self) -> bool:
        """Validates and saves where this step is due; stops where a signal asks for it. Whether the fit is at its end.

        Raises Interrupted once the checkpoint is saved.
        """
        progress, validation = self.progress, self.validation
        is_last = progress.step == self.n_steps
        if validation is not None and (is_last or progress.step % validation.every_steps == 0):
            self._validate(validation)
        stop, save = self._agreed_wishes()
        if stop is not None:
            self.trainer.read_losses()
            self._interrupt(stop)
        if save and not self._is_at_end(progress):  # At the end it is saved at once, whatever is under way.
            self.signals.wants_checkpoint = False
            self.trainer.read_losses()
            self.saver.begin(progress)
        return self._is_at_end(progress)

    def _agreed_wishes(self) -> tuple[str | None, bool]:
        """The signal to stop at, if any, and whether to save: what any rank was sent, all do after the same step."""
        signals = self.signals
        stop = 0 if signals.stop_name is None else signal.Signals[signals.stop_name].value
        saver = self.saver
        wishes = [stop, signals.wants_checkpoint, saver.is_idle(), saver.is_due(self.progress.step)]
        stop, is_asked, is_idle, is_due = self.mesh.all_reduce_max(wishes)
        signals.wants_checkpoint = bool(is_asked)
        return signal.Signals(stop).name if stop else None, bool(is_idle and (is_asked or is_due))

    def _is_at_end(self, progress: Progress) -> bool:
        """Whether the last step is taken, or the patience is used up."""
        best, patience = progress.best, self.config.solver.used_patience
        return progress.step >= self.n_steps or (best is not None and 0 < patience <= best.n_since)

    def _validate(self, validation: Validation) -> None:
        began, progress = time.perf_counter(), self.progress
        solver = self.trainer.solver
        scores, number = validation.score(self.trainer.model_shard())
        factors = solver.targets.ridge_factors
        if len(factors) > 1:
            scores = {**scores, "ridge": solver.ridge * factors[number]}
        average = progress.average_weights(solver.targets.n_outputs, number)
        progress.best = after_validation(
            progress.best, scores, average, progress.step, validation.name, number
        )
        split, epoch = validation.name, progress.step / self.order.steps_per_epoch
        position = {"step": progress.step, "epoch": epoch, "rows": round(epoch * self.order.epoch_rows)}
        record = {"kind": "validation", **position, "elapsed_s": progress.elapsed_s, "split": split, **scores}
        self.event_log.note(record)
        shown = (
            f"{name} {value:.4g}" for name, value in scores.items() if name not in ("n", "weighted_error")
        )
        logger.info("epoch %g on %s: %s", epoch, split, ", ".join(shown))
        progress.validated_s += time.perf_counter() - began

    def _interrupt(self, signal_name: str) -> None:
        """Saves, then raises Interrupted."""
        self.saver.save(self.progress)
        self._report()
        raise Interrupted(
            f"{signal_name}: stopped at step {self.progress.step} of {self.n_steps}, all up to there is saved; "
            "the same command goes on"
        )

    def _finish(self) -> None:
        """The last checkpoint, the model and the report."""
        progress, mesh = self.progress, self.mesh
        n_outputs = self.trainer.solver.targets.n_outputs
        weights = progress.average_weights(n_outputs) if progress.best is None else progress.best.weights
        if any(mesh.all_reduce_max([not bool(torch.isfinite(weights).all())])):
            raise DivergedError(
                "the weights are not finite at the end; try a larger bandwidth or a smaller data_rank"
            )
        self.saver.save(progress)
        learnt = self._learnt_effects(weights)
        whole = mesh.gather(weights, self.setup.plan.n_centers, dim=1)
        mesh.on_leader(lambda: self._save_model(whole, learnt))
        self.event_log.event("finish", progress, self._ending())
        if (warning := progress.running_score.warning) is not None:
            self.event_log.event("no_better", progress, warning)
        if sentence := bottleneck(seconds_spent(progress)):
            logger.info(sentence)
        self._report()

    def _learnt_effects(self, weights: Tensor) -> LearntEffects | None:
        """Effects of cells that make the model with these weights better; on the leader alone."""
        targets, validation = self.setup.targets(), self.validation
        if validation is None or not wants_effects(self.config, targets.n_outputs):
            return None
        manifest = self.reader.manifest
        model = replace(self.trainer.model_shard(), weights=weights, targets=targets.to(self.mesh.device))
        run = self.config.run
        spare_bytes = self.setup.plan.spare_bytes(run, self.mesh.device)
        n_rows = most_rows(spare_bytes, manifest.n_features, targets.n_outputs)
        n_steps = min(self.order.steps_per_epoch, self.n_steps, n_rows // self.order.batch_size)
        if not n_steps:
            return None

        def training() -> Iterator[Scored]:
            steps = range(n_steps)
            with NodeBatches(self.mesh, manifest, self.order, steps, lambda: self._stream(steps)) as batches:
                for batch in batches:
                    if (stop := self._agreed_wishes()[0]) is not None:
                        self._interrupt(stop)
                    yield batch.x, model.outputs(batch.x), batch.y

        def validated() -> Iterator[Scored]:
            pieces = node_pieces(self.mesh, validation.segments, manifest.n_features, self.order.batch_size)
            for x, y in pieces:
                outputs = model.outputs(x)
                if y is not None:
                    yield x, outputs, torch.from_numpy(y)

        if not self.mesh.is_leader:
            for rows in (training(), validated()):
                deque(rows, maxlen=0)  # All ranks compute the outputs, and the leader learns from them.
            return None
        logger.info("looking for columns whose combinations have effects; --effects none does without")
        names, n_codes = manifest.feature_names, code_features(manifest)
        learnt = learn_effects(training(), validated(), targets, names, n_codes, run.minutes, spare_bytes)
        if learnt is not None:
            self.event_log.event("effects", self.progress, learnt.message)
        return learnt

    def _save_model(self, weights: Tensor | None, learnt: LearntEffects | None) -> None:
        assert weights is not None  # The leader has them.
        setup = self._load_setup()
        if setup.digest != self.setup.digest:
            raise DamagedDataError(
                f"{self.directory.setup} is not what this fit has read; restore it, then the same command"
            )
        model = build_model(setup, weights.T.contiguous(), self.kernel)
        if learnt is not None:
            model = replace(model, effects=learnt.effects)
            write_json(self.directory.summary, read_summary(self.directory) | {"effects": learnt.told})
        save_model(self.directory, model, self.progress.step, setup.description.get("conversion"))

    def _ending(self) -> str:
        progress, solver = self.progress, self.trainer.solver
        best, factors = progress.best, solver.targets.ridge_factors
        if best is None:
            return f"finished after {progress.step} steps"
        each = ", ".join(f"{solver.ridge * factor:.3g}" for factor in sorted(factors))
        chosen = f" with ridge {solver.ridge * factors[best.ridge]:.3g} of {each}" if len(factors) > 1 else ""
        if best.step == progress.step:
            return f"finished after {progress.step} steps{chosen}"
        early = ""
        if progress.step < self.n_steps:
            plural = "s" if best.n_since > 1 else ""
            early = f"stopped early: {best.n_since} validation{plural} without a better one; "
        return (
            f"{early}finished after {progress.step} steps{chosen} with the model of step {best.step}, the best of all "
            f"validations (weighted error {best.error:.4g})"
        )

    def _report(self) -> None:
        if not self.mesh.is_leader:
            return
        try:
            write_report(self.directory.path)
        except (OSError, InputError) as error:
            logger.warning("all is saved, but the report cannot be written: %s", error)
