"""The scikit-learn face: `KernelRegressor` and `KernelClassifier`.

from ep3stream.estimator import KernelClassifier

model = KernelClassifier(n_centers=5000).fit(X, y)
model.predict_proba(X_new)

They train a `KernelModel` on arrays in memory, on Dask arrays a few blocks at a time, or on a split of a store, and
scale the inputs as `ep3stream.fit` does. They keep no checkpoints: for fits of hours there is `ep3stream.fit`.
"""

from __future__ import annotations

try:
    import sklearn.base  # noqa: F401
except ImportError as error:
    raise ImportError(
        "KernelRegressor and KernelClassifier need scikit-learn 1.6 or newer: pip install 'ep3stream[sklearn]'"
    ) from error

from ep3stream.estimator.classifier import KernelClassifier
from ep3stream.estimator.regressor import KernelRegressor

__all__ = ["KernelClassifier", "KernelRegressor"]
