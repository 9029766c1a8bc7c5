"""Dask arrays from end to end: made by blocks, trained on by blocks, predicted by blocks.

    python examples/dask_arrays.py

Nothing here holds all rows: `fit` and `predict` compute a few blocks at a time, on your cluster if there is one.
"""

from __future__ import annotations

import dask.array as da
import numpy as np

from ep3stream import KernelRegressor


def main(n_rows: int = 200_000, n_centers: int = 1000) -> float:
    """The share of the variance that is explained, by blocks too."""
    x = da.random.default_rng(0).standard_normal((n_rows, 10), chunks=(n_rows // 20, 10), dtype=np.float32)
    y = da.tanh(x[:, 0] * x[:, 1]) + 0.5 * da.cos(2 * x[:, 2])

    test = n_rows // 10
    model = KernelRegressor(kernel="gaussian", bandwidth=4.0, n_centers=n_centers, epochs=2, random_state=0)
    model.fit(x[test:], y[test:])

    predicted = model.predict(x[:test])  # lazy
    r2 = float(1 - ((predicted - y[:test]) ** 2).mean().compute() / y[:test].var().compute())
    print(f"R2 {r2:.3f} on {test:,} rows")
    return r2


if __name__ == "__main__":
    main()
