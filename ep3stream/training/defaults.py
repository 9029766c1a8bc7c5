"""What a fit does where its settings leave it open (`auto`): the kernel, the number of centers, epochs and patience.

The choice is made once, with the set-up, and recorded there: a resumed fit takes it from the record.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from ep3stream.config import FitConfig, KernelConfig
from ep3stream.mesh import Mesh
from ep3stream.solver.column_weights import FEWEST_ROWS
from ep3stream.solver.columns import COLUMN_KERNELS
from ep3stream.solver.kernels import CallableKernel, Kernel, KernelFunction
from ep3stream.solver.named_kernels import measured_kernel
from ep3stream.solver.set_up import MIN_BATCH
from ep3stream.training.budget import PATIENCE, USED_SHARE, FitSizes, SizeLimits, Speed, sizes_for
from ep3stream.training.column_kernel import plain_kernel
from ep3stream.training.effects import MOST_ROWS, wants_effects
from ep3stream.training.plan import ProblemSize, largest_model

logger = logging.getLogger(__name__)

# Each column in use costs a kernel on columns a few passes over a block, a kernel of distances one product for all of
# them. Of many columns few matter, as a rule, and learning leaves out the others: with 300 and 1000 columns, 6 of which
# matter, `product` had an R2 of .99 and .98, laplacian of .43 and .26; on images, 784 pixels, it lost .003 of accuracy.
MOST_COLUMNS = 1000
# Of the minutes, for the steps, however long the set-up took.
_LEAST_SHARE = 0.5
# A fit that is expected to take so many times its minutes warns of it.
_LATE = 1.25


def with_kernel(config: FitConfig, n_columns: int, n_rows: int) -> FitConfig:
    """The config with the kernel that `auto` stands for, in the one place where this is decided.

    n_columns: features, a category that is stored as codes being one. n_rows: to learn the weights of columns from.
    """
    kernel = config.kernel
    if kernel.name != "auto":
        return config
    is_narrowed = config.data.metric != "none" or config.data.inputs_rank not in ("auto", "full")
    precision = config.solver.precision
    is_short = precision not in ("auto", "float32")
    is_of_distances = is_narrowed or kernel.bandwidth != "median" or is_short
    is_of_columns = kernel.power is not None or kernel.sharpness != 1
    if not is_of_columns and (is_of_distances or n_columns > MOST_COLUMNS or n_rows < FEWEST_ROWS):
        has_another_reason = is_narrowed or kernel.bandwidth != "median" or n_columns > MOST_COLUMNS
        if is_short and n_rows >= FEWEST_ROWS and not has_another_reason:
            logger.warning(
                "precision is %s, which is for kernels of distances, so that the kernel is laplacian; on most tables "
                "product, which a fit in float32 takes, is more accurate",
                precision,
            )
        # Of a kernel that is left open, by other settings too, the linear part is as well.
        solver = config.solver
        if solver.linear == "auto" and not is_of_distances:
            solver = replace(solver, linear="tried")
        return replace(config, kernel=replace(kernel, name="laplacian"), solver=solver)
    return replace(config, kernel=replace(kernel, name="product"))


def is_timed(config: FitConfig) -> bool:
    """Whether the minutes of the run choose the centers or the epochs."""
    return config.run.minutes > 0 and "auto" in (config.solver.centers, config.solver.epochs)


def size_limits(
    shape: ProblemSize,
    config: FitConfig,
    n_centers: int | None,
    n_validated: int,
    memory_bytes: int,
    devices: int,
    most_distinct: int | None = None,
) -> SizeLimits:
    """What bounds the sizes of a fit. n_centers: the number that is given, None to have it chosen."""
    solver = config.solver
    decent = replace(solver, batch_size=solver.batch_size or max(1, min(MIN_BATCH, shape.n_left // 64)))
    return SizeLimits(
        shape.n_left,
        largest_model(shape, decent, memory_bytes, devices),
        n_validated,
        n_centers,
        None if solver.epochs == "auto" else float(solver.epochs),
        most_distinct=most_distinct,
        n_for_effects=min(shape.n_left, MOST_ROWS)
        if n_validated and wants_effects(config, shape.n_outputs)
        else 0,
    )


def typical_kernel(
    settings: KernelConfig, function: KernelFunction | None, x: Tensor, categories: Iterable[int]
) -> Kernel:
    """A kernel that takes as long as the one of the settings, where no column is left out for having no weight.

    x: (n, d), scaled rows; categories: the numbers of the features that are codes.
    """
    if function is not None:
        return CallableKernel.checked(function, x)
    if settings.name in COLUMN_KERNELS:
        return plain_kernel(settings, x.shape[1], categories)
    if settings.parameters().get("bandwidth") == "median":
        settings = replace(settings, bandwidth=max(1.0, x.shape[1] ** 0.5))
    return measured_kernel(settings, x, x.mean(0))


def with_sizes(config: FitConfig, limits: SizeLimits, speed: Speed, spent_s: float, mesh: Mesh) -> FitConfig:
    """The config with the centers, epochs and patience that are open settled by the minutes, which is told in the log.

    spent_s: seconds of the set-up so far. All ranks take over the leader's choice.
    """

    def choose() -> list[Any]:
        sizes, doubled = (
            sizes_for(
                limits.at(speed), _seconds_left(60 * minutes * USED_SHARE, spent_s) / speed.evaluation_s
            )
            for minutes in (config.run.minutes, 2 * config.run.minutes)
        )
        return [asdict(sizes), asdict(doubled)]

    sizes, doubled = (FitSizes(**each) for each in mesh.broadcast_object(choose))
    is_patient = config.solver.epochs == "auto" and limits.n_validated > 0
    settled = config.settled(
        {
            "centers": sizes.n_centers,
            "epochs": int(sizes.epochs) if sizes.epochs == int(sizes.epochs) else sizes.epochs,
            "patience": PATIENCE if is_patient else 0,
        }
    )
    logger.info(told(sizes, doubled, config, settled))
    if (late := late_text(config, spent_s)) is not None:
        logger.warning(late)
    return settled


def late_text(config: FitConfig, spent_s: float) -> str | None:
    """The warning of a fit whose set-up, of so many seconds, leaves it no chance to end in its minutes; else None."""
    seconds = 60 * config.run.minutes
    expected_s = spent_s + _seconds_left(seconds * USED_SHARE, spent_s)
    if expected_s < _LATE * seconds:
        return None
    hint = (
        ", or the kernel laplacian, which learns no weights" if config.kernel.name in COLUMN_KERNELS else ""
    )
    return (
        f"the set-up takes {spent_s:.0f} s of the {seconds:.0f} s that the fit may take, so that it will take some "
        f"{expected_s:.0f} s; give it more minutes{hint}"
    )


def _seconds_left(seconds: float, spent_s: float) -> float:
    """What is left for the steps; where the set-up took long, still a half: a model of no rows serves nobody."""
    return max(seconds - spent_s, _LEAST_SHARE * seconds)


def told(sizes: FitSizes, doubled: FitSizes, config: FitConfig, settled: FitConfig) -> str:
    """What was settled, in a line, with the options that repeat it, and with what twice the minutes would bring."""
    chosen = []
    if config.solver.centers == "auto":
        chosen.append(f"{sizes.n_centers:,} centers")
    if config.solver.epochs == "auto":
        chosen.append(_epochs_text(sizes.epochs))
    options = [
        f"--{name} {getattr(settled.solver, name)}"
        for name in ("centers", "epochs", "patience")
        if getattr(config.solver, name) == "auto" and getattr(settled.solver, name)
    ]
    line = f"{config.run.minutes:g} minutes at most: {', '.join(chosen)} ({' '.join(options)} repeats it)"
    twice = f"{2 * config.run.minutes:g} minutes would allow"
    if doubled.n_centers > sizes.n_centers:
        return f"{line}; {twice} {doubled.n_centers:,} centers"
    if doubled.epochs > sizes.epochs:
        return f"{line}; {twice} {_epochs_text(doubled.epochs)}"
    return f"{line}; a larger --memory would allow more centers" if sizes.limit == "memory" else line


def _epochs_text(epochs: float) -> str:
    return f"{epochs:g} epoch" + ("" if epochs == 1 else "s")


def choices_of(asked: FitConfig, config: FitConfig, n_centers: int, speed: Speed | None) -> dict[str, Any]:
    """What `asked` has left open and `config` has settled, by the names of the settings, for the record as JSON.

    speed: where it was measured.
    """
    choices: dict[str, Any] = {}
    if asked.kernel.name == "auto" != config.kernel.name:
        choices["kernel"] = config.kernel.name
    if asked.solver.centers == "auto":
        choices["centers"] = n_centers
    if asked.solver.epochs == "auto":
        choices["epochs"] = config.solver.used_epochs
    if asked.solver.patience == "auto":
        choices["patience"] = config.solver.used_patience
    if speed is not None:
        choices |= {"minutes": asked.run.minutes, "seconds_per_evaluation": speed.evaluation_s}
    return choices
