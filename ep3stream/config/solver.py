"""The settings of the kernel and of the solver: tables [kernel] and [solver] of a fit's TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, Literal

from ep3stream.config.parse import (
    parse_centers,
    parse_class_weights,
    parse_epochs,
    parse_number_or_word,
    parse_weights,
)
from ep3stream.config.settings import (
    Limit,
    at_least,
    check_settings,
    from_0_below,
    is_unicode,
    positive,
    require,
    setting,
    settings_of,
)

KernelName = Literal[
    "auto", "laplacian", "gaussian", "matern32", "matern52", "dispersal", "rational_quadratic",
    "polynomial", "ntk_relu", "ntk_relu_unit_sphere", "product", "anova",
]  # fmt: skip

Projection = Literal["nystrom", "eigenpro", "exact"]

StepRule = Literal["measured", "published"]

Precision = Literal["float32", "bf16x3", "tf32", "bfloat16"]

PrecisionChoice = Literal["auto", "float32", "bf16x3", "tf32", "bfloat16"]

# What `auto` may be given: a bandwidth makes it a kernel of distances, a power one on columns.
_PARAMETERS_OF_AUTO = ("bandwidth", "power")

# Every parameter of every kernel, and its value where the settings leave the parameter out.
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
    "product": {"power": 1.0},
    "anova": {"power": 1.0},
}


# Settings of a kernel that its parameters in models do not have: its name, and what goes into learnt weights.
_NO_PARAMETERS = ("name", "sharpness")


def _default_by_kernel(parameter: str) -> str:
    """`1.5 for dispersal, 1 for rational_quadratic`: the parameter's default for each kernel that has it."""
    values = {name: own[parameter] for name, own in KERNEL_DEFAULTS.items() if parameter in own}
    if len(set(values.values())) == 1:
        return f"{next(iter(values.values())):g}"
    return ", ".join(f"{value:g} for {name}" for name, value in values.items())


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """The kernel by name, and its parameters: those of `KERNEL_DEFAULTS[name]`. Formulas are in docs/kernels.md.

    `auto` is one of the others, chosen when the columns are known (`training/defaults.py`).
    """

    name: KernelName = setting(
        "auto",
        "the kernel",
        default_means="product up to 1000 columns, laplacian beyond",
        option="kernel",
        called="kernel",
    )
    bandwidth: float | Literal["median"] = setting(
        "median",
        "a length in the unit of the scaled inputs; median: of the distances between rows, or, for polynomial, "
        "of their norms",
        limit=positive("'median' or a positive, finite distance"),
        metavar="median|FLOAT",
    )
    shape: float | None = setting(
        None,
        "gamma of dispersal, in (0, 2]; alpha of rational_quadratic",
        limit=positive("a positive, finite number"),
        default_means=_default_by_kernel("shape"),
    )
    degree: int | None = setting(
        None,
        "degree of the polynomial kernel",
        limit=Limit(lambda degree: degree in range(1, 101), "a whole number from 1 to 100"),
        default_means=_default_by_kernel("degree"),
    )
    offset: float | None = setting(
        None,
        "offset of the polynomial kernel",
        limit=at_least(0, "0 or a positive, finite number"),
        default_means=_default_by_kernel("offset"),
    )
    depth: int | None = setting(
        None,
        "layers of the ntk_relu kernels",
        limit=Limit(lambda depth: depth in range(1, 1001), "a whole number from 1 to 1000"),
        default_means=_default_by_kernel("depth"),
    )
    bias: float | None = setting(
        None,
        "bias of the ntk_relu kernels",
        limit=at_least(0, "0 or a positive, finite number"),
        default_means=_default_by_kernel("bias"),
    )

    power: float | None = setting(
        None,
        "power q of the distance in a column, of product and anova, in (0, 2]",
        limit=positive("a positive, finite number"),
        default_means=_default_by_kernel("power"),
    )
    sharpness: float = setting(
        1.0,
        "factor of the weights that product and anova learn",
        limit=positive("a positive, finite number"),
    )

    def __post_init__(self) -> None:
        check_settings(self)
        own = KERNEL_DEFAULTS.get(self.name, _PARAMETERS_OF_AUTO)
        given = self._given()
        for each in settings_of(KernelConfig):
            if each.name not in given:
                continue
            value = given[each.name]
            require(
                each.name in own,
                f"{each.name} is {value!r:.80}, which the {self.name} kernel does not have; leave it out: "
                f"this kernel takes {', '.join(own)}",
            )
            require(isinstance(value, int | float), each.refusal(value))
        if self.name == "dispersal" and self.shape is not None:
            require(self.shape <= 2, f"shape is {self.shape}; the dispersal kernel takes one in (0, 2]")
        require(
            self.sharpness == 1 or "power" in own,
            f"sharpness is {self.sharpness}, which the {self.name} kernel does not have; leave it out, or give a "
            "bandwidth",
        )
        if self.power is not None:
            require(self.power <= 2, f"power is {self.power}; the {self.name} kernel takes one in (0, 2]")

    def parameters(self) -> dict[str, Any]:
        """Every parameter of this kernel, with its value or its default; of `auto` those that were given."""
        return {**KERNEL_DEFAULTS.get(self.name, {}), **self._given()}

    def _given(self) -> dict[str, Any]:
        values = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name not in _NO_PARAMETERS
        }
        return {name: value for name, value in values.items() if value is not None and value != "median"}


def earlier_averaging(projection: Any) -> float:
    """What `averaging` was by default in versions whose set-ups and states do not say."""
    return 0.0 if projection == "eigenpro" else 3.0


@dataclass(frozen=True, slots=True)
class SolverConfig:
    """The model's size and the method's parameters; 0 means chosen from the data and the memory budget.

    Centers, epochs and patience that are `auto` are settled when the set-up is made, by the minutes of the run.
    A ridge that is None is settled with the weights of the kernel's columns, and 0 for other kernels.
    Momentum, averaging and step that are None have the values of the projection: beta = 0.9, a = 2 and `measured`;
    with `eigenpro`, the published method, 0, 0 and `published`.
    """

    centers: int | str = setting(
        "auto",
        "rows drawn at random, means of clusters, an NPY file of (p, d) points, or all rows of a split of any store "
        "with the same features",
        limit=at_least(1),
        default_means="rows, by --minutes; without it 5000",
        metavar="N|kmeans:N|FILE|STORE/SPLIT",
        parse=parse_centers,
    )
    projection: Projection = setting(
        "nystrom",
        "how a step solves K(Z, Z) theta = h: nystrom by leading eigenpairs, exact by a factorization, eigenpro by "
        "the passes of the published method",
    )
    epochs: float | Literal["auto"] = setting(
        "auto",
        "passes over the rows, 0.5 for a half",
        limit=positive("a positive number, like 2 or 0.5, or auto"),
        default_means="by --minutes; without it 1",
        parse=parse_epochs,
        on_resume="free",
    )
    batch_size: int = setting(
        0,
        "rows of a step",
        limit=at_least(0, "a positive number, or 0 to have it chosen"),
        default_means="measured",
    )
    model_rank: int = setting(
        0,
        "eigenpairs of K(Z, Z)",
        limit=at_least(0, "a positive number, or 0 to have it chosen"),
        default_means="centers / 4, at most 250 (500 without a tail), 1500 where that helps much; 200 on columns",
    )
    tail: Literal["auto", "none"] | int = setting(
        "auto",
        "beyond these eigenpairs nystrom knows each center with its neighbours, in groups of so many centers; none: "
        "all centers alike",
        limit=at_least(2, "auto, none, or the size of a group, at least 2"),
        default_means="256, or fewer where memory is short; none where the eigenpairs leave nothing",
        metavar="auto|none|SIZE",
        parse=parse_number_or_word,
    )
    data_rank: int = setting(
        0,
        "eigenpairs of the data's preconditioner, for the whole fit",
        limit=at_least(0, "a positive number, or 0 to have it chosen"),
        default_means="more and more as rows are seen",
    )
    nystrom_samples: int = setting(
        0,
        "rows that these eigenpairs are estimated on",
        limit=at_least(0, "a positive number, or 0 to have it chosen"),
        default_means="1000 to 3000",
    )
    momentum: float | None = setting(
        None,
        "beta of the heavy ball, 0 for none",
        limit=from_0_below(1, "a number in [0, 1)"),
        default_means="0.9, but 0 with eigenpro",
        option=None,
        on_resume="override",
    )
    averaging: float | None = setting(
        None,
        "a of the tail average w_t = min(1, a / (t + a)), 0 for none",
        limit=at_least(0, "0 or a positive number"),
        default_means="2, but 0 with eigenpro",
        option=None,
        on_resume="override",
    )
    step: StepRule | None = setting(
        None,
        "how the sizes of steps and batches are chosen",
        default_means="measured, but published with eigenpro",
    )
    projection_passes: int = setting(
        2,
        "most passes of eigenpro over K(Z, Z) theta = h, each step",
        limit=at_least(1),
        on_resume="override",
    )
    projection_tolerance: float = setting(
        1e-3,
        "error, as a share of |h|, at which these passes end sooner",
        limit=from_0_below(1, "a number in [0, 1)"),
        metavar="FLOAT",
        on_resume="override",
    )
    ridge: float | None = setting(
        None,
        "lambda of the objective 1/(2n) sum_i |f(x_i) - y_i|^2 + lambda/2 |f|^2 over scaled targets",
        limit=at_least(0, "0 for none, or a positive, finite number"),
        default_means="0, but with kernels on columns the best for validated rows of four",
        metavar="LAMBDA",
    )
    validate_every: float = setting(
        1,
        "epochs between two validations, or a part of one",
        limit=positive("a positive number, like 2 or 0.5"),
        parse=parse_epochs,
        on_resume="override",
    )
    patience: int | Literal["auto"] = setting(
        "auto",
        "stop after N validations without a better model, 0 for never",
        limit=at_least(0, "a positive number, or 0 for none"),
        default_means="3 where --minutes chooses the epochs, else 0",
        on_resume="override",
    )
    class_weights: Literal["none", "balanced"] | Mapping[str, float] = setting(
        "none",
        "weight of a row in the loss, by its class: balanced is inverse to the class's frequency; by name, 1 for "
        "the classes left out",
        default_means="1 each",
        metavar="balanced|NAME=WEIGHT,...",
        parse=parse_class_weights,
    )
    output_weights: Mapping[str, float] = setting(
        dict,
        "weight of each target against the ridge, and in the score that --patience watches",
        default_means="1 each",
        metavar="NAME=WEIGHT,...",
        parse=parse_weights,
    )
    precision: PrecisionChoice = setting(
        "auto",
        "precision of the inputs of radial kernels, for tensor cores: bf16x3 keeps 16 bits of each number and takes "
        "three products, tf32 keeps 11 bits and bfloat16 8; everything else is float32 or better; auto is bf16x3 on a "
        "GPU that is found to take less time so, and to err little more, otherwise float32",
    )
    effects: Literal["auto", "none"] = setting(
        "auto",
        "add an effect for each combination of a few columns' values, such as a place on a day, learnt at the end from "
        "what the kernel leaves, where validated rows show that it helps",
        default_means="with kernels on columns, up to 8 outputs",
    )
    linear: Literal["auto", "tried", "none"] = setting(
        "auto",
        "add a ridge regression on the scaled inputs, fitted first, for the kernel to learn what it leaves, where rows "
        "left out show that it helps: auto with kernels on columns, and where auto takes a kernel of distances; tried "
        "with any kernel",
        default_means="with kernels on columns",
    )
    center_sampling: Literal["error", "uniform"] = setting(
        "error",
        "rows that become centers: error draws four fifths where a small model errs most, with kernels on columns; "
        "uniform draws from all rows alike, as other kernels do",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        self._check_weights()
        self._check_published()
        require(
            self.projection == "nystrom" or isinstance(self.tail, str),
            f"tail is {self.tail}, but projection is {self.projection!r}, which has none; leave it out",
        )
        if self.nystrom_samples and self.data_rank:
            require(
                self.data_rank < self.nystrom_samples,
                f"data_rank is {self.data_rank} but only {self.nystrom_samples} Nystrom samples are drawn; "
                f"use data_rank < {self.nystrom_samples} or more nystrom_samples",
            )

    def n_steps(self, steps_per_epoch: int) -> int:
        """The number of steps of the whole fit, at least one."""
        return max(1, round(self.used_epochs * steps_per_epoch))

    def validation_steps(self, steps_per_epoch: int) -> int:
        """The number of steps between two validations, at least one."""
        return max(1, round(self.validate_every * steps_per_epoch))

    def in_use(self) -> SolverConfig:
        """These settings with the projection's values where momentum, averaging or step is None, and without `auto`."""
        return replace(
            self,
            epochs=self.used_epochs,
            patience=self.used_patience,
            momentum=self.used_momentum,
            averaging=self.used_averaging,
            step=self.used_step,
        )

    @property
    def used_epochs(self) -> float:
        """`epochs`, or 1 where nothing has settled them."""
        return 1 if self.epochs == "auto" else self.epochs

    @property
    def used_patience(self) -> int:
        """`patience`, or 0 where nothing has settled it."""
        return 0 if self.patience == "auto" else self.patience

    @property
    def used_ridge(self) -> float:
        """`ridge`, or 0 where nothing has settled it."""
        return self.ridge or 0.0

    @property
    def used_momentum(self) -> float:
        """`momentum`, or the projection's value where it is None."""
        default = 0.0 if self.projection == "eigenpro" else 0.9
        return default if self.momentum is None else self.momentum

    @property
    def used_averaging(self) -> float:
        """`averaging`, or the projection's value where it is None."""
        return self.default_averaging if self.averaging is None else self.averaging

    @property
    def default_averaging(self) -> float:
        """What `averaging` is where it is None."""
        return 0.0 if self.projection == "eigenpro" else 2.0

    @property
    def used_step(self) -> StepRule:
        """`step`, or the projection's rule where it is None."""
        return self.step or ("published" if self.projection == "eigenpro" else "measured")

    def _check_weights(self) -> None:
        given = [("output_weights", self.output_weights)]
        if isinstance(self.class_weights, Mapping):
            require(bool(self.class_weights), "class_weights has no class; leave it out, or name one")
            given.append(("class_weights", self.class_weights))
        for name, weights in given:
            for key, value in weights.items():
                is_weight = type(value) in (int, float) and 0 < value < inf
                require(is_weight, f"{name} of {key!r:.80} is {value!r:.80}; use a positive, finite number")
                require(is_unicode(key), f"{name} has {key!r:.80}, which is not UTF-8; use another name")

    def _check_published(self) -> None:
        """`eigenpro` is the published method: no momentum, averaging or ridge; its step rule is for no other."""
        for name in ("momentum", "averaging", "ridge"):
            value = getattr(self, name)
            require(
                self.projection != "eigenpro" or not value,
                f"{name} is {value}, but projection is 'eigenpro', the published method, which has none; "
                f"leave {name} out, or use nystrom or exact",
            )
        require(
            self.used_step == "measured" or self.projection == "eigenpro",
            f"step is 'published' but projection is {self.projection!r}, whose preconditioner that rule does not "
            "know; use --step measured or --projection eigenpro",
        )
