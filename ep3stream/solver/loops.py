"""The way to the compiled loops: whether Numba is there, and in which threads they run."""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import NamedTuple

import torch

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


def in_threads(work: Callable[[slice], None], n_items: int, operations_each: int) -> None:
    """Calls `work` for consecutive runs of items that cover `n_items`, each in one of torch's number of threads.

    operations_each: about how many an item takes; little work stays in this thread. `work` must not call this itself.
    """
    sensible = n_items * operations_each // _THREAD_OPERATIONS + 1
    n_threads = max(1, min(torch.get_num_threads(), n_items, sensible))
    bounds = [n_items * i // n_threads for i in range(n_threads + 1)]
    mine, *others = (slice(*pair) for pair in itertools.pairwise(bounds))
    under_way = [_pool(torch.get_num_threads() - 1).submit(work, items) for items in others]
    work(mine)
    for each in under_way:
        each.result()


@functools.lru_cache(maxsize=1)  # Of another number of threads: those of before end.
def _pool(n_threads: int) -> ThreadPoolExecutor:
    """Threads that stay: to start some for each of several calls a step costs as much as a small call."""
    return ThreadPoolExecutor(n_threads, "ep3stream-loops")


# A forked process has none of its parent's threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
