"""`python -m ep3stream.rank FOLDER`: one rank of the job that `run/launch.py` has written into that folder.

Exit code 0 once an outcome is in the folder, whatever it is. Any other asks the launcher to start all ranks again.
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
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ep3stream.config import FitConfig
from ep3stream.errors import Ep3streamError, RankError
from ep3stream.mesh import has_met
from ep3stream.run.clock import FitProgress
from ep3stream.run.launch import JOB, LOST_RANK, OUTCOME, PIPE, write_outcome
from ep3stream.solver.kernels import KernelFunction
from ep3stream.training.fit import fit

_POLL_S = 0.5

# How long a rank that has lost another one waits for that one's outcome.
_OUTCOME_S = 5.0


def main(folder: Path) -> int:
    """Does the job and returns the exit code."""
    job = json.loads((folder / JOB).read_text())
    if (folder / OUTCOME).exists():
        return 0
    sys.path[:] = job["path"]
    _stop_with(job["parent"])
    rank = int(os.environ["RANK"])
    teller = _Teller(folder / PIPE) if rank == 0 else None
    package = logging.getLogger("ep3stream")
    package.propagate = False
    package.setLevel(job["level"])
    # The other ranks log the same as rank 0: once is enough.
    package.addHandler(teller or logging.NullHandler())
    try:
        result = _do(job["call"], job["arguments"], _kernel(job["kernel"]), teller)
    except (RankError, KeyboardInterrupt) as error:
        if rank == 0 and isinstance(error, KeyboardInterrupt):
            write_outcome(folder, {"error": ["KeyboardInterrupt", str(error)]})
        return _code_without_peers(folder)
    except Ep3streamError as error:
        if error.from_rank is None:
            write_outcome(folder, {"error": [type(error).__name__, str(error)]})
    else:
        if rank == 0:
            write_outcome(folder, {"result": result})
    return 0


def _do(call: str, arguments: dict[str, Any], kernel: KernelFunction | None, teller: _Teller | None) -> Any:
    """The result of the call, which is none for a fit."""
    if call == "fit":
        config = FitConfig.from_toml(arguments["config"], "the settings")
        observe = None if teller is None else teller.progress
        store, run, override = (arguments[name] for name in ("store", "run", "override"))
        fit(store, run, config, kernel=kernel, observe=observe, override=override)
        return None
    # A fit does not wait for what only these need.
    from ep3stream.prediction.evaluate import evaluate
    from ep3stream.prediction.predict import predict

    # Ranks start with all signals blocked that a fit handles. These end any other call by KeyboardInterrupt.
    for number in (stops := (signal.SIGTERM, signal.SIGINT)):
        signal.signal(number, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
    calls: dict[str, Callable[..., Any]] = {"evaluate": evaluate, "predict": predict}
    return calls[call](**arguments, kernel=kernel)


def _kernel(name: str | None) -> KernelFunction | None:
    """The function of a name such as `module:Class.function`."""
    if name is None:
        return None
    module, path = name.split(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    function: KernelFunction = found
    return function


def _code_without_peers(folder: Path) -> int:
    """The exit code after another rank is gone: 0 if that has written an outcome, or does so soon."""
    deadline = time.monotonic() + _OUTCOME_S
    while not (folder / OUTCOME).exists():
        if time.monotonic() > deadline:
            return LOST_RANK
        time.sleep(_POLL_S / 10)
    return 0


def _stop_with(parent: int) -> None:
    """Stops this rank soon after the launching process has ended: a killed one cannot do it.

    By SIGTERM, so that a fit saves; at once if this rank has not met the others, which may never come.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        if not has_met():
            os._exit(LOST_RANK)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="ep3stream-parent", daemon=True).start()


class _Teller(logging.Handler):
    """Tells the launching process of log records and progress, a line of JSON each, for as long as it lives."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        # The launching process reads before it starts ranks. Without it, opening would wait for a reader for ever.
        self._pipe: int | None = None
        with suppress(OSError):
            self._pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            os.set_blocking(self._pipe, True)
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._tell({"process": os.getpid(), "attempt": attempt})

    def progress(self, now: FitProgress) -> None:
        """Tells of progress."""
        self._tell({"progress": asdict(now)})

    def emit(self, record: logging.LogRecord) -> None:
        """Tells of a log record."""
        self._tell({"log": [record.name, record.levelno, record.getMessage()]})

    def _tell(self, message: dict[str, Any]) -> None:
        # A line may follow what a rank that was killed has left unfinished.
        data = b"\n" + json.dumps(message).encode() + b"\n"
        try:
            while self._pipe is not None and data:
                data = data[os.write(self._pipe, data) :]
        except OSError:
            self._pipe = None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
