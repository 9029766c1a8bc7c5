"""`python -m ep3stream.rank FOLDER`: one rank of the work that `launch.py` has written into that folder.

Exit code 0 once the outcome is in the folder, whatever it is; any other asks the launcher to start all ranks again.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ep3stream.config import FitConfig
from ep3stream.errors import Ep3streamError, RankError
from ep3stream.prediction.evaluate import evaluate, predict
from ep3stream.run.clock import FitProgress
from ep3stream.run.launch import JOB, LOST_RANK, OUTCOME, PIPE, write_outcome
from ep3stream.solver.kernels import KernelFunction
from ep3stream.training.fit import fit
from ep3stream.training.signals import HANDLED

_LOOK_S = 0.5

_OUTCOME_S = 5.0


def main(folder: Path) -> int:
    """The exit code."""
    # Until the fit has its handlers: a signal that comes before then waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    job = json.loads((folder / JOB).read_text())
    if (folder / OUTCOME).exists():
        return 0
    sys.path[:] = job["path"]
    _stop_with(job["parent"])
    rank = int(os.environ["RANK"])
    tell = _Teller(folder / PIPE) if rank == 0 else None
    _set_up_logging(job["level"], tell)
    try:
        result = CALLS[job["call"]](job["arguments"], _kernel(job["kernel"]), tell)
    except (RankError, KeyboardInterrupt) as error:
        if rank == 0 and isinstance(error, KeyboardInterrupt):
            write_outcome(folder, {"error": ["KeyboardInterrupt", str(error)]})
        return _code_without_peers(folder)
    except Ep3streamError as error:
        if error.told_by is None:
            write_outcome(folder, {"error": [type(error).__name__, str(error)]})
    else:
        if rank == 0:
            write_outcome(folder, {"result": result})
    return 0


def _code_without_peers(folder: Path) -> int:
    """0 if the others are gone for a reason that one of them has written down, or is about to."""
    deadline = time.monotonic() + _OUTCOME_S
    while not (folder / OUTCOME).exists():
        if time.monotonic() > deadline:
            return LOST_RANK
        time.sleep(_LOOK_S / 10)
    return 0


def _stop_with(parent: int) -> None:
    """Once the launching process is gone, as by a kill, nobody is left to stop the ranks but themselves."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="ep3stream-parent", daemon=True).start()


class _Teller:
    """Tells the launching process of log records and progress; nothing once that is gone."""

    def __init__(self, path: Path) -> None:
        self._pipe: int | None = os.open(path, os.O_WRONLY)
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._say({"process": os.getpid(), "attempt": attempt})

    def _say(self, message: dict[str, Any]) -> None:
        data = b"\n" + json.dumps(message).encode() + b"\n"
        try:
            while self._pipe is not None and data:
                data = data[os.write(self._pipe, data) :]
        except OSError:
            self._pipe = None

    def progress(self, now: FitProgress) -> None:
        """For `observe`."""
        self._say({"progress": asdict(now)})

    def record(self, record: logging.LogRecord) -> None:
        """For the loggers there."""
        self._say({"log": [record.name, record.levelno, record.getMessage()]})


class _Handler(logging.Handler):
    def __init__(self, tell: _Teller) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell.record(record)


def _set_up_logging(level: int, tell: _Teller | None) -> None:
    """All that rank 0 logs goes to the launching process; what the others log is the same, and goes nowhere."""
    own = logging.getLogger("ep3stream")
    own.propagate = False
    own.setLevel(level)
    own.addHandler(logging.NullHandler() if tell is None else _Handler(tell))


def _kernel(name: str | None) -> KernelFunction | None:
    if name is None:
        return None
    module, path = name.split(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    function: KernelFunction = found
    return function


def _fit(arguments: dict[str, Any], kernel: KernelFunction | None, tell: _Teller | None) -> None:
    config = FitConfig.from_toml(arguments["config"], "the settings")
    observe = None if tell is None else tell.progress
    fit(
        arguments["store"],
        arguments["run"],
        config,
        kernel=kernel,
        observe=observe,
        override=arguments["override"],
    )


def _evaluate(arguments: dict[str, Any], kernel: KernelFunction | None, tell: _Teller | None) -> Any:
    return evaluate(**arguments, kernel=kernel)


def _predict(arguments: dict[str, Any], kernel: KernelFunction | None, tell: _Teller | None) -> Any:
    return predict(**arguments, kernel=kernel)


CALLS: dict[str, Callable[[dict[str, Any], KernelFunction | None, _Teller | None], Any]] = {
    "fit": _fit,
    "evaluate": _evaluate,
    "predict": _predict,
}

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
