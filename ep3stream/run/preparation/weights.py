"""What rows of each class, or each target, count in the sum of squares that a fit makes small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ep3stream.config import SolverConfig
from ep3stream.data.store import SplitReader
from ep3stream.errors import ConfigError
from ep3stream.solver.targets import TargetCode


def with_weights(code: TargetCode, reader: SplitReader, settings: SolverConfig) -> TargetCode:
    """`code` with the weights of the settings, for the split's rows; as it is where there are none. ConfigError."""
    manifest, counts = reader.manifest, reader.info.class_counts
    require_weights_of_task(counts is not None, settings)
    if settings.output_weights and not settings.ridge and not settings.patience:
        raise ConfigError(
            "output_weights are given, but each target has weights of its own in the model, so that without a ridge "
            "or patience they change nothing; give one of these, or leave output_weights out"
        )
    names = manifest.target_names if counts is None else manifest.class_names or ()
    return weighted(code, names, None if counts is None else torch.tensor(counts), settings)


def require_weights_of_task(is_classification: bool, settings: SolverConfig) -> None:
    """ConfigError for weights of classes where there are none, or of outputs where there are classes."""
    if is_classification and settings.output_weights:
        raise ConfigError("output_weights are given, but the targets are classes; use class_weights")
    if not is_classification and settings.class_weights != "none":
        raise ConfigError(
            "class_weights are given, but the targets are numbers; use output_weights, or leave them out"
        )


def weighted(
    code: TargetCode, names: Sequence[str], class_counts: Tensor | None, settings: SolverConfig
) -> TargetCode:
    """`code` with the weights of the settings; ConfigError for a name that is none of `names`, of classes or targets.

    class_counts: rows of each class, (c,); None for targets. The offset of a class becomes its share of the weighted
    rows, the constant that fits them best.
    """
    if class_counts is None:
        given = settings.output_weights
        each = _by_name("output_weights", "target", given, names).float() if given else None
        return replace(code, weights=each)
    if settings.class_weights == "none":
        return code
    rows = class_counts.double().cpu()
    if isinstance(settings.class_weights, str):
        weights = _balanced(rows)
    else:
        weights = _by_name("class_weights", "class", settings.class_weights, names)
    total = weights * rows
    return replace(code, offset=(total / total.sum()).float(), weights=weights.float())


def _balanced(rows: Tensor) -> Tensor:
    """n / (k n_c) for the k classes that have rows, (c,): the same for each class in all, 1 for a row on average."""
    present = rows > 0
    return torch.where(present, rows.sum() / (present.sum() * rows.clamp_min(1)), 1.0)


def _by_name(field: str, what: str, weights: Mapping[str, float], names: Sequence[str]) -> Tensor:
    """(c,), float64: 1 for the names left out; ConfigError for one that is none of `names`."""
    places = {name: place for place, name in enumerate(names)}
    each = torch.ones(len(names), dtype=torch.float64)
    for name, weight in weights.items():
        if name not in places:
            some = ", ".join(list(names)[:10]) + (", ..." if len(names) > 10 else "")
            raise ConfigError(f"{field} has {name!r}, which is no {what}; use some of {some}")
        each[places[name]] = weight
    return each
