"""`ep3stream tune`: chooses kernel, bandwidth, ridge and feature scales on a sample of a store."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from ep3stream.config import KERNEL_DEFAULTS, FitConfig, KernelConfig, KernelName
from ep3stream.disk import write_file
from ep3stream.errors import ConfigError
from ep3stream.run.text import table_text
from ep3stream.solver.columns import COLUMN_KERNELS
from ep3stream.store.files import Location, ObjectUrl
from ep3stream.store.reader import SplitReader, open_store
from ep3stream.stream.order import sample_rows
from ep3stream.training.set_up import input_scaling, shape_of, target_code
from ep3stream.tuning.halving import Deadline, Rung, Sample, Search, Trial

DEFAULT_KERNELS: tuple[KernelName, ...] = ("laplacian", "matern32", "matern52", "gaussian")

Criterion = Literal["mse", "accuracy"]

# The random streams of `sample_rows` from which the rows to fit and the held-out rows are drawn.
_FIT_STREAM, _HELD_OUT_STREAM = 5, 6
_LEAST_ROWS = 50
_LEAST_CENTERS = 60

# Without --centers the largest trial takes n p^2 of this: some 5 s on 4 cores.
_MOST_WORK = 18000 * 2250**2

# The limits of n/p in a trial, and n/p where the number of centers of the fit is not known.
_ROWS_PER_CENTER = (4, 32)
_USUAL_ROWS_PER_CENTER = 8
_AUTO_CENTERS = 5000
_HELD_OUT_PER_CENTER = 2

# The table of trials.
_MAX_LINES = 20
_COLUMNS = ("", "kernel", "bandwidth", "ridge", "scaled", "rows", "mse")
_NAME_WIDTH = 20


@dataclass(frozen=True, slots=True)
class TuneResult:
    """The result of `tune`: settings for `fit`, and the trials on which they were chosen.

    table: all trials, those on most rows first, among these the best first. notes: sentences about what limits the
    choice. n_rows: the rows of the split, for which the ridge is meant.
    """

    config: FitConfig
    best: Trial
    table: tuple[Trial, ...]
    notes: tuple[str, ...]
    n_rows: int
    elapsed_s: float

    def as_json(self) -> dict[str, Any]:
        """The chosen trial, the file of the feature factors, the notes and all trials, for `--json`."""
        return {
            "best": _record(self.best, self.n_rows),
            "feature_scale": self.config.data.feature_scale,
            "notes": list(self.notes),
            "elapsed_s": self.elapsed_s,
            "trials": [_record(trial, self.n_rows) for trial in self.table],
        }


def tune(
    store: str | Path | ObjectUrl,
    config: FitConfig | None = None,
    *,
    out: str | Path | None = None,
    kernels: Sequence[KernelName] = DEFAULT_KERNELS,
    by: Criterion = "mse",
    feature_scale: bool = False,
    minutes: float = 2.0,
    n_centers: int | None = None,
    force: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> TuneResult:
    """Chooses kernel, bandwidth and ridge for a fit to `store`, and feature factors if `feature_scale`.

    Each candidate is a regularised least squares problem on random centers, solved directly: 20 candidates on a ninth
    of the largest sample, the best third of them on a third of it, and so on. The largest sample has as many rows per
    center as the fit, from 4 to 32 (at 8: 2250 centers and 18000 rows), as far as the rows of the store and
    config.run.memory_bytes allow: 6 p^2 + 3000 p numbers of float64, and the rows three times. The 2 p held-out rows
    are of the split config.data.validate, or else of the fitted split. The ridge for all n rows has the same n lambda.
    The other settings of `config` stay. For a given config.run.seed the result is the same, unless time runs out.

    n_centers: p of the largest sample, whose time grows with p^3; None for what takes seconds.
    out: the TOML file to write, with the feature factors in an NPY file beside it; an existing file is only replaced
    with `force`. Raises ConfigError for settings that contradict each other or the store.
    """
    began = clock()
    config = FitConfig() if config is None else config
    files = None if out is None else _OutputFiles.of(out, force)
    _check(config, kernels, by, feature_scale, minutes, files)
    with open_store(store, config.run.read_timeout_s) as rows:
        reader = rows.split(config.data.split)
        if by == "accuracy" and reader.manifest.task != "classification":
            raise ConfigError("by is 'accuracy', but the store's task is regression; use --by mse")
        held = None if config.data.validate in ("auto", "none", None) else rows.split(config.data.validate)
        rungs = _rungs(reader, held, config, n_centers)
        sample = _read_sample(reader, held, rungs[-1], config)
        n_rows = reader.info.n_rows
    search = Search(sample, rungs, by == "accuracy", Deadline(began + 60 * minutes, clock))
    best = search.run(kernels, feature_scale)
    ridge = 0.0 if config.solver.projection == "eigenpro" else _ridge(best, n_rows)
    tuned = replace(config, kernel=best.kernel, solver=replace(config.solver, ridge=ridge))
    if best.candidate.is_scaled:
        assert files is not None
        assert search.feature_scale is not None
        tuned = replace(tuned, data=replace(tuned.data, feature_scale=str(files.factors)))
        files.write_factors(_of_columns(search.feature_scale, sample.columns))
    if files is not None:
        write_file(files.toml, tuned.to_toml().encode())
    notes = _notes(search, best, tuned)
    table = sorted(search.trials, key=lambda trial: (-trial.rung.n_rows, trial.penalised_loss))
    return TuneResult(tuned, best, tuple(table), notes, n_rows, clock() - began)


@dataclass(frozen=True, slots=True)
class _OutputFiles:
    """Where the settings are written, and the feature factors beside them."""

    toml: Path
    factors: Path

    @classmethod
    def of(cls, out: str | Path, force: bool) -> _OutputFiles:
        """Raises ConfigError if a file exists and `force` is not given, or if there is no such directory."""
        toml = Path(out).absolute()
        files = cls(toml, toml.with_suffix(".scale.npy"))
        for file in (files.toml, files.factors):
            if file.exists() and not force:
                raise ConfigError(f"{file} exists; give another --out, or --force to replace it")
        if not toml.parent.is_dir():
            raise ConfigError(f"out is {str(out)!r}, but {toml.parent} is no directory; make it first")
        return files

    def write_factors(self, factors: Tensor) -> None:
        data = io.BytesIO()
        np.save(data, factors.cpu().numpy())
        write_file(self.factors, data.getvalue())


def default_out(store: Location) -> Path:
    """The TOML file beside the store: data/flights.zarr -> data/flights.tuned.toml.

    For a store in a bucket, a file in the working directory.
    """
    beside = store if isinstance(store, Path) else Path(store.name)
    return beside.absolute().with_suffix(".tuned.toml")


def _check(
    config: FitConfig,
    kernels: Sequence[KernelName],
    by: Criterion,
    feature_scale: bool,
    minutes: float,
    files: _OutputFiles | None,
) -> None:
    if not kernels:
        raise ConfigError("kernels is empty; name at least one, or leave it out")
    for name in kernels:
        KernelConfig(name)  # Raises ConfigError for an unknown name.
        if name in COLUMN_KERNELS:
            raise ConfigError(
                f"kernels has {name!r}, which has no bandwidth to choose: `fit --kernel {name}` learns its weights "
                "itself; leave it out here"
            )
    if by not in get_args(Criterion):
        raise ConfigError(f"by is {by!r}; use mse or accuracy")
    if not 0 < minutes < float("inf"):
        raise ConfigError(f"minutes is {minutes}; use a positive, finite number")
    if feature_scale and files is None:
        raise ConfigError("feature_scale needs a file to keep the factors beside; give out")
    if feature_scale and config.data.feature_scale is not None:
        raise ConfigError(
            f"feature_scale is already {config.data.feature_scale!r} in the settings; leave it out there, "
            "or do not ask for another one"
        )


def _rungs(reader: SplitReader, held: SplitReader | None, config: FitConfig, asked: int | None) -> list[Rung]:
    """The rungs, each a third of the next one.

    The last one has `asked` centers, or as many as the rows, the memory and _MOST_WORK allow. Raises ConfigError if
    there are too few rows, or too little memory even for the smallest one.
    """
    n_rows, memory_bytes = reader.info.n_rows, config.run.memory_bytes
    n_inputs = shape_of(reader, config).n_inputs
    if n_rows < _LEAST_ROWS:
        raise ConfigError(f"split {reader.info.name} has {n_rows} rows; tune needs {_LEAST_ROWS} or more")
    rows_each = _rows_per_center(config, n_rows)
    parts = 1 + rows_each + _HELD_OUT_PER_CENTER * (held is None)
    most = n_rows // parts
    if asked is not None and not _LEAST_CENTERS <= asked <= most:
        raise ConfigError(
            f"centers of tune is {asked}, but split {reader.info.name} has {n_rows} rows, of which each center takes "
            f"{parts}; use {_LEAST_CENTERS} to {most}, or leave it out"
        )
    n_centers = asked or min(int((_MOST_WORK / rows_each) ** (1 / 3)), most)

    def needed(p: int) -> int:
        # The rows as read, scaled, and multiplied by factors; then the memory that RidgePath.of states.
        rows = 3 * 4 * n_inputs * p * (1 + rows_each + _HELD_OUT_PER_CENTER)
        return rows + 8 * (6 * p * p + 3 * 1024 * p)

    while asked is None and needed(n_centers) > memory_bytes and n_centers > _LEAST_CENTERS:
        n_centers = n_centers * 9 // 10
    if needed(n_centers) > memory_bytes:
        raise ConfigError(
            f"memory is {memory_bytes} bytes, but {n_centers} centers with {n_inputs} features take "
            f"{needed(n_centers)}; give tune that much"
        )
    sizes = [n_centers // 9, n_centers // 3, n_centers]
    return [Rung(p, rows_each * p) for p in sizes if p >= _LEAST_CENTERS or p == n_centers]


def _rows_per_center(config: FitConfig, n_rows: int) -> int:
    """n/p of the fit, on which the best ridge and bandwidth depend, within limits."""
    centers = config.solver.centers
    if centers == "auto":
        centers = min(_AUTO_CENTERS, n_rows // 5)
    each = _USUAL_ROWS_PER_CENTER if isinstance(centers, str) else n_rows // centers
    least, most = _ROWS_PER_CENTER
    return min(max(each, least), most)


def _read_sample(reader: SplitReader, held: SplitReader | None, rung: Rung, config: FitConfig) -> Sample:
    """Centers, rows and held-out rows, all different, on the device that a fit would use."""
    seed, p, n = config.run.seed, rung.n_centers, rung.n_rows
    n_held = _HELD_OUT_PER_CENTER * p
    inputs, targets = input_scaling(reader, config), target_code(reader)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def read(source: SplitReader, n_rows: int, stream: int) -> tuple[Tensor, Tensor]:
        x, y = source.read_rows(sample_rows(source.info, n_rows, seed, stream))
        return inputs(torch.from_numpy(x).float()).to(device), torch.from_numpy(y).to(device)

    x, y = read(reader, p + n + n_held * (held is None), _FIT_STREAM)
    if held is None:
        held_x, held_y = x[p + n :], y[p + n :]
    else:
        held_x, held_y = read(held, min(n_held, held.info.n_rows), _HELD_OUT_STREAM)
    columns = inputs.columns.to(device) if inputs.n_codes else None
    return Sample(x[:p], x[p : p + n], y[p : p + n], held_x, held_y, targets.to(device), columns)


def _of_columns(factors: Tensor, columns: Tensor | None) -> Tensor:
    """A factor for each stored column from those of the features, (d,), which are the same within a column."""
    if columns is None:
        return factors
    return factors.new_zeros(int(columns[-1]) + 1).index_copy(0, columns, factors)


def _ridge(trial: Trial, n_rows: int) -> float:
    return float(f"{trial.noise / n_rows:.3g}")


def _notes(search: Search, best: Trial, tuned: FitConfig) -> tuple[str, ...]:
    notes = []
    if search.is_cut_short:
        notes.append("time ran out before every candidate had its turn; more --minutes may find better ones")
    if search.is_at_edge(best):
        notes.append("the best bandwidth lies at the end of those tried; a better one may lie beyond")
    if best.noise and not tuned.solver.ridge:
        notes.append("the ridge is left out: the published method, projection eigenpro, has none")
    return tuple(notes)


def _record(trial: Trial, n_rows: int) -> dict[str, Any]:
    return {
        "kernel": trial.kernel.name,
        **trial.kernel.parameters(),
        "ridge": _ridge(trial, n_rows),
        "feature_scale": trial.candidate.is_scaled,
        "n_centers": trial.rung.n_centers,
        "n_rows": trial.rung.n_rows,
        "mse": trial.mse,
        "r2": trial.r2,
        "accuracy": trial.accuracy,
        "elapsed_s": trial.elapsed_s,
    }


def describe_tuning(result: Mapping[str, Any], *, is_terminal: bool = False) -> str:
    """The trials of `TuneResult.as_json` in 80 columns, those on most rows first, and the notes."""
    score = "r2" if result["best"]["accuracy"] is None else "accuracy"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate((*_COLUMNS, score)):
        table.add_column(name, justify="right" if place > 1 else "left", no_wrap=True)
    for trial in result["trials"][:_MAX_LINES]:
        is_chosen = trial == result["best"]
        table.add_row(*_cells(trial, score, is_chosen), style="bold" if is_chosen else None)
    lines = [table_text(table, is_terminal=is_terminal)]
    if (n_more := len(result["trials"]) - _MAX_LINES) > 0:
        lines.append(f"and {n_more} more on fewer rows; --json has all")
    return "\n".join([*lines, "* chosen", *(f"note: {note}" for note in result["notes"])])


def _cells(trial: Mapping[str, Any], score: str, is_chosen: bool) -> tuple[str, ...]:
    others = [name for name in KERNEL_DEFAULTS[trial["kernel"]] if name != "bandwidth"]
    kernel = " ".join([trial["kernel"], *(f"{trial[name]:g}" for name in others)])
    return (
        "*" if is_chosen else "",
        kernel[:_NAME_WIDTH],
        f"{trial['bandwidth']:.4g}" if "bandwidth" in trial else "-",
        f"{trial['ridge']:.2g}",
        "yes" if trial["feature_scale"] else "no",
        f"{trial['n_rows']:,}",
        f"{trial['mse']:.5g}",
        f"{trial[score]:.4f}",
    )
