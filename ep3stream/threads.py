"""Threads that stay for work in small parts, such as the parts of a kernel block."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

_MOST_THREADS = 256


def in_threads(work: Callable[[slice], None], n_items: int, n_threads: int) -> None:
    """Calls `work` for consecutive runs of items that cover `n_items`, each in a thread: this one, and others.

    `work` must not call this itself.
    """
    n_runs = max(1, min(n_threads, n_items))
    bounds = [n_items * i // n_runs for i in range(n_runs + 1)]
    mine, *others = (slice(*pair) for pair in itertools.pairwise(bounds))
    under_way = [_pool().submit(work, items) for items in others]
    try:
        work(mine)
    finally:
        wait(under_way)  # Nothing is written any more when this ends, in any way.
    for each in under_way:
        each.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """It starts a thread only where none is idle. To start some for each call takes as long as a small call."""
    return ThreadPoolExecutor(_MOST_THREADS, "kernel-loops")


# A forked process has none of its parent's threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
