"""`fit`: from a store and settings to a model, on as many devices as are asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ep3stream.config import FitConfig
from ep3stream.errors import ConfigError
from ep3stream.mesh import Mesh, joined
from ep3stream.run.clock import FitProgress as FitProgress
from ep3stream.run.directory import RunDirectory
from ep3stream.run.event_log import require_tensorboard
from ep3stream.run.launch import Job, n_ranks_to_launch, run_on_ranks
from ep3stream.solver.kernels import KernelFunction
from ep3stream.store.files import ObjectUrl
from ep3stream.store.reader import RowStore, open_store
from ep3stream.training.set_up import require_enough_centers
from ep3stream.training.signals import Signals
from ep3stream.training.trainer import Trainer
from ep3stream.training.validation import require_validation


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
    require_validation(config)
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
        rows = resources.enter_context(mesh.all_or_raise(lambda: open_store(store)))
        mesh.all_or_raise(lambda: _require_splits(rows, config, mesh))
        directory = RunDirectory(Path(run).absolute())
        mesh.on_leader(lambda: resources.enter_context(directory.locked()))
        changes = mesh.on_leader(lambda: directory.settle_config(config, override))
        Trainer(directory, rows, config, kernel, observe, mesh).run(signals, changes or ())
    return directory.path


def _require_splits(store: RowStore, config: FitConfig, mesh: Mesh) -> None:
    """Before a run directory is made: the splits are there, and as many devices as were asked for."""
    for split in filter(None, (config.data.split, config.data.validate)):
        store.split(split)
    if config.run.devices not in ("auto", mesh.local_size):
        raise ConfigError(
            f"devices is {config.run.devices}, but {mesh.local_size} processes were started on this machine; "
            "under torchrun leave devices out"
        )
