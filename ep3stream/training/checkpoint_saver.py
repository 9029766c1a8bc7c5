"""Checkpoints are written in the background: a fit waits for a copy of its state, not for the disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from ep3stream.config import RunConfig
from ep3stream.errors import DamagedDataError, DiskError
from ep3stream.mesh import Mesh
from ep3stream.run.checkpoint import Progress, gathered, save_checkpoint

# A save that failed with one of these is tried again later: the disk refused, or gave back other bytes.
_FAILURES = (DiskError, DamagedDataError)


class CheckpointSaver:
    """Writes one checkpoint at a time under `directory`, in a thread of its own. A context manager.

    `tell(event, progress, message)` is called for each checkpoint, in the caller's thread, with the event
    `checkpoint` or `checkpoint_failed`. A failed checkpoint leaves the earlier ones as they were, and the next one is
    due as if it had succeeded. Leaving the context waits for a checkpoint under way, except after a
    KeyboardInterrupt: the thread then ends by itself, or with the process, as after a kill.

    Every rank has a saver and calls `begin` and `save` at the same step. The leader's gathers the rows of all ranks,
    writes them, and decides when a checkpoint is due.
    """

    def __init__(
        self,
        directory: Path,
        setup_digest: str,
        config: RunConfig,
        step: int,
        tell: Callable[[str, Progress, str], None],
        n_centers: int,
        mesh: Mesh,
    ) -> None:
        self._n_centers, self._mesh = n_centers, mesh
        self._directory, self._setup_digest, self._config, self._tell = directory, setup_digest, config, tell
        self.saved_step = step
        self._tried_step, self._tried_at = step, time.monotonic()
        self._under_way: tuple[Progress, Future[Path]] | None = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self._finish()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`, by steps or minutes since the last try. Only the leader decides."""
        if not self._mesh.is_leader:
            return False
        steps, minutes = self._config.checkpoint_steps, self._config.checkpoint_minutes
        by_steps = steps > 0 and step - self._tried_step >= steps
        return by_steps or (minutes > 0 and time.monotonic() - self._tried_at >= 60 * minutes)

    def is_idle(self) -> bool:
        """Whether the leader may `begin`, since no checkpoint is under way; reports one that has just ended."""
        if self._under_way is not None and self._under_way[1].done():
            self._finish()
        return self._mesh.is_leader and self._under_way is None

    def begin(self, progress: Progress) -> None:
        """Starts to write the checkpoint of `progress`; the next steps may follow at once."""
        assert self._under_way is None
        began = time.perf_counter()
        snapshot = gathered(progress, self._n_centers, self._mesh)
        if snapshot is not None:
            self._start(snapshot)
        self._tried_step, self._tried_at = progress.step, time.monotonic()
        progress.stalled_s += time.perf_counter() - began

    def _start(self, snapshot: Progress) -> None:
        future = Future[Path]()
        thread = threading.Thread(
            target=self._write, args=(snapshot, future), name="ep3stream-checkpoint", daemon=True
        )
        thread.start()
        self._under_way = snapshot, future

    def save(self, progress: Progress) -> None:
        """Returns when the checkpoint of `progress` is on the disk; raises DiskError or DamagedDataError on failure."""
        if self._mesh.broadcast_object(lambda: self._has_saved(progress.step)):
            return
        self.begin(progress)
        self._mesh.on_leader(self._must_finish)

    def _has_saved(self, step: int) -> bool:
        self._finish()
        return step == self.saved_step

    def _must_finish(self) -> None:
        error = self._finish()
        if error is not None:
            raise type(error)(f"{error}; the same command goes on from step {self.saved_step}") from error

    def _write(self, snapshot: Progress, future: Future[Path]) -> None:
        try:
            keep = self._config.keep_checkpoints
            future.set_result(save_checkpoint(self._directory, snapshot, self._setup_digest, keep))
        except BaseException as error:  # Whoever reads the future raises it.
            future.set_exception(error)

    def _finish(self) -> Exception | None:
        """Waits for the checkpoint under way, if any, and reports how it ended; returns its failure, or None."""
        if self._under_way is None:
            return None
        (snapshot, future), self._under_way = self._under_way, None
        failure = None
        try:
            path = future.result()
        except _FAILURES as error:
            failure = error
            self._tell("checkpoint_failed", snapshot, f"no checkpoint of step {snapshot.step}: {error}")
        else:
            self.saved_step = snapshot.step
            self._tell("checkpoint", snapshot, f"saved {path.name}")
        return failure
