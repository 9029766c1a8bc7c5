"""Starts ranks on this machine by torch's elastic launcher, which restarts and stops them.

Its agents meet in a way of our own, `_OneMachine`: each of torch's ways listens on a TCP port for other machines.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from ep3stream.mesh.join import RENDEZVOUS

_LOCAL = "ep3stream-local"


@dataclass(frozen=True, slots=True)
class FailedRank:
    """A rank that did not end with exit code 0. how: by which signal or exit code, in words."""

    rank: int
    exit_code: int
    how: str


class _OneMachine(RendezvousHandler):
    """The rendezvous of a job's only agent, this process. It listens on nothing."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    def get_backend(self) -> str:
        return _LOCAL

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("localhost", 0))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def _one_machine(parameters: RendezvousParameters) -> RendezvousHandler:
    return _OneMachine(parameters.run_id)


def launch_ranks(module: str, folder: Path, n_ranks: int, max_restarts: int) -> list[FailedRank]:
    """Runs `python -m module folder` as `n_ranks` ranks, which meet over a file in `folder`, until all have ended.

    When a rank ends by a signal or an exit code other than 0, all are stopped and started again, `max_restarts` times
    at most. Returns the ranks that failed in the last attempt, the first to fail first; none after a success.
    """
    with suppress(ValueError):  # An earlier call has registered it.
        rendezvous_handler_registry.register(_LOCAL, _one_machine)
    for name in ("torch.distributed.elastic", "torchelastic-events-null"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ[RENDEZVOUS] = f"file://{folder}/meeting"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n_ranks,
        run_id="ep3stream",
        rdzv_backend=_LOCAL,
        rdzv_endpoint="localhost",
        max_restarts=max_restarts,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
    )
    try:
        launch_agent(config, sys.executable, ["-m", module, str(folder)])
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        return [FailedRank(rank, failure.exitcode, _how(failure)) for rank, failure in failures]
    finally:
        del os.environ[RENDEZVOUS]
    return []


def _how(failure: ProcessFailure) -> str:
    return failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
