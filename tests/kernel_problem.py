"""A small regression problem on random points, and a solver for it on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ep3stream.mesh import Mesh
from ep3stream.solver.kernels import Kernel, RadialKernel
from ep3stream.solver.projection import NystromProjection, Spectra, build_nystrom
from ep3stream.solver.step import Solver
from ep3stream.solver.step_size import Stability, measure_stability
from ep3stream.solver.tail import Grouping
from ep3stream.solver.targets import TargetCode

ONE_RANK = Mesh(0, 1, torch.device("cpu"))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(n: int, d: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=generator(seed), dtype=dtype)


def laplacian(d: int, bandwidth: float = 3.0) -> RadialKernel:
    return RadialKernel("laplacian", bandwidth, torch.zeros(d))


def sphere(n: int, d: int, seed: int) -> Tensor:
    """(n, d) on the unit sphere."""
    return torch.nn.functional.normalize(points(n, d, seed, torch.float32))


def levels(z: Tensor, x: Tensor) -> Tensor:
    """On the sphere: d functions of the first degree, d (d + 1) / 2 of the second, all alike, and a bit of the rest."""
    t = z @ x.T
    return 0.3 * t + 0.65 * t * t + 0.05 * torch.exp(-(2 - 2 * t).clamp_min(0).sqrt())


def unit_targets(n_outputs: int, dtype: torch.dtype = torch.float64) -> TargetCode:
    return TargetCode(False, torch.zeros(n_outputs, dtype=dtype), torch.ones(n_outputs, dtype=dtype))


def k(kernel: Kernel, z: Tensor, x: Tensor) -> Tensor:
    """K(Z, X)."""
    return kernel.block(kernel.left(z), kernel.right(x))


@dataclass(frozen=True, slots=True)
class Problem:
    """Centers Z, (p, d), rows X, (n, d), and the preconditioners' ranks; every landmark and sample in order.

    group_size: of a local tail, 0 for none.
    """

    kernel: Kernel
    z: Tensor
    x: Tensor
    model_rank: int = 10
    data_rank: int = 4
    n_landmarks: int = 30
    n_samples: int = 50
    widest_rank: int = 0
    group_size: int = 0

    def projection(self, mesh: Mesh = ONE_RANK) -> tuple[NystromProjection, Spectra]:
        rows = mesh.shard_range(len(self.z))
        return build_nystrom(
            self.kernel,
            self.kernel.left(self.z[rows.start : rows.stop]),
            self.kernel.diagonal(self.z[rows.start : rows.stop]),
            self.z[: self.n_landmarks],
            self.x[: self.n_samples],
            len(self.z),
            self.model_rank,
            self.data_rank,
            mesh,
            generator(5),
            self.widest_rank,
            Grouping(self.group_size, len(self.z), self._some_centers) if self.group_size else None,
        )

    def _some_centers(self, numbers: range) -> Tensor:
        return self.z[numbers.start : numbers.stop]

    def solver(
        self, targets: TargetCode, mesh: Mesh = ONE_RANK, momentum: float = 0.9, averaging: float = 3.0
    ) -> Solver:
        rows = mesh.shard_range(len(self.z))
        centers = self.kernel.left(self.z[rows.start : rows.stop])
        return Solver(self.kernel, centers, self.projection(mesh)[0], targets, momentum, averaging, mesh)

    def stability(self, solver: Solver, batch_size: int) -> Stability:
        """Measured on all rows."""
        batches = self.x.split(batch_size)
        return measure_stability(solver.block, batches, solver.projection, solver.mesh, generator(6))
