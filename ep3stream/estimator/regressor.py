"""`KernelRegressor`: one target or several, by least squares."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

from sklearn.base import RegressorMixin
from sklearn.utils.validation import check_is_fitted

from ep3stream.estimator.base import AnyKernel, Block, KernelEstimator, Store
from ep3stream.prediction.predict import is_dask_array
from ep3stream.prediction.scores import RegressionScores
from ep3stream.solver.model import Predictor, unmasked
from ep3stream.store.reader import SplitReader


class KernelRegressor(RegressorMixin, KernelEstimator):  # type: ignore[misc]
    """f(x) = sum_i alpha_i K(x, z_i) fitted by least squares to one target or several.

    kernel: a name, a `KernelConfig`, or a callable k(x, z); `auto` is what `ep3stream.fit` takes: `product`, which
    learns what each feature matters, up to 1000 features; `laplacian` beyond, below 100 rows, and with a bandwidth.
    bandwidth: of a kernel given by name.
    n_centers: p; `auto` is 2000, from 10,000 rows a fifth of them, 5000 at most. They are drawn from the rows, and
    left out of the training where five times as many rows are there.
    epochs: `auto` shows the solver 30,000 rows, in 2 to 20 passes.
    minutes: of these two, those that are `auto` become what `ep3stream.fit` takes for so many minutes on this device;
    for a `fit` of a store, arrays or a DataFrame. Two fits may differ then; without minutes they do not.
    ridge: lambda of the objective
    1/(2n) sum_i |f(x_i) - y_i|^2 + lambda/2 |f|_H^2 over scaled targets; None for what `fit` takes.
    validation_fraction: of 1000 rows or more this share, 20,000 at most, is not trained on by a `fit` without
    sample_weight. After each epoch these rows choose the best model so far and, for `product` and `anova` with up to
    4 outputs, the best of four ridges. 0 trains on all.
    scale: of the inputs, as in `DataConfig`. linear: whether a ridge regression is fitted first, where it helps, as in
    `SolverConfig`; `auto` with kernels on columns. effects: `auto` ends a `fit` without
    sample_weight with the effects of crossed columns (`KernelModel.learn_effects`), `none` does without. inputs_rank:
    how many leading directions of the scaled inputs a kernel of distances takes, as in `DataConfig`; rows of a Dask
    array and rows with sample_weight have all inputs. The others are those of `KernelModel`.

    After a fit: `model_`, a `Predictor`; `losses_`, the mean squared error of each epoch's batches before their
    steps; `n_features_in_`, `feature_names_in_` where the data have names.
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
        self.linear = linear
        self.effects = effects
        self.inputs_rank = inputs_rank
        self.random_state = random_state

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """One pass over the rows. The first rows also give centers, scaling and step sizes, so give many of them."""
        return self._partial_fit(X, y, sample_weight)

    def predict(self, X: Any) -> Any:
        """Values, (n,) or (n, c), float32, or float64 where targets have offsets; lazy for a Dask array.

        Of a store, those of the split `test` or the only split.
        """
        check_is_fitted(self, "model_")
        columns = None if self._is_flat else self._n_outputs()
        return self._outputs(X, partial(_values, self._is_flat), columns, self.model_.output_dtype)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """R2, averaged over the targets; 1 is perfect. Dask arrays and stores take no sample_weight."""
        if not is_dask_array(X) and not isinstance(X, Store):
            y, sample_weight = unmasked(y, "y"), unmasked(sample_weight, "sample_weight")
            return float(super().score(X, y, sample_weight))
        self._refuse_weights(sample_weight)
        return float(self._streamed_score(X, y, RegressionScores())["r2"])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _n_outputs(self) -> int:
        return self._n_targets

    def _coded_arrays(self, X: Any, y: Any, is_first: bool) -> tuple[Block, Block]:
        X, y, is_stored = self._validated(X, y, is_first, multi_output=True, y_numeric=True)
        self._take_targets(y.shape[1:], is_first)
        return self._decided(X, y.reshape(len(y), -1), is_first, is_stored)

    def _coded_dask(self, y: Any, is_first: bool) -> Any:
        self._take_targets(y.shape[1:], is_first)
        return y if y.ndim == 2 else y[:, None]

    def _take_manifest(self, reader: SplitReader, is_first: bool) -> None:
        n_targets = reader.manifest.n_outputs
        self._take_names(reader, "regression", is_first)
        self._take_targets((n_targets,) if n_targets > 1 else (), is_first)

    def _take_targets(self, shape: tuple[int, ...], is_first: bool) -> None:
        n_targets = shape[0] if shape else 1
        if is_first:
            self._is_flat, self._n_targets = not shape, n_targets
        elif n_targets != self._n_targets:
            raise ValueError(
                f"y has {n_targets} targets, but {type(self).__name__} was fitted to {self._n_targets}"
            )

    def _fitted(self) -> dict[str, Any]:
        return super()._fitted() | {"is_flat": self._is_flat}

    def _take_fitted(self, fitted: dict[str, Any]) -> None:
        super()._take_fitted(fitted)
        self._n_targets = self.model_.targets.n_outputs
        self._is_flat = fitted.get("is_flat", self._n_targets == 1)


def _values(is_flat: bool, model: Predictor, x: Block) -> Block:
    outputs = model.decision_function(x)
    return outputs[:, 0] if is_flat else outputs
