"""A kernel machine to be trained batch by batch, on the user's own loader."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ep3stream.config import MIB, KernelConfig, Projection, SolverConfig, StepRule, Task, parse_bytes
from ep3stream.errors import ConfigError, InputError
from ep3stream.online.batch_solver import BatchSolver, BatchSolverSpec, SetupRows
from ep3stream.online.sources import Array, Data, RowForm, Source, StoreSource, source_of
from ep3stream.prediction.models import save_model
from ep3stream.prediction.scores import ClassScores, RegressionScores
from ep3stream.run.directory import RunDirectory
from ep3stream.solver.kernels import CALLABLE, KernelFunction
from ep3stream.solver.model import InputScaling, Predictor
from ep3stream.solver.targets import require_weights_of_task, weighted

_LOGGER = logging.getLogger(__name__)

# 3: with ridge and weights. 2 is read too.
STATE_VERSION = 3

_SOLVER_SETTINGS = (
    "projection", "nystrom_samples", "data_rank", "model_rank", "momentum", "averaging", "step",
    "ridge", "class_weights", "output_weights",
)  # fmt: skip

_SINCE_VERSION_3: dict[str, Any] = {"ridge": 0.0, "class_weights": "none", "output_weights": {}}


class KernelModel:
    """f(x) = sum_i alpha_i K(x, z_i), alpha of (p, c) fitted by least squares, from any source of batches.

        model = KernelModel(centers, "laplacian", n_outputs=10, bandwidth=20.0, task="classification")
        for epoch in range(5):
            model.fit_epoch(loader)
        model.predict(x)

    centers: (p, d), any points; inputs are taken as they are, not scaled. kernel: a name, a KernelConfig, or a
    callable k(x, z) -> (len(x), len(z)); bandwidth: of a kernel given by name.
    task: with `classification`, y are class ids of (m,) or one-hot rows; else values, (m,) or (m, c).
    nystrom_samples: how many rows the preconditioner is made from, or the rows themselves, (s, d).
    data_rank, model_rank: eigenpairs of the preconditioners, 0 for automatic. momentum, averaging, step,
    projection: as in SolverConfig. ridge, class_weights, output_weights: those of `fit`; classes are named by their
    ids, as numbers or texts, or as in the store; targets are `y0`, `y1`, ... or as in the store. `balanced` counts the
    rows of the set-up. memory: bytes on the device, or a text such as `8GiB`.

    The set-up needs rows: `fit` draws them from arrays and stores; from batches the first nystrom_samples + 1024
    rows are held back (1024 if the sample is given), then trained on like all others. So shuffle the loader.
    The end of an epoch, and whatever asks for the model, ends the wait with the rows there are.
    Raises ConfigError for settings, InputError for rows, that do not fit; DivergedError when steps halved three
    times still blow up, the last good weights in place. An epoch whose model is no better than predicting the mean of
    the targets ends with a warning. Nothing is printed; torch's random state is not touched.
    """

    def __init__(
        self,
        centers: Array,
        kernel: str | KernelConfig | KernelFunction = "laplacian",
        n_outputs: int = 1,
        *,
        bandwidth: float | Literal["median"] = "median",
        task: Task = "regression",
        projection: Projection = "nystrom",
        nystrom_samples: int | Array = 3000,
        data_rank: int = 0,
        model_rank: int = 0,
        momentum: float | None = None,
        averaging: float | None = None,
        step: StepRule | None = None,
        ridge: float = 0.0,
        class_weights: Literal["none", "balanced"] | Mapping[str | int, float] = "none",
        output_weights: Mapping[str, float] | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        memory: int | str = 2048 * MIB,
    ) -> None:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        _require_outputs(n_outputs, task)
        self._form = RowForm(np.shape(centers)[-1], n_outputs, task, where)
        sample, n_samples = None, nystrom_samples
        if not isinstance(n_samples, int):
            sample = self._form.inputs(n_samples, "nystrom_samples").clone()
            n_samples = len(sample)
        if n_samples < 1:
            raise ConfigError(f"nystrom_samples is {n_samples}; use a positive number, or rows of (s, d)")
        if not 0 <= seed < 2**63:
            raise ConfigError(f"seed is {seed}; use a number in [0, 2^63)")
        self._spec = BatchSolverSpec(
            centers=self._form.inputs(centers, "centers").clone(),
            kernel=_kernel_choice(kernel, bandwidth),
            settings=SolverConfig(
                projection=projection,
                model_rank=model_rank,
                data_rank=data_rank,
                nystrom_samples=n_samples,
                momentum=momentum,
                averaging=averaging,
                step=step,
                ridge=ridge,
                class_weights=_by_text(class_weights),
                output_weights=dict(output_weights or {}),
            ),
            sample=sample,
            memory_bytes=parse_bytes(memory),
            seed=seed,
        )
        _require_weights(task, self._spec.settings)
        self._solver: BatchSolver | None = None
        self._held: list[tuple[Tensor, Tensor]] = []
        self._shape = self._form.shape(None)
        self._names = self._form.names(None)
        self._epoch, self._is_warned = 0, False

    def fit(self, data: Data, epochs: int = 1, validation: Data | None = None) -> list[dict[str, Any]]:
        """Trains for so many epochs; returns `epoch`, `loss` and, of rows to validate on, `validation` of each.

        data, validation: (x, y) of arrays, shuffled here; a split of a store, `open_store(path).split(name)`;
        or any iterable of such batches, as a shuffled DataLoader.
        """
        history: list[dict[str, Any]] = []
        for _ in range(epochs):
            record: dict[str, Any] = {"loss": self.fit_epoch(data), "epoch": self._epoch}
            if validation is not None:
                record["validation"] = self._score(source_of(validation))
            history.append(record)
        return history

    def fit_epoch(self, data: Data) -> float:
        """Trains once on every row; returns the mean squared error of each batch before its step, over all rows."""
        source = source_of(data)
        if self._solver is None:
            self._meet(source)
        window = 1
        if self._solver is not None:
            window = self._solver.window_segments
            self._solver.mean_loss()  # What was not asked for is of another epoch.
        n_batches = 0
        for x, y in source.epoch(self._spec.seed, self._epoch, window, self._form.device):
            self._take(x, y)
            n_batches += 1
        if not n_batches:
            raise InputError(
                "the data gave no rows; an iterator is used up by one epoch: give a DataLoader or a list"
            )
        self._epoch += 1
        loss = self._settled().mean_loss()
        self._warn()
        return loss

    def fit_batch(self, x: Array, y: Array) -> float:
        """Trains on the rows, in several steps where they are many; returns the error before, as `fit_epoch` does.

        Nan while the rows are held back for the set-up; the batch that ends the wait returns the loss of all.
        """
        self._take(x, y)
        return math.nan if self._solver is None else self._solver.mean_loss()

    def outputs(self, x: Array) -> Tensor:
        """f(x), (n, c), on the model's device, for x of (n, d): the values behind `predict`."""
        return self.predictor().outputs(self._form.inputs(x))

    def predict(self, x: Array) -> Tensor:
        """Class ids, (n,), for classification; values, (n,) or (n, c), for regression."""
        outputs = self.outputs(x)
        if self._form.task == "classification":
            return outputs.argmax(1)
        return outputs[:, 0] if outputs.shape[1] == 1 else outputs

    def score(self, x: Array, y: Array) -> dict[str, Any]:
        """n and mse; rmse and r2 for regression; accuracy, top5 and auc (two classes) for classification."""
        return self._score(source_of((x, y)))

    def predictor(self) -> Predictor:
        """The model as it is now, to be kept: further training does not change it."""
        solver = self._settled()
        solver.watch()
        d, device = self._form.n_features, self._form.device
        scaling = InputScaling(torch.zeros(d, device=device), torch.ones(d, device=device))
        weights = solver.state.average.T.contiguous().clone()
        kernel, targets = solver.solver.kernel, solver.solver.targets
        return Predictor(kernel, self._spec.centers, weights, scaling, targets, *self._names)

    def save(self, path: Path | str) -> None:
        """Writes PATH/model, which `ep3stream.load(PATH)` reads; its class names are the ids as texts."""
        save_model(RunDirectory(Path(path).absolute()), self.predictor())

    def state_dict(self) -> dict[str, Any]:
        """All that it takes to go on with the same bits, in plain containers; weights and set-up rows are copies."""
        solver = self._settled()
        names = dict(zip(("features", "targets", "classes"), self._names, strict=True))
        head = {"version": STATE_VERSION, "settings": self._settings(), "names": names, "epoch": self._epoch}
        return {**head, **self._given_points(), **solver.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a `state_dict` of a model made with the same arguments; does the set-up again.

        Raises InputError naming the argument that differs.
        """
        if state.get("version") not in (2, STATE_VERSION):
            raise InputError(
                f"the state has the version {state.get('version')!r}; this one reads {STATE_VERSION}"
            )
        mine, theirs = self._settings(), _SINCE_VERSION_3 | state["settings"]
        for name in mine:
            if mine[name] != theirs.get(name):
                raise InputError(f"{name} is {mine[name]!r} but was {theirs.get(name)!r} in the state")
        for name, points in self._given_points().items():
            if name not in state or not torch.equal(points, state[name].to(points.device)):
                raise InputError(f"the {name} are not those of the state; give the same ones")
        self._solver = BatchSolver.load(self._spec, self._form.task == "classification", state)
        self._held, self._shape = [], self._solver.rows.shape
        self._epoch, names = state["epoch"], state["names"]
        self._names = (names["features"], names["targets"], names["classes"])

    def _warn(self) -> None:
        """Tells of a model that is no better than the zero model, once until it has become better."""
        warning = self._settled().running_score.warning
        if warning is not None and not self._is_warned:
            _LOGGER.warning(warning)
        self._is_warned = warning is not None

    def _meet(self, source: Source) -> None:
        """Takes note of what is known of the rows, and does the set-up where they can be drawn."""
        reader = source.reader if isinstance(source, StoreSource) else None
        self._names = self._form.names(reader)
        self._shape = replace(self._form.shape(reader), n_rows=source.n_rows)
        drawn = source.drawn(self._spec.n_held, self._spec.seed)
        if drawn is not None:
            self._set_up(*self._form.pair(*drawn))

    def _take(self, x: Array, y: Array) -> None:
        """Trains on the batch, or holds a copy of it while there are too few rows for the set-up."""
        inputs, targets = self._form.pair(x, y)
        if self._solver is not None:
            self._solver.train(inputs, targets)
            return
        self._held.append((inputs.clone(), targets.clone()))
        if sum(len(rows) for rows, _ in self._held) >= self._spec.n_held:
            self._settled()

    def _settled(self) -> BatchSolver:
        """The solver, set up now from what is held if it has to be."""
        if self._solver is not None:
            return self._solver
        if not self._held:
            raise InputError("the model has seen no rows yet; call fit, fit_epoch or fit_batch first")
        x, y = (torch.cat(parts) for parts in zip(*self._held, strict=True))
        return self._set_up(x, y)

    def _set_up(self, x: Tensor, y: Tensor) -> BatchSolver:
        n_held, (_, names, classes) = self._spec.n_held, self._names
        counts = None if classes is None else torch.bincount(y, minlength=self._form.n_outputs)
        code = weighted(self._form.code(y), classes or names, counts, self._spec.settings)
        rows = SetupRows(x[:n_held], y[:n_held], code.to(x.device), self._shape)
        self._solver = BatchSolver.of(self._spec, rows)
        held, self._held = self._held, []
        for inputs, targets in held:
            self._solver.train(inputs, targets)
        return self._solver

    def _score(self, source: Source) -> dict[str, Any]:
        predictor = self.predictor()
        prepared, classes = predictor.prepared(), predictor.class_names
        totals = RegressionScores() if classes is None else ClassScores(classes)
        n_batches = 0
        for batch in source.all():
            x, y = self._form.pair(*batch)
            totals.add(predictor.outputs(x, prepared).double().cpu().numpy(), y.cpu().numpy())
            n_batches += 1
        if not n_batches:
            raise InputError("there are no rows to score; give a loader with at least one batch")
        return totals.result()

    def _settings(self) -> dict[str, Any]:
        """The arguments that must be the same for a state to be taken over."""
        spec = self._spec
        named = asdict(spec.kernel) if isinstance(spec.kernel, KernelConfig) else {"name": CALLABLE}
        solver = {name: getattr(spec.settings, name) for name in _SOLVER_SETTINGS}
        form = {"n_outputs": self._form.n_outputs, "task": self._form.task}
        return {"kernel": named, **form, **solver, "seed": spec.seed, "memory": spec.memory_bytes}

    def _given_points(self) -> dict[str, Tensor]:
        given = {"centers": self._spec.centers}
        return given if self._spec.sample is None else given | {"nystrom_samples": self._spec.sample}


def _kernel_choice(
    kernel: str | KernelConfig | KernelFunction, bandwidth: float | Literal["median"]
) -> KernelConfig | KernelFunction:
    if isinstance(kernel, str):
        return KernelConfig(kernel, bandwidth)  # type: ignore[arg-type]
    if bandwidth != "median":
        raise ConfigError(f"bandwidth is {bandwidth}, but the kernel is no name; say it in the kernel itself")
    return kernel


def _by_text(
    weights: Literal["none", "balanced"] | Mapping[str | int, float],
) -> Literal["none", "balanced"] | Mapping[str, float]:
    return weights if isinstance(weights, str) else {str(name): each for name, each in weights.items()}


def _require_weights(task: str, settings: SolverConfig) -> None:
    require_weights_of_task(task == "classification", settings)
    if settings.output_weights and not settings.ridge:
        raise ConfigError(
            "output_weights are given, but each target has weights of its own in the model, so that without a ridge "
            "they change nothing; give a ridge, or leave output_weights out"
        )


def _require_outputs(n_outputs: int, task: str) -> None:
    if task not in get_args(Task):
        raise ConfigError(f"task is {task!r}; choose one of {', '.join(get_args(Task))}")
    least = 2 if task == "classification" else 1
    if n_outputs < least:
        raise ConfigError(f"n_outputs is {n_outputs}; {task} has at least {least}")
