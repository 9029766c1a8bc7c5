"""A run directory: where its pieces lie, who may write in it, and which settings it was started with.

Which settings may change when a fit is resumed, which only by an override, and which not at all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ep3stream.config import MAX_CONFIG_BYTES, FitConfig, on_resume
from ep3stream.disk import LockHeldError, read_small_file, take_lock, write_file, write_json
from ep3stream.errors import ConfigError, InputError
from ep3stream.store.files import RUN_MARK, path_kind

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """RUN/ and what lies in it."""

    path: Path

    @property
    def config(self) -> Path:
        """The settings, as TOML."""
        return self.path / RUN_MARK

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
    def overrides(self) -> Path:
        """Settings changed on the way by `--override`, a list of JSON objects; there only if there were any."""
        return self.path / "overrides.json"

    @property
    def tensorboard(self) -> Path:
        """Event files of TensorBoard, if the settings ask for them."""
        return self.path / "tensorboard"

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

    def settle_config(self, config: FitConfig, override: bool = False) -> tuple[Change, ...]:
        """Writes the settings of a new run, or checks those of a resumed one against what it was started with.

        A run without a set-up has nothing yet that depends on them: a corrected command starts it anew. One with a
        set-up keeps its settings until `adopt_config`, which wants the changes returned: those made by `override`.
        Raises ConfigError naming each setting that may not change.
        """
        if self.config.exists() and self.setup.exists():
            return overridden(self.read_config(), config, override, self.path)
        self.adopt_config(config, (), 0)
        return ()

    def adopt_config(self, config: FitConfig, changes: tuple[Change, ...], step: int) -> None:
        """From `step` on, `config` is what the run is fitted with; the changes are recorded first."""
        if changes:
            made = [{"step": step, "setting": name, "from": old, "to": new} for name, old, new in changes]
            write_json(self.overrides, [*self.read_overrides(), *made])
        if not self.config.exists() or self.read_config() != config:
            write_file(self.config, config.to_toml().encode())

    def read_overrides(self) -> list[dict[str, Any]]:
        """What `adopt_config` has recorded: objects with step, setting, from, to; none where that is unreadable."""
        try:
            content = json.loads(read_small_file(self.overrides, MAX_CONFIG_BYTES))
        except (OSError, ValueError, RecursionError):
            return []
        return [item for item in content if isinstance(item, dict)] if isinstance(content, list) else []

    def read_config(self) -> FitConfig:
        """The settings of an existing run."""
        try:
            text = read_small_file(self.config, MAX_CONFIG_BYTES).decode()
            return FitConfig.from_toml(text, str(self.config))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(self.no_run()) from error
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.config} cannot be read ({error}); restore it from a copy") from error

    def no_run(self) -> str:
        """The words of an error for a directory that has not what every run has."""
        found = path_kind(self.path)
        if found == "the RUN of a fit":
            return f"{self.path} holds no model and no set-up yet; start the fit again, or wait for it"
        return f"{self.path} is no run: it is {found}; give the RUN of a fit"

    def require(self) -> None:
        """InputError unless something of a run lies here."""
        pieces = (self.config, self.summary, self.metrics, self.evaluations, self.setup, self.model)
        if not any(piece.exists() for piece in pieces):
            raise InputError(self.no_run())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the directory and holds it against a second fit; the kernel lets go when this process ends.

        Raises InputError when it cannot be made, holds something else, or is held by another fit.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign_files()
            lock = take_lock(self.path / "lock")
        except LockHeldError as error:
            raise InputError(
                f"{self.path} is in use by {error.holder}; wait for it or stop it, or use another RUN"
            ) from None
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be made or written ({error}); choose another RUN"
            ) from error
        with lock:
            if lock.left_by:
                logger.warning(
                    "%s was held by %s, which ended without letting go; going on. (If that is another machine, still "
                    "at work on a file system that does not lock between machines: stop one of the two.)",
                    self.path,
                    lock.left_by,
                )
            yield

    def _refuse_foreign_files(self) -> None:
        items = sorted(self.path.iterdir())
        if links := [item.name for item in items if item.is_symlink()]:
            raise InputError(
                f"{self.path} holds the link {links[0]!r}, behind which a fit would write elsewhere; "
                "put what it leads to there, or use a new RUN"
            )
        names = [item.name for item in items]
        foreign = sorted(name for name in names if name != "lock" and not name.endswith(".partial"))
        if foreign and not self.config.exists():
            raise InputError(
                f"{self.path} is not a run but holds {foreign[0]!r}; use a new or empty directory"
            )


# They change how long the fit goes on or what it costs, not its path.
_FREE = on_resume("free")

# Read by each step, and by nothing that the set-up has made: every other setting has gone into the set-up.
_OVERRIDABLE = on_resume("override")


class Change(NamedTuple):
    """A setting, by its name in the TOML file, that is not what the run was started with."""

    setting: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.setting} was {self.old!r} and is now {self.new!r}"


def overridden(started: FitConfig, config: FitConfig, override: bool, what: object) -> tuple[Change, ...]:
    """The settings of `config` that change the path of the fit `what`, all of which an override allows.

    Raises ConfigError naming those that need one, unless `override`, and those that no override changes.
    """
    # Of the values in use: to leave a setting out is the same as to give what it then stands for.
    differences = started.in_use().differences(config.in_use())
    # Without patience, validations only show how far the fit is.
    free = _FREE if started.solver.patience else _FREE | {"data.validate", "solver.validate_every"}
    changes = [Change(name, old, new) for name, (old, new) in differences.items() if name not in free]
    fixed = [change for change in changes if change.setting not in _OVERRIDABLE]
    if fixed:
        raise ConfigError(
            f"{what} was started with other settings, on which its set-up is built: {_listed(fixed)}. "
            "No --override changes these: restore them or use a new RUN"
        )
    if changes and not override:
        raise ConfigError(
            f"{what} was started with other settings: {_listed(changes)}. "
            "Restore them, go on with the new ones by --override, or use a new RUN"
        )
    return tuple(changes)


def _listed(changes: list[Change]) -> str:
    return "; ".join(map(str, changes))
