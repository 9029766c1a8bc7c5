"""Which settings may change when a fit is resumed, which only by an override, and which not at all."""

from __future__ import annotations

from typing import Any, NamedTuple

from ep3stream.config import FitConfig
from ep3stream.errors import ConfigError

# They change how long the fit goes on or what it costs, not its path.
_FREE = {
    "solver.epochs",
    "run.checkpoint_steps",
    "run.checkpoint_minutes",
    "run.keep_checkpoints",
    "run.devices",
    "run.dask",
    "run.max_restarts",
    "run.rank_timeout_minutes",
    "run.read_timeout_s",
    "run.tensorboard",
}
# Read by each step, and by nothing that the set-up has made: every other setting has gone into the set-up.
_OVERRIDABLE = {
    "solver.momentum",
    "solver.averaging",
    "solver.projection_passes",
    "solver.projection_tolerance",
    "solver.patience",
    "solver.validate_every",
}


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
