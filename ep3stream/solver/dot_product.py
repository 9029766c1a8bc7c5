"""Kernels of the dot product x.z and the norms |x|, |z|: polynomial and ReLU neural tangent.

Their inputs are never centred: unlike a distance, a dot product changes when both points are shifted. The scaling of
`--scale` comes before the kernel and is part of the model; `--scale none` keeps the dot products of the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep3stream.solver.points import Points, products
from ep3stream.solver.tiles import column_strips


@dataclass(frozen=True, slots=True)
class PolynomialKernel:
    """(x.z / bandwidth^2 + offset)^degree, for offset >= 0.

    The kernel's space is spanned by the (d + degree choose degree) monomials of the d features up to `degree`, so more
    centers than that do not enlarge the model. Memory beside the block: none.
    """

    bandwidth: float
    degree: int
    offset: float
    name: str = "polynomial"

    @property
    def parameters(self) -> dict[str, Any]:
        """The bandwidth, the degree and the offset."""
        return {"bandwidth": self.bandwidth, "degree": self.degree, "offset": self.offset}

    def left(self, x: Tensor) -> Points:
        """x divided by the bandwidth."""
        return Points(x / self.bandwidth, is_factor=True)

    def right(self, x: Tensor) -> Points:
        """x divided by the bandwidth."""
        return self.left(x)

    def block(self, z: Points, x: Points, out: Tensor | None = None) -> Tensor:
        """K(Z, X), (len(z), len(x)), from one product and two element-wise passes."""
        values = products(z, x, out)
        return torch.pow(values.add_(self.offset), self.degree, out=values if out is None else out)

    def diagonal(self, x: Tensor) -> Tensor:
        """(|x|^2 / bandwidth^2 + offset)^degree of each row, (n,)."""
        return self.left(x).prepared.square().sum(1).add_(self.offset).pow_(self.degree)


@dataclass(frozen=True, slots=True)
class NtkKernel:
    """Neural tangent kernel of a fully connected ReLU network with `depth` layers of weights and biases.

    K(x, z) = N_depth, where u_1 = cos(x, z) and, for k from 1 to depth - 1,

        N_1     = |x| |z| u_1 + bias^2
        u_{k+1} = kappa_1(u_k) = (sqrt(1 - u_k^2) + u_k (pi - arccos u_k)) / pi
        N_{k+1} = N_k kappa_0(u_k) + |x| |z| u_{k+1} + bias^2,    kappa_0(u) = (pi - arccos u) / pi

    This is the recursion of Jacot et al. 2018 and Arora et al. 2019 with c_sigma = 2 (He): layers keep the norm.
    Weights have unit variance; biases start at zero and learn at the rate bias^2, so that they add to N but not to u.
    The values are those of EigenPro3's `ntk_relu`. Depth 1 is linear regression. K(x, x) = depth (|x|^2 + bias^2).
    The zero vector has the cosine 0 with every point, itself included.

    on_sphere: the kernel of x / |x|, with K(x, x) = depth (1 + bias^2); EigenPro3's `ntk_relu_unit_sphere`.

    Precision: a float32 cosine gives an angle near 0 or pi only to 4e-4. So the cosine is formed in float64, and one
    layer hands the next the angle, not the cosine: the error is some 1e-7 depth of sqrt(K(x, x) K(z, z)).
    Cost: a float64 product and about 15 element-wise passes a layer. Memory beside the block: 6 MiB for strips of 2^18
    values, and float64 copies of len(z) + 2^18 / len(z) points, 10 KiB d for tiles of 1024 rows.
    """

    depth: int
    bias: float
    on_sphere: bool = False

    @property
    def name(self) -> str:
        """`ntk_relu`, or `ntk_relu_unit_sphere` with `on_sphere`."""
        return "ntk_relu_unit_sphere" if self.on_sphere else "ntk_relu"

    @property
    def parameters(self) -> dict[str, Any]:
        """The depth and the bias."""
        return {"depth": self.depth, "bias": self.bias}

    def left(self, x: Tensor) -> Points:
        """x, or x / |x| with `on_sphere`, in the precision of x; `block` normalises again, in float64."""
        if not self.on_sphere:
            return Points(x)
        # Summed in float64, where squares of 1e-30 do not vanish, and without a float64 copy of all centers.
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64).to(x.dtype)
        return Points(x / norms.clamp_min(torch.finfo(x.dtype).tiny))

    def right(self, x: Tensor) -> Points:
        """x, or x / |x| with `on_sphere`."""
        return self.left(x)

    def block(self, z: Points, x: Points, out: Tensor | None = None) -> Tensor:
        """K(Z, X), (len(z), len(x)), computed in strips of columns."""
        out = z.prepared.new_empty(len(z), len(x)) if out is None else out
        z_directions, z_norms = _directions(z.prepared)
        for columns in column_strips(len(z), len(x), out.device):
            x_directions, x_norms = _directions(x.prepared[columns])
            cosine = torch.mm(z_directions, x_directions.T)
            self._tangent(cosine, (z_norms * x_norms.T).to(out.dtype), out[:, columns])
        return out

    def diagonal(self, x: Tensor) -> Tensor:
        """K(x_i, x_i), (n,), from the same recursion as the blocks."""
        directions, norms = _directions(self.left(x).prepared)
        out = torch.empty_like(x[:, :1])
        self._tangent(directions.square().sum(1, keepdim=True), norms.square().to(x.dtype), out)
        return out[:, 0]

    def _tangent(self, cosine: Tensor, norms: Tensor, out: Tensor) -> None:
        """Writes N_depth into `out`. cosine: float64, overwritten; norms: |x| |z|; all three have one shape."""
        angle = cosine.clamp_(-1, 1).acos().to(out.dtype)
        # 1 - u and the angle together keep the digits that u itself loses near 1.
        gap = cosine.neg_().add_(1).to(out.dtype)
        torch.sub(norms, norms * gap, out=out).add_(self.bias**2)
        for layer in range(1, self.depth):
            rest = math.pi - angle
            # 1 - kappa_1(u) = ((pi - angle) (1 - u) + angle - sin(angle)) / pi: in this order nothing turns negative.
            gap.mul_(rest).add_(angle).sub_(angle.sin_()).div_(math.pi)
            out.mul_(rest.div_(math.pi)).addcmul_(norms, 1 - gap).add_(self.bias**2)
            if layer < self.depth - 1:
                torch.div(gap, 2, out=angle).sqrt_().asin_().mul_(2)


def _directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x|, (n, d), zero for the zero vector, and |x|, (n, 1); both in float64."""
    exact = x.double()
    norms = exact.norm(dim=1, keepdim=True)
    return exact / norms.clamp_min(torch.finfo(torch.float64).tiny), norms
