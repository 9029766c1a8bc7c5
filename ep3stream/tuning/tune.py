"""Chooses kernel, bandwidth, ridge and feature scales on a sample of a store: `ep3stream tune`.

What `tune` found, as a table of 80 columns for people.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ep3stream.config import KERNEL_DEFAULTS, FitConfig, KernelConfig, KernelName
from ep3stream.disk import write_file
from ep3stream.errors import ConfigError
from ep3stream.store.files import Location, ObjectUrl
from ep3stream.store.reader import SplitReader, open_store
from ep3stream.stream.scan import sample_rows
from ep3stream.training.set_up import input_scaling, target_code
from ep3stream.tuning.halving import Deadline, Rung, Sample, Search, Trial

DEFAULT_KERNELS: tuple[KernelName, ...] = ("laplacian", "matern32", "matern52", "gaussian")

Criterion = Literal["mse", "accuracy"]

_TUNING, _HELD_OUT = 5, 6

_LEAST_CENTERS = 60

_MOST_WORK = 18000 * 2250**2  # of one fit, n p^2: some 5 s on 4 cores

_ROWS_PER_CENTER = (4, 32)

_AUTO_CENTERS = 5000

_HELD_PER_CENTER = 2

_LEAST_ROWS = 50


@dataclass(frozen=True, slots=True)
class TuneResult:
    """What `tune` chose: settings for `fit`, and the trials, those on most rows first and of these the best.

    notes: sentences about what limits the choice. n_rows: those of the split that the ridge is meant for.
    """

    config: FitConfig
    best: Trial
    table: tuple[Trial, ...]
    notes: tuple[str, ...]
    n_rows: int
    elapsed_s: float

    def as_json(self) -> dict[str, Any]:
        """Everything, for `--json`."""
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
    """Kernel, bandwidth and ridge for a fit to `store`, and feature factors if asked for.

    Regularised least squares on random centers, solved directly for each candidate: 20 of them on a ninth of the
    largest sample, the best third on a third of it, and so on. The largest has as many rows per center as the fit,
    from 4 to 32 (at 8, 2250 centers and 18000 rows), as far as rows and config.run.memory_bytes go: 6 p^2 + 3000 p
    numbers of float64, and the rows three times. n_centers: p of the largest, whose time grows with p^3; None for what
    takes seconds. Held-out rows, 2 p, are of config.data.validate, or of the split itself. The ridge is carried over
    to all n rows with n lambda unchanged.
    The other settings of `config` stay. A function of config.run.seed, unless time runs out.

    out: the TOML file to write, with the feature factors in an NPY file beside it; never over another one
    unless `force`. Raises ConfigError for settings that contradict each other or the store.
    """
    began = clock()
    config = FitConfig() if config is None else config
    files = _Files.at(out, force)
    _check(config, kernels, by, feature_scale, minutes, files)
    with open_store(store) as rows:
        reader = rows.split(config.data.split)
        if by == "accuracy" and reader.manifest.task != "classification":
            raise ConfigError("by is 'accuracy', but the store's task is regression; use --by mse")
        held = None if config.data.validate is None else rows.split(config.data.validate)
        rungs = _rungs(reader, held, config, n_centers)
        sample = _sample(reader, held, rungs[-1], config)
        n_rows = reader.info.n_rows
    search = Search(sample, rungs, by == "accuracy", Deadline(began + 60 * minutes, clock))
    best = search.run(kernels, feature_scale)
    tuned = _tuned(config, best, n_rows)
    if best.candidate.is_scaled:
        assert files is not None
        assert search.feature_scale is not None
        tuned = replace(tuned, data=replace(tuned.data, feature_scale=str(files.factors)))
        files.write_factors(search.feature_scale)
    if files is not None:
        write_file(files.toml, tuned.to_toml().encode())
    notes = _notes(search, best, tuned)
    table = sorted(search.trials, key=lambda trial: (-trial.rung.n_rows, trial.rank))
    return TuneResult(tuned, best, tuple(table), notes, n_rows, clock() - began)


@dataclass(frozen=True, slots=True)
class _Files:
    """Where the settings go, and the feature factors beside them."""

    toml: Path
    factors: Path

    @classmethod
    def at(cls, out: str | Path | None, force: bool) -> _Files | None:
        """None for no files; raises ConfigError where one exists and is not to be replaced."""
        if out is None:
            return None
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
    """Beside the store: data/flights.zarr -> data/flights.tuned.toml; for one in a bucket, here."""
    beside = store if isinstance(store, Path) else Path(store.name)
    return beside.absolute().with_suffix(".tuned.toml")


def _check(
    config: FitConfig,
    kernels: Sequence[KernelName],
    by: Criterion,
    feature_scale: bool,
    minutes: float,
    files: _Files | None,
) -> None:
    if not kernels:
        raise ConfigError("kernels is empty; name at least one, or leave it out")
    for name in kernels:
        KernelConfig(name)  # raises ConfigError for a name that is none
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
    """Each a third of the next one; the last of `asked` centers, or as large as rows, memory and work allow."""
    n_rows, d, memory_bytes = reader.info.n_rows, reader.manifest.n_features, config.run.memory_bytes
    if n_rows < _LEAST_ROWS:
        raise ConfigError(f"split {reader.info.name} has {n_rows} rows; tune needs {_LEAST_ROWS} or more")
    rows_each = _rows_per_center(config, n_rows)
    parts = 1 + rows_each + _HELD_PER_CENTER * (held is None)
    most = n_rows // parts
    if asked is not None and not _LEAST_CENTERS <= asked <= most:
        raise ConfigError(
            f"centers of tune is {asked}, but split {reader.info.name} has {n_rows} rows, of which each center takes "
            f"{parts}; use {_LEAST_CENTERS} to {most}, or leave it out"
        )
    n_centers = asked or min(int((_MOST_WORK / rows_each) ** (1 / 3)), most)

    def needed(p: int) -> int:
        # Rows as read, scaled, and scaled by factors; then what RidgePath.of says.
        rows = 3 * 4 * d * p * (1 + rows_each + _HELD_PER_CENTER)
        return rows + 8 * (6 * p * p + 3 * 1024 * p)

    while asked is None and needed(n_centers) > memory_bytes and n_centers > _LEAST_CENTERS:
        n_centers = n_centers * 9 // 10
    if needed(n_centers) > memory_bytes:
        raise ConfigError(
            f"memory is {memory_bytes} bytes, but {n_centers} centers with {d} features take "
            f"{needed(n_centers)}; give tune that much"
        )
    sizes = [n_centers // 9, n_centers // 3, n_centers]
    return [Rung(p, rows_each * p) for p in sizes if p >= _LEAST_CENTERS or p == n_centers]


def _rows_per_center(config: FitConfig, n_rows: int) -> int:
    """Those of the fit within limits: what ridge and bandwidth are worth depends on them. 8 for a file of centers."""
    centers = config.solver.centers
    least, most = _ROWS_PER_CENTER
    if centers == "auto":
        centers = min(_AUTO_CENTERS, n_rows // 5)
    each = 8 if isinstance(centers, str) else n_rows // centers
    return min(max(each, least), most)


def _sample(reader: SplitReader, held: SplitReader | None, rung: Rung, config: FitConfig) -> Sample:
    """Centers, rows and held-out rows, no row twice, on the device that a fit would use."""
    seed, p, n = config.run.seed, rung.n_centers, rung.n_rows
    n_held = _HELD_PER_CENTER * p
    inputs, targets = input_scaling(reader, config), target_code(reader)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def read(source: SplitReader, n_rows: int, stream: int) -> tuple[Tensor, Tensor]:
        x, y = source.read_rows(sample_rows(source.info, n_rows, seed, stream))
        return inputs(torch.from_numpy(x).float()).to(device), torch.from_numpy(y).to(device)

    x, y = read(reader, p + n + n_held * (held is None), _TUNING)
    if held is None:
        held_x, held_y = x[p + n :], y[p + n :]
    else:
        held_x, held_y = read(held, min(n_held, held.info.n_rows), _HELD_OUT)
    return Sample(x[:p], x[p : p + n], y[p : p + n], held_x, held_y, targets.to(device))


def _tuned(config: FitConfig, best: Trial, n_rows: int) -> FitConfig:
    ridge = 0.0 if config.solver.projection == "eigenpro" else _ridge(best, n_rows)
    solver = replace(config.solver, ridge=ridge)
    return replace(config, kernel=best.kernel, solver=solver)


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


_WIDTH = 80

_MAX_LINES = 20

_COLUMNS = ("", "kernel", "bandwidth", "ridge", "scaled", "rows", "mse")

_LONGEST_NAME = 20


def describe_tuning(found: Mapping[str, Any], *, is_terminal: bool = False) -> str:
    """The trials of `TuneResult.as_json`, those on most rows first, and notes; on a terminal with its styles."""
    console = Console(
        file=StringIO(), width=_WIDTH, force_terminal=is_terminal, markup=False, emoji=False, highlight=False
    )
    score = "r2" if found["best"]["accuracy"] is None else "accuracy"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate((*_COLUMNS, score)):
        table.add_column(name, justify="right" if place > 1 else "left", no_wrap=True)
    for trial in found["trials"][:_MAX_LINES]:
        chosen = trial == found["best"]
        table.add_row(*_cells(trial, score, chosen), style="bold" if chosen else None)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    if (n_more := len(found["trials"]) - _MAX_LINES) > 0:
        lines.append(f"and {n_more} more on fewer rows; --json has all")
    return "\n".join([*lines, "* chosen", *(f"note: {note}" for note in found["notes"])])


def _cells(trial: Mapping[str, Any], score: str, is_chosen: bool) -> tuple[str, ...]:
    others = [name for name in KERNEL_DEFAULTS[trial["kernel"]] if name != "bandwidth"]
    kernel = " ".join([trial["kernel"], *(f"{trial[name]:g}" for name in others)])
    return (
        "*" if is_chosen else "",
        kernel[:_LONGEST_NAME],
        f"{trial['bandwidth']:.4g}" if "bandwidth" in trial else "-",
        f"{trial['ridge']:.2g}",
        "yes" if trial["feature_scale"] else "no",
        f"{trial['n_rows']:,}",
        f"{trial['mse']:.5g}",
        f"{trial[score]:.4f}",
    )
