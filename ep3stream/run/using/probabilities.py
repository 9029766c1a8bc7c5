"""Outputs of a classifier as probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def nearest_in_simplex(outputs: NDArray[Any]) -> NDArray[Any]:
    """The Euclidean projection of each row, (n, c), onto {p >= 0, sum p = 1}; O(n c log c) time.

    Duchi, Shalev-Shwartz, Singer and Chandra, ICML 2008, figure 1: p_k = max(f_k - t, 0), t from the sorted row.
    """
    values = outputs.astype(np.float64)
    descending = -np.sort(-values, axis=1)
    excess = np.cumsum(descending, axis=1) - 1
    counts = np.arange(1, values.shape[1] + 1)
    n_kept = (descending * counts > excess).sum(1)
    threshold = excess[np.arange(len(values)), n_kept - 1] / n_kept
    nearest: NDArray[Any] = np.maximum(values - threshold[:, None], 0.0).astype(outputs.dtype)
    return nearest
