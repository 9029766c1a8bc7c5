"""The way to the compiled loops: whether Numba is there, and in how many threads they run."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from ep3stream.threads import in_threads

_LOGGER = logging.getLogger(__name__)

# Less work than this takes less time than to wake another thread.
_THREAD_OPERATIONS = 1 << 19


class Loops(NamedTuple):
    """`compiled_columns.py` and `compiled_products.py`."""

    columns: ModuleType
    products: ModuleType


@functools.cache
def compiled_loops() -> Loops | None:
    """The compiled loops, imported at the first call; None where they cannot be used, which is told once."""
    try:
        return Loops(
            *(importlib.import_module(f"ep3stream.solver.compiled_{each}") for each in Loops._fields)
        )
    except ImportError as error:
        _LOGGER.warning(
            "kernels on columns take several times as long, because Numba is not there: %s", error
        )
        return None


def in_torchs_threads(work: Callable[[slice], None], n_items: int, operations_each: int) -> None:
    """`in_threads` with torch's number of threads. operations_each: about how many an item takes; few need no other."""
    worthwhile = n_items * operations_each // _THREAD_OPERATIONS + 1
    in_threads(work, n_items, min(torch.get_num_threads(), worthwhile))
