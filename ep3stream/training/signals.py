"""SIGTERM, SIGINT and SIGUSR1 as flags that the fit loop reads between steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_STOP = (signal.SIGTERM, signal.SIGINT)

_SAVE = signal.SIGUSR1

HANDLED = (*_STOP, _SAVE)


class Signals:
    """While entered, SIGTERM or SIGINT sets `stop_name`, to save and stop; SIGUSR1 asks to save and go on.

    A SIGINT after either of the first two is a KeyboardInterrupt at once. Outside the main thread, where Python
    delivers no signals, nothing is ever asked for.
    """

    def __init__(self) -> None:
        self.stop_name: str | None = None
        self.wants_checkpoint = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in HANDLED}
            # A rank is started with these held back until now.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == _SAVE:
            self.wants_checkpoint = True
        elif self.stop_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt(
                "nothing was saved since the last checkpoint; the same command goes on from it"
            )
        else:
            self.stop_name = signal.Signals(number).name
