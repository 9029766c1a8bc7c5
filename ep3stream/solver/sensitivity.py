"""How much a kernel machine's outputs change along each input: the diagonal of its average gradient outer product.

Radhakrishnan, Beaglehole, Pandit and Belkin (Science 2024, "Mechanism for feature learning in neural networks and
backpropagation-free machine learning models") take the kernel's distances in the metric of that matrix and fit again;
its diagonal weighs each feature by what the last model made of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ep3stream.solver.blocks import tiles
from ep3stream.solver.kernels import RadialKernel


def _matern32(t: Tensor, _: float) -> Tensor:
    return 3 * torch.exp(-math.sqrt(3) * t)


def _matern52(t: Tensor, _: float) -> Tensor:
    return 5 / 3 * (1 + math.sqrt(5) * t) * torch.exp(-math.sqrt(5) * t)


# -phi'(t) / t of each profile phi of `RadialKernel`.
_SLOPES: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "laplacian": lambda t, _: torch.exp(-t) / t,
    "gaussian": lambda t, _: torch.exp(-t.square() / 2),
    "matern32": _matern32,
    "matern52": _matern52,
    "dispersal": lambda t, shape: shape * t ** (shape - 2) * torch.exp(-(t**shape)),
    "rational_quadratic": lambda t, shape: (1 + t.square() / (2 * shape)) ** (-shape - 1),
}
_NEAR = 1e-4  # bandwidths


def mean_squared_gradient(kernel: RadialKernel, centers: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """mean_j |d f(x_j) / d x_k|^2 for each feature k, (d,), of f(x) = sum_i alpha_i K(x, z_i).

    With w = -phi'(t) / t, the gradient is sum_i alpha_i w(t_ij) (z_i - x_j) / bandwidth^2. centers: (p, d),
    weights: (p, c), x: (n, d), the units of the kernel. O(n p d c) time, 1024 (p + d) numbers of float64.
    A center closer than 1e-4 bandwidths adds nothing: the Laplacian has a kink there.
    """
    z, weights = (centers - kernel.centre).double(), weights.double()
    total = z.new_zeros(z.shape[1])
    for rows in tiles(len(x)):
        part = (x[rows] - kernel.centre).double()
        t = torch.cdist(part, z) / kernel.bandwidth
        slopes = torch.where(t > _NEAR, _SLOPES[kernel.name](t.clamp_min(_NEAR), kernel.shape), 0.0)
        for alpha in weights.T:
            weighted = slopes * alpha
            gradient = weighted @ z - weighted.sum(1, keepdim=True) * part
            total += gradient.square().sum(0)
    return total / (len(x) * kernel.bandwidth**4)
