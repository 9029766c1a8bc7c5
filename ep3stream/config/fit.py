"""The settings of a fit, read and written as TOML in four tables: data, kernel, solver, run."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_type_hints

import tomli_w

from ep3stream.config.parse import MIB, parse_bytes, parse_minutes, parse_number_or_word
from ep3stream.config.settings import (
    Limit,
    OnResume,
    at_least,
    check_settings,
    check_toml_value,
    from_0_below,
    positive,
    require,
    require_short_numbers,
    setting,
    settings_of,
)
from ep3stream.config.solver import KernelConfig, SolverConfig
from ep3stream.errors import ConfigError

CONFIG_VERSION = 1
MAX_CONFIG_BYTES = MIB

# tomllib takes time in the square of the number of parts of a key.
_MAX_DOTS = 100

# For one segment, which has 16 MiB unless the conversion was told otherwise.
READ_TIMEOUT_S = 120.0

Scale = Literal["auto", "standard", "minmax", "none"]


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which rows a fit streams, and how their inputs are scaled: a part of the model, not of the store."""

    split: str = setting("train", "rows to fit")
    validate: str | None = setting(
        "auto",
        "rows to score after each epoch, which decide the model that is kept: those of a split of the store, 50000 "
        "at most, or none",
        default_means="the split validation, valid, val or dev if there is one, else a tenth of the rows to fit, "
        "20000 at most, which are not trained on",
        metavar="auto|none|SPLIT",
        on_resume="override",
    )
    scale: Scale = setting(
        "auto",
        "how the inputs are scaled: auto standardises numbers, bends those with long tails by asinh, and leaves the "
        "0/1 features of categories and gaps as they are, so that a rare category does not outweigh the rest; "
        "standard standardises these too",
    )
    keep_center_rows: bool = setting(
        False, "train on the rows that were drawn as centers too, which overfits", option=None
    )
    feature_scale: str | None = setting(
        None,
        "path of an NPY file of (d,) positive factors that multiply the scaled inputs; the set-up reads it once",
        option=None,
    )
    inputs_rank: Literal["auto", "full"] | int = setting(
        "auto",
        "leading directions of the scaled inputs that kernels of distances take: auto, as many as keep the kernel's "
        "error on pairs of rows below 0.015, where these are at most half of 64 to 2048 inputs and a small model errs "
        "no more with them; full: all inputs as they are",
        limit=at_least(1, "auto, full, or a number of directions"),
        metavar="auto|full|N",
        parse=parse_number_or_word,
    )
    metric: Literal["none", "diagonal", "full"] = setting(
        "none",
        "metric that kernels of distances learn before the fit, by the gradients of shorter fits: a factor for each "
        "input, or a whole matrix, of which --inputs-rank takes the leading directions",
    )
    metric_rounds: int = setting(
        3, "most rounds of learning the metric, which end with the first that is no better", limit=at_least(1)
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.validate is None:  # TOML has no word for it.
            object.__setattr__(self, "validate", "none")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Resources, checkpoints and the seed. Minutes are wall-clock minutes; 0 switches a trigger off."""

    memory_bytes: int = setting(
        2048 * MIB,
        "bytes that the fit's arrays may take on each device; the interpreter and its libraries come on top",
        limit=Limit(lambda n_bytes: n_bytes > 0, "a positive number"),
        # A GPU's default is taken when the set-up is made.
        default_means="on a GPU four fifths of the free memory",
        option="memory",
        metavar="BYTES",
        parse=parse_bytes,
        called="memory",
        unit=" bytes",
    )
    checkpoint_steps: int = setting(
        0,
        "steps between two checkpoints",
        limit=at_least(0, "0 or more"),
        default_means="only by time",
        on_resume="free",
    )
    checkpoint_minutes: float = setting(
        5.0,
        "minutes between two checkpoints, 0 for none by time",
        limit=at_least(0, "0 or more"),
        metavar="N",
        on_resume="free",
    )
    keep_checkpoints: int = setting(
        2, "how many checkpoints stay, the newest", limit=at_least(1), option=None, on_resume="free"
    )
    devices: int | Literal["auto"] = setting(
        "auto",
        "processes on this machine, each with a GPU of its own, or, where there are none, a share of the CPU's "
        "cores; torchrun starts the processes itself: leave it at auto",
        limit=at_least(1, "at least 1, or auto"),
        default_means="all GPUs, or one CPU",
        on_resume="free",
    )
    seed: int = setting(0, "seed of every random choice", limit=from_0_below(2**63, "a number in [0, 2^63)"))
    dask: str | None = setting(
        None,
        "scheduler of a Dask cluster whose workers read the store",
        metavar="ADDRESS",
        on_resume="free",
    )
    max_restarts: int = setting(
        3,
        "how often all processes are started again when one of them dies",
        limit=at_least(0, "0 or more"),
        on_resume="free",
    )
    rank_timeout_minutes: float = setting(
        30.0,
        "how long a process waits for another before it takes that one for dead",
        limit=positive("a positive number"),
        option=None,
        on_resume="free",
    )
    read_timeout_s: float = setting(
        READ_TIMEOUT_S,
        "longest wait for a segment, which is then asked for again, twice; 0 to wait for ever",
        limit=at_least(0, "a positive number of seconds, or 0 to wait for ever"),
        option="read-timeout",
        metavar="SECONDS",
        on_resume="free",
    )
    tensorboard: bool | str = setting(
        False,
        "draw curves for TensorBoard in RUN/tensorboard",
        on_resume="free",
    )
    minutes: float = setting(
        2.0,
        "how long the fit may take at most, with its set-up: centers and epochs that are not given are chosen by it; "
        "none to have 5000 centers and one epoch",
        limit=at_least(0, "a positive number of minutes, or none"),
        metavar="N|none",
        parse=parse_minutes,
    )
    host_memory_bytes: int = setting(
        1024 * MIB,
        "where the device is a GPU, bytes of its host's memory that rows read ahead may take: two windows of segments "
        "and three batches",
        limit=Limit(lambda n_bytes: n_bytes > 0, "a positive number"),
        option="host-memory",
        metavar="BYTES",
        parse=parse_bytes,
        called="host_memory",
        unit=" bytes",
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class FitConfig:
    """All settings of a fit, in the four tables of its TOML file."""

    data: DataConfig = field(default_factory=DataConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_toml(self) -> str:
        """The settings as TOML; those that are None or empty are left out, since TOML has no value for them."""
        tables: dict[str, Any] = {"format_version": CONFIG_VERSION}
        for name in FIT_TABLES:
            table = getattr(self, name)
            values = {item.name: getattr(table, item.name) for item in fields(table)}
            tables[name] = {key: value for key, value in values.items() if value is not None and value != {}}
        return tomli_w.dumps(tables)

    @classmethod
    def from_toml(cls, text: str, origin: str) -> FitConfig:
        """The settings in a text that `to_toml` wrote, or a person; each one left out has its default.

        Raises ConfigError that names `origin` and the setting that is unknown, of another type or not allowed.
        """
        dots = max((line.count(".") for line in text.splitlines()), default=0)
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
        unknown = sorted(set(document) - set(FIT_TABLES))
        require(
            not unknown, f"{origin} has the unknown table {unknown[:1]!r:.80}; use {', '.join(FIT_TABLES)}"
        )
        return cls().with_settings(document, origin)

    def with_settings(self, settings: Mapping[str, Any], origin: str) -> FitConfig:
        """This config with the settings in `settings`, by table and name, replaced; all are checked again."""
        tables = {}
        for table, values in settings.items():
            require(isinstance(values, Mapping), f"{origin}: {table} must be a table of settings")
            current = getattr(self, table)
            for name, value in values.items():
                check_toml_value(type(current), name, value, f"{origin}: {table}.{name}")
            tables[table] = replace(current, **values)
        return replace(self, **tables)

    def in_use(self) -> FitConfig:
        """This config with each setting that stands for another value, such as None, replaced by that value."""
        kernel = replace(self.kernel, **self.kernel.parameters())
        return replace(self, kernel=kernel, solver=self.solver.in_use())

    def settled(self, choices: Mapping[str, Any]) -> FitConfig:
        """This config with what it leaves open as in `choices`: the kernel and settings of the solver by name.

        What is not in `choices` stays open.
        """
        kernel, solver = self.kernel, self.solver
        if kernel.name == "auto" and "kernel" in choices:
            kernel = replace(kernel, name=choices["kernel"])
        found = {
            name: choices[name]
            for name in ("centers", "epochs", "patience", "precision", "averaging")
            if name in choices and getattr(solver, name) in ("auto", None)
        }
        return replace(self, kernel=kernel, solver=replace(solver, **found))

    def differences(self, other: FitConfig) -> dict[str, tuple[Any, Any]]:
        """`table.setting` -> (this value, the other value) wherever the two differ."""
        return {
            f"{table}.{item.name}": (mine, theirs)
            for table in FIT_TABLES
            for item in fields(getattr(self, table))
            if (mine := getattr(getattr(self, table), item.name))
            != (theirs := getattr(getattr(other, table), item.name))
        }


# The tables by name, in the order of the file.
FIT_TABLES: Mapping[str, type] = get_type_hints(FitConfig)


def on_resume(rule: OnResume) -> frozenset[str]:
    """`table.setting` of every setting of a fit that has this rule for a fit that is resumed."""
    return frozenset(
        f"{name}.{each.name}"
        for name, table in FIT_TABLES.items()
        for each in settings_of(table)
        if each.on_resume == rule
    )
