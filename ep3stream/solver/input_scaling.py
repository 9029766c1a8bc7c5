"""The transform of inputs that belongs to a model: from a row as it is stored to the point that a kernel takes.

A number is scaled. The code of a category becomes 0/1 features, one for each code, for kernels of distances and dot
products. So codes alone lie in stores, batches and model files, and 0/1 features only where blocks are computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ep3stream.config import Scale

# Of the description in set-ups and models.
INPUTS_VERSION = 1

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


@dataclass(frozen=True, slots=True)
class InputScaling:
    """Maps rows x, (n, d), to points, (n, D): numbers to (x - shift) * scale, codes to 0/1 features times scale.

    shift, scale: (d,). A constant feature has the scale 0. n_codes: (d,), how many codes a feature has, 0 for a
    number; empty where all are taken as numbers. Code k of n becomes n features in the place of one, of which the
    k-th is `scale` and the others are 0. What is no code, such as the -1 of an unknown category, becomes zeros.
    """

    shift: Tensor
    scale: Tensor
    n_codes: tuple[int, ...] = ()

    @classmethod
    def of(cls, kind: Scale, mean: Tensor, std: Tensor, minimum: Tensor, maximum: Tensor) -> InputScaling:
        """The scaling from statistics, each (d,): `standard` to mean 0 and variance 1, `minmax` to [0, 1], `none`."""
        if kind == "none":
            return cls.identity(len(mean))
        shift, spread = (mean, std) if kind == "standard" else (minimum, maximum - minimum)
        inverse = 1 / spread.clamp_min(torch.finfo(torch.float64).tiny)
        return cls(shift.float(), torch.where(spread > 0, inverse, 0.0).float())

    @classmethod
    def identity(cls, n_features: int, device: torch.device | None = None) -> InputScaling:
        """Features as they are."""
        return cls(torch.zeros(n_features, device=device), torch.ones(n_features, device=device))

    @classmethod
    def described(cls, shift: Tensor, scale: Tensor, description: Mapping[str, Any]) -> InputScaling:
        """From the tensors and the `inputs` of a description; KeyError, TypeError or ValueError if impossible."""
        found = description.get("inputs")
        if found is None:  # Nothing but numbers, as in all earlier formats.
            return cls(shift, scale)
        if found["version"] != INPUTS_VERSION:
            raise ValueError(f"inputs has version {found['version']!r:.50}, not {INPUTS_VERSION}")
        d = len(shift)
        sizes = {one["feature"]: one["n_codes"] for one in found["codes"]}
        for feature, size in sizes.items():
            if type(feature) is not int or not 0 <= feature < d or type(size) is not int:
                raise ValueError(f"inputs has {size!r:.50} codes for feature {feature!r:.50} of {d}")
            if not 1 <= size <= _MOST_CODES:
                raise ValueError(f"inputs has {size!r:.50} codes for feature {feature!r:.50} of {d}")
        return cls(shift, scale, tuple(sizes.get(feature, 0) for feature in range(d)) if sizes else ())

    def description(self) -> dict[str, Any]:
        """`inputs` for a description, as JSON: features that are codes. Empty where there are none."""
        codes = [{"feature": j, "n_codes": n} for j, n in enumerate(self.n_codes) if n]
        return {"inputs": {"version": INPUTS_VERSION, "codes": codes}} if codes else {}

    def with_codes(self, n_codes: Mapping[int, int]) -> InputScaling:
        """The same scaling of numbers, where these features are codes, so many each, that become 0/1 features."""
        if not n_codes:
            return self
        sizes = tuple(n_codes.get(feature, 0) for feature in range(len(self.shift)))
        sparing = self.sparing(list(n_codes))
        return InputScaling(sparing.shift, sparing.scale, sizes)

    def sparing(self, features: Sequence[int]) -> InputScaling:
        """The same scaling, but these features as they are."""
        shift, scale = self.shift.clone(), self.scale.clone()
        shift[list(features)], scale[list(features)] = 0, 1
        return InputScaling(shift, scale, self.n_codes)

    def times(self, factors: Tensor) -> InputScaling:
        """The same scaling followed by a factor for each feature, (d,); for a code, of all its 0/1 features."""
        return InputScaling(self.shift, self.scale * factors.to(self.scale), self.n_codes)

    @property
    def n_inputs(self) -> int:
        """D, the number of features of a point."""
        return sum(max(1, n) for n in self.n_codes) if self.n_codes else len(self.shift)

    @property
    def columns(self) -> Tensor:
        """The number of the stored feature that each feature of a point is made of, (D,)."""
        if not self.n_codes:
            return torch.arange(len(self.shift))
        return self.layout(torch.device("cpu")).column

    def layout(self, device: torch.device) -> CodeLayout:
        """Where features go among those of a point, on this device; only with codes."""
        return _layout(self.n_codes, device)

    def __call__(self, x: Tensor) -> Tensor:
        """The points of rows x, (n, d): a copy, (n, D). What is not finite does not become so."""
        scaled = (x - self.shift).mul_(self.scale)  # In place: new memory costs more than the arithmetic.
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
        """The point, (D,), of the mean of rows, (d,), with 0 for the 0/1 features of codes, whose mean says nothing."""
        scaled = (mean - self.shift.to(mean)) * self.scale.to(mean)
        if not self.n_codes:
            return scaled
        layout = self.layout(mean.device)
        point = scaled.new_zeros(len(layout.column))
        point[layout.number_at] = scaled[layout.numbers]
        return point

    def typical_rows(self, points: Tensor) -> Tensor:
        """Rows, (n, d), whose points are near `points`, (n, D), means of others: of a category the most frequent code.

        A constant feature, whose scale is 0, is what it is everywhere.
        """
        spread = torch.where(self.scale > 0, 1 / self.scale.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        if not self.n_codes:
            return points * spread + self.shift
        layout = self.layout(points.device)
        rows = points.new_zeros(len(points), len(self.shift))
        numbers = points[:, layout.number_at]
        rows[:, layout.numbers] = numbers * spread[layout.numbers] + self.shift[layout.numbers]
        for feature, at, last in zip(*(part.tolist() for part in layout[2:5]), strict=True):
            rows[:, feature] = points[:, at : at + last + 1].argmax(1).to(rows)
        return rows

    def to(self, device: torch.device) -> InputScaling:
        """The same scaling on another device."""
        return InputScaling(self.shift.to(device), self.scale.to(device), self.n_codes)
