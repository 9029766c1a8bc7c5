"""All settings of a fit, which read and write TOML."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import tomli_w

from ep3stream.config.checks import check_type, require, require_choice, require_short_numbers
from ep3stream.config.convert import MIB
from ep3stream.config.kernel import KernelConfig
from ep3stream.config.solver import SolverConfig
from ep3stream.errors import ConfigError

Scale = Literal["none", "standard", "minmax"]

CONFIG_VERSION = 1
# Of a segment, which has 16 MiB unless the conversion was told otherwise.
READ_TIMEOUT_S = 120.0
MAX_CONFIG_BYTES = MIB
_MAX_DOTS = 100


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which rows a fit streams and how their inputs are scaled (part of the model, not of the store).

    keep_center_rows: train on the rows that were drawn as centers too, which overfits.
    feature_scale: the path of an NPY file of (d,) positive factors, which multiply the scaled inputs; read
    once, by the set-up.
    """

    split: str = "train"
    validate: str | None = None
    scale: Scale = "standard"
    keep_center_rows: bool = False
    feature_scale: str | None = None

    def __post_init__(self) -> None:
        require_choice("scale", self.scale, Scale)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Resources, checkpoints and the seed. Minutes are wall-clock minutes; 0 switches a trigger off.

    memory_bytes bounds the arrays of a fit on each device; the interpreter and its libraries come on top. On a GPU
    its default stands for four fifths of the memory that is free when the set-up is made.
    dask: address of a Dask scheduler whose workers read the store; None reads in this process.
    devices: processes on this machine, each with a device of its own: GPUs, or where there are none, shares of the
    CPU's cores; `auto` for all GPUs there are, or one CPU. torchrun starts the processes itself: leave it at `auto`.
    max_restarts: how often all of them are started again when one dies. rank_timeout_minutes: how long one waits for
    another before it takes that one for dead.
    read_timeout_s: how long a segment may take to come before it is asked for again, twice; 0 waits for ever.
    tensorboard: True to write curves for TensorBoard into RUN/tensorboard; or the directory to write them into.
    """

    memory_bytes: int = 2048 * MIB
    checkpoint_steps: int = 0
    checkpoint_minutes: float = 5.0
    keep_checkpoints: int = 2
    devices: int | Literal["auto"] = "auto"
    seed: int = 0
    dask: str | None = None
    max_restarts: int = 3
    rank_timeout_minutes: float = 30.0
    read_timeout_s: float = READ_TIMEOUT_S
    tensorboard: bool | str = False

    def __post_init__(self) -> None:
        require(self.memory_bytes > 0, f"memory is {self.memory_bytes} bytes; use a positive number")
        require(self.checkpoint_steps >= 0, f"checkpoint_steps is {self.checkpoint_steps}; use 0 or more")
        require(
            0 <= self.checkpoint_minutes < math.inf,
            f"checkpoint_minutes is {self.checkpoint_minutes}; use 0 or more",
        )
        require(self.keep_checkpoints >= 1, f"keep_checkpoints is {self.keep_checkpoints}; use at least 1")
        require(
            0 <= self.read_timeout_s < math.inf,
            f"read_timeout_s is {self.read_timeout_s}; use a positive number of seconds, or 0 to wait for ever",
        )
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; use a number in [0, 2^63)")
        if isinstance(self.devices, str):
            require(self.devices == "auto", f"devices is {self.devices!r:.80}; use a number or 'auto'")
        else:
            require(self.devices >= 1, f"devices is {self.devices}; use at least 1, or auto")
        require(self.max_restarts >= 0, f"max_restarts is {self.max_restarts}; use 0 or more")
        require(
            0 < self.rank_timeout_minutes < math.inf,
            f"rank_timeout_minutes is {self.rank_timeout_minutes}; use a positive number",
        )


@dataclass(frozen=True, slots=True)
class FitConfig:
    """All settings of a fit, in the four tables of its TOML file."""

    data: DataConfig = field(default_factory=DataConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_toml(self) -> str:
        """The settings as TOML; unset ones are left out, having no value in TOML."""
        tables: dict[str, Any] = {"format_version": CONFIG_VERSION}
        tables |= {table: _set_values(getattr(self, table)) for table in _TABLES}
        return tomli_w.dumps(tables)

    @classmethod
    def from_toml(cls, text: str, origin: str) -> FitConfig:
        """Reads `to_toml`'s format; raises ConfigError naming `origin` and the unknown or ill-typed setting."""
        dots = max((line.count(".") for line in text.splitlines()), default=0)
        # A key of many parts takes tomllib the square of their number.
        require(
            len(text) <= MAX_CONFIG_BYTES and dots <= _MAX_DOTS,
            f"{origin} has {len(text)} letters and a line of {dots} dots; "
            f"settings have {MAX_CONFIG_BYTES} and {_MAX_DOTS} at most",
        )
        try:
            document = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # Also for a number of thousands of digits.
            raise ConfigError(f"{origin} is not TOML: {error}; correct it") from error
        for table, settings in document.items():
            require_short_numbers(settings, f"{origin}: {table:.80}")
        version = document.pop("format_version", CONFIG_VERSION)
        require(
            version == CONFIG_VERSION,
            f"{origin} has format_version {version!r:.80}; this version of ep3stream reads {CONFIG_VERSION}: "
            "upgrade it, or correct the file",
        )
        unknown = sorted(set(document) - set(_TABLES))
        require(not unknown, f"{origin} has the unknown table {unknown[:1]!r:.80}; use {', '.join(_TABLES)}")
        return cls().with_settings(document, origin)

    def with_settings(self, settings: Mapping[str, Any], origin: str) -> FitConfig:
        """This config with some settings of some tables replaced, all checked again."""
        tables = {}
        for table, values in settings.items():
            require(isinstance(values, Mapping), f"{origin}: {table} must be a table of settings")
            current = getattr(self, table)
            for name, value in values.items():
                check_type(type(current), name, value, f"{origin}: {table}.{name}")
            tables[table] = replace(current, **values)
        return replace(self, **tables)

    def in_use(self) -> FitConfig:
        """With every setting that stands for another value replaced by that value."""
        kernel = replace(self.kernel, **self.kernel.parameters())
        return replace(self, kernel=kernel, solver=self.solver.in_use())

    def differences(self, other: FitConfig) -> dict[str, tuple[Any, Any]]:
        """`table.setting` -> (this value, the other value) wherever the two differ."""
        return {
            f"{table}.{item.name}": (mine, theirs)
            for table in _TABLES
            for item in fields(getattr(self, table))
            if (mine := getattr(getattr(self, table), item.name))
            != (theirs := getattr(getattr(other, table), item.name))
        }


_TABLES = tuple(item.name for item in fields(FitConfig))


def _set_values(table: Any) -> dict[str, Any]:
    values = {item.name: getattr(table, item.name) for item in fields(table)}
    return {name: value for name, value in values.items() if value is not None and value != {}}
