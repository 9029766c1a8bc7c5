"""What `KernelRegressor` and `KernelClassifier` share: training and prediction for rows of every kind."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import _safe_indexing, check_consistent_length, check_random_state, check_X_y
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from ep3stream.config import (
    DataConfig,
    FitConfig,
    KernelConfig,
    RunConfig,
    Scale,
    SolverConfig,
    Task,
    parse_bytes,
)
from ep3stream.conversion.offsets import array_offsets, sample_rows
from ep3stream.errors import ConfigError, InputError
from ep3stream.estimator.row_sets import NO_ROWS, DaskRows, WeightedRows, batches_of
from ep3stream.estimator.saved import load_estimator, save_estimator
from ep3stream.mesh import Mesh
from ep3stream.online.kernel_model import STATE_VERSION, KernelModel, kernel_choice
from ep3stream.online.sources import ArraySource, NumberedSource, RowForm, StoreSource
from ep3stream.prediction.frames import FrameReader, encoded_frame, is_table
from ep3stream.prediction.predict import is_dask_array, map_rows
from ep3stream.prediction.scores import ClassScores, RegressionScores
from ep3stream.solver.columns import COLUMN_KERNELS
from ep3stream.solver.gpu import usual_device
from ep3stream.solver.input_scaling import InputScaling
from ep3stream.solver.kernels import KernelFunction
from ep3stream.solver.model import Predictor, unmasked
from ep3stream.store.columns import code_features, columns_of, zero_one_features
from ep3stream.store.reader import RowStore, SplitReader, open_store
from ep3stream.stream.order import Rows
from ep3stream.training.budget import StageTimes
from ep3stream.training.centers import drawn_centers
from ep3stream.training.column_kernel import LearntColumns
from ep3stream.training.defaults import is_timed, with_kernel
from ep3stream.training.measured_sizes import with_measured_sizes
from ep3stream.training.plan import memory_budget, on_device
from ep3stream.training.problem import n_to_scale, problem_of_split, rows_to_scale, scaling_by, shape_of
from ep3stream.training.set_up import learn_columns, narrowed, random_rows, resolving_centers
from ep3stream.training.set_up_rows import read_pool
from ep3stream.training.validation import NO_VALIDATION, ValidationRows, n_held_out
from ep3stream.values.labels import label_type_of, names_of
from ep3stream.values.offsets import Offsets, shifted

_FEW_CENTERS, _MANY_CENTERS = 2000, 5000
_FEW_ROWS_PER_CENTER = 5
# What messages call the rows that say what a DataFrame's columns become.
_FIRST_FRAME = Path("the fitted DataFrame")
_ROWS_TO_SEE, _LEAST_EPOCHS, _MOST_EPOCHS = 30_000, 2, 20


Source = NumberedSource | DaskRows | WeightedRows

Store = str | Path | RowStore | SplitReader

Block = NDArray[Any]

AnyKernel = str | KernelConfig | KernelFunction

ClassWeights = Literal["none", "balanced"] | Mapping[str | int, float]


# X is taken in any of these types as it is, so that an offset can be subtracted before it is rounded.
EXACT_TYPES = (np.float64, np.float32, np.int64, np.uint64)


def rounded(x: Any, offsets: NDArray[np.float64]) -> Block:
    """x, (n, d), an array or a sparse matrix, less the offsets as a dense array of float32, row by row in memory.

    Distances gain nothing from zeros. Too large values become infinite, and are refused where they are used.
    """
    with np.errstate(over="ignore"):
        if not offsets.any():
            dense = x.astype(np.float32, copy=False)
            return np.ascontiguousarray(dense.toarray() if issparse(x) else dense)
        out = np.empty(x.shape, np.float32)
        for rows in batches_of(x.shape[0]):
            block = x[rows]
            out[rows] = shifted(block.toarray() if issparse(x) else block, offsets)
        return out


@dataclass(frozen=True, slots=True)
class _Start:
    """What a training starts with. centers: the numbers of the rows that become centers, in random order.

    drawn: the same where these rows are not trained on. excluded: sorted numbers of rows that are not trained on.
    held_rows: those of them that are held out, and held: their x, (h, d), and y; none without validations. learnt: the
    kernel on columns, where the centers were drawn by it. epochs, patience: as the minutes allow; None, 0 without them.
    """

    source: Source
    centers: Rows
    drawn: Rows | None = None
    excluded: Rows = field(default_factory=lambda: NO_ROWS)
    held_rows: Rows = field(default_factory=lambda: NO_ROWS)
    held: tuple[Block, Block] | None = None
    learnt: LearntColumns | None = None
    epochs: float | None = None
    patience: int = 0


class KernelEstimator(BaseEstimator):  # type: ignore[misc]
    """The common base of both estimators. Subclasses code the targets and decode the outputs."""

    model_: Predictor
    losses_: list[float]
    n_features_in_: int
    minutes: float | None
    inputs_rank: Any
    _trainer: KernelModel | None
    _saved: dict[str, Any] | None
    _kernel: AnyKernel  # That of the settings, with `auto` settled.
    _linear: Any  # As well.
    _scaling: InputScaling
    _centers: torch.Tensor
    _seed: int
    _offsets: Offsets
    _frames: FrameReader | None  # Of the columns of the store or DataFrame that it was fitted to.

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Trains from the start, for all epochs, and keeps the model of the epoch that suits held-out rows best.

        X, y: arrays of (n, d) and (n,), or for regression (n, c); Dask arrays of these; or, without y, a store's
        path, an open store, or one of its splits: `train`, or the only one. X may be a DataFrame with texts,
        categories, dates and gaps, which become features as `convert` makes them. sample_weight, for rows in memory:
        what each row counts, (n,), 0 or more; a row of weight 2 is as good as two rows. Raises ValueError for what is
        no such data, DivergedError where steps halved three times still blow up.
        """
        if self.effects not in ("auto", "none"):
            raise ConfigError(f"effects is {self.effects!r}; use 'auto' or 'none'")
        start = self._start(self._training_rows(X, y, is_first=True, sample_weight=sample_weight), True)
        source, excluded, held = start.source, start.excluded, start.held
        trainer, self.losses_ = self._trained(), []
        epochs = start.epochs or self._n_epochs(source.n_rows - len(excluded))
        for _ in range(math.ceil(epochs)):
            self.losses_.append(trainer.train_epoch(source, excluded, min(1, epochs)))
            n_since_best = 0 if held is None else trainer.validate(*held)
            if 0 < start.patience <= n_since_best:
                break
        if self.effects == "auto" and not isinstance(source, WeightedRows):
            trainer.effects_of(source, excluded, held)
        self.model_ = self._predictor()
        return self

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any) -> Self:
        is_first = not hasattr(self, "model_")
        source, excluded = self._training_rows(X, y, is_first, sample_weight=sample_weight), NO_ROWS
        if isinstance(source, StoreSource) and (source.reader.manifest.offsets - self._offsets):
            raise ValueError(
                f"{source.reader.path} has other offsets than {type(self).__name__} was fitted to; convert it with "
                "like= of the first store, or give arrays"
            )
        trainer = None if is_first else self._trained()
        if trainer is None:
            start = self._start(source, False)
            source, excluded = start.source, start.excluded
        loss = (trainer or self._trained()).train_epoch(source, excluded)
        self.losses_ = [*([] if is_first else self.losses_), loss]
        self.model_ = self._predictor()
        return self

    def save(self, path: Path | str) -> None:
        """Writes PATH/model and PATH/estimator, safetensors and JSON; `load` goes on from there.

        A `random_state` that is no number is saved as None, a callable kernel not at all. Raises DiskError.
        """
        check_is_fitted(self, "model_")
        state = self._saved if self._trainer is None else self._trainer.state_dict()
        if state is None:
            raise InputError("the model came from a run alone; copy that run, or use ep3stream.export")
        place = Path(path).absolute()
        record = None if self._frames is None else self._frames.record
        save_estimator(place, self.model_, self.get_params(deep=False), self._fitted(), state, record)

    @classmethod
    def load(cls, path: Path | str, kernel: KernelFunction | None = None) -> Self:
        """The estimator that was saved, or the model of a run, which can predict but not be trained on.

        kernel: the callable it was fitted with, if any. Raises InputError for a model of the other task.
        """
        saved = load_estimator(Path(path).absolute(), kernel)
        if (saved.model.class_names is None) != issubclass(cls, RegressorMixin):
            other = "KernelRegressor" if saved.model.class_names is None else "KernelClassifier"
            raise InputError(f"{path} holds a model for another task; use {other}.load")
        made = cls(**saved.parameters)
        made.model_, made._trainer, made._saved = saved.model, None, saved.state
        made._frames = None
        if isinstance(frames := saved.model.frames, FrameReader) and frames.record is not None:
            made._frames = replace(frames, unknown="ignore")
            made.model_ = replace(saved.model, frames=made._frames)
        # The model's centers may be in another order than those that its state was given.
        given = (saved.state or {}).get("centers", saved.model.centers)
        made._centers, made._scaling = given, saved.model.inputs
        made._kernel = made._settled_kernel(lambda _: saved.model.kernel.name)
        made._linear = made._settled_linear()
        made._offsets = saved.model.offsets or Offsets.none(
            saved.model.n_features, saved.model.targets.n_outputs
        )
        made._take_fitted(saved.fitted)
        return made

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    def _trained(self) -> KernelModel:
        """The trainer; after `load` it is made again from the saved state."""
        if self._trainer is None:
            if self._saved is None:
                raise InputError(
                    "the model came from a run, which holds no training state for partial_fit; go on with "
                    "ep3stream.fit, or call fit"
                )
            self._trainer = self._new_trainer()
            self._trainer.load_state_dict(self._unscaled(self._saved))
            self._saved = None
        return self._trainer

    def _unscaled(self, state: dict[str, Any]) -> dict[str, Any]:
        """A saved state with points in the units of the data; before version 4 they were scaled."""
        if state["version"] >= STATE_VERSION:
            return state
        inputs = self._scaling.to(torch.device("cpu"))
        # A constant feature, whose scale is 0, is what it is everywhere.
        spread = torch.where(inputs.scale > 0, 1 / inputs.scale, 0.0)
        rows = state["rows"].cpu() * spread + inputs.shift
        return state | {"centers": self._centers, "rows": rows}

    def _start(self, source: Source, holds_out: bool) -> _Start:
        """Draws the centers, and rows to hold out where that is asked for, and makes the trainer."""
        given = self.random_state
        is_number = isinstance(given, int | np.integer) and not isinstance(given, bool)
        self._seed = int(given) if is_number else int(check_random_state(given).randint(2**31 - 1))
        self._kernel = self._settled_kernel(partial(self._kernel_of_fit, source.n_rows))
        self._linear = self._settled_linear()
        n_held = self._n_held_out(source) if holds_out else 0
        self._scaling = self._input_scaling(source, n_held)
        self._require_sizes(source, holds_out)
        start = self._drawn(source, n_held)
        # Training on centers overfits, but where they are many of the rows it costs less than to lose those. A fit's
        # sizes leave rows enough.
        if start.epochs or _FEW_ROWS_PER_CENTER * len(start.centers) <= source.n_rows:
            left_out = np.union1d(start.centers, start.held_rows)
            start = replace(start, drawn=start.centers, excluded=left_out)
        if n_held:
            start = replace(start, held=_taken(source, start.held_rows))
        self._centers = torch.from_numpy(np.asarray(_taken(source, start.centers)[0], np.float32))
        self._saved = None
        held, learnt = start.held_rows, start.learnt
        if isinstance(source, NumberedSource):
            rows = {"drawn": start.drawn, "excluded": start.excluded}
            self._trainer = self._new_trainer(**rows, held=held, learnt=learnt, epochs=start.epochs or 1)
            return start
        self._trainer = self._new_trainer(held=held)
        return replace(start, source=replace(source, excluded=start.excluded), excluded=NO_ROWS)

    def _drawn(self, source: Source, n_held: int) -> _Start:
        """The centers and the rows to hold out, as a fit draws them where the rows have numbers."""
        n_centers = min(self._n_centers(source.n_rows), source.n_rows - n_held)
        if not isinstance(source, NumberedSource):
            drawn = source.draw_centers(n_centers + n_held, self._seed)
            held = np.sort(drawn[n_centers:])
            return _Start(source, drawn[:n_centers], excluded=held, held_rows=held)
        began, split, config = time.perf_counter(), source.split(), self._config
        mesh, inputs, sizes = Mesh(0, 1, self._device), self._scaling, dict[str, Any]()
        validation = ValidationRows(split.info.name, n_held) if n_held else NO_VALIDATION
        held = validation.held_rows(split.info, self._seed)
        problem = replace(problem_of_split(split, config, inputs), categories=self._codes)
        function = kernel_choice(self._kernel, self.bandwidth)[1]
        read = partial(random_rows, split, config, held)
        problem = narrowed(problem, config, function, mesh, StageTimes(logs=False), read)
        self._scaling = inputs = problem.inputs

        def learn(n_most: int) -> LearntColumns | None:
            pool = read_pool(split, config, held)
            n_resolving = resolving_centers(n_most, source.n_rows)
            return None if pool is None else learn_columns(problem, pool, config, n_resolving, mesh)

        if is_timed(config):
            problem = replace(
                problem, shape=on_device(shape_of(split, config, validation), config.run, mesh.device)
            )
            config, learnt, _ = with_measured_sizes(
                problem,
                split,
                config,
                function,
                None if self.n_centers == "auto" else n_centers,
                n_held,
                memory_budget(config.run.memory_bytes, mesh),
                mesh,
                learn,
                began,
                StageTimes(),
            )
            n_centers = int(config.solver.centers)
            sizes = {"epochs": config.solver.used_epochs, "patience": config.solver.used_patience}
        else:
            learnt = learn(n_centers)
        errors = None if learnt is None else learnt.errors
        drawn = drawn_centers(split, n_centers, errors, inputs, config, mesh, held)
        return _Start(source, drawn, excluded=held, held_rows=held, learnt=learnt, **sizes)

    def _require_sizes(self, source: Source, is_whole_fit: bool) -> None:
        """Raises ConfigError for sizes that cannot be, and for `minutes` but for a `fit` of rows that have numbers."""
        self._n_centers(source.n_rows)
        self._n_epochs(source.n_rows)
        if self.minutes is None:
            return
        if (
            isinstance(self.minutes, bool)
            or not isinstance(self.minutes, int | float)
            or not self.minutes > 0
        ):
            raise ConfigError(f"minutes is {self.minutes!r}; use None or a positive number")
        if not is_whole_fit or not isinstance(source, NumberedSource):
            rows = "a Dask array" if isinstance(source, DaskRows) else "rows with sample_weight"
            raise ConfigError(
                f"minutes is {self.minutes}, but {rows if is_whole_fit else 'partial_fit'} cannot be timed; leave it "
                "out, and give n_centers and epochs"
            )

    def _n_held_out(self, source: Source) -> int:
        share = self.validation_fraction
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise ConfigError(f"validation_fraction is {share!r}; use a number from 0 to below 1")
        return 0 if isinstance(source, WeightedRows) else n_held_out(source.n_rows, share)

    @property
    def _config(self) -> FitConfig:
        """What a fit would be told."""
        run = RunConfig(seed=self._seed, memory_bytes=parse_bytes(self.memory), minutes=self.minutes or 0)
        centers, epochs = (
            given if given == "auto" else int(given) for given in (self.n_centers, self.epochs)
        )
        solver = SolverConfig(
            centers=centers,
            epochs=epochs,
            **self._solver_settings,
            linear=self._linear,
            effects=self.effects if self._class_weights() == "none" else "none",
        )
        data = DataConfig(inputs_rank=self.inputs_rank)
        kernel = kernel_choice(self._kernel, self.bandwidth)[0]
        return FitConfig(data=data, kernel=kernel, solver=solver, run=run)

    @property
    def _solver_settings(self) -> dict[str, Any]:
        """The settings that `SolverConfig` and `KernelModel` call as this estimator does."""
        names = "projection", "nystrom_samples", "data_rank", "model_rank", "tail", "ridge", "precision"
        return {name: getattr(self, name) for name in names}

    @property
    def _is_of_columns(self) -> bool:
        kernel = self._kernel.name if isinstance(self._kernel, KernelConfig) else self._kernel
        return kernel in COLUMN_KERNELS

    @property
    def _device(self) -> torch.device:
        return torch.device(self.device or usual_device())

    def _new_trainer(self, **rows: Any) -> KernelModel:
        """rows: what `KernelModel.with_scaling` is told of them; nothing for a trainer whose state will be loaded."""
        return KernelModel.with_scaling(
            self._centers,
            self._scaling,
            self._kernel,
            self._n_outputs(),
            bandwidth=self.bandwidth,
            task=self._task,
            **self._solver_settings,
            linear=self._linear,
            class_weights=self._class_weights(),
            categories=self._codes,
            device=self.device,
            seed=self._seed,
            memory=self.memory,
            **rows,
        )

    @property
    def _task(self) -> Task:
        return "regression" if isinstance(self, RegressorMixin) else "classification"

    def _array_source(self, x: Block, y: Block) -> ArraySource:
        return ArraySource(x, y, RowForm(x.shape[1], self._n_outputs(), self._task, torch.device("cpu")))

    def _class_weights(self) -> ClassWeights:
        """Class weights by class id, as `KernelModel` takes them; a classifier overrides this."""
        return "none"

    def _input_scaling(self, source: Source, n_held: int) -> InputScaling:
        if self.scale not in get_args(Scale):
            raise ConfigError(f"scale is {self.scale!r}; choose one of {', '.join(get_args(Scale))}")
        is_auto, rows = self.scale == "auto", None
        if isinstance(source, NumberedSource):
            split = source.split()
            features = split.info.features
            held = ValidationRows(split.info.name, n_held).held_rows(split.info, self._seed)
            rows = rows_to_scale(split, self._seed, held) if is_auto else None
        elif self.scale == "none" and not self._codes:  # No pass over the rows.
            return InputScaling.identity(self._n_features)
        else:
            features = source.statistics()
            rows = np.asarray(source.drawn(n_to_scale(self._n_features), self._seed)[0]) if is_auto else None
        zero_one = () if self._frames is None else zero_one_features(self._frames)
        scaling = scaling_by(self.scale, features, zero_one, self._codes, rows)
        return scaling if self._is_of_columns else scaling.with_codes(self._codes)

    @property
    def _codes(self) -> dict[int, int]:
        """The features that are codes of categories, and how many codes each has."""
        return {} if self._frames is None else code_features(self._frames)

    @property
    def _n_features(self) -> int:
        """d, the features of the model; of a DataFrame others than its columns, which `n_features_in_` counts."""
        return self.n_features_in_ if self._frames is None else len(self._frames.feature_names)

    def _settled_kernel(self, automatic: Callable[[KernelConfig], Any]) -> AnyKernel:
        """The kernel of the settings; where these say `auto`, with the name that `automatic` gives for them."""
        given: AnyKernel = self.kernel
        if isinstance(given, KernelConfig):
            return replace(given, name=automatic(given)) if given.name == "auto" else given
        return str(automatic(KernelConfig(bandwidth=self.bandwidth))) if given == "auto" else given

    def _settled_linear(self) -> Any:
        """Whether a linear part is tried: with a kernel of distances, if it was left open, as with one on columns."""
        given = self.kernel.name if isinstance(self.kernel, KernelConfig) else self.kernel
        is_open = self.linear == "auto" and given == "auto" and not self._is_of_columns
        return "tried" if is_open else self.linear

    def _kernel_of_fit(self, n_rows: int, given: KernelConfig) -> str:
        """The name of the kernel that `fit` takes for as many features and rows."""
        config = FitConfig(kernel=given, solver=SolverConfig(precision=self.precision))
        return with_kernel(config, self._n_features, n_rows).kernel.name

    def _n_centers(self, n_rows: int) -> int:
        if self.n_centers == "auto":
            return min(n_rows, max(_FEW_CENTERS, min(_MANY_CENTERS, n_rows // _FEW_ROWS_PER_CENTER)))
        if not isinstance(self.n_centers, int | np.integer) or self.n_centers < 1:
            raise ConfigError(f"n_centers is {self.n_centers!r}; use 'auto' or a positive number")
        return min(n_rows, int(self.n_centers))

    def _n_epochs(self, n_rows: int) -> int:
        if self.epochs == "auto":
            return min(_MOST_EPOCHS, max(_LEAST_EPOCHS, -(-_ROWS_TO_SEE // n_rows)))
        if not isinstance(self.epochs, int | np.integer) or self.epochs < 1:
            raise ConfigError(f"epochs is {self.epochs!r}; use 'auto' or a positive number")
        return int(self.epochs)

    def _training_rows(
        self, X: Any, y: Any, is_first: bool, split: str = "train", sample_weight: Any = None
    ) -> Source:
        """Rows of any kind with coded targets. The first rows set the number of features, targets or classes."""
        if isinstance(X, Store) or is_dask_array(X):
            self._refuse_weights(sample_weight)
        if isinstance(X, Store):
            if y is not None:
                raise InputError("y was given beside a store, which has targets of its own; leave y out")
            reader = _reader(X, split)
            self._take_manifest(reader, is_first)
            if is_first:
                self._offsets = reader.manifest.offsets
            return StoreSource(reader)
        self._frames = None if is_first else self._frames
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        if is_dask_array(X):
            if is_first:
                self.n_features_in_ = X.shape[1]
            self._require_features(X.shape[1])
            rows = DaskRows.of(X, self._coded_dask(_as_dask(y), is_first), parse_bytes(self.memory))
            if is_first:
                self._decide_offsets(*rows.first_rows(sample_rows(X.shape[1])))
            return replace(rows, offsets=self._offsets)
        X, y = unmasked(X, "X"), unmasked(y, "y")
        if sample_weight is None:
            return self._array_source(*self._coded_arrays(X, y, is_first))
        X, y, weights = _weighing(X, y, sample_weight)
        x, coded = self._coded_arrays(X, y, is_first)
        return WeightedRows.of(x, coded, weights)

    def _decide_offsets(self, x: Block, y: Block) -> None:
        """Offsets by the first rows: of the features, and of targets that are numbers."""
        names = list(getattr(self, "feature_names_in_", ()))
        if len(names) != x.shape[1]:
            names = [f"x{i}" for i in range(x.shape[1])]
        self._offsets = Offsets(array_offsets(x, names), np.zeros(self._n_outputs()))
        if self._task == "regression":
            targets = [f"y{i}" for i in range(self._n_outputs())]
            self._offsets = replace(self._offsets, y=array_offsets(y, targets, "target"))

    def _validated(self, X: Any, y: Any, is_first: bool, **checks: Any) -> tuple[Any, Block, bool]:
        """X, (n, d), and y as scikit-learn checks them, and whether X is less its offsets already.

        The first DataFrame with texts, dates or gaps says which features are made of its columns, for all later ones.
        """
        read = None
        if not is_first:
            self._require_rows_of_features(X)
            read = None if self._frames is None else self._frames(X)
        elif (table := encoded_frame(X)) is not None:
            validate_data(self, X, skip_check_array=True)  # For the names and the number of the columns.
            record = table.record
            self._frames = FrameReader(table.feature_names, run=_FIRST_FRAME, record=record, unknown="ignore")
            read = table.x, True
        if read is None:
            X, y = validate_data(self, X, y, dtype=EXACT_TYPES, reset=is_first, accept_sparse="csr", **checks)
            return X, y, False
        return *check_X_y(read[0], y, dtype=EXACT_TYPES, estimator=self, **checks), read[1]

    def _decided(self, x: Any, y: Block, is_first: bool, is_stored: bool) -> tuple[Block, Block]:
        """x, (n, d), and y less the offsets, x in float32; the first rows decide about these.

        is_stored: whether x is less its offsets already.
        """
        if is_first:
            first = x[: sample_rows(x.shape[1])]
            self._decide_offsets(first.toarray() if issparse(x) else first, y)
            if self._frames is not None:
                known = Offsets.recorded(self._frames.columns, self._frames.feature_names, ())
                self._offsets = replace(self._offsets, x=known.x)
        return x if is_stored else rounded(x, self._offsets.x), shifted(y, self._offsets.y)

    def _outputs(
        self, X: Any, of_block: Callable[[Predictor, Block], Block], n_columns: int | None, dtype: Any
    ) -> Any:
        """`of_block(model, x)` for rows of any kind; a lazy array for a Dask array, else a NumPy array."""
        check_is_fitted(self, "model_")
        if is_dask_array(X):
            self._require_features(X.shape[1])
            return map_rows(self.model_, X, of_block, n_columns, dtype)
        if isinstance(X, Store):
            reader = _reader(X, "test")
            self._require_features(reader.manifest.n_features)
            model = self.model_.without(reader.manifest.offsets)
            return np.concatenate([of_block(model, np.asarray(x)) for x, _ in StoreSource(reader).all()])
        if self._is_read_by_name(X):
            return of_block(self.model_, X)
        self._require_rows_of_features(X)
        X = validate_data(self, unmasked(X, "X"), dtype=EXACT_TYPES, reset=False, accept_sparse="csr")
        if issparse(X):  # A block of rows at a time is never large.
            parts = [of_block(self.model_, X[rows].toarray()) for rows in batches_of(X.shape[0])]
            return np.concatenate(parts)
        return of_block(self.model_, X)

    def _is_read_by_name(self, X: Any) -> bool:
        """Whether X is a table whose columns are found by their names; a record of columns may make features of them.

        Without a record this is for a saved model, and for other columns than the features alone.
        """
        if self._frames is not None:
            return is_table(X)
        names = getattr(X, "columns", None)
        if self.model_.frames is None or names is None:
            return False
        return list(names) != list(getattr(self, "feature_names_in_", ()))

    def _require_rows_of_features(self, X: Any) -> None:
        """InputError for an array where the columns of a DataFrame became other features."""
        known = self._frames
        if known is None or is_table(X):
            return
        if list(getattr(self, "feature_names_in_", ())) != list(known.feature_names):
            raise InputError(
                f"X is a {type(X).__name__}, but {type(self).__name__} was fitted to a DataFrame whose columns became "
                f"{len(known.feature_names)} features; give a DataFrame with its columns"
            )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _streamed_score(self, X: Any, y: Any, totals: RegressionScores | ClassScores) -> dict[str, Any]:
        """Scores of rows that need not fit in memory, summed in `totals`."""
        check_is_fitted(self, "model_")
        source = self._training_rows(X, y, is_first=False, split="test")
        offsets = source.reader.manifest.offsets if isinstance(source, StoreSource) else self._offsets
        model = self.model_.without(offsets)
        for x, targets in source.all():
            values = np.asarray(targets) if model.class_names else targets + offsets.y
            totals.add(model.decision_function(x).astype(np.float64), values)
        return totals.result()

    def _take_names(self, reader: SplitReader, task: str, is_first: bool) -> None:
        """Takes over the feature names of a store; ValueError where the first rows had other features."""
        manifest = reader.manifest
        if manifest.task != task:
            raise ValueError(f"{reader.path} is for {manifest.task}; {type(self).__name__} does {task}")
        names = np.array(manifest.feature_names, dtype=object)
        if is_first:
            self.n_features_in_, self.feature_names_in_ = len(names), names
            self._frames = FrameReader(
                manifest.feature_names,
                run=Path(reader.path.name),
                record=columns_of(manifest),
                unknown="ignore",
            )
        self._require_features(len(names))
        known = (
            getattr(self, "feature_names_in_", names) if self._frames is None else self._frames.feature_names
        )
        if list(known) != list(names):
            raise ValueError(f"{reader.path} has other features than {type(self).__name__} was fitted to")

    def _refuse_weights(self, sample_weight: Any) -> None:
        if sample_weight is not None:
            raise InputError(
                "sample_weight was given, but it is for arrays in memory, not for stores and Dask arrays; leave it "
                "out, or repeat rows when they are converted"
            )

    def _require_features(self, n_features: int) -> None:
        if n_features != self._n_features:
            raise ValueError(
                f"X has {n_features} features, but {type(self).__name__} is expecting {self._n_features} features"
            )

    def _predictor(self) -> Predictor:
        """The model as it is now, with the feature and class names of the data."""
        assert self._trainer is not None  # it has just been trained
        model = replace(self._trainer.predictor(), offsets=self._offsets if self._offsets else None)
        names = getattr(self, "feature_names_in_", None)
        classes = getattr(self, "classes_", None)
        class_names = None if classes is None else names_of(classes)
        feature_names = model.feature_names if names is None else tuple(map(str, names))
        frames = self._frames
        if frames is not None:
            feature_names = frames.feature_names
            frames = replace(frames, target_names=model.target_names, class_names=class_names)
        return replace(
            model,
            feature_names=feature_names,
            class_names=class_names,
            label_type="text" if classes is None else label_type_of(classes),
            frames=frames,
        )

    def _fitted(self) -> dict[str, Any]:
        """The fitted attributes as JSON; `_take_fitted` restores them."""
        names = getattr(self, "feature_names_in_", None)
        features = {
            "n_features": self.n_features_in_,
            "feature_names": None if names is None else list(names),
        }
        return {**features, "losses": self.losses_, "seed": self._seed}

    def _take_fitted(self, fitted: dict[str, Any]) -> None:
        names = fitted.get("feature_names", list(self.model_.feature_names))
        if names is not None:
            self.feature_names_in_ = np.array(names, dtype=object)
        self.n_features_in_ = fitted.get("n_features", self.model_.n_features)
        self.losses_, self._seed = fitted.get("losses", []), fitted.get("seed", 0)


def _taken(source: Source, rows: Rows) -> tuple[Block, Block]:
    """x, (m, d), and y of the rows of these numbers."""
    x, y = source.split().read_rows(rows) if isinstance(source, NumberedSource) else source.take(rows)
    return np.asarray(x), np.asarray(y)


def _reader(rows: Store, usual: str) -> SplitReader:
    """The reader of a split: the one given, or of a store the split `usual`, or its only split."""
    if isinstance(rows, SplitReader):
        return rows
    store = rows if isinstance(rows, RowStore) else open_store(rows)
    names = list(store.manifest.splits)
    return store.split(names[0] if len(names) == 1 else usual)


def _weighing(X: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, Block]:
    """The rows of positive weight, and their weights, (n,); ValueError for a negative weight, or none above zero."""
    check_consistent_length(X, y)
    weights = _check_sample_weight(
        unmasked(sample_weight, "sample_weight"), X, dtype=np.float64, ensure_non_negative=True
    )
    counts = np.flatnonzero(weights)
    if not len(counts):
        raise ValueError("sample_weight is zero for every row; give some of them a positive weight")
    if len(counts) < len(weights):
        X, y = _safe_indexing(X, counts), _safe_indexing(y, counts)
    return X, y, weights[counts]


def _as_dask(y: Any) -> Any:
    import dask.array as da

    if not is_dask_array(y):
        return da.from_array(np.asarray(unmasked(y, "y")))
    is_masked = isinstance(getattr(y, "_meta", None), np.ma.MaskedArray)
    return y.map_blocks(unmasked, "y", dtype=y.dtype, meta=y._meta) if is_masked else y
