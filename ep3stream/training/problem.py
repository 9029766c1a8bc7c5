"""What a fit must know of all rows: sizes, names, how inputs are scaled and targets coded; and what it refuses.

Of a split the manifest says all of it but for long tails of numbers, which are told by some thousand rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.config import FitConfig, Scale, SolverConfig, Task
from ep3stream.errors import ConfigError, InputError
from ep3stream.solver.columns import COLUMN_KERNELS
from ep3stream.solver.input_scaling import InputScaling
from ep3stream.solver.targets import TargetCode, require_weights_of_task, weighted
from ep3stream.store.columns import code_features, columns_of, zero_one_features
from ep3stream.store.manifest import ColumnStatistics, Manifest, told_two_valued
from ep3stream.store.reader import Split
from ep3stream.stream.order import NO_ROWS, Rows, sample_rows
from ep3stream.training.column_kernel import tried_ridges
from ep3stream.training.plan import ProblemSize
from ep3stream.training.validation import NO_VALIDATION, ValidationRows

logger = logging.getLogger(__name__)

# A purpose of random numbers; others have set_up.py, set_up_rows.py, centers.py and validation.py.
_SCALED = 16
# Of the rows that tell which numbers have long tails.
_FEWEST_SCALED, _MOST_SCALED, _SCALED_VALUES = 500, 4096, 1 << 20

# Standard deviations from the mean, from which on values are told of, of so many columns.
_FAR, _TOLD_TAILS = 30, 5


@dataclass(frozen=True, slots=True)
class Problem:
    """What a set-up must know of all rows, whatever their source.

    shape: sizes; names: of features, targets and classes (None for regression). inputs: the input transform of the
    model; targets: how targets are coded and weighted. feature_mean: (d,), float64, the mean of the inputs in the
    units of the data; radial kernels subtract it before distances are taken. None takes the mean of the centers.
    categories: the features that are codes of categories, by number, and how many codes each has.
    fingerprint, conversion: of the store, where the rows come from one.
    """

    shape: ProblemSize
    task: Task
    names: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...] | None]
    inputs: InputScaling
    targets: TargetCode
    feature_mean: Tensor | None = None
    categories: Mapping[int, int] = field(default_factory=dict)
    fingerprint: str = ""
    conversion: Any = None


def problem_of_split(split: Split, config: FitConfig, inputs: InputScaling) -> Problem:
    """What the manifest says of the split's rows, with these inputs and the weights of the settings."""
    manifest = split.manifest
    return Problem(
        shape=shape_of(split, config),
        task=manifest.task,
        names=(manifest.feature_names, manifest.target_names, manifest.class_names),
        inputs=inputs,
        targets=with_weights(target_code(split), split, config.solver),
        feature_mean=torch.tensor(split.info.features.mean, dtype=torch.float64),
        categories=code_features(manifest),
        fingerprint=manifest.fingerprint,
        conversion=columns_of(manifest),
    )


def shape_of(split: Split, config: FitConfig, validation: ValidationRows = NO_VALIDATION) -> ProblemSize:
    """The sizes of the problem that a split poses to a fit with this kernel, and with these rows to validate on."""
    manifest, info = split.manifest, split.info
    y_values = 1 if manifest.task == "classification" else manifest.n_outputs
    row_bytes = manifest.n_features * np.dtype(manifest.x_dtype).itemsize + 4 * y_values
    is_shuffled = manifest.shuffle_seed is not None
    codes = expanded_codes(manifest, config).values()
    return ProblemSize(
        info.n_rows,
        manifest.n_features,
        manifest.n_outputs,
        info.segment_rows,
        row_bytes,
        is_shuffled,
        validation.n_held,
        validation.split is not None,
        sum(codes) - len(codes),
        config.kernel.name in COLUMN_KERNELS,
        ridge_factors=tried_ridges(config, manifest.n_features, manifest.n_outputs)
        if validation.split is not None
        else (1.0,),
    )


def expanded_codes(manifest: Manifest, config: FitConfig) -> dict[int, int]:
    """Features whose codes become 0/1 features, by number, and how many each; none for a kernel that compares codes."""
    return {} if config.kernel.name in COLUMN_KERNELS else code_features(manifest)


def input_scaling(split: Split, config: FitConfig, held: Rows = NO_ROWS) -> InputScaling:
    """The model's input transform: by the split's statistics, times the factors of `feature_scale`.

    With `auto` some thousand rows are read, none of those held out.
    """
    kind, manifest = config.data.scale, split.manifest
    rows = rows_to_scale(split, config.run.seed, held) if kind == "auto" else None
    scaling = scaling_by(
        kind, split.info.features, zero_one_features(manifest), code_features(manifest), rows
    )
    scaling = scaling.with_codes(expanded_codes(split.manifest, config))
    if config.data.feature_scale is None:
        return scaling
    return scaling.times(_feature_factors(Path(config.data.feature_scale), split.manifest.n_features))


def n_to_scale(n_features: int) -> int:
    """How many rows tell which numbers have long tails: fewer of many columns, which are sorted one by one."""
    return max(_FEWEST_SCALED, min(_MOST_SCALED, _SCALED_VALUES // n_features))


def rows_to_scale(split: Split, seed: int, held: Rows = NO_ROWS) -> NDArray[Any]:
    """x of random rows of the split, (n, d), by which numbers with long tails are bent; none of those held out."""
    n_rows = min(split.info.n_rows - len(held), n_to_scale(split.manifest.n_features))
    return split.read_rows(np.sort(sample_rows(split.info, n_rows, seed, _SCALED, without=held)))[0]


def scaling_by(
    kind: Scale,
    features: ColumnStatistics,
    zero_one: Sequence[int],
    codes: Mapping[int, int],
    rows: NDArray[Any] | None,
) -> InputScaling:
    """The scaling of this kind by statistics; `codes` stay as they are, with `auto` the features `zero_one` too.

    rows: random ones, (n, d), by which with `auto` numbers with long tails are bent.
    Two rows then differ by 2 in the squared distance through a standardised number, on average, and by 2 through a
    category where theirs are not the same.
    """
    columns = (features.mean, features.std, features.minimum, features.maximum)
    statistics = [torch.tensor(column, dtype=torch.float64) for column in columns]
    scaling = InputScaling.of(kind, *statistics)
    if rows is not None:
        scaling = scaling.bent(torch.from_numpy(rows), *statistics[2:])
    return scaling.sparing([*codes, *(zero_one if kind == "auto" else ())])


def _feature_factors(file: Path, n_features: int) -> Tensor:
    """(d,), float32; raises ConfigError unless each is positive and finite in float32."""
    # Few fits read an array, and readers take long to import.
    from ep3stream.formats.arrays import open_array

    try:
        stored = open_array(file)
    except InputError as error:
        raise ConfigError(
            f"feature_scale is {str(file)!r}, which is no NPY file of ({n_features},) numbers: {error}"
        ) from error
    if stored.shape != (n_features,):
        raise ConfigError(
            f"feature_scale in {file} has the shape {stored.shape}; it must be ({n_features},), "
            "one factor for each feature of the store"
        )
    with np.errstate(over="ignore"):  # What float32 cannot hold becomes infinite and is refused.
        factors = stored.astype(np.float32)
    wrong = np.flatnonzero(~(np.isfinite(factors) & (factors > 0)))
    if len(wrong):
        raise ConfigError(
            f"feature_scale in {file} is {stored[wrong[0]]} for feature {wrong[0]}; "
            "use positive, finite numbers"
        )
    return torch.from_numpy(factors)


def target_code(split: Split) -> TargetCode:
    """How the split's targets enter the least-squares problem: classes by frequency, numbers by mean and spread."""
    info = split.info
    if info.class_counts is not None:
        counts = torch.tensor(info.class_counts, dtype=torch.float64)
        return TargetCode(True, (counts / counts.sum()).float(), torch.ones(len(counts)))
    assert info.targets is not None  # The manifest was checked.
    spread = torch.tensor(info.targets.std, dtype=torch.float64)
    offset = torch.tensor(info.targets.mean, dtype=torch.float64)
    return TargetCode(False, offset.float(), torch.where(spread > 0, spread, 1.0).float())


def with_weights(code: TargetCode, split: Split, settings: SolverConfig) -> TargetCode:
    """`code` with the class or output weights of the settings; ConfigError where they do not fit the split's task."""
    manifest, counts = split.manifest, split.info.class_counts
    require_weights_of_task(counts is not None, settings)
    if settings.output_weights and not settings.used_ridge and not settings.used_patience:
        raise ConfigError(
            "output_weights are given, but each target has weights of its own in the model, so that without a ridge "
            "or patience they change nothing; give one of these, or leave output_weights out"
        )
    names = manifest.target_names if counts is None else manifest.class_names or ()
    return weighted(code, names, None if counts is None else torch.tensor(counts), settings)


def require_varied_features(split: Split) -> None:
    """ConfigError where no feature varies over the split; the log names some that do not."""
    info = split.info
    ranges = zip(split.manifest.feature_names, info.features.minimum, info.features.maximum, strict=True)
    constant = [name for name, low, high in ranges if low == high]
    if len(constant) == split.manifest.n_features:
        raise ConfigError(
            f"every feature of split {info.name} is constant, so there is nothing to learn from; "
            "choose other columns or another split"
        )
    if constant:
        some = ", ".join(constant[:3]) + (", ..." if len(constant) > 3 else "")
        logger.warning(
            "%d features are constant in split %s and have no say: %s", len(constant), info.name, some
        )


def require_varied_targets(split: Split) -> None:
    """ConfigError where all rows have the same target or class: a fit would take its time to find that constant.

    The log tells of targets that look like classes.
    """
    info = split.info
    is_one_class = info.class_counts is not None and sum(count > 0 for count in info.class_counts) == 1
    if is_one_class or (info.targets is not None and info.targets.minimum == info.targets.maximum):
        raise ConfigError(
            f"every row of split {info.name} has the same {' and '.join(split.manifest.target_names)}, so there "
            "is nothing to learn; choose another target or split"
        )
    if told := told_two_valued(split.manifest, info.name):
        logger.info(told)


def require_in_range(x: Tensor) -> Tensor:
    """x, (m, d), scaled, if distances between its rows are finite in float32; else ConfigError."""
    if not bool(torch.isfinite(x.square().sum(1)).all()):
        raise ConfigError(
            f"inputs reach {float(x.abs().max()):.3g} after scaling, whose squares are not finite in float32; "
            "use --scale auto, or convert them in a larger unit"
        )
    return x


def require_codes(centers: Tensor, problem: Problem) -> None:
    """ConfigError where a center, (p, d), has something else than a code, or -1 for none of them, for a category."""
    for feature, n_codes in problem.categories.items():
        values = centers[:, feature]
        wrong = (values != values.round()) | (values < -1) | (values >= n_codes)
        if bool(wrong.any()):
            raise ConfigError(
                f"centers have {float(values[wrong][0]):.6g} for {problem.names[0][feature]!r}, a category that is "
                f"stored as a code; use whole numbers from 0 to {n_codes - 1}, or -1 for no known category"
            )


def tell_one_hot(split: Split, config: FitConfig) -> None:
    """Warns where a kernel on columns gets categories as one-hot features rather than codes."""
    manifest, name = split.manifest, config.kernel.name
    if name not in COLUMN_KERNELS or code_features(manifest):
        return
    if any(one["kind"] == "category" for one in manifest.columns.get("columns", ())):
        logger.warning(
            "the store has its categories as one-hot features, which the %s kernel takes for numbers, one by one; "
            "convert with --categories codes",
            name,
        )


def tell_heavy_tails(split: Split, scale: Scale, inputs: InputScaling) -> None:
    """Says which numbers are bent for their long tails, or lie more than 30 standard deviations from their mean."""
    names = split.manifest.feature_names
    if bent := [names[j] for j, bend in enumerate(inputs.bends) if bend]:
        logger.info(
            "%d of %d columns have long tails and are bent by asinh: %s%s",
            len(bent),
            len(names),
            ", ".join(bent[:_TOLD_TAILS]),
            ", ..." if len(bent) > _TOLD_TAILS else "",
        )
    if scale != "standard":
        return
    left_out = {*code_features(split.manifest), *zero_one_features(split.manifest)}
    features, far = split.info.features, []
    for number, name in enumerate(names):
        mean, std = features.mean[number], features.std[number]
        low, high = mean - features.minimum[number], features.maximum[number] - mean
        # Of two values only: then std^2 = low high.
        if number in left_out or not std or std**2 > (1 - 1e-3) * low * high:
            continue
        if (reach := max(low, high) / std) > _FAR:
            far.append((reach, name))
    if far:
        far.sort(reverse=True)
        shown = ", ".join(f"{name!r} ({reach:.0f})" for reach, name in far[:_TOLD_TAILS])
        logger.warning(
            "values lie more than %d standard deviations from the mean in %s%s; a distance sees little but these: "
            "--scale auto bends them",
            _FAR,
            shown,
            ", ..." if len(far) > _TOLD_TAILS else "",
        )
