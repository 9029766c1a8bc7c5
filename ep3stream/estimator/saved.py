"""An estimator on disk, without pickle: the model in the form of a run, and the state to train on from.

PATH/model/          what `ep3stream.load(PATH)` and `ep3stream export` read
PATH/estimator/      settings, fitted attributes, and the state of the training
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.config import KernelConfig
from ep3stream.errors import DamagedDataError, InputError
from ep3stream.prediction.models import load, save_model
from ep3stream.run.bundle import find_bundle, read_bundle, write_bundle
from ep3stream.run.directory import RunDirectory
from ep3stream.solver.kernels import KernelFunction
from ep3stream.solver.model import Predictor

_KIND = "estimator"
_FLOAT = "float"
_CONFIG, _CALLABLE, _PAIRS = "KernelConfig", "callable", "pairs"  # Not every key is a text, as JSON wants.
_LABELS = "labels"


@dataclass(frozen=True, slots=True)
class SavedEstimator:
    """An estimator as read from disk.

    parameters: arguments of the constructor. fitted: fitted attributes, JSON. state: the state of the `KernelModel`,
    None where the files hold only a model.
    """

    model: Predictor
    parameters: dict[str, Any]
    fitted: dict[str, Any]
    state: dict[str, Any] | None


def save_estimator(
    path: Path,
    model: Predictor,
    parameters: Mapping[str, Any],
    fitted: Mapping[str, Any],
    state: Mapping[str, Any],
    record: Mapping[str, Any] | None,
) -> None:
    """Writes the estimator's bundle, then the model's, each all or nothing. Raises DiskError.

    record: how columns of tables become features, as `columns_of` says it of a store.
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    description = {
        "parameters": {name: _as_json(value) for name, value in parameters.items()},
        "fitted": dict(fitted),
        "state": _finite({name: value for name, value in state.items() if name not in tensors}),
    }
    try:
        json.dumps(description)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be written: {error}; set that argument to a number or a text"
        ) from error
    write_bundle(path / _KIND, _KIND, tensors, description)
    save_model(RunDirectory(path), model, conversion=record)


def load_estimator(path: Path, kernel: KernelFunction | None) -> SavedEstimator:
    """The saved estimator, or only the model where `path` is a run. Raises InputError, DamagedDataError."""
    model = load(path, kernel)
    found = find_bundle(path / _KIND)
    if found is None:
        return SavedEstimator(model, {}, {}, None)
    bundle = read_bundle(found, _KIND)
    try:
        parameters = {name: _from_json(value) for name, value in bundle.description["parameters"].items()}
        state = {**_restored(bundle.description["state"]), **bundle.tensors}
        if kernel is not None:
            parameters["kernel"] = kernel
        return SavedEstimator(model, parameters, bundle.description["fitted"], state)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedDataError(f"{found} has a missing or impossible field ({error!r}); fit again") from error


def _finite(value: Any) -> Any:
    """The state with infinite and nan numbers as texts, since JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}
    return {name: _finite(each) for name, each in value.items()} if isinstance(value, dict) else value


def _restored(value: Any) -> Any:
    """The state that `_finite` was given."""
    if not isinstance(value, dict):
        return value
    if value.keys() == {_FLOAT}:
        return float(value[_FLOAT])
    return {name: _restored(each) for name, each in value.items()}


def labels_as_json(labels: NDArray[Any]) -> dict[str, Any]:
    """Labels of any type that a classifier learns; dates and durations as whole numbers of their unit."""
    values = labels.astype(np.int64) if labels.dtype.kind in "mM" else labels
    listed = [str(value) for value in values] if values.dtype == np.longdouble else values.tolist()
    return {"values": listed, "dtype": labels.dtype.str}


def labels_from_json(content: Mapping[str, Any]) -> NDArray[Any]:
    """The labels that `labels_as_json` was given."""
    return np.array(content["values"], dtype=content["dtype"])


def _as_json(value: Any) -> Any:
    """A constructor argument as JSON; a callable is saved as a mark, a random generator as None."""
    if isinstance(value, datetime.date | np.datetime64 | np.timedelta64):
        return {_LABELS: labels_as_json(np.array([value], None if isinstance(value, np.generic) else "M8"))}
    if isinstance(value, KernelConfig):
        return {_CONFIG: asdict(value)}
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, dict):
        return {_PAIRS: [[_as_json(key), _as_json(each)] for key, each in value.items()]}
    if callable(value):
        return {_CALLABLE: None}
    if hasattr(value, "item"):
        return value.item()
    return value if isinstance(value, str | int | float | None) else None


def _from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if _PAIRS in value:
        return {_from_json(key): _from_json(each) for key, each in value[_PAIRS]}
    if _LABELS in value:
        return labels_from_json(value[_LABELS])[0]
    return KernelConfig(**value[_CONFIG]) if _CONFIG in value else value
