"""How loops become machine code, by Numba.

Numba is imported by `compiled_columns.py` and `compiled_products.py` alone, and these by `column_loops.py` at the first
block that can use them: fits with other kernels do not wait for it. Machine code is kept beside these files or in the
user's cache directory, so that a process compiles only what none has compiled before.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar, cast

import numba

_LOGGER = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., None])

# Products and sums may become one instruction; no other rule of float arithmetic is given up. A check of every division
# would keep loops from becoming vector instructions.
ARITHMETIC: Mapping[str, Any] = {"fastmath": {"contract"}, "error_model": "numpy"}
# Sums may also be added up in the order of the vector instructions: always the same one on one processor.
REORDERED: Mapping[str, Any] = {"fastmath": {"contract", "reassoc"}, "error_model": "numpy"}


def compiled(arithmetic: Mapping[str, Any]) -> Callable[[_Function], _Function]:
    """The function as machine code from its first call on, which runs without Python's lock.

    The machine code is kept on disk. Where that fails (no place, a full disk, a damaged file), this process compiles
    for itself, and the next one keeps its own.
    """
    options = {"nogil": True, **arithmetic}

    def decorator(function: _Function) -> _Function:
        in_use: list[Callable[..., Any]] = []
        lock = threading.Lock()

        def first(*arguments: Any) -> None:
            found: Any = None
            try:
                found = numba.njit(cache=True, **options)(function)
                found(*arguments)
            except Exception as error:  # Whatever a damaged file may lead to.
                _LOGGER.info("%s: machine code is not kept on disk: %s", function.__name__, error)
                with suppress(Exception):  # Otherwise every process would find the file damaged.
                    found._cache.flush()
                found = numba.njit(**options)(function)
                found(*arguments)
            in_use.append(found)

        @functools.wraps(function)
        def run(*arguments: Any) -> None:
            if not in_use:
                with lock:
                    if not in_use:
                        first(*arguments)
                        return
            in_use[0](*arguments)

        return cast("_Function", run)

    return decorator
