"""Models on disk: in a run, for this package; and exported, for other programs.

An exported model is a directory of tensors, JSON, and a program of `torch.export`; docs/formats.md has the layout.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ep3stream.config import MAX_CONFIG_BYTES
from ep3stream.disk import read_small_file, remove, replacing
from ep3stream.errors import ConfigError, DamagedDataError, InputError
from ep3stream.run.bundle import find_bundle, read_bundle, read_description, write_bundle
from ep3stream.run.checkpoint import load_newest_checkpoint, require_shape
from ep3stream.run.directory import SETUP_KIND, RunDirectory
from ep3stream.run.setup import Setup
from ep3stream.run.state import MODEL_KIND
from ep3stream.solver.export import exported_program
from ep3stream.solver.kernels import KernelFunction
from ep3stream.solver.model import Predictor
from ep3stream.store.columns import columns_of
from ep3stream.store.json_files import created_by
from ep3stream.store.reader import open_store
from ep3stream.values.labels import recorded_label_type
from ep3stream.values.offsets import Offsets

if TYPE_CHECKING:
    from ep3stream.conversion.recorded_columns import RecordedColumns

# 2: a model with offsets. 3: one whose `inputs` say that features are codes or bent. 4: with directions. 5: effects.
# 6: a linear part. 7: leading directions and what is beyond them.
_WITH_OFFSETS, _WITH_INPUTS, _WITH_DIRECTIONS, _WITH_EFFECTS, _WITH_LINEAR, EXPORT_VERSION = 2, 3, 4, 5, 6, 7
TENSORS, DESCRIPTION, PROGRAM = "model.safetensors", "model.json", "program.pt2"
logger = logging.getLogger(__name__)


def build_model(setup: Setup, weights: Tensor, function: KernelFunction | None = None) -> Predictor:
    """The model of a set-up that holds all centers, with these weights, (p, c), on the CPU."""
    names, conversion = setup.description["names"], setup.description.get("conversion")
    columns = (conversion or {}).get("columns") or {}
    offsets = Offsets.recorded(columns, names["features"], names["classes"] or names["targets"])
    return Predictor(
        setup.kernel(function),
        setup.tensors["centers"],
        weights.cpu(),
        setup.inputs(),
        setup.targets(),
        tuple(names["features"]),
        tuple(names["targets"]),
        None if names["classes"] is None else tuple(names["classes"]),
        offsets if offsets else None,
        recorded_label_type(columns, names["classes"]),
        linear=setup.linear(),
    )


def save_model(
    directory: RunDirectory, model: Predictor, step: int | None = None, conversion: Any = None
) -> None:
    """Writes RUN/model. Raises DiskError.

    step: after how many steps the weights are those of a fit; None if no fit made the model. conversion: how columns
    of files become the features of the model, as `columns_of` says it of a store; None if unknown.
    """
    known = {} if step is None else {"step": step}
    if conversion is not None:
        known["conversion"] = conversion
    write_bundle(directory.model, MODEL_KIND, model.tensors(), model.description() | known)


def load(run: Path | str, kernel: KernelFunction | None = None) -> Predictor:
    """The model of a run, with its digests checked; for an unfinished fit the model of the newest checkpoint.

    kernel: the callable that the fit was given, if any. Raises InputError if there is no model yet, and
    DamagedDataError if the files are not as they were written.
    """
    directory = RunDirectory(Path(run).absolute())
    if (finished := find_bundle(directory.model)) is not None:
        return _read_model(directory, finished, kernel)
    if not directory.setup.exists():
        raise InputError(directory.no_run())
    setup = Setup.load(directory.setup)
    progress = load_newest_checkpoint(directory.checkpoints, setup.digest, torch.device("cpu"))
    if progress is None:
        raise InputError(f"{directory.path} has no checkpoint yet; wait for the first one")
    logger.warning("%s is unfinished: using its checkpoint at step %d", directory.path, progress.step)
    require_shape(progress, setup.ridge_targets(), setup.plan.n_centers, directory.checkpoints)
    # Steps since the best validation are for the better, unless a validation has shown that they are not.
    best = progress.best if progress.best is not None and progress.best.n_since else None
    n_outputs = setup.targets().n_outputs
    weights = progress.average_weights(n_outputs) if best is None else best.weights
    model = build_model(setup, weights.T.contiguous(), kernel)
    return _with_columns(directory, model, setup.description.get("conversion"))


def _read_model(directory: RunDirectory, path: Path, kernel: KernelFunction | None) -> Predictor:
    bundle = read_bundle(path, MODEL_KIND)
    try:
        model = Predictor.of(bundle.tensors, bundle.description, kernel)
        return _with_columns(directory, model, bundle.description.get("conversion"))
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise DamagedDataError(f"{path} has a missing or impossible field ({error!r}); fit again") from error


def _with_columns(directory: RunDirectory, model: Predictor, record: dict[str, Any] | None) -> Predictor:
    """The model with what the record of its store's columns says of its labels, and of tables."""
    # Fits save models too, and need nothing of the readers of tables, whose imports take half a second.
    from ep3stream.prediction.frames import FrameReader

    frames = FrameReader(model.feature_names, model.target_names, model.class_names, directory.path, record)
    if record is None or model.class_names is None or model.label_type != "text":
        return replace(model, frames=frames)
    label_type = recorded_label_type(record["columns"], model.class_names)
    return replace(model, frames=frames, label_type=label_type)


def recorded_columns(run: Path | str) -> RecordedColumns:
    """How columns of files become the features of a run's model: as the run, or else its store, records it.

    Raises InputError if neither does.
    """
    from ep3stream.conversion.recorded_columns import RecordedColumns, unreadable_columns

    directory = RunDirectory(Path(run).absolute())
    record: Any = _conversion_record(directory)
    description = _description_of_run(directory)
    try:
        names = description.get("names")
        if names is not None:
            targets, classes = names["targets"], names["classes"]
        else:
            targets, classes = description["target_names"], description["class_names"]
        reason = "keeps no record of its columns" if record is None else unreadable_columns(record["columns"])
        if reason is None:
            return RecordedColumns.read(directory.path, record, tuple(targets), classes and tuple(classes))
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"has columns that are not as recorded ({error!r})"
    raise InputError(f"{directory.path} {reason}; convert the file with --like STORE and give that store")


def _conversion_record(directory: RunDirectory) -> dict[str, Any] | None:
    """The `columns_of` the store that the model was fitted to; None if it is not known any more."""
    record: dict[str, Any] | None = _description_of_run(directory).get("conversion")
    return record or _columns_of_store(directory)


def _description_of_run(directory: RunDirectory) -> dict[str, Any]:
    """The description of the finished model, or of the set-up of an unfinished fit."""
    if (model := find_bundle(directory.model)) is not None:
        return read_description(model, MODEL_KIND)
    if (setup := find_bundle(directory.setup)) is not None:
        return read_description(setup, SETUP_KIND)
    raise InputError(directory.no_run())


def _columns_of_store(directory: RunDirectory) -> dict[str, Any] | None:
    """For runs made before models had the record: the store's, if the store is still there and unchanged."""
    try:
        named = json.loads(read_small_file(directory.summary, MAX_CONFIG_BYTES))["store"]
        with open_store(named["path"]) as store:
            return columns_of(store.manifest) if store.manifest.fingerprint == named["fingerprint"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, InputError, DamagedDataError):
        return None


def export(run: Path | str, out: Path | str, kernel: KernelFunction | None = None) -> Path:
    """Writes the model of a run, or of `save`, to a new directory `out`; returns that directory.

    Other programs read it without ep3stream: `model.safetensors` and `model.json` hold all that predictions depend on,
    and `program.pt2` predicts: torch.export.load(file).module()(x), x of (n, d) float32, or float64 for a model with
    offsets, which the program subtracts. A callable kernel has to be
    given here, and is in the program only.
    Raises InputError if `out` exists or cannot be written, and for a callable that torch cannot export.
    """
    place = Path(out).absolute()
    if place.exists():
        raise InputError(f"{place} exists; remove it or choose another name")
    model = load(run, kernel)
    conversion = _conversion_record(RunDirectory(Path(run).absolute()))
    program = exported_program(model)
    try:
        with replacing(place) as partial:
            remove(partial)
            partial.mkdir(parents=True)
            save_file(model.tensors(), partial / TENSORS)
            text = json.dumps(_export_description(model, conversion), indent=1, allow_nan=False)
            (partial / DESCRIPTION).write_text(text + "\n")
            # safetensors makes a file that only its owner may read.
            (partial / TENSORS).chmod((partial / DESCRIPTION).stat().st_mode)
            torch.export.save(program, partial / PROGRAM)
    except OSError as error:
        raise InputError(
            f"{place} cannot be written ({error}); free space or choose another place"
        ) from error
    return place


def _export_version(model: Predictor) -> int:
    """The lowest version that can say what the model is."""
    if model.inputs.leading is not None:
        return EXPORT_VERSION
    if model.linear is not None:
        return _WITH_LINEAR
    if model.effects is not None:
        return _WITH_EFFECTS
    if model.inputs.directions is not None:
        return _WITH_DIRECTIONS
    if model.inputs.description():
        return _WITH_INPUTS
    return _WITH_OFFSETS if model.offsets else 1


def _export_description(model: Predictor, conversion: dict[str, Any] | None) -> dict[str, Any]:
    p, d = model.centers.shape
    return {
        "format": "ep3stream-model",
        "format_version": _export_version(model),
        "created_by": created_by(),
        "task": "regression" if model.class_names is None else "classification",
        "n_centers": p,
        "n_features": d,
        "n_outputs": model.targets.n_outputs,
        **model.description(),
        "conversion": conversion,
    }
