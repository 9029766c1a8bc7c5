"""The transform of inputs that belongs to a model: from a row as it is stored to the point that a kernel takes.

A number is scaled, and bent where its values have long tails. The code of a category becomes 0/1 features, one for each
code, for kernels of distances and dot products. So codes alone lie in stores, batches and model files, and 0/1 features
only where blocks are computed. Last, a metric may be multiplied by, and the
leading directions taken (`input_directions.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ep3stream.config import Scale
from ep3stream.solver.bends import chosen_bend, may_be_bent
from ep3stream.solver.input_directions import LeadingDirections

# Of the description in set-ups and models: 1 has codes alone, 2 codes and bends, 3 directions, 4 leading directions.
INPUTS_VERSION = 4

# float32 holds all whole numbers up to here.
_MOST_CODES = 1 << 24


class CodeLayout(NamedTuple):
    """Where the d features of a row go among the D of a point.

    numbers, codes: features that are numbers, and codes; number_at: (numbers,), code_at: (codes,), the first place of
    each in a point; last: (codes,), the largest code of each. column: (D,), the feature that each place is made of.
    """

    numbers: Tensor
    number_at: Tensor
    codes: Tensor
    code_at: Tensor
    last: Tensor
    column: Tensor


@lru_cache(maxsize=16)
def _layout(n_codes: tuple[int, ...], device: torch.device) -> CodeLayout:
    sizes = torch.tensor(n_codes)
    is_code = sizes > 0
    widths = torch.where(is_code, sizes, 1)
    at = widths.cumsum(0) - widths
    parts = (
        (~is_code).nonzero()[:, 0],
        at[~is_code],
        is_code.nonzero()[:, 0],
        at[is_code],
        sizes[is_code] - 1,
        torch.arange(len(sizes)).repeat_interleave(widths),
    )
    return CodeLayout(*(part.to(device) for part in parts))


@lru_cache(maxsize=16)
def _bent_features(bends: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The features that are bent, (k,), and their bends, (k,)."""
    every = torch.tensor(bends, device=device)
    at = every.nonzero()[:, 0]
    return at, every[at]


@dataclass(frozen=True, slots=True)
class InputScaling:
    """Maps rows x, (n, d), to points, (n, D): numbers to (x - shift) * scale, codes to 0/1 features times scale.

    shift, scale: (d,). A constant feature has the scale 0. n_codes: (d,), how many codes a feature has, 0 for a
    number; empty where all are taken as numbers. Code k of n becomes n features in the place of one, of which the
    k-th is `scale` and the others are 0. What is no code, such as the -1 of an unknown category, becomes zeros.
    bends: (d,), not 0 for a number that becomes asinh((x - shift) * bend) * scale instead, which is linear near
    `shift` and logarithmic far away, so that a few large values do not squeeze all others together; empty for none.
    directions: what scaled rows s, (n, D), are multiplied by: (D, k) makes s @ directions of them, (D,) s * directions.
    leading: what narrows the result.
    """

    shift: Tensor
    scale: Tensor
    n_codes: tuple[int, ...] = ()
    bends: tuple[float, ...] = ()
    directions: Tensor | None = None
    leading: LeadingDirections | None = None

    @classmethod
    def of(cls, kind: Scale, mean: Tensor, std: Tensor, minimum: Tensor, maximum: Tensor) -> InputScaling:
        """The scaling from statistics, each (d,): to mean 0 and variance 1; `minmax` to [0, 1]; `none` as is."""
        if kind == "none":
            return cls.identity(len(mean))
        shift, spread = (minimum, maximum - minimum) if kind == "minmax" else (mean, std)
        inverse = 1 / spread.clamp_min(torch.finfo(torch.float64).tiny)
        return cls(shift.float(), torch.where(spread > 0, inverse, 0.0).float())

    @classmethod
    def identity(cls, n_features: int, device: torch.device | None = None) -> InputScaling:
        """Features as they are."""
        return cls(torch.zeros(n_features, device=device), torch.ones(n_features, device=device))

    @classmethod
    def described(cls, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> InputScaling:
        """From what `tensors` and `description` gave; KeyError, TypeError or ValueError if impossible."""
        shift, scale, found = tensors["input_shift"], tensors["input_scale"], description.get("inputs")
        if found is None:  # Nothing but numbers, as in all earlier formats.
            return cls(shift, scale)
        if found["version"] not in range(1, INPUTS_VERSION + 1):
            raise ValueError(f"inputs has version {found['version']!r:.50}, not 1 to {INPUTS_VERSION}")
        d = len(shift)
        sizes = {one["feature"]: one["n_codes"] for one in found["codes"]}
        for feature, size in sizes.items():
            if type(feature) is not int or not 0 <= feature < d or type(size) is not int:
                raise ValueError(f"inputs has {size!r:.50} codes for feature {feature!r:.50} of {d}")
            if not 1 <= size <= _MOST_CODES:
                raise ValueError(f"inputs has {size!r:.50} codes for feature {feature!r:.50} of {d}")
        bends = {one["feature"]: one["bend"] for one in found.get("bent", [])}
        for feature, bend in bends.items():
            is_bend = type(bend) is float and 0 < bend < math.inf
            if type(feature) is not int or not 0 <= feature < d or feature in sizes or not is_bend:
                raise ValueError(f"inputs has the bend {bend!r:.50} for feature {feature!r:.50} of {d}")
        made = cls(
            shift,
            scale,
            tuple(sizes.get(feature, 0) for feature in range(d)) if sizes else (),
            tuple(bends.get(feature, 0.0) for feature in range(d)) if bends else (),
        )
        if "directions" in found:
            directions = tensors["input_directions"]
            is_possible = (
                directions.ndim in (1, 2) and len(directions) == made.n_scaled and directions.numel()
            )
            if not is_possible or list(directions.shape) != found["directions"]:
                raise ValueError(
                    f"inputs has directions {found['directions']!r:.50}, but they are {tuple(directions.shape)} for "
                    f"{made.n_scaled} features"
                )
            made = replace(made, directions=directions)
        if "leading" not in found:
            return made
        return replace(made, leading=LeadingDirections.described(tensors, found["leading"], made.n_inputs))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, for a set-up or a model; `described` needs them."""
        own = {"input_shift": self.shift, "input_scale": self.scale}
        if self.directions is not None:
            own["input_directions"] = self.directions
        return own if self.leading is None else own | self.leading.tensors()

    def direction_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of those tensors that directions add, by name."""
        every = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        return {name: shape for name, shape in every.items() if name not in ("input_shift", "input_scale")}

    def description(self) -> dict[str, Any]:
        """`inputs` for a description, as JSON: features that are codes or bent, the shape of the directions.

        Empty where there are none of these; of the lowest version that has what there is.
        """
        codes = [{"feature": j, "n_codes": n} for j, n in enumerate(self.n_codes) if n]
        bent = [{"feature": j, "bend": bend} for j, bend in enumerate(self.bends) if bend]
        along = {} if self.directions is None else {"directions": list(self.directions.shape)}
        if self.leading is not None:
            leading = self.leading.description()
            return {"inputs": {"version": 4, "codes": codes, "bent": bent, **along, "leading": leading}}
        if along:
            return {"inputs": {"version": 3, "codes": codes, "bent": bent, **along}}
        if bent:
            return {"inputs": {"version": 2, "codes": codes, "bent": bent}}
        return {"inputs": {"version": 1, "codes": codes}} if codes else {}

    def bent(self, rows: Tensor, minimum: Tensor, maximum: Tensor) -> InputScaling:
        """The same scaling, with numbers bent that have long tails: counts, amounts, codes for gaps far from the rest.

        rows: (n, d), random ones; minimum, maximum: (d,), of all. `bends.py` says how.
        """
        shift, scale, bends = self.shift.clone(), self.scale.clone(), [0.0] * len(self.shift)
        columns = rows.T.contiguous().sort().values
        for j in may_be_bent(columns, minimum, maximum).nonzero()[:, 0].tolist():
            bend = chosen_bend(columns[j].double(), float(minimum[j]), float(maximum[j]))
            if bend is not None:
                shift[j], scale[j] = bend.origin, bend.scale
                bends[j] = float(torch.tensor(bend.factor, dtype=torch.float32))
        return replace(self, shift=shift, scale=scale, bends=tuple(bends)) if any(bends) else self

    def with_codes(self, n_codes: Mapping[int, int]) -> InputScaling:
        """The same scaling of numbers, where these features are codes, so many each, that become 0/1 features."""
        if not n_codes:
            return self
        sizes = tuple(n_codes.get(feature, 0) for feature in range(len(self.shift)))
        sparing = self.sparing(list(n_codes))
        return replace(sparing, n_codes=sizes)

    def sparing(self, features: Sequence[int]) -> InputScaling:
        """The same scaling, but these features as they are."""
        shift, scale = self.shift.clone(), self.scale.clone()
        shift[list(features)], scale[list(features)] = 0, 1
        bends = tuple(0.0 if j in features else bend for j, bend in enumerate(self.bends))
        return replace(self, shift=shift, scale=scale, bends=bends if any(bends) else ())

    def times(self, factors: Tensor) -> InputScaling:
        """The same scaling followed by a factor for each feature, (d,); for a code, of all its 0/1 features."""
        return replace(self, scale=self.scale * factors.to(self.scale))

    def along(self, directions: Tensor | None) -> InputScaling:
        """The same scaling followed by these directions, (D, k) or (D,), alone."""
        return replace(self, directions=directions, leading=None)

    @property
    def n_scaled(self) -> int:
        """D, the number of features of a scaled row, before directions."""
        return sum(max(1, n) for n in self.n_codes) if self.n_codes else len(self.shift)

    @property
    def n_inputs(self) -> int:
        """The number of features of a point: k with directions of (D, k), else D; k + 1 with k leading ones."""
        if self.leading is not None:
            return self.leading.n_features
        return self.n_scaled if self.directions is None else self.directions.shape[-1]

    @property
    def columns(self) -> Tensor:
        """The number of the stored feature that each feature of a scaled row is made of, (D,)."""
        if not self.n_codes:
            return torch.arange(len(self.shift))
        return self.layout(torch.device("cpu")).column

    @property
    def main_columns(self) -> Tensor:
        """The number of the stored feature that has the largest part in each feature of a point, (n_inputs,)."""
        columns = self.columns
        if self.directions is not None and self.directions.ndim == 2:
            columns = columns[self.directions.abs().argmax(0).cpu()]
        return columns if self.leading is None else columns[self.leading.main_inputs.cpu()]

    def layout(self, device: torch.device) -> CodeLayout:
        """Where features go among those of a point, on this device; only with codes."""
        return _layout(self.n_codes, device)

    def __call__(self, x: Tensor) -> Tensor:
        """The points of rows x, (n, d): a copy, (n, n_inputs). What is not finite does not become so."""
        return self.directed(self.scaled(x))

    def scaled(self, x: Tensor) -> Tensor:
        """The scaled rows of x, (n, d): a copy, (n, D)."""
        scaled = self._bend(x - self.shift).mul_(
            self.scale
        )  # In place: new memory costs more than arithmetic.
        if not self.n_codes:
            return scaled
        layout = self.layout(x.device)
        points = scaled.new_zeros(len(x), len(layout.column))
        points[:, layout.number_at] = scaled[:, layout.numbers]
        codes = x[:, layout.codes]
        places = torch.minimum(codes.long().clamp_min(0), layout.last)
        values = (codes == places).to(scaled) * self.scale[layout.codes] + (codes - codes)
        return points.scatter_(1, layout.code_at + places, values)

    def of_mean(self, mean: Tensor) -> Tensor:
        """The point, (n_inputs,), of the mean of rows, (d,).

        With 0 for the 0/1 features of codes, whose mean says nothing.
        """
        scaled = self._bend(mean - self.shift.to(mean)) * self.scale.to(mean)
        if not self.n_codes:
            return self.directed(scaled)
        layout = self.layout(mean.device)
        point = scaled.new_zeros(len(layout.column))
        point[layout.number_at] = scaled[layout.numbers]
        return self.directed(point)

    def typical_rows(self, points: Tensor) -> Tensor:
        """Rows, (n, d), that are near `points`, (n, D), when scaled, means of others: of a category the most frequent
        code.

        A constant feature, whose scale is 0, is what it is everywhere.
        """
        spread = torch.where(self.scale > 0, 1 / self.scale.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        if not self.n_codes:
            return self._unbend(points * spread) + self.shift
        layout = self.layout(points.device)
        rows = points.new_zeros(len(points), len(self.shift))
        numbers = points[:, layout.number_at]
        rows[:, layout.numbers] = numbers * spread[layout.numbers]
        rows = self._unbend(rows) + self.shift
        for feature, at, last in zip(*(part.tolist() for part in layout[2:5]), strict=True):
            rows[:, feature] = points[:, at : at + last + 1].argmax(1).to(rows)
        return rows

    def to(self, device: torch.device) -> InputScaling:
        """The same scaling on another device."""
        directions = None if self.directions is None else self.directions.to(device)
        return replace(
            self,
            shift=self.shift.to(device),
            scale=self.scale.to(device),
            directions=directions,
            leading=None if self.leading is None else self.leading.to(device),
        )

    def directed(self, scaled: Tensor) -> Tensor:
        """The points of scaled rows, (n, D) or (D,): times the directions, along the leading ones."""
        if self.directions is not None:
            directions = self.directions.to(scaled)
            scaled = scaled * directions if directions.ndim == 1 else scaled @ directions
        return scaled if self.leading is None else self.leading(scaled)

    def _bend(self, x: Tensor) -> Tensor:
        """x, (n, d) or (d,), minus the shift, with its bent features bent in place."""
        if self.bends:
            at, bends = _bent_features(self.bends, x.device)
            x[..., at] = torch.asinh(x[..., at] * bends.to(x))
        return x

    def _unbend(self, x: Tensor) -> Tensor:
        if self.bends:
            at, bends = _bent_features(self.bends, x.device)
            x[..., at] = torch.sinh(x[..., at]) / bends.to(x)
        return x
