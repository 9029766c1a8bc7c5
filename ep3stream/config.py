"""Every setting of a conversion and of a fit, checked before any work; a fit's settings read and write TOML."""

from __future__ import annotations

import csv
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from ep3stream.errors import ConfigError

MIB = 1 << 20
CONFIG_VERSION = 1
MAX_CONFIG_BYTES = MIB
_MAX_DOTS = 100

Task = Literal["regression", "classification"]
Format = Literal["zarr", "hdf5"]
XDtype = Literal["float32", "float16"]
Codec = Literal["auto", "none", "lz4", "zstd"]
Categories = Literal["onehot", "codes"]
Missing = Literal["error", "mean", "drop"]
DatePart = Literal["days", "month", "day", "weekday", "hour"]
KernelName = Literal[
    "laplacian", "gaussian", "matern32", "matern52", "dispersal", "rational_quadratic",
    "polynomial", "ntk_relu", "ntk_relu_unit_sphere",
]  # fmt: skip
Projection = Literal["nystrom", "eigenpro", "exact"]
StepRule = Literal["measured", "published"]
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


def parse_names(text: str) -> tuple[str, ...]:
    """`a,b,c` as names; one with a comma in it stands in double quotes, as in CSV."""
    names = tuple(name.strip() for name in next(csv.reader([text], skipinitialspace=True), []))
    _require(bool(names) and all(names), f"{text!r} has an empty name; write it like a,b,c")
    return names


def parse_renames(text: str) -> dict[str, str]:
    """`OLD=NEW,...` as a mapping of old name to new name."""
    renames: dict[str, str] = {}
    for part in parse_names(text):
        old, _, new = (name.strip() for name in part.partition("="))
        _require(
            bool(old and new), f"rename {part!r} is not OLD=NEW; write it like dep=departure,arr=arrival"
        )
        _require(old not in renames, f"rename has {old!r} twice; give each column one new name")
        renames[old] = new
    return renames


def parse_weights(text: str) -> dict[str, float]:
    """`NAME=WEIGHT,...` as a mapping of name to weight."""
    weights: dict[str, float] = {}
    for part in parse_names(text):
        name, _, weight = (piece.strip() for piece in part.rpartition("="))
        _require(name not in weights, f"weight of {name!r} is given twice; give each name once")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise ConfigError(f"weight {part!r} is not NAME=WEIGHT; write it like cat=2,dog=0.5") from None
    return weights


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_distinct(field_name: str, names: Sequence[str]) -> None:
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    _require(twice is None, f"{field_name} has {twice!r} twice; give each name once")


def _require_choice(field_name: str, value: str, choices: Any) -> None:
    allowed = get_args(choices)
    _require(value in allowed, f"{field_name} is {value!r:.80}; choose one of {', '.join(allowed)}")


@dataclass(frozen=True, slots=True)
class ConvertConfig:
    """How `convert` reads a source and lays out the store. Bytes are bytes; fractions sum to 1.

    target: the column to predict, or several of numbers. columns, drop: names or patterns (`px_*`) of the
    features; none chosen means all. rename: name in the source -> name in the store.
    categories: how texts are stored, `onehot` unless said. category: further columns to treat like texts.
    dates: the features of a date or time; those that fit its type unless said.
    missing: what becomes of an empty cell or NaN, `error` unless said.
    like: a store whose columns, mappings and dtype are taken over, so that a model fits both.
    dtype, categories, missing: None leaves the choice to `like`, or to the default.
    features, index_base: of svmlight files, how many features there are (None: a first pass counts them) and
    whether the first has the index 1 or 0.
    codec: `auto` is lz4 where it shrinks a sample of the rows to four fifths or less, else none.
    """

    target: str | Sequence[str] | None = None
    task: Task | None = None
    columns: Sequence[str] = ()
    drop: Sequence[str] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    categories: Categories | None = None
    category: Sequence[str] = ()
    dates: Sequence[DatePart] = ()
    missing: Missing | None = None
    like: Path | str | None = None
    features: int | None = None
    index_base: int = 1
    splits: Mapping[str, float] = field(default_factory=lambda: {"train": 1.0})
    format: Format | None = None
    dtype: XDtype | None = None
    codec: Codec = "auto"
    shuffle: bool = True
    seed: int = 0
    memory_bytes: int = 1024 * MIB
    segment_bytes: int = 16 * MIB

    def __post_init__(self) -> None:
        choices = {
            "task": Task,
            "format": Format,
            "dtype": XDtype,
            "codec": Codec,
            "categories": Categories,
            "missing": Missing,
        }
        for name, allowed in choices.items():
            if getattr(self, name) is not None:
                _require_choice(name, getattr(self, name), allowed)
        self._check_columns()
        _require(self.features is None or self.features >= 1, f"features is {self.features}; use at least 1")
        _require(self.index_base in (0, 1), f"index_base is {self.index_base}; use 0 or 1")
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

    @property
    def targets(self) -> tuple[str, ...]:
        """The columns to predict; none when none was chosen."""
        return (self.target,) if isinstance(self.target, str) else tuple(self.target or ())

    def _check_columns(self) -> None:
        for name in ("columns", "drop", "category", "dates"):
            given = getattr(self, name)
            _require(not isinstance(given, str), f"{name} is {given!r}; give a list of names")
            _require_distinct(name, given)
        _require_distinct("target", self.targets)
        for part in self.dates:
            _require_choice("dates", part, DatePart)
        _require_distinct("rename", list(self.rename.values()))
        _require(all(self.rename.values()), "rename has an empty new name; use one of a letter at least")


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
        _require_choice("scale", self.scale, Scale)


# Every parameter of every kernel, and what it is where the settings leave it out.
KERNEL_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "laplacian": {"bandwidth": "median"},
    "gaussian": {"bandwidth": "median"},
    "matern32": {"bandwidth": "median"},
    "matern52": {"bandwidth": "median"},
    "dispersal": {"bandwidth": "median", "shape": 1.5},
    "rational_quadratic": {"bandwidth": "median", "shape": 1.0},
    "polynomial": {"bandwidth": "median", "degree": 3, "offset": 1.0},
    "ntk_relu": {"depth": 2, "bias": 1.0},
    "ntk_relu_unit_sphere": {"depth": 2, "bias": 1.0},
}

_KERNEL_LIMITS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "bandwidth": (lambda length: 0 < length < math.inf, "'median' or a positive, finite distance"),
    "shape": (lambda shape: 0 < shape < math.inf, "a positive, finite number"),
    "degree": (lambda degree: degree in range(1, 101), "a whole number from 1 to 100"),
    "offset": (lambda offset: 0 <= offset < math.inf, "0 or a positive, finite number"),
    "depth": (lambda depth: depth in range(1, 1001), "a whole number from 1 to 1000"),
    "bias": (lambda bias: 0 <= bias < math.inf, "0 or a positive, finite number"),
}


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """The kernel by name and its parameters, those of `KERNEL_DEFAULTS[name]`; formulas are in docs/kernels.md.

    bandwidth: a length in the unit of scaled inputs; `median` is the median distance between rows, and for
    `polynomial` their median norm. The others have the kernel's default while they are None.
    shape: gamma of `dispersal`, in (0, 2]; alpha of `rational_quadratic`.
    """

    name: KernelName = "laplacian"
    bandwidth: float | Literal["median"] = "median"
    shape: float | None = None
    degree: int | None = None
    offset: float | None = None
    depth: int | None = None
    bias: float | None = None

    def __post_init__(self) -> None:
        _require_choice("kernel", self.name, KernelName)
        own = KERNEL_DEFAULTS[self.name]
        for name, value in self._given().items():
            _require(
                name in own,
                f"{name} is {value!r:.80}, which the {self.name} kernel does not have; leave it out: "
                f"this kernel takes {', '.join(own)}",
            )
            is_allowed, allowed = _KERNEL_LIMITS[name]
            is_number = isinstance(value, int | float)
            _require(is_number and is_allowed(value), f"{name} is {value!r:.80}; use {allowed}")
        if self.name == "dispersal" and self.shape is not None:
            _require(self.shape <= 2, f"shape is {self.shape}; the dispersal kernel takes one in (0, 2]")

    def parameters(self) -> dict[str, Any]:
        """Every parameter of this kernel, with its value or its default."""
        return {**KERNEL_DEFAULTS[self.name], **self._given()}

    def _given(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "name"}
        return {name: value for name, value in values.items() if value is not None and value != "median"}


@dataclass(frozen=True, slots=True)
class SolverConfig:
    """The model's size and the method's parameters; 0 means chosen from the data and the memory budget.

    centers: how many rows to draw; `auto`; `kmeans:N`, the means of N clusters; the path of an NPY file of (p, d);
    or `STORE/split`, all rows of a split of any store with the same features.
    epochs: passes over the rows, 0.5 for a half.
    momentum, averaging: beta of the heavy ball and a of the tail average w_t = min(1, a / (t + a)), 0 for none;
    while they are None, 0.9 and 3, but 0 and 0 with `eigenpro`, which is the published method and has neither.
    step: how batch and step size are chosen; while it is None, `published` with `eigenpro`, else `measured`.
    projection_passes, projection_tolerance: where `eigenpro` ends its passes over K(Z, Z) theta = h: after so
    many, or at an error of that share of |h|.
    ridge: lambda of the objective 1/(2n) sum_i |f(x_i) - y_i|^2 + lambda/2 |f|_H^2 over scaled targets.
    validate_every: after how many epochs, or what part of one, the split data.validate is scored.
    patience: after how many validations without a better one the fit ends; its best model is then kept. 0 for never.
    class_weights: what a row of a class counts in the loss; `balanced`, inverse to the class's frequency, or by
    class name, 1 for those left out. output_weights: what each target counts, by name.
    """

    centers: int | str = "auto"
    projection: Projection = "nystrom"
    epochs: float = 1
    batch_size: int = 0
    model_rank: int = 0
    data_rank: int = 0
    nystrom_samples: int = 0
    momentum: float | None = None
    averaging: float | None = None
    step: StepRule | None = None
    projection_passes: int = 2
    projection_tolerance: float = 1e-3
    ridge: float = 0.0
    validate_every: float = 1
    patience: int = 0
    class_weights: Literal["none", "balanced"] | Mapping[str, float] = "none"
    output_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_choice("projection", self.projection, Projection)
        if isinstance(self.centers, int):
            _require(self.centers >= 1, f"centers is {self.centers}; use at least 1")
        for name in ("epochs", "validate_every"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"{name} is {value}; use a positive number, like 2 or 0.5")
        _require(self.patience >= 0, f"patience is {self.patience}; use a positive number, or 0 for none")
        self._check_weights()
        for name in ("batch_size", "model_rank", "data_rank", "nystrom_samples"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} is {value}; use a positive number, or 0 to have it chosen")
        _require(0 <= self.used_momentum < 1, f"momentum is {self.momentum}; use a number in [0, 1)")
        _require(
            0 <= self.used_averaging < math.inf, f"averaging is {self.averaging}; use 0 or a positive number"
        )
        self._check_published()
        if self.nystrom_samples and self.data_rank:
            _require(
                self.data_rank < self.nystrom_samples,
                f"data_rank is {self.data_rank} but only {self.nystrom_samples} Nystrom samples are drawn; "
                f"use data_rank < {self.nystrom_samples} or more nystrom_samples",
            )

    def n_steps(self, steps_per_epoch: int) -> int:
        """Of the whole fit, at least one."""
        return max(1, round(self.epochs * steps_per_epoch))

    def validation_steps(self, steps_per_epoch: int) -> int:
        """Between two validations, at least one."""
        return max(1, round(self.validate_every * steps_per_epoch))

    def in_use(self) -> SolverConfig:
        """With what the projection decides filled in."""
        return replace(self, momentum=self.used_momentum, averaging=self.used_averaging, step=self.used_step)

    @property
    def used_momentum(self) -> float:
        """`momentum`, or the projection's own."""
        own = 0.0 if self.projection == "eigenpro" else 0.9
        return own if self.momentum is None else self.momentum

    @property
    def used_averaging(self) -> float:
        """`averaging`, or the projection's own."""
        own = 0.0 if self.projection == "eigenpro" else 3.0
        return own if self.averaging is None else self.averaging

    @property
    def used_step(self) -> StepRule:
        """`step`, or the projection's own."""
        return self.step or ("published" if self.projection == "eigenpro" else "measured")

    def _check_weights(self) -> None:
        if isinstance(self.class_weights, str):
            _require_choice("class_weights", self.class_weights, Literal["none", "balanced"])
        given = [("output_weights", self.output_weights)]
        if isinstance(self.class_weights, Mapping):
            _require(bool(self.class_weights), "class_weights has no class; leave it out, or name one")
            given.append(("class_weights", self.class_weights))
        for name, weights in given:
            for key, value in weights.items():
                is_weight = type(value) in (int, float) and 0 < value < math.inf
                _require(is_weight, f"{name} of {key!r:.80} is {value!r:.80}; use a positive, finite number")
                _require(_is_unicode(key), f"{name} has {key!r:.80}, which is not UTF-8; use another name")

    def _check_published(self) -> None:
        for name in ("momentum", "averaging"):
            value = getattr(self, name)
            _require(
                self.projection != "eigenpro" or not value,
                f"{name} is {value}, but projection is 'eigenpro', the published method, which has none; "
                f"leave {name} out, or use nystrom or exact",
            )
        if self.step is not None:
            _require_choice("step", self.step, StepRule)
        _require(
            self.used_step == "measured" or self.projection == "eigenpro",
            f"step is 'published' but projection is {self.projection!r}, whose preconditioner that rule does not "
            "know; use --step measured or --projection eigenpro",
        )
        passes, tolerance = self.projection_passes, self.projection_tolerance
        _require(passes >= 1, f"projection_passes is {passes}; use at least 1")
        _require(0 <= tolerance < 1, f"projection_tolerance is {tolerance}; use a number in [0, 1)")
        _require(
            0 <= self.ridge < math.inf, f"ridge is {self.ridge}; use 0 for none, or a positive, finite number"
        )
        _require(
            not self.ridge or self.projection != "eigenpro",
            f"ridge is {self.ridge}, but projection is 'eigenpro', the published method, which has none; "
            "leave ridge out, or use nystrom or exact",
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
                f"devices is {self.devices!s:.80}, but this version trains on one device; use --devices 1 or auto",
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
        _require(
            len(text) <= MAX_CONFIG_BYTES and dots <= _MAX_DOTS,
            f"{origin} has {len(text)} letters and a line of {dots} dots; "
            f"settings have {MAX_CONFIG_BYTES} and {_MAX_DOTS} at most",
        )
        try:
            document = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # Also for a number of thousands of digits.
            raise ConfigError(f"{origin} is not TOML: {error}; correct it") from error
        for table, settings in document.items():
            _require_short_numbers(settings, f"{origin}: {table:.80}")
        version = document.pop("format_version", CONFIG_VERSION)
        _require(
            version == CONFIG_VERSION,
            f"{origin} has format_version {version!r:.80}; this version of ep3stream reads {CONFIG_VERSION}: "
            "upgrade it, or correct the file",
        )
        unknown = sorted(set(document) - set(_TABLES))
        _require(not unknown, f"{origin} has the unknown table {unknown[:1]!r:.80}; use {', '.join(_TABLES)}")
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


def _require_short_numbers(value: Any, where: str) -> None:
    """Of a hexadecimal number of thousands of digits Python cannot even say in an error what it is."""
    if isinstance(value, int):
        _require(abs(value) < 1 << 63, f"{where} has more than 64 bits; use a smaller number")
    elif isinstance(value, list):
        for item in value:
            _require_short_numbers(item, where)
    elif isinstance(value, dict):
        for name, item in value.items():
            _require_short_numbers(item, f"{where}.{name:.80}")


_type_hints = cache(get_type_hints)


def _check_type(table: type, name: str, value: Any, where: str) -> None:
    """A TOML value against the field's annotation; a whole number will do where a float is asked for."""
    hints = _type_hints(table)
    _require(name in hints, f"{where:.400} is not a setting; use one of {', '.join(hints)}")
    allowed = _plain_types(hints[name]) - {type(None)}
    if float in allowed:
        allowed |= {int}
    _require(
        type(value) in allowed,
        f"{where} is {value!r:.80}; it must be {' or '.join(sorted(kind.__name__ for kind in allowed))}",
    )
    if isinstance(value, int):
        _require(abs(value) < 1 << 63, f"{where} has more than 64 bits; use a smaller number")
    if isinstance(value, str):
        _require(_is_unicode(value), f"{where} is {value!r:.400}, which is not UTF-8; use another name")


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: a file name in another encoding reaches Python with lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _plain_types(hint: Any) -> set[type]:
    if get_origin(hint) is Literal:
        return {type(value) for value in get_args(hint)}
    if get_origin(hint) is Mapping:
        return {dict}
    if get_args(hint):
        return set().union(*(_plain_types(part) for part in get_args(hint)))
    return {hint}
