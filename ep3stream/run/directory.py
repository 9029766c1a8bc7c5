"""A run directory: where its pieces lie, who may write in it, and which settings it was started with."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ep3stream.config import FitConfig
from ep3stream.errors import ConfigError, InputError
from ep3stream.run.bundle import write_file

# Settings that may differ when a fit is resumed: they change how long it goes on or what it costs, not its path.
_FREE_SETTINGS = {
    "solver.epochs",
    "run.checkpoint_steps",
    "run.checkpoint_minutes",
    "run.keep_checkpoints",
    "run.devices",
    "run.dask",
}
# Which these are too, unless the fit may stop by what they find.
_VALIDATION_SETTINGS = {"data.validate", "solver.validate_every"}


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """RUN/ and what lies in it."""

    path: Path

    @property
    def config(self) -> Path:
        """The settings, as TOML."""
        return self.path / "config.toml"

    @property
    def summary(self) -> Path:
        """What was fitted, how it was planned and set up: `run.json`, for people and the report."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON object a line, by `evaluate`."""
        return self.path / "evaluations.jsonl"

    @property
    def setup(self) -> Path:
        """Bundle: centers, preconditioner, sizes. Written once."""
        return self.path / "setup"

    @property
    def checkpoints(self) -> Path:
        """Bundles `step-NNN`."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """Bundle: the finished model."""
        return self.path / "model"

    def settle_config(self, config: FitConfig) -> FitConfig:
        """Writes the settings of a new run, or checks those of a resumed one against what it was started with.

        A run without a set-up has nothing yet that depends on them: a corrected command starts it anew.
        Raises ConfigError naming each setting that may not change.
        """
        started = self.read_config() if self.config.exists() else None
        if started is not None and self.setup.exists():
            self._require_same(started, config)
        if started != config:
            write_file(self.config, config.to_toml().encode())
        return config

    def _require_same(self, started: FitConfig, config: FitConfig) -> None:
        free = _FREE_SETTINGS if started.solver.patience else _FREE_SETTINGS | _VALIDATION_SETTINGS
        # Of the values in use: to leave a setting out is the same as to give what it then stands for.
        changed = [
            f"{name} was {old!r} and is now {new!r}"
            for name, (old, new) in started.in_use().differences(config.in_use()).items()
            if name not in free
        ]
        if changed:
            raise ConfigError(
                f"{self.path} was started with other settings: {'; '.join(changed)}. "
                "Restore them or use a new RUN"
            )
        if config.solver.epochs < started.solver.epochs:
            raise ConfigError(
                f"epochs is {config.solver.epochs} but {self.path} was started with {started.solver.epochs}; "
                "raise it, leave it, or use a new RUN"
            )

    def read_config(self) -> FitConfig:
        """The settings of an existing run."""
        try:
            return FitConfig.from_toml(self.config.read_text(), str(self.config))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{self.path} is not a run directory ({error}); give the RUN of a fit"
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the directory and holds it against a second fit; the kernel lets go when this process ends.

        Raises InputError when it cannot be made, holds something else, or is held by another fit.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_strangers()
            lock = (self.path / "lock").open("a+")
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be made or written ({error}); choose another RUN"
            ) from error
        with lock:
            self._take(lock)
            yield

    def _refuse_strangers(self) -> None:
        names = [item.name for item in self.path.iterdir()]
        strangers = sorted(name for name in names if name != "lock" and not name.endswith(".partial"))
        if strangers and not self.config.exists():
            raise InputError(
                f"{self.path} is not a run but holds {strangers[0]!r}; use a new or empty directory"
            )

    def _take(self, lock: TextIO) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
        except BlockingIOError:
            lock.seek(0)
            raise InputError(f"{self.path} is in use by {lock.read(200)}; wait for it or stop it") from None
        except OSError as error:
            raise InputError(f"{self.path} cannot be locked ({error}); choose another RUN") from error
