"""`KernelClassifier`: class probabilities by least squares on class indicators."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from ep3stream.errors import ConfigError, InputError
from ep3stream.estimator.base import AnyKernel, Block, ClassWeights, KernelEstimator, Store
from ep3stream.estimator.saved import labels_as_json, labels_from_json
from ep3stream.prediction.predict import is_dask_array
from ep3stream.prediction.scores import ClassScores, nearest_in_simplex
from ep3stream.solver.model import Predictor, unmasked
from ep3stream.store.reader import SplitReader
from ep3stream.values.labels import as_labels, names_of, recorded_label_type


class KernelClassifier(ClassifierMixin, KernelEstimator):  # type: ignore[misc]
    """The class k of the largest f_k(x) = sum_i alpha_ik K(x, z_i), fitted by least squares to one-hot rows.

    Settings and attributes are those of `KernelRegressor`; class_weight: what a row of a class counts, by label, 1 for
    those left out, or `balanced`, inverse to its frequency among the rows, each counted by its weight; `classes_`: the
    labels in order. f_k estimates the probability of class k, being the least-squares fit to its indicator;
    `predict_proba` is the nearest point of the probability simplex to f(x), which never has a larger Brier score. It
    is not calibrated beyond that:
    sklearn.calibration.CalibratedClassifierCV does it.
    """

    def __init__(
        self,
        kernel: AnyKernel = "auto",
        *,
        bandwidth: float | str = "median",
        n_centers: int | str = "auto",
        epochs: int | str = "auto",
        minutes: float | None = None,
        ridge: float | None = None,
        scale: str = "auto",
        validation_fraction: float = 0.1,
        projection: str = "nystrom",
        nystrom_samples: int = 3000,
        data_rank: int = 0,
        model_rank: int = 0,
        tail: str | int = "auto",
        precision: str = "auto",
        memory: int | str = "2GiB",
        device: str | None = None,
        class_weight: Any = None,
        linear: str = "auto",
        effects: str = "auto",
        inputs_rank: str | int = "auto",
        random_state: Any = None,
    ) -> None:
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.n_centers = n_centers
        self.epochs = epochs
        self.minutes = minutes
        self.ridge = ridge
        self.scale = scale
        self.validation_fraction = validation_fraction
        self.projection = projection
        self.nystrom_samples = nystrom_samples
        self.data_rank = data_rank
        self.model_rank = model_rank
        self.tail = tail
        self.precision = precision
        self.memory = memory
        self.device = device
        self.class_weight = class_weight
        self.linear = linear
        self.effects = effects
        self.inputs_rank = inputs_rank
        self.random_state = random_state

    def partial_fit(self, X: Any, y: Any = None, classes: Any = None, sample_weight: Any = None) -> Self:
        """One pass over the rows. The first call needs all `classes`, unless the rows are a store, which knows them.

        The first rows also give the centers, scaling and step sizes: let them be many and of all classes.
        """
        if not hasattr(self, "model_") and not isinstance(X, Store):
            if classes is None:
                raise ValueError("classes must be passed on the first call to partial_fit")
            self._take_classes(np.unique(unmasked(classes, "classes")))
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ValueError(f"classes are {classes!r:.100}, but the first call had {self.classes_!r:.100}")
        return self._partial_fit(X, y, sample_weight)

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """As `KernelRegressor.fit`, with y of class labels: numbers, texts or booleans."""
        if hasattr(self, "classes_"):
            del self.classes_
        return super().fit(X, y, sample_weight)

    def predict(self, X: Any) -> Any:
        """Labels, (n,); a lazy array for a Dask array. For a store, those of the split `test` or the only split."""
        check_is_fitted(self, "model_")
        return self._outputs(X, partial(_labels, self.classes_), None, self.classes_.dtype)

    def predict_proba(self, X: Any) -> Any:
        """Probabilities, (n, classes), float32: the point of the simplex nearest to the outputs; rows sum to 1."""
        check_is_fitted(self, "model_")
        return self._outputs(X, _probabilities, len(self.classes_), np.float32)

    def decision_function(self, X: Any) -> Any:
        """The outputs, (n, classes); for two classes their difference, (n,), positive for the second."""
        check_is_fitted(self, "model_")
        columns = None if len(self.classes_) == 2 else len(self.classes_)
        return self._outputs(X, _decision, columns, np.float32)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """The accuracy. Dask arrays and stores are streamed, and take no sample_weight."""
        if not is_dask_array(X) and not isinstance(X, Store):
            y, sample_weight = unmasked(y, "y"), unmasked(sample_weight, "sample_weight")
            return float(super().score(X, y, sample_weight))
        self._refuse_weights(sample_weight)
        check_is_fitted(self, "model_")
        return float(self._streamed_score(X, y, ClassScores(tuple(map(str, self.classes_))))["accuracy"])

    def _class_weights(self) -> ClassWeights:
        if self.class_weight is None:
            return "none"
        if self.class_weight == "balanced":
            return "balanced"
        if not isinstance(self.class_weight, Mapping):
            raise ConfigError(
                f"class_weight is {self.class_weight!r:.80}; use 'balanced', a weight for each label, or None"
            )
        for label, weight in self.class_weight.items():
            is_number = isinstance(weight, int | float | np.number) and not isinstance(weight, bool)
            if not is_number or not 0 < weight < math.inf:
                raise ConfigError(
                    f"class_weight of {_shown(label)} is {weight!r:.80}; use a positive, finite number"
                )
        labels = np.array(list(self.class_weight))
        if labels.dtype.kind == "U" and self.classes_.dtype.kind != "U":
            # As a store names its classes.
            by_name = dict(zip(names_of(self.classes_), self.classes_.tolist(), strict=True))
            labels = np.array([by_name.get(label, label) for label in labels.tolist()])
        if self.classes_.dtype.kind in "mM":
            labels = labels.astype(self.classes_.dtype)  # Of dates as Python and pandas have them.
        return dict(
            zip(
                _ids(labels, self.classes_, " of class_weight").tolist(),
                self.class_weight.values(),
                strict=True,
            )
        )

    def _n_outputs(self) -> int:
        return len(self.classes_)

    def _take_classes(self, classes: Block) -> None:
        if len(classes) < 2:
            raise ValueError(
                f"y has one class, {_shown(classes[0])}; a classifier needs rows of at least two classes"
            )
        self.classes_ = classes

    def _coded_arrays(self, X: Any, y: Any, is_first: bool) -> tuple[Block, Block]:
        if getattr(getattr(y, "dtype", None), "kind", "") == "T":
            y = y.astype(object).astype(str)  # NumPy's StringDType, which scikit-learn does not know.
        X, y, is_stored = self._validated(X, y, is_first)
        y = column_or_1d(y, warn=True)
        try:
            check_classification_targets(y)
            distinct = np.unique(y)
        except TypeError as error:
            raise InputError(
                f"y holds {y.dtype} that are no labels ({error}); give numbers, texts, booleans or numpy.datetime64"
            ) from error
        if y.dtype.kind in "mM" and np.isnat(y).any():
            raise InputError(
                f"y is NaT in row {int(np.isnat(y).argmax()) + 1}; leave out rows without a label"
            )
        if not hasattr(self, "classes_"):
            self._take_classes(distinct)
        return self._decided(X, _ids(y, self.classes_), is_first, is_stored)

    def _coded_dask(self, y: Any, is_first: bool) -> Any:
        import dask.array as da

        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        if not hasattr(self, "classes_"):
            self._take_classes(da.unique(y).compute())
        return y.map_blocks(_ids, self.classes_, dtype=np.int64)

    def _take_manifest(self, reader: SplitReader, is_first: bool) -> None:
        self._take_names(reader, "classification", is_first)
        manifest = reader.manifest
        names = manifest.class_names or ()
        classes = as_labels(names, recorded_label_type(manifest.columns, names))
        if is_first:
            self._take_classes(classes)
        elif names_of(classes) != names_of(self.classes_):
            raise ValueError(
                f"{reader.path} has the classes {classes!r:.100}, the model {self.classes_!r:.100}"
            )

    def _fitted(self) -> dict[str, Any]:
        return super()._fitted() | {"classes": labels_as_json(self.classes_)}

    def _take_fitted(self, fitted: dict[str, Any]) -> None:
        super()._take_fitted(fitted)
        classes = fitted.get("classes")
        self.classes_ = self.model_.labels if classes is None else labels_from_json(classes)


def _shown(label: Any) -> str:
    """A label in a message: a number or text of NumPy as Python has it."""
    is_plain = isinstance(label, np.generic) and label.dtype.kind not in "mM"
    return repr(label.item() if is_plain else label)


def _ids(labels: Block, classes: Block, where: str = "") -> Block:
    """Class ids, (n,), of the labels; ValueError for a label that is not among the classes. where: it comes from."""
    unmasked(labels, "y")
    found: Block = np.searchsorted(classes, labels).clip(max=len(classes) - 1).astype(np.int64)
    unknown = np.flatnonzero(classes[found] != labels)
    if len(unknown):
        label, known = _shown(labels[unknown[0]]), ", ".join(map(_shown, classes))
        raise ValueError(f"the label {label}{where} is not among the classes, which are {known:.100}")
    return found


def _labels(classes: Block, model: Predictor, x: Block) -> Block:
    labels: Block = classes[model.decision_function(x).argmax(1)]
    return labels


def _decision(model: Predictor, x: Block) -> Block:
    outputs = model.decision_function(x)
    return outputs[:, 1] - outputs[:, 0] if outputs.shape[1] == 2 else outputs


def _probabilities(model: Predictor, x: Block) -> Block:
    return nearest_in_simplex(model.decision_function(x))
