"""A run directory: where its pieces lie, which fit may write in it, and which settings a resumed fit may change."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from ep3stream.config import (
    KERNEL_DEFAULTS,
    MAX_CONFIG_BYTES,
    FitConfig,
    Precision,
    earlier_averaging,
    on_resume,
)
from ep3stream.disk import LockHeldError, read_small_file, take_lock, write_file, write_json
from ep3stream.errors import ConfigError, DamagedDataError, InputError
from ep3stream.run.bundle import read_description
from ep3stream.store.files import RUN_MARK, path_kind

logger = logging.getLogger(__name__)

SETUP_KIND = "set-up"

# Settings that change how long a fit goes on or what it costs, and never the weights after a step.
_FREE = on_resume("free")

# Settings that only the steps read. All others have gone into the set-up, which is made once.
_OVERRIDABLE = on_resume("override")


_RESTORE = "restore it from a copy, or write the settings of the fit into it again"


class Change(NamedTuple):
    """A setting, by its name in the TOML file, whose value is not the one that the run was started with."""

    setting: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.setting} was {self.old!r} and is now {self.new!r}"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The directory RUN of a fit, and the paths in it."""

    path: Path

    @property
    def config(self) -> Path:
        """config.toml: the settings."""
        return self.path / RUN_MARK

    @property
    def summary(self) -> Path:
        """run.json, for people and the report: what was fitted, how it was planned and set up."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl: steps, validations and events of the fit, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """evaluations.jsonl: the scores of each `evaluate`, one JSON object a line."""
        return self.path / "evaluations.jsonl"

    @property
    def overrides(self) -> Path:
        """overrides.json: the settings that `--override` has changed on the way. Missing where it has changed none."""
        return self.path / "overrides.json"

    @property
    def tensorboard(self) -> Path:
        """tensorboard/: event files, if the settings ask for them."""
        return self.path / "tensorboard"

    @property
    def rounds(self) -> Path:
        """rounds/: the rounds of learning a metric, each a run of its own; missing without one."""
        return self.path / "rounds"

    @property
    def setup(self) -> Path:
        """setup/: the bundle of centers, preconditioner and sizes, written once."""
        return self.path / "setup"

    @property
    def checkpoints(self) -> Path:
        """checkpoints/: a bundle `step-NNN` each."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """model/: the bundle of the finished model."""
        return self.path / "model"

    def settle_config(self, config: FitConfig, override: bool = False) -> tuple[Change, ...]:
        """Writes the settings of a run without a set-up; checks `config` against the settings of a run with one.

        Nothing depends on the settings before there is a set-up, so that a corrected command starts the run anew.
        Afterwards the settings stay until `adopt_config`. Returns the changes for it, which only an `override` allows.
        Raises ConfigError naming each setting that may not change.
        """
        if self.config.exists() and self.setup.exists():
            choices = settled_choices(read_description(self.setup, SETUP_KIND))
            return _allowed_changes(self.read_config(), config, choices, override, self.path)
        self.adopt_config(config, (), 0)
        return ()

    def adopt_config(self, config: FitConfig, changes: tuple[Change, ...], step: int) -> None:
        """Records the changes, made after `step`, and then replaces the settings of the run by `config`."""
        if changes:
            made = [{"step": step, "setting": name, "from": old, "to": new} for name, old, new in changes]
            write_json(self.overrides, [*self.read_overrides(), *made])
        if not self.config.exists() or self.read_config() != config:
            write_file(self.config, config.to_toml().encode())

    def read_overrides(self) -> list[dict[str, Any]]:
        """The changes that `adopt_config` has recorded, each with step, setting, from and to; none if unreadable."""
        try:
            content = json.loads(read_small_file(self.overrides, MAX_CONFIG_BYTES))
        except (OSError, ValueError, RecursionError):
            return []
        return [item for item in content if isinstance(item, dict)] if isinstance(content, list) else []

    def read_config(self) -> FitConfig:
        """The settings of the run; raises InputError where there are none, or they cannot be read.

        Raises DamagedDataError where the file is lost, emptied or no TOML, but the run has more than it.
        """
        try:
            text = read_small_file(self.config, MAX_CONFIG_BYTES).decode()
            if "format_version" not in text and self.is_begun():
                raise DamagedDataError(
                    f"{self.config} is not what was written: {len(text)} bytes without a format_version; {_RESTORE}"
                )
            return FitConfig.from_toml(text, str(self.config))
        except ConfigError as error:
            if self.is_begun() and isinstance(error.__cause__, ValueError | RecursionError):
                raise DamagedDataError(f"{error}, or restore it from a copy") from error
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            if self.is_begun():
                raise DamagedDataError(f"{self.config} is missing; {_RESTORE}") from error
            raise InputError(self.no_run()) from error
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.config} cannot be read ({error}); restore it from a copy") from error

    def is_begun(self) -> bool:
        """Whether the directory holds a set-up and what a fit writes after it, with or without its settings."""
        return self.setup.exists() and (self.summary.is_file() or self.checkpoints.is_dir())

    def no_run(self) -> str:
        """The message of an error about a directory without what every run has."""
        found = path_kind(self.path)
        if found == "the RUN of a fit":
            return f"{self.path} holds no model and no set-up yet; start the fit again, or wait for it"
        return f"{self.path} is no run: it is {found}; give the RUN of a fit"

    def require(self) -> None:
        """Raises InputError unless the directory holds something of a run."""
        pieces = (self.config, self.summary, self.metrics, self.evaluations, self.setup, self.model)
        if not any(piece.exists() for piece in pieces):
            raise InputError(self.no_run())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the directory and locks it against a second fit, for as long as this is entered or the process lives.

        Raises InputError when the directory cannot be made, holds other files than a run's, or is locked.
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
        if not self.config.exists() and self.is_begun():
            raise DamagedDataError(f"{self.config} is missing; {_RESTORE}")
        if foreign and not self.config.exists():
            raise InputError(
                f"{self.path} is not a run but holds {foreign[0]!r}; use a new or empty directory"
            )


def settled_choices(description: Mapping[str, Any]) -> dict[str, Any]:
    """What the set-up with this description has settled of settings that were left open, by their names.

    What no fit could have chosen is left out.
    """
    recorded, plan = (_mapping(description.get(name)) for name in ("choices", "plan"))
    # Earlier versions left neither open. A callable stands in the place of whichever kernel is named.
    kernel, precision, averaging = (plan.get(name) for name in ("kernel", "precision", "averaging"))
    if type(averaging) is not float:
        averaging = earlier_averaging(plan.get("projection"))
    found = {
        "kernel": kernel if isinstance(kernel, str) and kernel in KERNEL_DEFAULTS else "laplacian",
        "precision": precision if precision in get_args(Precision) else "float32",
        "averaging": averaging,
    }
    return found | {
        name: recorded[name]
        for name, allows in _CHOICES.items()
        if name in recorded and allows(recorded[name])
    }


_CHOICES: Mapping[str, Callable[[Any], bool]] = {
    "centers": lambda value: type(value) is int and value > 0,
    "epochs": lambda value: type(value) in (int, float) and 0 < value < math.inf,
    "patience": lambda value: type(value) is int and value >= 0,
}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _allowed_changes(
    started: FitConfig, config: FitConfig, choices: Mapping[str, Any], override: bool, run: Path
) -> tuple[Change, ...]:
    """The settings of `config` by which the weights of `run` become others; an override allows all of them.

    choices: what the set-up has settled. Raises ConfigError naming the settings that no override changes, and, without
    `override`, those that need one.
    """
    # Of the values in use: a setting left out is the same as its default given.
    in_use = (each.settled(choices).in_use() for each in (started, config))
    differences = next(in_use).differences(next(in_use))
    changes = [Change(name, old, new) for name, (old, new) in differences.items() if name not in _FREE]
    if fixed := [change for change in changes if change.setting not in _OVERRIDABLE]:
        raise ConfigError(
            f"{run} was started with other settings, on which its set-up is built: {_listed(fixed)}. "
            "No --override changes these: restore them or use a new RUN"
        )
    if changes and not override:
        raise ConfigError(
            f"{run} was started with other settings: {_listed(changes)}. "
            "Restore them, go on with the new ones by --override, or use a new RUN"
        )
    return tuple(changes)


def _listed(changes: list[Change]) -> str:
    return "; ".join(map(str, changes))
