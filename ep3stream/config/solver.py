"""The settings of the solver."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ep3stream.config.checks import is_unicode, require, require_choice

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
