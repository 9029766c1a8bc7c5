"""`KernelModel`: a kernel machine trained on arrays, on a store, or on batches of the user's own loader."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.config import (
    FitConfig,
    KernelConfig,
    PrecisionChoice,
    Projection,
    RunConfig,
    SolverConfig,
    StepRule,
    Task,
    parse_bytes,
)
from ep3stream.conversion.offsets import array_offsets, sample_rows
from ep3stream.errors import ConfigError, InputError
from ep3stream.online.online_trainer import OnlineSpec, OnlineTrainer, set_up_rows
from ep3stream.online.sources import (
    UNKNOWN_ROWS,
    Array,
    Data,
    NumberedSource,
    Pair,
    RowForm,
    Source,
    StoreSource,
    as_array,
    source_of,
)
from ep3stream.prediction.frames import FrameReader
from ep3stream.prediction.models import save_model
from ep3stream.prediction.scores import ClassScores, RegressionScores
from ep3stream.run.directory import RunDirectory
from ep3stream.solver.cell_effects import CellEffects
from ep3stream.solver.gpu import usual_device
from ep3stream.solver.input_scaling import InputScaling
from ep3stream.solver.kernels import CALLABLE, KernelFunction
from ep3stream.solver.model import Predictor
from ep3stream.solver.set_up import PROBE_ROWS
from ep3stream.solver.targets import require_weights_of_task, weighted
from ep3stream.store.columns import code_features
from ep3stream.store.reader import SplitReader
from ep3stream.stream.order import NO_ROWS, Rows
from ep3stream.training.centers import offsets_left
from ep3stream.training.column_kernel import LearntColumns, pool_rows
from ep3stream.training.effects import Scored, learn_effects, most_rows, wants_effects
from ep3stream.training.problem import Problem, problem_of_split
from ep3stream.values.offsets import Offsets, shifted

_LOGGER = logging.getLogger(__name__)

# 4: the set-up is that of a fit, with a head start. 2 and 3 are read too. A state with offsets is of version 5, one
# with codes of categories of version 6, one with validations of version 7, one with a linear part of version 8.
STATE_VERSION = 4
_STATE_WITH_OFFSETS, _STATE_WITH_CODES, _STATE_WITH_BEST, _STATE_WITH_LINEAR = 5, 6, 7, 8

_SOLVER_SETTINGS = (
    "projection", "nystrom_samples", "data_rank", "model_rank", "tail", "momentum", "averaging", "step",
    "ridge", "class_weights", "output_weights", "precision", "linear",
)  # fmt: skip

# One of so many rows tells whether effects help, and is left out when they are learnt.
_HELD_OUT = 10

# Settings that states of older versions do not have, and what they were then.
_LATER_SETTINGS: dict[str, Any] = {
    "tail": "none",
    "ridge": 0.0,
    "class_weights": "none",
    "output_weights": {},
    "precision": "float32",
    "linear": "none",
}


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
    data_rank, model_rank: eigenpairs of the preconditioners, 0 for automatic. tail: as in SolverConfig; with one, the
    model has the centers in another order. momentum, averaging, step,
    projection: as in SolverConfig. ridge, class_weights, output_weights: those of `fit`; classes are named by their
    ids, as numbers or texts, or as in the store; targets are `y0`, `y1`, ... or as in the store. `balanced` counts all
    rows of arrays and stores, and the rows of the set-up of loaders. precision: of kernel blocks, as in SolverConfig.
    linear: whether a ridge regression is fitted first, and the kernel learns what it leaves, where that helps: `auto`
    with kernels on columns, `tried` with any. It is learnt from the rows that weights of columns are learnt from.
    categories: the features that are codes of categories, by number, and how many codes each has; a store's are known.
    memory: bytes on the device, or a text such as `8GiB`; by default 2 GiB, on a GPU four fifths of what is free.

    On a split of a store, the model is byte for byte that of `ep3stream.fit` with the same centers (as a file), seed
    and settings, `scale="none"` and, with 64 inputs or more, `inputs_rank="full"`.

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
        tail: Literal["auto", "none"] | int = "auto",
        momentum: float | None = None,
        averaging: float | None = None,
        step: StepRule | None = None,
        ridge: float | None = None,
        class_weights: Literal["none", "balanced"] | Mapping[str | int, float] = "none",
        output_weights: Mapping[str, float] | None = None,
        precision: PrecisionChoice = "auto",
        linear: Literal["auto", "tried", "none"] = "auto",
        categories: Mapping[int, int] | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        memory: int | str = RunConfig().memory_bytes,
    ) -> None:
        where = torch.device(device or usual_device())
        _require_outputs(n_outputs, task)
        self._form = RowForm(np.shape(centers)[-1], n_outputs, task, where)
        self._form = replace(self._form, offsets=self._first_offsets(centers, None))
        self._may_offset = True
        # Points as they were given, for offsets that only the first data ask for; float32 has lost nothing more.
        self._given: tuple[NDArray[Any] | None, NDArray[Any] | None] = (_with_all_digits(centers), None)
        sample, n_samples = None, nystrom_samples
        if not isinstance(n_samples, int):
            sample = self._form.inputs(n_samples, "nystrom_samples").clone()
            self._given = (self._given[0], _with_all_digits(n_samples))
            n_samples = len(sample)
        if n_samples < 1:
            raise ConfigError(f"nystrom_samples is {n_samples}; use a positive number, or rows of (s, d)")
        if not 0 <= seed < 2**63:
            raise ConfigError(f"seed is {seed}; use a number in [0, 2^63)")
        name, function = kernel_choice(kernel, bandwidth)
        solver = SolverConfig(
            projection=projection,
            model_rank=model_rank,
            tail=tail,
            data_rank=data_rank,
            nystrom_samples=n_samples,
            momentum=momentum,
            averaging=averaging,
            step=step,
            ridge=ridge,
            class_weights=_by_text(class_weights),
            output_weights=dict(output_weights or {}),
            precision=precision,
            linear=linear,
        )
        d = self._form.n_features
        self._spec = OnlineSpec(
            config=FitConfig(
                kernel=name, solver=solver, run=RunConfig(seed=seed, memory_bytes=parse_bytes(memory))
            ),
            function=function,
            centers=self._form.inputs(centers, "centers").clone(),
            sample=sample,
            inputs=InputScaling.identity(d, where),
            offsets=self._form.offsets,
        ).with_categories(_checked_categories(categories, d))
        _require_weights(task, solver)
        self._trainer: OnlineTrainer | None = None
        self._held: list[tuple[Tensor, Tensor]] = []
        self._n_rows = 0
        self._names = self._form.names(None)
        self._epoch, self._is_warned = 0, False
        self._effects: CellEffects | None = None

    @classmethod
    def with_scaling(
        cls,
        centers: Tensor,
        inputs: InputScaling,
        *args: Any,
        drawn: Rows | None = None,
        excluded: Rows = NO_ROWS,
        held: Rows = NO_ROWS,
        learnt: LearntColumns | None = None,
        epochs: float = 1,
        **settings: Any,
    ) -> KernelModel:
        """A model of inputs that are scaled by `inputs`, whose centers are in the units of the data.

        Centers and rows are less the offsets that they need already.
        drawn: the numbers of the rows of the first source that became centers; excluded: those that are not trained
        on, sorted; held: those that `validate` is going to be given, sorted. learnt: what was learnt from rows
        before. epochs: how many there will be; less than one has smaller batches. The further arguments
        are those of the constructor.
        """
        made = cls(centers, *args, **settings)
        inputs, config = inputs.to(made._form.device), made._spec.config
        made._spec = replace(
            made._spec,
            config=replace(config, solver=replace(config.solver, epochs=min(1, epochs))),
            inputs=inputs,
            drawn=drawn,
            excluded=excluded,
            held=held,
            learnt=learnt,
            offsets=None,
        )
        made._form, made._may_offset = replace(made._form, offsets=None), False
        return made

    def fit(self, data: Data, epochs: int = 1, validation: Data | None = None) -> list[dict[str, Any]]:
        """Trains for so many epochs; returns `epoch`, `loss` and, of rows to validate on, `validation` of each.

        data, validation: (x, y) of arrays, shuffled here; a split of a store, `open_store(path).split(name)`;
        or any iterable of such batches, as a shuffled DataLoader.
        """
        history: list[dict[str, Any]] = []
        for _ in range(epochs):
            record: dict[str, Any] = {"loss": self.fit_epoch(data), "epoch": self._epoch}
            if validation is not None:
                record["validation"] = self._score(source_of(validation, self._form))
            history.append(record)
        return history

    def fit_epoch(self, data: Data) -> float:
        """Trains once on every row; returns the mean squared error of each batch before its step, over all rows."""
        self._look_at(data)
        return self.train_epoch(source_of(data, self._form), np.empty(0, np.int64))

    def train_epoch(self, source: Source, excluded: Rows, share: float = 1.0) -> float:
        """`fit_epoch` without the rows `excluded`, sorted numbers, of a source whose rows have numbers.

        share: of the steps of an epoch that are taken, of such a source.
        """
        self._effects = None
        if self._trainer is None:
            self._meet(source)
        else:
            self._trainer.mean_loss()  # What was not asked for is of another epoch.
        if isinstance(source, NumberedSource) and self._trainer is not None:
            n_batches = self._trainer.train_epoch(source, self._epoch, excluded, share)
        else:
            assert not isinstance(source, NumberedSource)  # `_meet` has made its set-up.
            n_batches = 0
            for x, y in source.epoch(self._spec.config.run.seed, self._epoch):
                self._take(x, y)
                n_batches += 1
        if not n_batches:
            raise InputError(
                "the data gave no rows; an iterator is used up by one epoch: give a DataLoader or a list"
            )
        self._epoch += 1
        trainer = self._settled()
        loss, warning = trainer.mean_loss(), trainer.progress.running_score.warning
        # Told once, until the model has become better.
        if warning is not None and not self._is_warned:
            _LOGGER.warning(warning)
        self._is_warned = warning is not None
        return loss

    def validate(self, x: NDArray[Any], y: NDArray[Any]) -> int:
        """Keeps the model of now if it is the best one on these rows so far; it is `predictor` until a further step.

        x: (h, d), y: (h,) or (h, c), the rows `held` of `with_scaling`, the same each time. Returns how many
        validations there were after the best one.
        """
        return self._settled().validate(x, y, self._names[2])

    def fit_batch(self, x: Array, y: Array) -> float:
        """Trains on the rows, in several steps where they are many; returns the error before, as `fit_epoch` does.

        Nan while the rows are held back for the set-up; the batch that ends the wait returns the loss of all.
        """
        self._effects = None
        self._take(x, y)
        return math.nan if self._trainer is None else self._trainer.mean_loss()

    def learn_effects(self, data: Data) -> bool:
        """Adds the effects of crossed columns that `fit` ends with, where rows left out of them show that they help.

        data: the rows of the training; every tenth is left out. Returns whether effects were added, which is False
        but for kernels on columns, up to 8 outputs and no class weights. Call it last: further training drops them,
        and a `state_dict` does not have them.
        """
        self._look_at(data)
        return self.effects_of(source_of(data, self._form), np.empty(0, np.int64))

    def effects_of(self, source: Source, excluded: Rows, held: Pair | None = None) -> bool:
        """`learn_effects` without the rows `excluded`, sorted numbers, of a source whose rows have numbers.

        held: x and y of rows that are not trained on, which show whether effects help, in place of every tenth.
        """
        trainer, form, config = self._settled(), self._form, self._spec.config
        self._effects = None
        if self._spec.function is not None or not wants_effects(config, form.n_outputs):
            return False
        model = self.predictor()
        prepared, held_out = model.prepared(), list[Scored]()
        spare_bytes = trainer.spare_bytes
        most = most_rows(spare_bytes, form.n_features, form.n_outputs)

        def training() -> Iterator[Scored]:
            n_rows = 0
            for x, y in self._rows_of(source, excluded):
                if n_rows >= most:
                    break
                n_rows += len(x)
                scored = x, model.outputs(x, prepared), y
                if held is not None:
                    yield scored
                    continue
                is_held = torch.arange(len(x), device=x.device) % _HELD_OUT == 0
                held_out.append(_parts(scored, is_held))
                yield _parts(scored, is_held.logical_not())

        if held is not None:
            x, y = form.pair(*held)
            held_out.append((x, model.outputs(x, prepared), y))
        names, n_codes = model.feature_names, self._spec.categories
        learnt = learn_effects(training(), held_out, model.targets, names, n_codes, 0, spare_bytes)
        self._effects = None if learnt is None else learnt.effects.to(form.device)
        return learnt is not None

    def _rows_of(self, source: Source, excluded: Rows) -> Iterator[tuple[Tensor, Tensor]]:
        """x, (m, d), and y of the first epoch's batches, each valid until the next one is asked for."""
        if isinstance(source, NumberedSource):
            order = self._settled().order(source.n_rows, source.segment_rows, excluded)
            with source.batches(order, range(order.steps_per_epoch), self._form.device) as batches:
                for batch in batches:
                    yield batch.x, batch.y
        else:
            for x, y in source.epoch(self._spec.config.run.seed, 0):
                yield self._form.pair(x, y)

    def outputs(self, x: Array) -> Tensor:
        """f(x), (n, c), on the model's device, for x of (n, d): the values behind `predict`.

        Float64 where targets have offsets, which are added. The columns of a DataFrame are found by the names of the
        features, if those are a store's.
        """
        if (table := FrameReader(self._names[0])(x)) is not None:
            x = table[0]
        outputs = self.predictor().outputs(self._form.inputs(x))
        if self._form.offsets is None or not self._form.offsets.y.any():
            return outputs
        return outputs.double() + torch.from_numpy(self._form.offsets.y).to(outputs.device)

    def predict(self, x: Array) -> Tensor:
        """Class ids, (n,), for classification; values, (n,) or (n, c), for regression."""
        outputs = self.outputs(x)
        if self._form.task == "classification":
            return outputs.argmax(1)
        return outputs[:, 0] if outputs.shape[1] == 1 else outputs

    def score(self, x: Array, y: Array) -> dict[str, Any]:
        """n and mse; rmse and r2 for regression; accuracy, top5 and auc (two classes) for classification."""
        return self._score(source_of((x, y), self._form))

    def predictor(self) -> Predictor:
        """The model as it is now, to be kept: further training does not change it."""
        return replace(self._settled().predictor(self._names), effects=self._effects)

    def save(self, path: Path | str) -> None:
        """Writes PATH/model, which `ep3stream.load(PATH)` reads; its class names are the ids as texts."""
        save_model(RunDirectory(Path(path).absolute()), self.predictor())

    def state_dict(self) -> dict[str, Any]:
        """All that it takes to go on with the same bits, in plain containers; weights and set-up rows are copies."""
        trainer = self._settled()
        names = dict(zip(("features", "targets", "classes"), self._names, strict=True))
        head = {"version": STATE_VERSION, "settings": self._settings(), "names": names, "epoch": self._epoch}
        if self._form.offsets:
            # A version that knows no offsets must not take the state over.
            offsets = {"x": self._form.offsets.x.tolist(), "y": self._form.offsets.y.tolist()}
            head |= {"version": _STATE_WITH_OFFSETS, "offsets": offsets}
        if self._spec.categories:
            # Texts, as JSON has keys.
            categories = {str(j): n for j, n in self._spec.categories.items()}
            head |= {"version": _STATE_WITH_CODES, "categories": categories}
        if trainer.progress.best is not None:
            head["version"] = _STATE_WITH_BEST
        if trainer.trainer.solver.linear is not None:
            head["version"] = _STATE_WITH_LINEAR
        return {**head, **self._given_points(), **trainer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a `state_dict` of a model made with the same arguments; does the set-up again.

        Raises InputError naming the argument that differs.
        """
        if state.get("version") not in range(2, _STATE_WITH_LINEAR + 1):
            raise InputError(
                f"the state has the version {state.get('version')!r}; this one reads {_STATE_WITH_LINEAR}"
            )
        if "categories" in state:
            self._spec = self._spec.with_categories({int(j): n for j, n in state["categories"].items()})
        if "offsets" in state:
            offsets = Offsets(*(np.array(state["offsets"][part], np.float64) for part in "xy"))
            self._take_offsets(offsets, state["centers"].double().mean(0).cpu().numpy())
        self._go_without({"tail", "linear"} - state["settings"].keys())
        mine, theirs = self._settings(), _LATER_SETTINGS | state["settings"]
        # Kernels had fewer parameters once.
        mine["kernel"], theirs["kernel"] = (_given(each["kernel"]) for each in (mine, theirs))
        if mine["ridge"] is None:  # Nothing asked for: the one that the state's set-up has settled.
            mine["ridge"] = theirs["ridge"]
        # The one that the state's set-up has settled; earlier versions held what was asked for.
        theirs["precision"] = state.get("precision", theirs["precision"])
        if mine["precision"] == "auto":
            mine["precision"] = theirs["precision"]
        for name in mine:
            if mine[name] != theirs.get(name):
                raise InputError(f"{name} is {mine[name]!r} but was {theirs.get(name)!r} in the state")
        for name, points in self._given_points().items():
            if name not in state or not torch.equal(points, state[name].to(points.device)):
                raise InputError(f"the {name} are not those of the state; give the same ones")
        names = state["names"]
        self._names = (names["features"], names["targets"], names["classes"])
        self._trainer, self._effects = (
            OnlineTrainer.load(self._spec, self._form.task, self._names, state),
            None,
        )
        self._held, self._epoch = [], state["epoch"]

    def _go_without(self, names: set[str]) -> None:
        """Takes `auto` for `none` of these settings, which the version that has written a state did not know."""
        config = self._spec.config
        left_open: dict[str, Any] = {name: "none" for name in names if getattr(config.solver, name) == "auto"}
        self._spec = replace(self._spec, config=replace(config, solver=replace(config.solver, **left_open)))

    def _first_offsets(self, x: Array | None, y: Array | None) -> Offsets | None:
        """The offsets known by now, and those that the first rows of x and y ask for where there are none yet."""
        form = self._form
        known = form.offsets or Offsets.none(form.n_features, form.n_outputs)
        names, targets, _ = form.names(None)
        if x is not None and not known.x.any() and len(np.shape(x)) == 2 and np.shape(x)[1] == len(names):
            known = replace(known, x=array_offsets(as_array(x[: sample_rows(len(names))]), names))
        if y is not None and form.task == "regression" and np.shape(y)[1:] in ((), (form.n_outputs,)):
            known = replace(
                known, y=array_offsets(as_array(y[: sample_rows(len(targets))]), targets, "target")
            )
        return known if known else None

    def _look_at(self, data: Data) -> None:
        """Decides about offsets by the first data, before a row of them is rounded; a store has its own."""
        if isinstance(data, SplitReader):
            if self._may_offset and self._trainer is None:
                self._take_offsets(data.manifest.offsets, np.array(data.info.features.mean))
            own = self._form.offsets or Offsets.none(self._form.n_features, self._form.n_outputs)
            if data.manifest.n_features == self._form.n_features and (data.manifest.offsets - own):
                raise InputError(
                    f"{data.path} has other offsets than the data before; convert it with like= of the first store"
                )
        elif self._may_offset and isinstance(data, tuple) and all(hasattr(part, "shape") for part in data):
            found = self._first_offsets(*data) if len(data) == 2 else None
            if found is not None:
                self._take_offsets(found, np.zeros(self._form.n_features))
        else:
            return
        self._may_offset, self._given = False, (None, None)

    def _take_offsets(self, offsets: Offsets, mean: NDArray[np.float64]) -> None:
        """Subtracts these offsets from now on, and from the centers and the sample that were given.

        mean: (d,), about where the rows will lie when the offsets are subtracted.
        """
        own = self._form.offsets or Offsets.none(self._form.n_features, self._form.n_outputs)
        if len(offsets.x) != len(own.x) or len(offsets.y) != len(own.y) or not (offsets - own):
            return  # A store of another form is refused where it is read.

        def moved(points: Tensor, given: NDArray[Any] | None) -> Tensor:
            values = points.cpu().numpy() if given is None else given
            return torch.from_numpy(shifted(values, offsets_left(values, offsets.x, mean))).to(points)

        spec, (centers, sample) = self._spec, self._given
        self._spec = replace(
            spec,
            centers=moved(spec.centers, centers),
            sample=None if spec.sample is None else moved(spec.sample, sample),
            offsets=offsets,
        )
        self._form = replace(self._form, offsets=offsets)

    def _meet(self, source: Source) -> None:
        """Takes note of what is known of the rows, and makes the set-up where rows can be drawn."""
        self._n_rows = source.n_rows
        if not isinstance(source, NumberedSource):
            self._names = self._form.names(None)
            drawn = source.drawn(max(self._n_held, self._n_pool), self._spec.config.run.seed)
            if drawn is not None:
                self._set_up(*self._form.pair(*drawn))
            return
        self._names = self._form.names(source.reader if isinstance(source, StoreSource) else None)
        split = source.split()
        if codes := code_features(split.manifest):
            self._spec = self._spec.with_categories(codes)
        problem = problem_of_split(split, self._spec.config, self._spec.inputs)
        shape = replace(problem.shape, n_held=len(self._spec.held))
        problem = self._spec.problem(replace(problem, names=self._names, shape=shape))
        self._trainer = OnlineTrainer.of_split(self._spec, problem, split)

    @property
    def _n_held(self) -> int:
        """Rows that the set-up asks for: to probe the step size, and for the sample unless the user gave one."""
        return PROBE_ROWS + (self._spec.config.solver.nystrom_samples if self._spec.sample is None else 0)

    @property
    def _n_pool(self) -> int:
        """Rows that are learnt from before the fit, where as many can be had; 0 where there is nothing to learn."""
        config, form = self._spec.config, self._form
        if self._spec.function is not None:
            return 0
        return pool_rows(config, self._n_rows or UNKNOWN_ROWS, form.n_features, form.n_outputs)

    def _take(self, x: Array, y: Array) -> None:
        """Trains on the batch, or holds a copy of the batch while there are too few rows for the set-up."""
        self._look_at((x, y))
        inputs, targets = self._form.pair(x, y)
        if self._trainer is not None:
            self._trainer.train_rows(inputs, targets)
            return
        self._held.append((inputs.clone(), targets.clone()))
        if sum(len(rows) for rows, _ in self._held) >= self._n_held:
            self._settled()

    def _settled(self) -> OnlineTrainer:
        """The trainer; its set-up is made now from the rows that are held, if it has to be."""
        if self._trainer is not None:
            return self._trainer
        if not self._held:
            raise InputError("the model has seen no rows yet; call fit, fit_epoch or fit_batch first")
        x, y = (torch.cat(parts) for parts in zip(*self._held, strict=True))
        return self._set_up(x, y)

    def _set_up(self, x: Tensor, y: Tensor) -> OnlineTrainer:
        """The set-up from rows in random order, then the steps on the rows that were held back."""
        spec, n_held = self._spec, self._n_held
        counts = None
        if self._form.task == "classification":
            counts = torch.bincount(y, minlength=self._form.n_outputs)
        code = weighted(self._form.code(y), self._weighted_names(), counts, spec.config.solver)
        problem = Problem(
            shape=self._form.shape(self._n_rows or UNKNOWN_ROWS),
            task=self._form.task,
            names=self._names,
            inputs=spec.inputs,
            targets=code.to(x.device),
        )
        problem = spec.problem(problem)
        rows = set_up_rows(spec, x[:n_held], y[:n_held], spec.config.solver.nystrom_samples)
        if spec.function is None:
            n_pool = min(self._n_pool, len(x))
            rows = replace(rows, pool=(x[:n_pool], y[:n_pool]) if n_pool else None)
        if self._n_rows in (0, UNKNOWN_ROWS):
            # A head start is for a sample that is few of the rows, and nobody knows how many there are.
            rows = replace(rows, sample_y=None)
        self._trainer = OnlineTrainer(spec, problem, rows)
        held, self._held = self._held, []
        for inputs, targets in held:
            self._trainer.train_rows(inputs, targets)
        return self._trainer

    def _weighted_names(self) -> tuple[str, ...]:
        """The names that class or output weights go by."""
        _, targets, classes = self._names
        return targets if classes is None else classes

    def _score(self, source: Source) -> dict[str, Any]:
        predictor = self.predictor()
        prepared, classes = predictor.prepared(), predictor.class_names
        totals = RegressionScores() if classes is None else ClassScores(classes)
        n_batches, form = 0, self._form
        if isinstance(source, StoreSource):
            # Its rows are less offsets of its own.
            own = form.offsets or Offsets.none(form.n_features, form.n_outputs)
            form = replace(form, offsets=own - source.reader.manifest.offsets)
        for batch in source.all():
            x, y = form.pair(*batch)
            totals.add(predictor.outputs(x, prepared).double().cpu().numpy(), y.cpu().numpy())
            n_batches += 1
        if not n_batches:
            raise InputError("there are no rows to score; give a loader with at least one batch")
        return totals.result()

    def _settings(self) -> dict[str, Any]:
        """The arguments that must be the same for a state to be taken over."""
        config = self._spec.config
        kernel = asdict(config.kernel) if self._spec.function is None else {"name": CALLABLE}
        solver = {name: getattr(config.solver, name) for name in _SOLVER_SETTINGS}
        form = {"n_outputs": self._form.n_outputs, "task": self._form.task}
        return {
            "kernel": kernel,
            **form,
            **solver,
            "seed": config.run.seed,
            "memory": config.run.memory_bytes,
        }

    def _given_points(self) -> dict[str, Tensor]:
        given = {"centers": self._spec.centers}
        return given if self._spec.sample is None else given | {"nystrom_samples": self._spec.sample}


def _parts(scored: Scored, rows: Tensor) -> Scored:
    """Copies of some of the rows, (m,) booleans."""
    x, outputs, y = (part[rows].clone() for part in scored)
    return x, outputs, y


def _with_all_digits(points: Array) -> NDArray[Any] | None:
    """A copy of points that float32 may not hold; None for others."""
    values = as_array(points)
    return None if np.can_cast(values.dtype, np.float32) else values.copy()


def kernel_choice(
    kernel: str | KernelConfig | KernelFunction, bandwidth: float | Literal["median"]
) -> tuple[KernelConfig, KernelFunction | None]:
    """The kernel's settings, and the callable that stands in their place if one was given."""
    if isinstance(kernel, KernelConfig) and kernel.name == "auto" and kernel.bandwidth != "median":
        kernel = replace(kernel, name="laplacian")
    if kernel == "auto" or (isinstance(kernel, KernelConfig) and kernel.name == "auto"):
        raise ConfigError(
            "kernel is 'auto', which `fit` and the estimators choose by the columns; name one, such as product for "
            "a table or laplacian"
        )
    if isinstance(kernel, str):
        return KernelConfig(kernel, bandwidth), None  # type: ignore[arg-type]
    if bandwidth != "median":
        raise ConfigError(f"bandwidth is {bandwidth}, but the kernel is no name; say it in the kernel itself")
    return (kernel, None) if isinstance(kernel, KernelConfig) else (KernelConfig(), kernel)


def _given(kernel: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that differ from none at all; a sharpness of 1 is none, which older states do not have."""
    parameters = {name: value for name, value in kernel.items() if value is not None}
    return parameters | {"sharpness": kernel.get("sharpness", 1.0)}


def _by_text(
    weights: Literal["none", "balanced"] | Mapping[str | int, float],
) -> Literal["none", "balanced"] | Mapping[str, float]:
    return weights if isinstance(weights, str) else {str(name): each for name, each in weights.items()}


def _checked_categories(categories: Mapping[int, int] | None, n_features: int) -> dict[int, int]:
    for feature, n_codes in (categories or {}).items():
        if not 0 <= feature < n_features or n_codes < 1:
            raise ConfigError(
                f"categories has {n_codes!r} codes for feature {feature!r}; give a number of codes for features from "
                f"0 to {n_features - 1}"
            )
    return dict(categories or {})


def _require_weights(task: str, settings: SolverConfig) -> None:
    require_weights_of_task(task == "classification", settings)
    if settings.output_weights and not settings.used_ridge:
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
