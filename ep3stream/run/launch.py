"""Work on several devices of this machine: a process each, which this one starts, listens to, and stops.

    here                                                   the ranks
    torch's elastic agent, in a thread    starts ->        all; again, when one dies
    signals                               passed on ->     rank 0, which lets the others know
    logging, `observe`                    <- a pipe        rank 0
    the result, or the error              <- a file        rank 0, or whoever failed first

Nothing listens on a network: the ranks meet over a file and talk over the loopback interface.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from ep3stream import errors
from ep3stream.errors import ConfigError, RankError
from ep3stream.mesh import devices_here, is_rank, require_devices
from ep3stream.mesh.launch import FailedRank, launch_ranks
from ep3stream.run.clock import FitProgress
from ep3stream.solver.kernels import KernelFunction

logger = logging.getLogger(__name__)

JOB, PIPE, OUTCOME = "job.json", "pipe", "outcome.json"

LOST_RANK = RankError.exit_code

_POLL_S = 0.1

_PATIENCE_S = 30

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def n_ranks_to_launch(devices: int | Literal["auto"]) -> int:
    """How many processes the setting asks this one to start; 1 for none, as where it is a rank itself.

    Raises ConfigError where there are GPUs, but not so many.
    """
    if is_rank():
        return 1
    n_ranks = devices_here() if devices == "auto" else devices
    require_devices(n_ranks)
    return n_ranks


@dataclass(frozen=True, slots=True)
class Job:
    """What every rank is to do: `call` with these JSON arguments. kernel: `module:name` of a callable kernel."""

    call: str
    arguments: dict[str, Any]
    kernel: str | None = None

    def write(self, folder: Path) -> None:
        """With what a rank needs of this process: where modules are, and which log records are wanted."""
        level = logging.getLogger("ep3stream").getEffectiveLevel()
        content = asdict(self) | {"path": sys.path, "level": level, "parent": os.getpid()}
        (folder / JOB).write_text(json.dumps(content))

    @classmethod
    def of(cls, call: str, kernel: KernelFunction | None, **arguments: Any) -> Job:
        """ConfigError for a kernel that other processes cannot find."""
        return cls(call, arguments, None if kernel is None else _name_of(kernel))


def _name_of(kernel: KernelFunction) -> str:
    module, name = getattr(kernel, "__module__", None), getattr(kernel, "__qualname__", "<no name>")
    found: Any = sys.modules.get(module or "")
    for part in name.split("."):
        found = getattr(found, part, None)
    if module in (None, "__main__") or found is not kernel:
        raise ConfigError(
            f"kernel {name!r} of {module} cannot be found by the processes of other devices; define it at the top of "
            "a module that they can import, or use devices=1"
        )
    return f"{module}:{name}"


def run_on_ranks(
    job: Job, n_ranks: int, max_restarts: int, observe: Callable[[FitProgress], None] | None = None
) -> Any:
    """What the job gives on rank 0. Raises its errors; RankError when a rank died once more than it may.

    Signals to this process, of its main thread, are the ranks'. What `observe` raises ends them at once.
    """
    with tempfile.TemporaryDirectory(prefix="ep3stream-") as name, _Signals() as signals:
        folder = Path(name)
        job.write(folder)
        os.mkfifo(folder / PIPE)
        agent = _in_thread(lambda: launch_ranks("ep3stream.rank", folder, n_ranks, max_restarts))
        listener = _Listener(signals, observe, max_restarts)
        try:
            with _pipe(folder / PIPE) as pipe:
                listener.attend(pipe, agent)
        except BaseException:
            write_outcome(folder, {"stopped": True})  # Ranks started anew find their work done.
            signals.stop_now()
            _await(agent)
            raise
        return _result(folder, agent.result(), n_ranks, max_restarts)


def _in_thread(work: Callable[[], list[FailedRank]]) -> Future[list[FailedRank]]:
    """A thread, not the main one, in which torch's agent would set signal handlers of its own."""
    future: Future[list[FailedRank]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # Whoever reads the future raises it.
            future.set_exception(error)

    threading.Thread(target=run, name="ep3stream-agent", daemon=True).start()
    return future


@contextmanager
def _pipe(path: Path) -> Iterator[int]:
    """For reading; an end for writing is held too, so that a rank that dies does not end it."""
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writing = os.open(path, os.O_WRONLY)
    try:
        yield reading
    finally:
        os.close(writing)
        os.close(reading)


class _Signals:
    """While entered, in the main thread, signals to this process are passed on to rank 0, once there is one."""

    def __init__(self) -> None:
        self._rank_0: int | None = None
        self._waiting: list[int] = []
        self._stop: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _PASSED_ON}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR1 and self._stop is None:
            self._stop = number
        self._waiting.append(number)

    def rank_0_is(self, process: int) -> None:
        """A new one, which knows nothing of what was asked of the one before."""
        self._rank_0 = process
        if self._stop is not None and self._stop not in self._waiting:
            self._waiting.insert(0, self._stop)

    def pass_on(self) -> None:
        """What has come since."""
        while self._rank_0 is not None and self._waiting:
            with suppress(ProcessLookupError):
                os.kill(self._rank_0, self._waiting.pop(0))

    def stop_now(self) -> None:
        """A SIGINT after a SIGTERM: rank 0 saves nothing more."""
        self._waiting += [signal.SIGTERM, signal.SIGINT]
        self.pass_on()


class _Listener:
    """Hears rank 0: log records become this process's own, progress goes to `observe`."""

    def __init__(
        self, signals: _Signals, observe: Callable[[FitProgress], None] | None, max_restarts: int
    ) -> None:
        self._signals, self._observe, self._max_restarts = signals, observe, max_restarts
        self._heard = b""

    def attend(self, pipe: int, agent: Future[list[FailedRank]]) -> None:
        """Until the agent is done and the pipe is empty."""
        while True:
            is_last = agent.done()
            while select.select([pipe], [], [], 0 if is_last else _POLL_S)[0]:
                self._hear(os.read(pipe, 1 << 16))
                self._signals.pass_on()
            self._signals.pass_on()
            if is_last:
                return

    def _hear(self, data: bytes) -> None:
        *lines, self._heard = (self._heard + data).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:  # Cut short, with the rank that wrote it.
                continue
            self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        if "log" in message:
            name, level, text = message["log"]
            logging.getLogger(name).log(level, "%s", text)
        elif "progress" in message and self._observe is not None:
            self._observe(FitProgress(**message["progress"]))
        elif "process" in message:
            self._signals.rank_0_is(message["process"])
            if attempt := message["attempt"]:
                logger.warning(
                    "a rank died; all have started again from the last checkpoint (%d of %d restarts)",
                    attempt,
                    self._max_restarts,
                )


def _await(agent: Future[list[FailedRank]]) -> None:
    """Until the ranks are gone: one that does not listen any more, the agent kills after half a minute."""
    deadline = time.monotonic() + 2 * _PATIENCE_S
    while not agent.done() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def write_outcome(folder: Path, outcome: dict[str, Any]) -> None:
    """The first one counts."""
    partial = folder / f"{OUTCOME}.{os.getpid()}"
    partial.write_text(json.dumps(outcome))
    with suppress(FileExistsError):
        os.link(partial, folder / OUTCOME)


def _result(folder: Path, fallen: list[FailedRank], n_ranks: int, max_restarts: int) -> Any:
    if (folder / OUTCOME).exists():
        outcome = json.loads((folder / OUTCOME).read_text())
        if "result" in outcome:
            return outcome["result"]
        name, message = outcome["error"]
        raise KeyboardInterrupt(message) if name == "KeyboardInterrupt" else getattr(errors, name)(message)
    if not fallen:
        raise RankError("the ranks ended without a result; the same command goes on from the last checkpoint")
    # Those that merely lost another one say nothing of the cause.
    first = next((each for each in fallen if each.exit_code != LOST_RANK), fallen[0])
    hint = ", by the system if its memory ran out" if first.how == "SIGKILL" else ""
    raise RankError(
        f"rank {first.rank} of {n_ranks} ended by {first.how}{hint}, after {max_restarts} restarts; the same command "
        "goes on from the last checkpoint"
    )
