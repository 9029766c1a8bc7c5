"""A run's set-up as it lies in RUN/setup, and what a fit makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ep3stream.config import KERNEL_DEFAULTS, FitConfig
from ep3stream.data.order import RowOrder
from ep3stream.data.store import SplitReader
from ep3stream.errors import DamagedDataError, InputError
from ep3stream.mesh import Mesh
from ep3stream.run.bundle import Bundle, file_digest, read_bundle
from ep3stream.solver.eigenpro import EigenProProjection, EigenProTensors, Passes
from ep3stream.solver.exact import ExactProjection
from ep3stream.solver.kernels import CALLABLE, CallableKernel, Kernel, KernelFunction, Points, RadialKernel
from ep3stream.solver.model import InputScaling
from ep3stream.solver.named_kernels import named_kernel
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
        is_classification, tensors = self.description["task"] == "classification", self.tensors
        return TargetCode(
            is_classification,
            tensors["target_offset"],
            tensors["target_scale"],
            tensors.get("target_weights"),
        )

    def kernel(self, function: KernelFunction | None) -> Kernel:
        """The kernel as it was set up, or `function`; InputError unless the set-up was done with it."""
        name = self.plan["kernel"]
        named = name != CALLABLE
        if named == (function is not None):
            remedy = "leave kernel= out" if named else "pass that callable as kernel="
            raise InputError(f"the fit was set up with the {name} kernel; {remedy} or use a new RUN")
        if function is not None:
            return CallableKernel(function)
        parameters = {item: self.plan[item] for item in KERNEL_DEFAULTS[name]}
        return named_kernel(name, parameters, self.tensors.get("kernel_centre"))

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
        centers = self.inputs().to(mesh.device)(centers)
        rows = kernel.left(centers)
        return Solver(
            kernel,
            rows,
            self._projection(config, kernel, centers, rows, mesh),
            self.targets().to(mesh.device),
            config.solver.used_momentum,
            config.solver.used_averaging,
            mesh,
            torch.zeros(len(owned) * self.plan["batch_size"], device=mesh.device),
            config.solver.ridge,
        )

    def _projection(
        self, config: FitConfig, kernel: Kernel, centers: Tensor, rows: Points, mesh: Mesh
    ) -> Projection:
        """`rows`: the shard's scaled `centers`, prepared."""
        parts = {name: tensor.to(mesh.device) for name, tensor in self.tensors.items()}
        if self.plan["projection"] == "exact":
            return ExactProjection(parts["factor"], parts["directions"], parts["shrink"], mesh)
        owned = mesh.owned(len(parts["basis"]))
        basis = parts["basis"][owned.start : owned.stop]
        if self.plan["projection"] == "eigenpro":
            kept = {name: parts[name] for name in EigenProTensors.__slots__}
            tensors = EigenProTensors(**kept | {"basis": basis})
            passes = Passes(
                self.plan["center_batch_size"],
                self.plan["center_step_size"],
                config.solver.projection_passes,
                config.solver.projection_tolerance,
            )
            return EigenProProjection.of(kernel, rows, kernel.right(centers), tensors, passes, mesh)
        eigenvalues = torch.tensor(self.description["model_eigenvalues"], device=mesh.device).to(basis)
        tempering = parts.get("tempering")
        if tempering is not None:
            tempering = tempering[owned.start : owned.stop]
        return NystromProjection(
            basis, parts["core"], self.plan["mu"], self.plan["n_leading"], mesh, eigenvalues, tempering
        )


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
    if "target_weights" in tensors:
        shapes["target_weights"] = (c,)
    if plan["projection"] == "exact":
        q = len(tensors["shrink"])
        shapes |= {"factor": (p, p), "directions": (p, q)}
    elif plan["projection"] == "eigenpro":
        if not 1 <= plan["center_batch_size"] <= p or not plan["center_step_size"] > 0:
            raise ValueError(f"passes of {plan['center_batch_size']} by {plan['center_step_size']}")
        (s, q), (n_landmarks, r) = tensors["data_vectors"].shape, tensors["model_vectors"].shape
        shapes |= {"basis": (p, q), "sample": (s, d), "model_weights": (r,), "center_order": (p,)}
        if n_landmarks > p or not torch.equal(tensors["center_order"].sort()[0], torch.arange(p)):
            raise ValueError("center_order is no order of the centers")
    else:
        r = len(tensors["core"])
        shapes |= {"basis": (p, r), "core": (r, r)}
        if "tempering" in tensors:
            shapes["tempering"] = (p,)
        if len(bundle.description["model_eigenvalues"]) != r:
            raise ValueError(f"{len(bundle.description['model_eigenvalues'])} model_eigenvalues, not {r}")
    wrong = [name for name, shape in shapes.items() if tuple(tensors[name].shape) != shape]
    if wrong:
        raise ValueError(f"shape {tuple(tensors[wrong[0]].shape)} of {wrong[0]}, not {shapes[wrong[0]]}")


def _on_device(kernel: Kernel, device: torch.device) -> Kernel:
    if isinstance(kernel, RadialKernel):
        return replace(kernel, centre=kernel.centre.to(device))
    return kernel
