"""A model's outputs for a Dask array, block by block and not before they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.errors import InputError
from ep3stream.solver.model import Predictor

Block = NDArray[Any]


def is_dask_array(value: object) -> bool:
    """Without importing Dask for those who do not use it."""
    kind = type(value)
    return (
        kind.__module__.partition(".")[0] == "dask"
        and hasattr(value, "map_blocks")
        and hasattr(value, "chunks")
    )


def map_rows(
    model: Predictor, x: Any, of_block: Callable[[Predictor, Block], Block], n_columns: int | None, dtype: Any
) -> Any:
    """A lazy Dask array of what `of_block` makes of each block of x, (n, d): (n,), or (n, n_columns).

    The model is one node of the graph, sent to each worker once; columns in several chunks are joined first.
    Raises InputError unless x has the model's features.
    """
    import dask.array as da
    from dask.delayed import delayed

    if x.ndim != 2 or x.shape[1] != model.n_features:
        raise InputError(f"x has the shape {x.shape}; the model takes (n, {model.n_features}) features")
    x = x.rechunk({1: -1})
    shape: dict[str, Any] = {"drop_axis": 1} if n_columns is None else {"chunks": (x.chunks[0], (n_columns,))}
    shared = delayed(model, pure=False)
    return da.map_blocks(_of_rows, x, shared, of_block, dtype=dtype, meta=_meta(n_columns, dtype), **shape)


def predict_lazily(model: Predictor, x: Any, scores: bool = False) -> Any:
    """`model.predict` of a Dask array x, (n, d), or with `scores` its `decision_function`, as a lazy Dask array."""
    n_outputs = model.targets.n_outputs
    if scores:
        return map_rows(model, x, Predictor.decision_function, n_outputs, np.float32)
    if model.class_names is not None:
        return map_rows(model, x, Predictor.predict, None, np.asarray(model.class_names).dtype)
    return map_rows(model, x, Predictor.predict, None if n_outputs == 1 else n_outputs, np.float32)


def _of_rows(rows: Block, model: Predictor, of_block: Callable[[Predictor, Block], Block]) -> Block:
    return of_block(model, rows)


def _meta(n_columns: int | None, dtype: Any) -> Block:
    return np.empty((0,) if n_columns is None else (0, 0), dtype)
