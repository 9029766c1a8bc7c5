"""SIGTERM, SIGINT and SIGUSR1: flags that a fit reads between its steps, and never the end of its process.

A process that is to fit holds signals back from its first moment on: they wait until the fit handles them. After the
fit they are ignored, since the exit code stands by then.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def hold_signals(*numbers: signal.Signals) -> None:
    """Blocks signals for this thread, and for all threads and processes that it starts, until `handling` is entered.

    The system keeps them until then. To be called before any other thread is there, which would receive them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


@contextmanager
def handling(note: Callable[[signal.Signals], None]) -> Iterator[None]:
    """While entered, calls `note` for each of HANDLED that this process receives, those held back so far at once.

    Afterwards the handlers from before are back, but signals that were held back are ignored from then on, also by
    the interpreter as it ends. Does nothing outside the main thread, where Python runs no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        note(signal.Signals(number))

    # None is a handler that was not set from Python, and cannot be put back.
    previous: dict[int, Any] = {number: signal.signal(number, handle) or signal.SIG_DFL for number in HANDLED}
    try:
        for number in signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED) & previous.keys():
            previous[number] = signal.SIG_IGN
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Signals:
    """While entered, SIGTERM or SIGINT sets `stop_name`, to save and stop; SIGUSR1 asks to save and go on.

    A SIGINT after either of the first two raises KeyboardInterrupt at once. Outside the main thread nothing is ever
    asked for.
    """

    def __init__(self) -> None:
        self.stop_name: str | None = None
        self.wants_checkpoint = False
        self._handling: AbstractContextManager[None] = handling(self._note)

    def __enter__(self) -> Signals:
        self._handling.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._handling.__exit__(*exc)

    def _note(self, number: signal.Signals) -> None:
        if number == signal.SIGUSR1:
            self.wants_checkpoint = True
        elif self.stop_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt(
                "nothing was saved since the last checkpoint; the same command goes on from it"
            )
        else:
            self.stop_name = number.name
