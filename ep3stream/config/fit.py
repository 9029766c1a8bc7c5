"""The settings of a kernel, and what each kernel takes.

The settings of the solver.

All settings of a fit, which read and write TOML.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import tomli_w

from ep3stream.config.convert import MIB
from ep3stream.config.settings import check_type, is_unicode, require, require_choice, require_short_numbers
from ep3stream.errors import ConfigError

KernelName = Literal[
    "laplacian", "gaussian", "matern32", "matern52", "dispersal", "rational_quadratic",
    "polynomial", "ntk_relu", "ntk_relu_unit_sphere",
]  # fmt: skip

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
        require_choice("kernel", self.name, KernelName)
        own = KERNEL_DEFAULTS[self.name]
        for name, value in self._given().items():
            require(
                name in own,
                f"{name} is {value!r:.80}, which the {self.name} kernel does not have; leave it out: "
                f"this kernel takes {', '.join(own)}",
            )
            is_allowed, allowed = _KERNEL_LIMITS[name]
            is_number = isinstance(value, int | float)
            require(is_number and is_allowed(value), f"{name} is {value!r:.80}; use {allowed}")
        if self.name == "dispersal" and self.shape is not None:
            require(self.shape <= 2, f"shape is {self.shape}; the dispersal kernel takes one in (0, 2]")

    def parameters(self) -> dict[str, Any]:
        """Every parameter of this kernel, with its value or its default."""
        return {**KERNEL_DEFAULTS[self.name], **self._given()}

    def _given(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "name"}
        return {name: value for name, value in values.items() if value is not None and value != "median"}


Projection = Literal["nystrom", "eigenpro", "exact"]

StepRule = Literal["measured", "published"]

Precision = Literal["float32", "tf32", "bfloat16"]


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
    precision: of the inputs of radial kernels, and on GPUs of the products with kernel blocks: `tf32` and `bfloat16`
    are for tensor cores, 10 and 7 bits of each number's mantissa; everything else is float32 or better.
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
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        require_choice("projection", self.projection, Projection)
        require_choice("precision", self.precision, Precision)
        if isinstance(self.centers, int):
            require(self.centers >= 1, f"centers is {self.centers}; use at least 1")
        for name in ("epochs", "validate_every"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} is {value}; use a positive number, like 2 or 0.5")
        require(self.patience >= 0, f"patience is {self.patience}; use a positive number, or 0 for none")
        self._check_weights()
        for name in ("batch_size", "model_rank", "data_rank", "nystrom_samples"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}; use a positive number, or 0 to have it chosen")
        require(0 <= self.used_momentum < 1, f"momentum is {self.momentum}; use a number in [0, 1)")
        require(
            0 <= self.used_averaging < math.inf, f"averaging is {self.averaging}; use 0 or a positive number"
        )
        self._check_published()
        if self.nystrom_samples and self.data_rank:
            require(
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
            require_choice("class_weights", self.class_weights, Literal["none", "balanced"])
        given = [("output_weights", self.output_weights)]
        if isinstance(self.class_weights, Mapping):
            require(bool(self.class_weights), "class_weights has no class; leave it out, or name one")
            given.append(("class_weights", self.class_weights))
        for name, weights in given:
            for key, value in weights.items():
                is_weight = type(value) in (int, float) and 0 < value < math.inf
                require(is_weight, f"{name} of {key!r:.80} is {value!r:.80}; use a positive, finite number")
                require(is_unicode(key), f"{name} has {key!r:.80}, which is not UTF-8; use another name")

    def _check_published(self) -> None:
        for name in ("momentum", "averaging"):
            value = getattr(self, name)
            require(
                self.projection != "eigenpro" or not value,
                f"{name} is {value}, but projection is 'eigenpro', the published method, which has none; "
                f"leave {name} out, or use nystrom or exact",
            )
        if self.step is not None:
            require_choice("step", self.step, StepRule)
        require(
            self.used_step == "measured" or self.projection == "eigenpro",
            f"step is 'published' but projection is {self.projection!r}, whose preconditioner that rule does not "
            "know; use --step measured or --projection eigenpro",
        )
        passes, tolerance = self.projection_passes, self.projection_tolerance
        require(passes >= 1, f"projection_passes is {passes}; use at least 1")
        require(0 <= tolerance < 1, f"projection_tolerance is {tolerance}; use a number in [0, 1)")
        require(
            0 <= self.ridge < math.inf, f"ridge is {self.ridge}; use 0 for none, or a positive, finite number"
        )
        require(
            not self.ridge or self.projection != "eigenpro",
            f"ridge is {self.ridge}, but projection is 'eigenpro', the published method, which has none; "
            "leave ridge out, or use nystrom or exact",
        )


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
