"""Kernels of the dot product x.z and the norms |x|, |z|: polynomial and ReLU neural tangent.

Their inputs are never centred: unlike a distance, a dot product changes when both points are shifted. What
`--scale` does comes before, and is part of the model: `none` keeps the dot products of the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep3stream.solver.kernels import column_strips
from ep3stream.solver.points import Points, products


@dataclass(frozen=True, slots=True)
class PolynomialKernel:
    """(x.z / bandwidth^2 + offset)^degree, for offset >= 0.

    Memory beside the block: none. It is a sum over the monomials of up to `degree` of d features: of more centers
    than there are monomials, (d + degree choose degree), the others bring nothing.
    """

    bandwidth: float
    degree: int
    offset: float
    name: str = "polynomial"

    @property
    def parameters(self) -> dict[str, Any]:
        """Bandwidth, degree and offset."""
        return {"bandwidth": self.bandwidth, "degree": self.degree, "offset": self.offset}

    def left(self, x: Tensor) -> Points:
        """x in units of the bandwidth."""
        return Points(x / self.bandwidth, is_factor=True)

    def right(self, x: Tensor) -> Points:
        """x in units of the bandwidth."""
        return self.left(x)

    def block(self, z: Points, x: Points, out: Tensor | None = None) -> Tensor:
        """K(Z, X)."""
        values = products(z, x, out)
        return torch.pow(values.add_(self.offset), self.degree, out=values if out is None else out)

    def diagonal(self, x: Tensor) -> Tensor:
        """(|x|^2 / bandwidth^2 + offset)^degree."""
        return self.left(x).prepared.square().sum(1).add_(self.offset).pow_(self.degree)


@dataclass(frozen=True, slots=True)
class NtkKernel:
    """Neural tangent kernel of a fully connected ReLU network with `depth` layers of weights and biases.

    With u_1 = cos(x, z), and k from 1 to depth - 1,

        N_1     = |x| |z| u_1 + bias^2
        u_{k+1} = kappa_1(u_k) = (sqrt(1 - u_k^2) + u_k (pi - arccos u_k)) / pi
        N_{k+1} = N_k kappa_0(u_k) + |x| |z| u_{k+1} + bias^2,    kappa_0(u) = (pi - arccos u) / pi

    N_depth is K(x, z): the recursion of Jacot et al. 2018 and Arora et al. 2019, c_sigma = 2 (He) so that layers
    keep the norm, for weights of unit variance and biases that start at zero and learn at the rate bias^2: they add
    to N but not to u, as in EigenPro3's `ntk_relu`, whose values these are. Depth 1 is linear regression.
    K(x, x) = depth (|x|^2 + bias^2). The zero vector has the cosine 0 with every point and with itself.

    on_sphere: of x / |x|, so that K(x, x) = depth (1 + bias^2): EigenPro3's `ntk_relu_unit_sphere`.

    The cosine is formed in float64 and angles, which float32 loses to 4e-4 near u = +-1, are what is handed from
    layer to layer: the error is some 1e-7 depth of sqrt(K(x, x) K(z, z)). Cost: a float64 product and about
    15 element-wise passes per layer. Memory beside the block: 6 MiB for strips of 2^18 values, and float64 copies
    of len(z) + 2^18 / len(z) points: 10 KiB d for tiles of 1024 rows.
    """

    depth: int
    bias: float
    on_sphere: bool = False

    @property
    def name(self) -> str:
        """`ntk_relu` or `ntk_relu_unit_sphere`."""
        return "ntk_relu_unit_sphere" if self.on_sphere else "ntk_relu"

    @property
    def parameters(self) -> dict[str, Any]:
        """Depth and bias."""
        return {"depth": self.depth, "bias": self.bias}

    def left(self, x: Tensor) -> Points:
        """x, or x / |x| to the precision of x: `block` makes these exactly unit vectors again."""
        if not self.on_sphere:
            return Points(x)
        # Summed in float64, where squares of 1e-30 do not vanish, and without a float64 copy of all centers.
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64).to(x.dtype)
        return Points(x / norms.clamp_min(torch.finfo(x.dtype).tiny))

    def right(self, x: Tensor) -> Points:
        """x, or x / |x|."""
        return self.left(x)

    def block(self, z: Points, x: Points, out: Tensor | None = None) -> Tensor:
        """K(Z, X), a strip of columns at a time."""
        out = z.prepared.new_empty(len(z), len(x)) if out is None else out
        z_directions, z_norms = _directions(z.prepared)
        for columns in column_strips(len(z), len(x)):
            x_directions, x_norms = _directions(x.prepared[columns])
            cosine = torch.mm(z_directions, x_directions.T)
            self._tangent(cosine, (z_norms * x_norms.T).to(out.dtype), out[:, columns])
        return out

    def diagonal(self, x: Tensor) -> Tensor:
        """K(x, x) from the same recursion."""
        directions, norms = _directions(self.left(x).prepared)
        out = torch.empty_like(x[:, :1])
        self._tangent(directions.square().sum(1, keepdim=True), norms.square().to(x.dtype), out)
        return out[:, 0]

    def _tangent(self, cosine: Tensor, norms: Tensor, out: Tensor) -> None:
        """N_depth into `out`; cosine in float64, norms: |x| |z|, all of one shape."""
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
    """x / |x|, (n, d), zero for the zero vector, and |x|, (n, 1), in float64."""
    exact = x.double()
    norms = exact.norm(dim=1, keepdim=True)
    return exact / norms.clamp_min(torch.finfo(torch.float64).tiny), norms
