"""The settings of a kernel, and what each kernel takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from ep3stream.config.checks import require, require_choice

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
