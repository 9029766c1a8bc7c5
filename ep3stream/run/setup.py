"""A run's set-up as it lies in RUN/setup, and what a fit makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ep3stream.config import FitConfig
from ep3stream.data.order import RowOrder
from ep3stream.data.store import SplitReader
from ep3stream.errors import DamagedDataError, InputError
from ep3stream.mesh import Mesh
from ep3stream.run.bundle import Bundle, file_digest, read_bundle
from ep3stream.solver.exact import ExactProjection
from ep3stream.solver.kernels import CallableKernel, Kernel, KernelFunction, RadialKernel
from ep3stream.solver.model import InputScaling
from ep3stream.solver.projection import NystromProjection, Projection
from ep3stream.solver.step import Solver
from ep3stream.solver.targets import TargetCode

SETUP_KIND = "set-up"


@dataclass(frozen=True, slots=True)
class Setup:
    """A run's unchanging part, as read back from RUN/setup: what a resumed fit uses is what the first one wrote."""

    tensors: dict[str, Tensor]
    description: dict[str, Any]
    digest: str

    @classmethod
    def load(cls, path: Path) -> Setup:
        """Checked against its digests; raises DamagedDataError."""
        bundle: Bundle = read_bundle(path, SETUP_KIND)
        try:
            _require_complete(bundle)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedDataError(
                f"{path} has a missing or impossible field ({error!r}); use a new RUN"
            ) from error
        return cls(bundle.tensors, bundle.description, file_digest(path / "manifest.json"))

    @property
    def plan(self) -> dict[str, Any]:
        """Sizes and step size."""
        plan: dict[str, Any] = self.description["plan"]
        return plan

    def inputs(self) -> InputScaling:
        """How inputs are scaled."""
        return InputScaling(self.tensors["input_shift"], self.tensors["input_scale"])

    def targets(self) -> TargetCode:
        """How targets are coded."""
        is_classification = self.description["task"] == "classification"
        return TargetCode(is_classification, self.tensors["target_offset"], self.tensors["target_scale"])

    def kernel(self, function: KernelFunction | None) -> Kernel:
        """The kernel with its measured bandwidth, or `function`; InputError unless the set-up was done with it."""
        named = "kernel_centre" in self.tensors
        if named == (function is not None):
            remedy = "leave kernel= out" if named else "pass that callable as kernel="
            raise InputError(
                f"the fit was set up with the {self.plan['kernel']} kernel; {remedy} or use a new RUN"
            )
        if function is not None:
            return CallableKernel(function)
        return RadialKernel(self.plan["kernel"], self.plan["bandwidth"], self.tensors["kernel_centre"])

    def order(self, reader: SplitReader, seed: int) -> RowOrder:
        """The order of the rows."""
        info = reader.info
        excluded = self.tensors["excluded_rows"].numpy()
        return RowOrder(
            seed,
            info.n_rows,
            info.segment_rows,
            self.plan["window_segments"],
            self.plan["batch_size"],
            excluded,
        )

    def solver(self, config: FitConfig, function: KernelFunction | None, mesh: Mesh) -> Solver:
        """Ready to step, on the mesh's device."""
        kernel = _on_device(self.kernel(function), mesh.device)
        owned = mesh.owned(len(self.tensors["centers"]))
        centers = self.tensors["centers"][owned.start : owned.stop].to(mesh.device)
        targets = self.targets()
        return Solver(
            kernel,
            kernel.left(self.inputs().to(mesh.device)(centers)),
            self._projection(mesh),
            TargetCode(
                targets.is_classification, targets.offset.to(mesh.device), targets.scale.to(mesh.device)
            ),
            config.solver.momentum,
            config.solver.averaging,
            mesh,
            torch.zeros(len(owned) * self.plan["batch_size"], device=mesh.device),
        )

    def _projection(self, mesh: Mesh) -> Projection:
        parts = {name: tensor.to(mesh.device) for name, tensor in self.tensors.items()}
        if self.plan["projection"] == "exact":
            return ExactProjection(parts["factor"], parts["directions"], parts["shrink"], mesh)
        owned = mesh.owned(len(parts["basis"]))
        basis = parts["basis"][owned.start : owned.stop]
        return NystromProjection(basis, parts["core"], self.plan["mu"], self.plan["n_leading"], mesh)


def _require_complete(bundle: Bundle) -> None:
    """KeyError, TypeError or ValueError unless sizes are whole numbers and every tensor has the shape they say."""
    plan, tensors = bundle.description["plan"], bundle.tensors
    sizes = {name: plan[name] for name in ("n_centers", "window_segments", "batch_size")}
    if any(type(size) is not int or not 1 <= size < 1 << 40 for size in sizes.values()):
        raise ValueError(f"sizes {sizes}")
    names = bundle.description["names"]
    p, d, c = plan["n_centers"], len(names["features"]), len(names["classes"] or names["targets"])
    shapes = {"centers": (p, d), "input_shift": (d,), "input_scale": (d,)}
    shapes |= {"target_offset": (c,), "target_scale": (c,)}
    if plan["projection"] == "exact":
        q = len(tensors["shrink"])
        shapes |= {"factor": (p, p), "directions": (p, q)}
    else:
        r = len(tensors["core"])
        shapes |= {"basis": (p, r), "core": (r, r)}
    wrong = [name for name, shape in shapes.items() if tuple(tensors[name].shape) != shape]
    if wrong:
        raise ValueError(f"shape {tuple(tensors[wrong[0]].shape)} of {wrong[0]}, not {shapes[wrong[0]]}")


def _on_device(kernel: Kernel, device: torch.device) -> Kernel:
    if isinstance(kernel, RadialKernel):
        return RadialKernel(kernel.name, kernel.bandwidth, kernel.centre.to(device))
    return kernel
