"""A run directory: where its pieces lie, who may write in it, and which settings it was started with."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ep3stream.config import FitConfig
from ep3stream.errors import ConfigError, InputError
from ep3stream.run.bundle import write_file

# Settings that may differ when a fit is resumed: they change how long it goes on or what it costs, not its path.
_FREE_SETTINGS = {
    "solver.epochs",
    "run.checkpoint_steps",
    "run.checkpoint_minutes",
    "run.keep_checkpoints",
    "run.dask",
}


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

        Raises ConfigError naming each setting that may not change, InputError when the directory holds
        something else.
        """
        if self.config.exists():
            started = self.read_config()
            differences = started.differences(config)
            changed = {name: pair for name, pair in differences.items() if name not in _FREE_SETTINGS}
            if changed:
                listed = "; ".join(
                    f"{name} was {old!r} and is now {new!r}" for name, (old, new) in changed.items()
                )
                raise ConfigError(
                    f"{self.path} was started with other settings: {listed}. Restore them or use a new RUN"
                )
            if config.solver.epochs < started.solver.epochs:
                raise ConfigError(
                    f"epochs is {config.solver.epochs} but {self.path} was started with {started.solver.epochs}; "
                    "raise it, leave it, or use a new RUN"
                )
            if not differences:
                return config
        elif strangers := self._strangers():
            raise InputError(
                f"{self.path} is not a run but holds {strangers[0]!r}; use a new or empty directory"
            )
        write_file(self.config, config.to_toml().encode())
        return config

    def _strangers(self) -> list[str]:
        names = [item.name for item in self.path.iterdir()]
        return sorted(name for name in names if name != "lock" and not name.endswith(".partial"))

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
        """Makes the directory and holds it against a second fit; the kernel lets go when this process ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("a+")
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be made or written ({error}); choose another RUN"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.seek(0)
                raise InputError(
                    f"{self.path} is in use by {lock.read(200)}; wait for it or stop it"
                ) from None
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            yield
