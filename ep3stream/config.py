"""Every setting of a conversion and of a fit, checked before any work; a fit's settings read and write TOML."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from ep3stream.errors import ConfigError

MIB = 1 << 20
CONFIG_VERSION = 1

Task = Literal["regression", "classification"]
Format = Literal["zarr", "hdf5"]
XDtype = Literal["float32", "float16"]
KernelName = Literal["laplacian", "gaussian"]
Projection = Literal["nystrom", "eigenpro", "exact"]
Scale = Literal["none", "standard", "minmax"]

_BYTE_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip


def parse_bytes(text: str | int) -> int:
    """Number of bytes in `512MB`, `8GiB` or a plain number; raises ConfigError on anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _BYTE_UNITS:
        raise ConfigError(f"{text!r} is not a number of bytes; write it like 512MB or 8GiB")
    n_bytes = float(match[1]) * _BYTE_UNITS[match[2].upper()]
    if not 1 <= n_bytes < 1 << 63:
        raise ConfigError(f"{text!r} is {n_bytes:g} bytes; give at least one and fewer than 2^63")
    return int(n_bytes)


def parse_splits(text: str) -> dict[str, float]:
    """`train=0.9,test=0.1` as a mapping of split name to its share of the rows."""
    splits: dict[str, float] = {}
    for part in text.split(","):
        name, _, fraction = (piece.strip() for piece in part.partition("="))
        _require(name not in splits, f"split {name!r} is given twice; give each name once")
        try:
            splits[name] = float(fraction)
        except ValueError:
            raise ConfigError(
                f"split {part!r} is not NAME=FRACTION; write it like train=0.9,test=0.1"
            ) from None
    return splits


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_choice(field_name: str, value: str, choices: Any) -> None:
    allowed = get_args(choices)
    _require(value in allowed, f"{field_name} is {value!r}; choose one of {', '.join(allowed)}")


@dataclass(frozen=True, slots=True)
class ConvertConfig:
    """How `convert` reads a source and lays out the store. Bytes are bytes; fractions sum to 1."""

    target: str | None = None
    task: Task | None = None
    splits: Mapping[str, float] = field(default_factory=lambda: {"train": 1.0})
    format: Format | None = None
    dtype: XDtype = "float32"
    shuffle: bool = True
    seed: int = 0
    memory_bytes: int = 1024 * MIB
    segment_bytes: int = 16 * MIB

    def __post_init__(self) -> None:
        if self.task is not None:
            _require_choice("task", self.task, Task)
        if self.format is not None:
            _require_choice("format", self.format, Format)
        _require_choice("dtype", self.dtype, XDtype)
        _require(self.seed >= 0, f"seed is {self.seed}; use 0 or more")
        _require(self.segment_bytes >= 4096, f"segment_bytes is {self.segment_bytes}; use at least 4KiB")
        _require(
            self.memory_bytes >= 4 * self.segment_bytes,
            f"memory is {self.memory_bytes} bytes but segments have {self.segment_bytes}; "
            "use at least 4 segments of memory, or smaller segments",
        )
        for name, fraction in self.splits.items():
            _require(
                re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", name) is not None,
                f"split name {name!r} is not allowed; use up to 64 letters, digits, _ and -",
            )
            _require(0 < fraction <= 1, f"split {name} has the fraction {fraction}; use one in (0, 1]")
        total = math.fsum(self.splits.values())
        _require(abs(total - 1) < 1e-6, f"split fractions sum to {total:g}; they must sum to 1")


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which rows a fit streams and how their inputs are scaled (part of the model, not of the store).

    keep_center_rows: train on the rows that were drawn as centers too, which overfits.
    """

    split: str = "train"
    validate: str | None = None
    scale: Scale = "standard"
    keep_center_rows: bool = False

    def __post_init__(self) -> None:
        _require_choice("scale", self.scale, Scale)


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """The kernel by name and its bandwidth, in the unit of scaled inputs; `median` is the median distance."""

    name: KernelName = "laplacian"
    bandwidth: float | Literal["median"] = "median"

    def __post_init__(self) -> None:
        _require_choice("kernel", self.name, KernelName)
        if self.bandwidth != "median":
            _require(
                isinstance(self.bandwidth, int | float) and 0 < self.bandwidth < math.inf,
                f"bandwidth is {self.bandwidth!r}; use 'median' or a positive, finite distance",
            )


@dataclass(frozen=True, slots=True)
class SolverConfig:
    """The model's size and the method's parameters; 0 means chosen from the data and the memory budget.

    centers: how many rows to draw, `auto`, or the path of an NPY file of (p, d).
    averaging: a of the tail average w_t = min(1, a / (t + a)); 0 switches it off.
    """

    centers: int | str = "auto"
    projection: Projection = "nystrom"
    epochs: int = 1
    batch_size: int = 0
    model_rank: int = 0
    data_rank: int = 0
    nystrom_samples: int = 0
    momentum: float = 0.9
    averaging: float = 3.0

    def __post_init__(self) -> None:
        _require_choice("projection", self.projection, Projection)
        _require(
            self.projection != "eigenpro",
            "projection is 'eigenpro', which this version does not have yet; use nystrom or exact",
        )
        if isinstance(self.centers, int):
            _require(self.centers >= 1, f"centers is {self.centers}; use at least 1")
        _require(self.epochs >= 1, f"epochs is {self.epochs}; use at least 1")
        for name in ("batch_size", "model_rank", "data_rank", "nystrom_samples"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} is {value}; use a positive number, or 0 to have it chosen")
        _require(0 <= self.momentum < 1, f"momentum is {self.momentum}; use a number in [0, 1)")
        _require(0 <= self.averaging < math.inf, f"averaging is {self.averaging}; use 0 or a positive number")
        if self.nystrom_samples and self.data_rank:
            _require(
                self.data_rank < self.nystrom_samples,
                f"data_rank is {self.data_rank} but only {self.nystrom_samples} Nystrom samples are drawn; "
                f"use data_rank < {self.nystrom_samples} or more nystrom_samples",
            )


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Resources, checkpoints and the seed. Minutes are wall-clock minutes; 0 switches a trigger off.

    memory_bytes bounds the arrays of a fit on each device; the interpreter and its libraries come on top.
    dask: address of a Dask scheduler whose workers read the store; None reads in this process.
    """

    memory_bytes: int = 2048 * MIB
    checkpoint_steps: int = 0
    checkpoint_minutes: float = 5.0
    keep_checkpoints: int = 2
    devices: int | Literal["auto"] = "auto"
    seed: int = 0
    dask: str | None = None

    def __post_init__(self) -> None:
        _require(self.memory_bytes > 0, f"memory is {self.memory_bytes} bytes; use a positive number")
        _require(self.checkpoint_steps >= 0, f"checkpoint_steps is {self.checkpoint_steps}; use 0 or more")
        _require(
            0 <= self.checkpoint_minutes < math.inf,
            f"checkpoint_minutes is {self.checkpoint_minutes}; use 0 or more",
        )
        _require(self.keep_checkpoints >= 1, f"keep_checkpoints is {self.keep_checkpoints}; use at least 1")
        _require(0 <= self.seed < 2**63, f"seed is {self.seed}; use a number in [0, 2^63)")
        if self.devices != "auto":
            _require(
                self.devices == 1,
                f"devices is {self.devices}, but this version trains on one device; use --devices 1 or auto",
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
        try:
            document = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(f"{origin} is not TOML: {error}") from error
        version = document.pop("format_version", CONFIG_VERSION)
        _require(
            version == CONFIG_VERSION,
            f"{origin} has format_version {version!r}; this version of ep3stream reads {CONFIG_VERSION}",
        )
        unknown = sorted(set(document) - set(_TABLES))
        _require(not unknown, f"{origin} has the unknown table {unknown[:1]}; use {', '.join(_TABLES)}")
        return cls().with_settings(document, origin)

    def with_settings(self, settings: Mapping[str, Any], origin: str) -> FitConfig:
        """This config with some settings of some tables replaced, all checked again."""
        tables = {}
        for table, values in settings.items():
            _require(isinstance(values, Mapping), f"{origin}: {table} must be a table of settings")
            current = getattr(self, table)
            for name, value in values.items():
                _check_type(type(current), name, value, f"{origin}: {table}.{name}")
            tables[table] = replace(current, **values)
        return replace(self, **tables)

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
    return {name: value for name, value in values.items() if value is not None}


def _check_type(table: type, name: str, value: Any, where: str) -> None:
    """A TOML value against the field's annotation; a whole number will do where a float is asked for."""
    hints = get_type_hints(table)
    _require(name in hints, f"{where} is not a setting; use one of {', '.join(hints)}")
    allowed = _plain_types(hints[name]) - {type(None)}
    if float in allowed:
        allowed |= {int}
    _require(
        type(value) in allowed,
        f"{where} is {value!r}; it must be {' or '.join(sorted(kind.__name__ for kind in allowed))}",
    )
    if isinstance(value, int):
        _require(abs(value) < 1 << 63, f"{where} has more than 64 bits; use a smaller number")
    if isinstance(value, str):
        _require(_is_unicode(value), f"{where} is {value!r}, which is not UTF-8; use another name")


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: a file name in another encoding reaches Python with lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _plain_types(hint: Any) -> set[type]:
    if get_origin(hint) is Literal:
        return {type(value) for value in get_args(hint)}
    if get_args(hint):
        return set().union(*(_plain_types(part) for part in get_args(hint)))
    return {hint}
