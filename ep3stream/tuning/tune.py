"""`ep3stream tune`: chooses kernel, bandwidth or sharpness, and ridge for a fit to a store, or keeps the default."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.table import Table
from torch import Tensor

from ep3stream.config import KERNEL_DEFAULTS, FitConfig, KernelConfig, KernelName
from ep3stream.disk import write_file
from ep3stream.errors import ConfigError
from ep3stream.mesh import Mesh
from ep3stream.run.text import table_text
from ep3stream.solver.columns import COLUMN_KERNELS
from ep3stream.solver.gpu import usual_device
from ep3stream.store.files import Location, ObjectUrl
from ep3stream.store.reader import RowStore, SplitReader, open_store
from ep3stream.stream.order import Rows, sample_rows
from ep3stream.training.centers import CenterSource
from ep3stream.training.defaults import MOST_COLUMNS, with_kernel
from ep3stream.training.measured_sizes import with_expected_sizes
from ep3stream.training.plan import automatic_centers, memory_budget, on_device
from ep3stream.training.problem import require_varied_features, require_varied_targets, shape_of
from ep3stream.training.validation import ValidationRows
from ep3stream.tuning.search import Search, Verdict, first_candidates, rungs
from ep3stream.tuning.trials import Candidate, Trial, TrialFits, paired

DEFAULT_KERNELS: tuple[KernelName, ...] = (
    "laplacian", "matern32", "matern52", "gaussian", "product", "anova",
)  # fmt: skip

Criterion = Literal["mse", "accuracy"]

# The random streams of `sample_rows` from which the rows to fit and the held-out rows are drawn.
_FIT_STREAM, _HELD_OUT_STREAM = 5, 6
_LEAST_ROWS, _LEAST_CENTERS = 50, 10
_MOST_HELD, _HELD_SHARE = 50_000, 1 / 5

# Rows in memory take at most this part of it. A kernel on more columns is slow, and tried only where it is asked for.
_SAMPLE_SHARE = 1 / 4

# What is held back of the time, since fits take longer than was reckoned now and then.
_USED_SHARE = 0.95
# Told where the constant is not beaten by so many standard errors, and where the choice takes so much longer.
_BEATEN, _SLOWER = 2.0, 1.25

# The table of trials.
_MAX_LINES = 20
_COLUMNS = ("", "kernel", "width", "ridge", "centers", "rows")
_NAME_WIDTH = 22
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TuneResult:
    """The result of `tune`: settings for `fit`, and the trials on which they were chosen.

    config: that which was given, if nothing was better. table: all trials, those on most rows first, among these the
    best first. notes: sentences about the choice and what limits it. n_rows: the rows of the split, for which the
    ridge is meant; n_held: held-out rows.
    """

    config: FitConfig
    best: Trial
    default: Trial
    table: tuple[Trial, ...]
    notes: tuple[str, ...]
    n_rows: int
    n_held: int
    elapsed_s: float

    def as_json(self) -> dict[str, Any]:
        """The chosen trial, that of the default on the same rung, the notes and all trials, for `--json`."""
        defaults = {trial.size: trial for trial in self.table if trial.candidate == self.default.candidate}

        def record(trial: Trial) -> dict[str, Any]:
            return _record(trial, defaults.get(trial.size), self.n_rows)

        return {
            "best": record(self.best),
            "default": record(self.default),
            "keeps_default": self.best is self.default,
            "n_held": self.n_held,
            "notes": list(self.notes),
            "elapsed_s": self.elapsed_s,
            "trials": [record(trial) for trial in self.table],
        }


def tune(
    store: str | Path | ObjectUrl,
    config: FitConfig | None = None,
    *,
    out: str | Path | None = None,
    kernels: Sequence[KernelName] | None = None,
    by: Criterion = "mse",
    minutes: float = 5.0,
    n_centers: int | None = None,
    force: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> TuneResult:
    """Chooses kernel, bandwidth or sharpness, and ridge for a fit to `store`, or keeps those of `config`.

    Candidates are fitted as `fit` does it, to ever more rows and centers until those of the fit are reached or the
    time is used, and compared on the same held-out rows: 50,000 of the split that the fit validates on, or else of the
    fitted split, a fifth of it at most. The settings of `config`, which are the default, are a candidate on every
    rung. They are kept unless another one is better by more than two standard errors of the paired difference. The
    ridge for all n rows has the n lambda of the trials.

    kernels: the names to try; None for laplacian, matern32, matern52 and gaussian, product and anova. n_centers: p of
    the largest trial; None for that of the fit. minutes: how long it may take. The rows of the sample take a quarter
    of config.run.memory_bytes at most. For a given config.run.seed and number of centers trials are the same on every
    machine, but which of them there is time for depends on its speed. out: the TOML file to write; an existing file is
    only replaced with `force`. Raises ConfigError for settings that contradict each other or the store.
    """
    began = clock()
    config = FitConfig() if config is None else config
    file = None if out is None else _writable(out, force)
    _check(kernels, by, minutes)
    with open_store(store, config.run.read_timeout_s) as rows:
        reader = rows.split(config.data.split)
        if by == "accuracy" and reader.manifest.task != "classification":
            raise ConfigError("by is 'accuracy', but the store's task is regression; use --by mse")
        if reader.info.n_rows < _LEAST_ROWS:
            raise ConfigError(
                f"split {reader.info.name} has {reader.info.n_rows} rows; tune needs {_LEAST_ROWS} or more"
            )
        asked, config = config, with_kernel(config, reader.manifest.n_features, reader.info.n_rows)
        require_varied_features(reader)
        require_varied_targets(reader)
        numbers, held = _sampled(rows, reader, config)
        most = _most_centers(rows, reader, config, len(numbers), n_centers, clock)
        fits = TrialFits(reader, numbers, held, config, by == "accuracy", most, clock)
        search = Search(
            fit=fits.fit,
            learning_seconds=fits.learning_seconds,
            bandwidth=fits.bandwidth,
            sizes=rungs(len(numbers), most),
            ends_at=began + _USED_SHARE * 60 * minutes,
            has_one_ridge=fits.has_one_ridge,
            clock=clock,
        )
        n_rows = reader.info.n_rows
        default = Candidate(config.kernel, _noise(config, n_rows))
        names = _default_names(reader, config) if kernels is None else kernels
        verdict = search.run(first_candidates(default, names, fits.bandwidth))
        constant = fits.constant_losses()
    tuned = asked if verdict.is_default else _with_choice(config, verdict.best.candidate, n_rows)
    if file is not None:
        write_file(file, tuned.to_toml().encode())
    notes = tuple(_notes(search, verdict, constant, by))
    table = sorted(search.trials, key=lambda trial: (-trial.size.n_rows, trial.loss))
    return TuneResult(
        tuned, verdict.best, verdict.default, tuple(table), notes, n_rows, len(held[1]), clock() - began
    )


def default_out(store: Location) -> Path:
    """The TOML file beside the store: data/flights.zarr -> data/flights.tuned.toml.

    For a store in a bucket, a file in the working directory.
    """
    beside = store if isinstance(store, Path) else Path(store.name)
    return beside.absolute().with_suffix(".tuned.toml")


def _writable(out: str | Path, force: bool) -> Path:
    """The file's path; ConfigError if it exists and `force` is not given, or if there is no such directory."""
    file = Path(out).absolute()
    if file.exists() and not force:
        raise ConfigError(f"{file} exists; give another --out, or --force to replace it")
    if not file.parent.is_dir():
        raise ConfigError(f"out is {str(out)!r}, but {file.parent} is no directory; make it first")
    return file


def _check(kernels: Sequence[KernelName] | None, by: Criterion, minutes: float) -> None:
    if kernels is not None and not kernels:
        raise ConfigError("kernels is empty; name at least one, or leave it out")
    for name in kernels or ():
        KernelConfig(name)  # Raises ConfigError for an unknown name.
    if by not in get_args(Criterion):
        raise ConfigError(f"by is {by!r}; use mse or accuracy")
    if not 0 < minutes < float("inf"):
        raise ConfigError(f"minutes is {minutes}; use a positive, finite number")


def _default_names(reader: SplitReader, config: FitConfig) -> tuple[KernelName, ...]:
    """All of DEFAULT_KERNELS, without those on columns where these are slow or cannot be."""
    if reader.manifest.n_features <= MOST_COLUMNS and config.solver.precision in ("auto", "float32"):
        return DEFAULT_KERNELS
    return tuple(name for name in DEFAULT_KERNELS if name not in COLUMN_KERNELS)


def _most_centers(
    rows: RowStore,
    reader: SplitReader,
    config: FitConfig,
    n_rows: int,
    asked: int | None,
    clock: Callable[[], float],
) -> int:
    """The number of centers of the largest trial, those of the fit unless asked for; ConfigError for too many."""
    most = n_rows // 2
    if asked is not None and not _LEAST_CENTERS <= asked <= most:
        raise ConfigError(
            f"centers of tune is {asked}, but there are {n_rows} rows of split {reader.info.name} to fit; "
            f"use {_LEAST_CENTERS} to {most}, or leave it out"
        )
    if asked is not None:
        return asked
    device = usual_device()
    memory_bytes = memory_budget(config.run.memory_bytes, Mesh(0, 1, device))
    validation = ValidationRows.of(config, rows.manifest)
    shape = on_device(shape_of(reader, config, validation), config.run, device)
    config = with_expected_sizes(reader, config, None, validation, shape, memory_bytes, device, clock=clock)
    return min(most, CenterSource.of(config, reader, automatic_centers(shape)).n_centers)


def _sampled(rows: RowStore, reader: SplitReader, config: FitConfig) -> tuple[Rows, tuple[Tensor, Tensor]]:
    """Numbers of the rows to fit, in random order, and x and y of the held-out rows."""
    seed, info = config.run.seed, reader.info
    validated = ValidationRows.of(config, rows.manifest).split
    if validated in (None, info.name):
        source, n_held = reader, min(int(info.n_rows * _HELD_SHARE), _MOST_HELD)
    else:
        source = rows.split(str(validated))
        n_held = min(source.info.n_rows, _MOST_HELD)
    n_taken = n_held if source is reader else 0
    row_bytes = 4 * (reader.manifest.n_features + reader.manifest.n_outputs)
    most = max(_LEAST_ROWS, int(config.run.memory_bytes * _SAMPLE_SHARE) // row_bytes)
    numbers = sample_rows(info, min(info.n_rows, n_taken + most), seed, _FIT_STREAM)
    held = numbers[:n_taken] if n_taken else sample_rows(source.info, n_held, seed, _HELD_OUT_STREAM)
    x, y = source.read_rows(held)
    return numbers[n_taken:], (torch.from_numpy(x).float(), torch.from_numpy(y))


def _noise(config: FitConfig, n_rows: int) -> float | None:
    """n lambda of the settings; None where the fit finds it."""
    solver = config.solver
    return None if solver.ridge is None and solver.projection != "eigenpro" else solver.used_ridge * n_rows


def _ridge(candidate: Candidate, n_rows: int) -> float | None:
    return None if candidate.noise is None else float(f"{candidate.noise / n_rows:.3g}")


def _with_choice(config: FitConfig, chosen: Candidate, n_rows: int) -> FitConfig:
    """The settings with the chosen kernel and ridge; the ridge as it was where it was not changed."""
    ridge = config.solver.ridge
    if chosen.noise != _noise(config, n_rows):
        ridge = _ridge(chosen, n_rows)
    return replace(config, kernel=chosen.kernel, solver=replace(config.solver, ridge=ridge))


def _notes(search: Search, verdict: Verdict, constant: Tensor, by: Criterion) -> list[str]:
    """What was chosen and by how much it is better, and what limits the choice."""
    best, default, notes = verdict.best, verdict.default, []
    others = [trial for trial in search.trials if trial.size == default.size and trial is not default]
    n_held = len(default.losses)
    score = (
        "the mse"
        if default.r2 is None and by == "mse"
        else "R2"
        if default.r2 is not None
        else "the accuracy"
    )
    if not others:
        notes.append(
            f"there was no time to try anything but the default, a fit of {default.elapsed_s:.0f} s; give more "
            "--minutes"
        )
    elif verdict.is_default:
        excess, error = min((trial.excess(default) for trial in others), key=lambda pair: pair[0])
        notes.append(
            "nothing tried beats the default by more than two standard errors: the best of the others is "
            f"{_gain(excess)} by {abs(excess):.2g} +- {error:.2g} in {score} on {n_held:,} held-out rows; keep the "
            "default"
        )
    else:
        excess, error = best.excess(default)
        notes.append(
            f"better than the default by {-excess:.2g} +- {error:.2g} in {score} on {n_held:,} held-out rows, "
            f"with {best.size.n_centers:,} centers and {best.size.n_rows:,} rows each"
        )
        if best.elapsed_s > _SLOWER * default.elapsed_s:
            notes.append(
                f"such a fit takes {best.elapsed_s / default.elapsed_s:.1f} times as long as the default"
            )
    gain, error = paired(constant, best.losses)
    if gain <= _BEATEN * error:
        known = "the mean of the targets" if best.accuracy is None else "the frequencies of the classes"
        notes.append(
            f"nothing tried is better than {known} by two standard errors ({gain:.2g} +- {error:.2g} in {score}): "
            "either these inputs tell nothing of the targets, or it takes more rows and centers to see it"
        )
    if search.late:
        notes.append(
            f"there was no time for {len(search.late)} trials more; more --minutes may find better ones"
        )
    full = search.sizes[-1]
    if best.size.n_centers < full.n_centers:
        notes.append(
            f"the fit will have {full.n_centers:,} centers; there was no time for trials of more than "
            f"{best.size.n_centers:,}"
        )
    return notes


def _gain(excess: float) -> str:
    return "worse" if excess > 0 else "better"


def _record(trial: Trial, default: Trial | None, n_rows: int) -> dict[str, Any]:
    kernel = trial.candidate.kernel
    excess, error = (None, None) if default is None else trial.excess(default)
    return {
        "kernel": kernel.name,
        **kernel.parameters(),
        "sharpness": kernel.sharpness,
        "ridge": _ridge(trial.candidate, n_rows),
        "n_centers": trial.size.n_centers,
        "n_rows": trial.size.n_rows,
        "mse": trial.mse,
        "r2": trial.r2,
        "accuracy": trial.accuracy,
        "loss": trial.loss,
        "better_by": None if excess is None else -excess,
        "standard_error": error,
        "elapsed_s": trial.elapsed_s,
    }


def describe_tuning(result: Mapping[str, Any], *, is_terminal: bool = False) -> str:
    """The trials of `TuneResult.as_json` in 80 columns, those on most rows first, and the notes."""
    score = "r2" if result["best"]["accuracy"] is None else "accuracy"
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for place, name in enumerate((*_COLUMNS, score, "better by")):
        table.add_column(name, justify="right" if place > 1 else "left", no_wrap=True)
    for trial in result["trials"][:_MAX_LINES]:
        is_chosen = trial == result["best"]
        mark = "*" if is_chosen else "d" if trial == result["default"] else ""
        table.add_row(mark, *_cells(trial, score), style="bold" if is_chosen else None)
    lines = [table_text(table, is_terminal=is_terminal)]
    if (n_more := len(result["trials"]) - _MAX_LINES) > 0:
        lines.append(f"and {n_more} more; --json has all")
    legend = "* chosen: the default" if result["keeps_default"] else "* chosen, d the default"
    return "\n".join([*lines, legend, *(f"note: {note}" for note in result["notes"])])


def _cells(trial: Mapping[str, Any], score: str) -> tuple[str, ...]:
    others = [name for name in KERNEL_DEFAULTS[trial["kernel"]] if name != "bandwidth"]
    kernel = " ".join([trial["kernel"], *(f"{trial[name]:g}" for name in others)])
    width = trial.get("bandwidth", f"/{trial['sharpness']:.3g}" if "power" in trial else "-")
    better = ""
    if trial["standard_error"]:
        better = f"{trial['better_by']:+.4f}±{trial['standard_error']:.4f}".replace("0.", ".")
    return (
        kernel[:_NAME_WIDTH],
        width if isinstance(width, str) else f"{width:.4g}",
        "auto" if trial["ridge"] is None else f"{trial['ridge']:.2g}",
        f"{trial['n_centers']:,}",
        f"{trial['n_rows']:,}",
        f"{trial[score]:.4f}",
        better,
    )
