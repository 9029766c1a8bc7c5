"""Models on disk: written at the end of a fit, read back from a finished or an unfinished run."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from ep3stream.errors import ConfigError, DamagedDataError, InputError
from ep3stream.run.bundle import find_bundle, read_bundle, read_description, write_bundle
from ep3stream.run.checkpoint import load_newest_checkpoint, require_shape
from ep3stream.run.directory import RunDirectory
from ep3stream.run.setup import Setup
from ep3stream.solver.kernels import KernelFunction
from ep3stream.solver.model import Predictor

logger = logging.getLogger(__name__)

_KIND = "model"


def build_model(setup: Setup, weights: Tensor, function: KernelFunction | None = None) -> Predictor:
    """The model with these weights, (p, c), on the CPU."""
    names = setup.description["names"]
    return Predictor(
        setup.kernel(function),
        setup.tensors["centers"],
        weights.cpu(),
        setup.inputs(),
        setup.targets(),
        tuple(names["features"]),
        tuple(names["targets"]),
        None if names["classes"] is None else tuple(names["classes"]),
    )


def save_model(directory: RunDirectory, model: Predictor, step: int | None = None) -> None:
    """Writes RUN/model: that of a fit after `step` steps, if it was a fit. Raises DiskError."""
    known = {} if step is None else {"step": step}
    write_bundle(directory.model, _KIND, model.tensors(), model.description() | known)


def model_step(directory: RunDirectory) -> int | None:
    """After how many steps the model in RUN/model was written; None where there is none that says so."""
    path = find_bundle(directory.model)
    try:
        step = None if path is None else read_description(path, _KIND).get("step")
    except DamagedDataError as error:
        logger.warning("%s", error)
        return None
    return step if type(step) is int else None


def load(run: Path | str, kernel: KernelFunction | None = None) -> Predictor:
    """The model of a run, checked against its digests; that of the newest checkpoint if the fit is unfinished.

    `kernel`: the callable the fit was given, if any. Raises InputError where there is no model yet,
    DamagedDataError where there is one that is not as written.
    """
    directory = RunDirectory(Path(run).absolute())
    if (finished := find_bundle(directory.model)) is not None:
        return _read_model(finished, kernel)
    if not directory.setup.exists():
        raise InputError(f"{directory.path} holds no model and no set-up; give the RUN of a fit")
    setup = Setup.load(directory.setup)
    progress = load_newest_checkpoint(directory.checkpoints, setup.digest, torch.device("cpu"))
    if progress is None:
        raise InputError(f"{directory.path} has no checkpoint yet; wait for the first one")
    logger.warning("%s is unfinished: using its checkpoint at step %d", directory.path, progress.step)
    require_shape(progress, setup.targets().n_outputs, setup.plan["n_centers"], directory.checkpoints)
    weights = progress.state.average if progress.best is None else progress.best.weights
    return build_model(setup, weights.T.contiguous(), kernel)


def _read_model(path: Path, kernel: KernelFunction | None) -> Predictor:
    bundle = read_bundle(path, _KIND)
    try:
        return Predictor.of(bundle.tensors, bundle.description, kernel)
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise DamagedDataError(f"{path} has a missing or impossible field ({error!r}); fit again") from error
