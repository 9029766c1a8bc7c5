"""Work on several devices of this machine: one process for each, which this process starts, listens to and stops.

    this process                                           the ranks
    torch's elastic agent, in a thread    starts ->        all; again, when one dies
    signals                               passed on ->     rank 0, which lets the others know
    logging, `observe`                    <- a pipe        rank 0
    the result, or the error              <- a file        rank 0, or the rank that failed first

torch's launcher starts, watches, restarts and kills the ranks. The last three lines are ours: on SIGTERM torch's
launcher kills ranks that need more than 30 s for a checkpoint, it knows nothing of SIGUSR1, and it brings back neither
progress nor log records, and results only by unpickling. Nothing listens on a network.
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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ep3stream import errors
from ep3stream.errors import ConfigError, RankError
from ep3stream.mesh import devices_here, is_rank, require_devices
from ep3stream.mesh.launch import FailedRank, launch_ranks
from ep3stream.run.clock import FitProgress
from ep3stream.run.signals import HANDLED, handling, hold_signals
from ep3stream.solver.kernels import KernelFunction

# The files of a job's folder: what to do, what rank 0 tells meanwhile, and how it ended.
JOB, PIPE, OUTCOME = "job.json", "pipe", "outcome.json"

# The exit code of a rank that merely lost another one.
LOST_RANK = RankError.exit_code
_POLL_S = 0.1

# The agent kills ranks that have not ended 30 s after it told them to.
_STOP_S = 60


def n_ranks_to_launch(devices: int | Literal["auto"]) -> int:
    """How many processes this one is to start for the setting `devices`; 1 for none, also where it is a rank itself.

    Raises ConfigError for less than one device, or for more than the GPUs where there are any.
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

    @classmethod
    def of(cls, call: str, kernel: KernelFunction | None, **arguments: Any) -> Job:
        """The job of a call; raises ConfigError for a kernel that other processes cannot find."""
        return cls(call, arguments, None if kernel is None else _name_of(kernel))

    def write(self, folder: Path) -> None:
        """Writes the job, with what a rank needs of this process: its module path, log level and process number."""
        level = logging.getLogger("ep3stream").getEffectiveLevel()
        content = asdict(self) | {"path": sys.path, "level": level, "parent": os.getpid()}
        (folder / JOB).write_text(json.dumps(content))


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
    """Does the job on `n_ranks` new ranks and returns the result of rank 0.

    Raises the error of the job, and RankError when a rank has died more than `max_restarts` times. Called in the main
    thread, it passes the signals of this process on to rank 0. An error of `observe` stops the ranks and is raised.
    """
    signals = _PassedSignals()
    with tempfile.TemporaryDirectory(prefix="ep3stream-") as name, handling(signals.note):
        folder = Path(name)
        job.write(folder)
        os.mkfifo(folder / PIPE)
        with _opened(folder / PIPE) as pipe:
            agent = _in_thread(lambda: launch_ranks("ep3stream.rank", folder, n_ranks, max_restarts))
            try:
                _Listener(signals, observe, max_restarts).listen(pipe, agent)
            except BaseException:
                write_outcome(folder, {"stopped": True})  # Ranks that are started again find their work done.
                signals.stop_now()
                wait([agent], _STOP_S)
                raise
        return _result(folder, agent.result(), n_ranks, max_restarts)


def _in_thread(work: Callable[[], list[FailedRank]]) -> Future[list[FailedRank]]:
    """Runs torch's agent in a thread: in the main thread it would set signal handlers.

    A daemon, unlike the threads of an executor: an agent that hangs must not keep this process from ending.
    """
    future: Future[list[FailedRank]] = Future()

    def run() -> None:
        hold_signals(*HANDLED)  # The ranks start with these blocked, until they can handle them.
        try:
            future.set_result(work())
        except BaseException as error:  # `future.result()` raises it.
            future.set_exception(error)

    threading.Thread(target=run, name="ep3stream-agent", daemon=True).start()
    return future


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A named pipe for reading. It is held open for writing too, so that it does not end with a rank that dies."""
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writing = os.open(path, os.O_WRONLY)
    try:
        yield reading
    finally:
        os.close(writing)
        os.close(reading)


class _PassedSignals:
    """The signals of this process, which wait until there is a rank 0 to pass them on to."""

    def __init__(self) -> None:
        self._rank_0: int | None = None
        self._waiting: list[signal.Signals] = []
        self._stop: signal.Signals | None = None

    def note(self, number: signal.Signals) -> None:
        """Keeps a signal for `pass_on`."""
        if number != signal.SIGUSR1 and self._stop is None:
            self._stop = number
        self._waiting.append(number)

    def rank_0_is(self, process: int) -> None:
        """There is a new rank 0, which does not know yet that the one before was asked to stop."""
        self._rank_0 = process
        if self._stop is not None and self._stop not in self._waiting:
            self._waiting.insert(0, self._stop)

    def pass_on(self) -> None:
        """Sends the signals that wait."""
        while self._rank_0 is not None and self._waiting:
            with suppress(ProcessLookupError):
                os.kill(self._rank_0, self._waiting.pop(0))

    def stop_now(self) -> None:
        """Stops rank 0 without another checkpoint, as SIGINT after SIGTERM does."""
        self._waiting += [signal.SIGTERM, signal.SIGINT]
        self.pass_on()


class _Listener:
    """Reads what rank 0 tells: log records are logged here, progress goes to `observe`."""

    def __init__(
        self, signals: _PassedSignals, observe: Callable[[FitProgress], None] | None, max_restarts: int
    ) -> None:
        self._signals, self._observe, self._max_restarts = signals, observe, max_restarts
        self._unfinished = b""

    def listen(self, pipe: int, agent: Future[list[FailedRank]]) -> None:
        """Reads the pipe until the agent is done and the pipe is empty."""
        is_last = False
        while not is_last:
            is_last = agent.done()
            while select.select([pipe], [], [], 0 if is_last else _POLL_S)[0]:
                *lines, self._unfinished = (self._unfinished + os.read(pipe, 1 << 16)).split(b"\n")
                for line in lines:
                    try:
                        message = json.loads(line)
                    except ValueError:  # Empty, or cut short by the death of the rank that wrote it.
                        continue
                    self._take(message)
                self._signals.pass_on()
            self._signals.pass_on()

    def _take(self, message: dict[str, Any]) -> None:
        if "log" in message:
            name, level, text = message["log"]
            logging.getLogger(name).log(level, "%s", text)
        elif "progress" in message and self._observe is not None:
            self._observe(FitProgress(**message["progress"]))
        elif "process" in message:
            self._signals.rank_0_is(message["process"])
            if attempt := message["attempt"]:
                logging.getLogger(__name__).warning(
                    "a rank died; all have started again from the last checkpoint (%d of %d restarts)",
                    attempt,
                    self._max_restarts,
                )


def write_outcome(folder: Path, outcome: dict[str, Any]) -> None:
    """Writes how the job ended, unless another process has done so: the first one counts."""
    partial = folder / f"{OUTCOME}.{os.getpid()}"
    partial.write_text(json.dumps(outcome))
    with suppress(FileExistsError):
        os.link(partial, folder / OUTCOME)


def _result(folder: Path, failed: list[FailedRank], n_ranks: int, max_restarts: int) -> Any:
    """The result in the outcome; raises the error in it, or RankError where there is no outcome."""
    if (folder / OUTCOME).exists():
        outcome = json.loads((folder / OUTCOME).read_text())
        if "result" in outcome:
            return outcome["result"]
        name, message = outcome["error"]
        raise KeyboardInterrupt(message) if name == "KeyboardInterrupt" else getattr(errors, name)(message)
    if not failed:
        raise RankError("the ranks ended without a result; the same command goes on from the last checkpoint")
    # A rank that lost another one says nothing of the cause.
    first = next((rank for rank in failed if rank.exit_code != LOST_RANK), failed[0])
    hint = ", by the system if its memory ran out" if first.how == "SIGKILL" else ""
    raise RankError(
        f"rank {first.rank} of {n_ranks} ended by {first.how}{hint}, after {max_restarts} restarts; the same command "
        "goes on from the last checkpoint"
    )
