"""A learnt metric for kernels of distances: rounds of fit, average gradient outer product, new metric.

Radhakrishnan, Beaglehole, Pandit, Belkin, "Mechanism for feature learning in neural networks and backpropagation-free
machine learning models", Science 2024. Each round is a run of its own in RUN/rounds, with its checkpoints, at most an
epoch long; a killed fit goes on in the round that it was in. The fit itself takes the metric whose round had the
smallest error on the rows that are validated.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ep3stream.config import FitConfig, on_resume
from ep3stream.disk import remove
from ep3stream.errors import ConfigError
from ep3stream.mesh import Mesh
from ep3stream.prediction.models import load
from ep3stream.run.bundle import Bundle, read_bundle, read_description, write_bundle
from ep3stream.run.directory import RunDirectory
from ep3stream.run.event_log import read_lines
from ep3stream.run.setup import Setup
from ep3stream.solver.gradients import GradientProducts, metric_diagonal, metric_directions
from ep3stream.solver.input_scaling import InputScaling
from ep3stream.solver.kernels import RADIAL_KERNELS, KernelFunction, RadialKernel
from ep3stream.store.reader import SplitReader
from ep3stream.stream.order import Rows, sample_rows
from ep3stream.training.defaults import with_kernel
from ep3stream.training.problem import shape_of
from ep3stream.training.set_up import LearntMetric
from ep3stream.training.validation import ValidationRows

logger = logging.getLogger(__name__)

_KIND = "round of a metric"
# Gradients are taken at so many rows, so many at a time.
_GRADIENT_ROWS, _ROWS_AT_ONCE = 20_000, 1024
_STREAM, _SIGNS = 10, 11
# A whole metric is D x D numbers in float64.
_MOST_INPUTS = 4096
_TOLD_COLUMNS = 20
# Of the minutes of a fit, for its rounds.
ROUNDS_SHARE = 0.5

# Fits to the directory with these settings and metric, on all ranks.
FitRound = Callable[[RunDirectory, FitConfig, LearntMetric], None]


@dataclass(frozen=True, slots=True)
class _Round:
    """A finished round. error: on the validated rows. directions: of the next round. shares: (d,), of the columns."""

    error: float
    directions: Tensor
    shares: list[float]


def require_metric(config: FitConfig, function: KernelFunction | None, reader: SplitReader) -> None:
    """ConfigError where a metric is asked for that the kernel cannot have, or without rows to choose a round by."""
    metric = config.data.metric
    if metric == "none":
        return
    config = with_kernel(config, reader.manifest.n_features, reader.info.n_rows)
    name = config.kernel.name if function is None else "callable"
    if name not in RADIAL_KERNELS:
        raise ConfigError(
            f"metric is {metric!r}, but the {name} kernel takes no distances; leave it out, or take a kernel such as "
            "laplacian"
        )
    n_inputs = shape_of(reader, config).n_inputs
    if metric == "full" and n_inputs > _MOST_INPUTS:
        raise ConfigError(
            f"metric is 'full', but there are {n_inputs} inputs, more than {_MOST_INPUTS}; use --metric diagonal"
        )
    if ValidationRows.of(config, reader.manifest).split is None:
        raise ConfigError(
            f"metric is {metric!r}, but no rows are validated, by which the best round is chosen; give a split with "
            "--validate, or leave metric out"
        )


def learn_metric(
    directory: RunDirectory, reader: SplitReader, config: FitConfig, fit_round: FitRound, mesh: Mesh
) -> LearntMetric:
    """The metric that the settings ask for, all ranks together; rounds that are finished are read, not made again.

    Ends with the first round that is no better than all before. Raises what a fit raises.
    """
    began = time.perf_counter()
    settings = round_settings(config, reader)
    mesh.on_leader(lambda: _drop_others(directory, settings, reader))
    rounds: list[_Round] = []
    while len(rounds) <= config.data.metric_rounds and _improves(rounds):
        place = RunDirectory(directory.rounds / f"round-{len(rounds)}")
        if not mesh.broadcast_object(_result(place).is_dir):
            fit_round(place, settings, LearntMetric(rounds[-1].directions if rounds else None))
            _write_result(place, reader, config, mesh)
        rounds.append(_finished_round(place, mesh))
        logger.info("metric, round %d: validation error %.5g", len(rounds) - 1, rounds[-1].error)
    errors = [each.error for each in rounds]
    best = errors.index(min(errors))
    if best:
        logger.info("metric: that of round %d is taken", best)
    else:
        logger.warning("metric: none is better than distances without one, which are taken")
    shares, names = rounds[best].shares, reader.manifest.feature_names
    order = sorted(range(len(shares)), key=lambda j: -shares[j])[:_TOLD_COLUMNS]
    told = {
        "kind": config.data.metric,
        "errors": [error if math.isfinite(error) else None for error in errors],
        "round": best,
        "columns": [{"name": names[j], "importance": shares[j]} for j in order],
    }
    directions = rounds[best - 1].directions if best else None
    return LearntMetric(directions, told, time.perf_counter() - began)


def _finished_round(place: RunDirectory, mesh: Mesh) -> _Round:
    """The result of a round on every rank. What else the round has is removed: the next one takes as much again."""

    def read() -> Bundle:
        found = read_bundle(_result(place), _KIND)
        for item in (place.setup, place.checkpoints, place.model):
            remove(item)
        return found

    bundle = mesh.on_leader(read)
    told = mesh.broadcast_object(lambda: None if bundle is None else bundle.description)
    directions = mesh.replicate(None if bundle is None else bundle.tensors["directions"])
    return _Round(math.inf if told["error"] is None else told["error"], directions, told["shares"])


def _improves(rounds: Sequence[_Round]) -> bool:
    """Whether the last round is better than all before, so that another may be better still."""
    return len(rounds) < 2 or rounds[-1].error < min(each.error for each in rounds[:-1])


def round_settings(config: FitConfig, reader: SplitReader) -> FitConfig:
    """Of each round: an epoch at most, its part of half of the minutes, and all inputs: what is left out stays out."""
    config = with_kernel(config, reader.manifest.n_features, reader.info.n_rows)
    epochs = config.solver.epochs
    minutes = ROUNDS_SHARE * config.run.minutes / (config.data.metric_rounds + 1)
    return replace(
        config,
        data=replace(config.data, metric="none", inputs_rank="full"),
        solver=replace(config.solver, epochs=epochs if epochs == "auto" else min(epochs, 1)),
        run=replace(config.run, minutes=minutes, tensorboard=False),
    )


def _drop_others(directory: RunDirectory, settings: FitConfig, reader: SplitReader) -> None:
    """Removes rounds of other settings or of another store: before the set-up nothing depends on either."""
    first = RunDirectory(directory.rounds / "round-0")
    if not first.config.exists():
        return
    is_other = bool(set(first.read_config().differences(settings)) - on_resume("free"))
    if _result(first).is_dir():
        made_of = read_description(_result(first), _KIND)["store_fingerprint"]
        is_other = is_other or made_of != reader.manifest.fingerprint
    if is_other:
        remove(directory.rounds)


def _result(place: RunDirectory) -> Path:
    return place.path / "metric"


def _write_result(place: RunDirectory, reader: SplitReader, config: FitConfig, mesh: Mesh) -> None:
    """Takes the gradients of a finished fit and writes the next metric, all ranks together."""
    model = mesh.on_leader(lambda: load(place.path))
    weights = mesh.scatter_rows(None if model is None else model.weights)
    setup = Setup.scattered(mesh.on_leader(lambda: Setup.load(place.setup)), mesh)
    kernel, inputs = setup.kernel(None), setup.inputs().to(mesh.device)
    assert isinstance(kernel, RadialKernel)
    kernel = replace(kernel, centre=kernel.centre.to(mesh.device))
    is_diagonal = config.data.metric == "diagonal"
    points = inputs(setup.tensors["centers"].to(mesh.device))
    products = GradientProducts(
        kernel, points, weights.T.contiguous().to(mesh.device), is_diagonal, mesh, _SIGNS
    )
    spread = _Spread.of(inputs)
    for x in _rows(reader, setup.tensors["excluded_rows"].numpy(), config.run.seed, mesh):
        scaled = inputs.scaled(x.to(mesh.device))
        spread.add(scaled)
        products.add(inputs.directed(scaled))

    def write() -> None:
        directions = None if inputs.directions is None else inputs.directions.cpu()
        worth = metric_diagonal(products.sum, directions) * spread.variance()
        shares = torch.zeros(len(inputs.shift), dtype=torch.float64).index_add(0, inputs.columns, worth)
        lines = read_lines(place.metrics)
        errors = [line["weighted_error"] for line in lines if line.get("kind") == "validation"]
        found = metric_directions(products.sum, directions, is_diagonal)
        write_bundle(
            _result(place),
            _KIND,
            {"directions": found},
            {
                "error": min(filter(math.isfinite, errors), default=None),
                "shares": (shares / shares.sum().clamp_min(torch.finfo(torch.float64).tiny)).tolist(),
                "store_fingerprint": reader.manifest.fingerprint,
            },
        )

    mesh.on_leader(write)


@dataclass(slots=True)
class _Spread:
    """The variance of scaled inputs, (D,), of rows that come block by block."""

    n_rows: int
    sum: Tensor
    squares: Tensor

    @classmethod
    def of(cls, inputs: InputScaling) -> _Spread:
        zeros = torch.zeros(inputs.n_scaled, dtype=torch.float64)
        return cls(0, zeros, zeros.clone())

    def add(self, scaled: Tensor) -> None:
        values = scaled.double().cpu()
        self.n_rows += len(values)
        self.sum += values.sum(0)
        self.squares += values.square().sum(0)

    def variance(self) -> Tensor:
        return (self.squares / self.n_rows - (self.sum / self.n_rows).square()).clamp_min(0)


def _rows(reader: SplitReader, excluded: Rows, seed: int, mesh: Mesh) -> Iterator[Tensor]:
    """x of rows that were trained on, some at a time; each is read by one rank of a machine."""
    n_rows = min(_GRADIENT_ROWS, reader.info.n_rows - len(excluded))
    numbers = np.sort(sample_rows(reader.info, n_rows, seed, _STREAM, without=excluded))
    for some in np.array_split(numbers, -(-n_rows // _ROWS_AT_ONCE)):
        yield mesh.once_per_node(partial(_read, reader, some))[0]


def _read(reader: SplitReader, numbers: Rows) -> list[Tensor]:
    return [torch.from_numpy(reader.read_rows(numbers)[0]).float()]
