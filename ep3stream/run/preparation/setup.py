"""A run's set-up as it lies in RUN/setup, and what a fit makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ep3stream.config import KERNEL_DEFAULTS, FitConfig
from ep3stream.data.store import SplitReader
from ep3stream.data.streaming.order import RowOrder
from ep3stream.errors import DamagedDataError, InputError
from ep3stream.mesh import Mesh
from ep3stream.run.files.bundle import Bundle, read_bundle
from ep3stream.run.files.bundle_manifest import file_digest
from ep3stream.run.preparation.setup_check import require_complete
from ep3stream.solver.eigenpro import EigenProProjection, EigenProTensors, Passes
from ep3stream.solver.exact import ExactProjection
from ep3stream.solver.gpu_blocks import fuses
from ep3stream.solver.kernels import CALLABLE, CallableKernel, Kernel, KernelFunction, RadialKernel
from ep3stream.solver.model import InputScaling
from ep3stream.solver.named_kernels import named_kernel, with_precision
from ep3stream.solver.points import Points
from ep3stream.solver.projection import NystromProjection
from ep3stream.solver.step import Solver, SolverState, Stage
from ep3stream.solver.targets import TargetCode

SETUP_KIND = "set-up"
# Tensors with a row for each center.
_BY_CENTER = frozenset({"centers", "basis", "tempering"})
# What each stage has its own of, stacked; bare in a set-up of bundle format 1, which has one stage.
STAGED = "shrink"


@dataclass(frozen=True, slots=True)
class Setup:
    """A run's unchanging part, as read back from RUN/setup: what a resumed fit uses is what the first one wrote.

    As loaded it is whole, and a memory map; as dealt, what has a row for each center is this rank's shard.
    """

    tensors: dict[str, Tensor]
    description: dict[str, Any]
    digest: str

    @classmethod
    def load(cls, path: Path) -> Setup:
        """Checked against its digests; raises DamagedDataError."""
        bundle: Bundle = read_bundle(path, SETUP_KIND)
        try:
            require_complete(bundle.tensors, bundle.description)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DamagedDataError(
                f"{path} has a missing or impossible field ({error!r}); use a new RUN"
            ) from error
        return cls(bundle.tensors, bundle.description, file_digest(path / "manifest.json"))

    @classmethod
    def dealt(cls, whole: Setup | None, mesh: Mesh) -> Setup:
        """Each rank's, of the one that the leader has loaded: the only rank that has to see the files."""
        if mesh.size == 1:
            assert whole is not None
            return whole
        tensors = {} if whole is None else whole.tensors
        told = mesh.led(lambda: None if whole is None else [list(tensors), whole.description, whole.digest])
        shards = {
            name: mesh.deal(tensors.get(name)) if name in _BY_CENTER else mesh.copy(tensors.get(name))
            for name in told[0]
        }
        return cls(shards, told[1], told[2])

    def without_centers(self) -> Setup:
        """The same without what has a row for each center: a solver holds what it needs of them, prepared."""
        return replace(self, tensors={k: v for k, v in self.tensors.items() if k not in _BY_CENTER})

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
        """The order of the rows; DamagedDataError where the set-up is not one for them."""
        info = reader.info
        if self.plan["batch_size"] > info.n_rows or self.plan["window_segments"] > info.n_segments:
            raise DamagedDataError(
                f"the set-up has batches of {self.plan['batch_size']} rows and windows of "
                f"{self.plan['window_segments']} segments, but the split has {info.n_rows} rows in "
                f"{info.n_segments}; use a new RUN"
            )
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
        """Of a set-up as dealt, ready to step; DamagedDataError where kernel values of a batch exceed the memory."""
        kernel = with_precision(_on_device(self.kernel(function), mesh.device), config.solver.precision)
        centers = self.inputs().to(mesh.device)(self.tensors["centers"].to(mesh.device))
        rows = kernel.left(centers)
        stages = self._stages(config, kernel, centers, rows, mesh)
        return Solver(
            kernel,
            rows,
            stages[0].projection,
            self.targets().to(mesh.device),
            config.solver.used_momentum,
            config.solver.used_averaging,
            mesh,
            self._block_memory(kernel, centers, self._memory_bytes(config, mesh), mesh),
            config.solver.ridge,
            stages[1:],
        )

    def initial_state(self, solver: Solver) -> SolverState:
        """Of a set-up as dealt: the head start, or zero where there is none.

        The average counts it as if its rows had been steps.
        """
        state = solver.initial_state()
        if (coefficients := self.tensors.get("start")) is not None:
            assert isinstance(solver.projection, NystromProjection)
            basis = solver.projection.basis
            state.weights.copy_((basis @ coefficients.to(basis)).T)
            state.average.copy_(state.weights)
            state.averaged = self.plan["start_rows"] // self.plan["batch_size"]
        return state

    def _memory_bytes(self, config: FitConfig, mesh: Mesh) -> int:
        """As asked for; on a GPU what the set-up has found free (`machine.memory_budget`)."""
        found: int = self.plan.get("memory_bytes", 0) if mesh.device.type == "cuda" else 0
        return max(found, config.run.memory_bytes)

    def _block_memory(self, kernel: Kernel, centers: Tensor, memory_bytes: int, mesh: Mesh) -> Tensor | None:
        """For the block of a shard, (p_shard, d); None where products are fused, or form it anew.

        They form it anew, twice a step, where the set-up was planned for more devices.
        """
        batch_size, n_outputs = self.plan["batch_size"], len(self.tensors["target_offset"])
        largest = -(-self.plan["n_centers"] // self.plan.get("devices", 1))
        if 4 * largest * batch_size > memory_bytes:
            raise DamagedDataError(
                f"the set-up has kernel blocks of {4 * largest * batch_size} bytes, more than the memory of "
                f"{memory_bytes} it was made for; use a new RUN"
            )
        # A step that is scored multiplies weights and their average at once.
        is_fused = fuses(kernel.name, mesh.device, centers.shape[1], 2 * n_outputs)
        if is_fused or 4 * len(centers) * batch_size > memory_bytes:
            return None
        return torch.zeros(len(centers) * batch_size, device=mesh.device)

    def _stages(
        self, config: FitConfig, kernel: Kernel, centers: Tensor, rows: Points, mesh: Mesh
    ) -> tuple[Stage, ...]:
        """`rows`: the shard's scaled `centers`, prepared."""
        parts = {
            name: tensor.to(mesh.device)
            for name, tensor in self.tensors.items()
            if name not in ("centers", "excluded_rows")
        }
        staged = [STAGED]
        if "core" in parts:
            parts |= _factored(parts["core"])
            staged.append("half")
        first = self._projection(config, kernel, centers, rows, mesh, parts)
        if "stages" not in self.plan or isinstance(first, EigenProProjection):
            return (Stage(0, first),)
        own: list[dict[str, Any]] = [
            {name: parts[name][number] for name in staged} for number in range(len(self.plan["stages"]))
        ]
        return tuple(
            Stage(stage["first_row"], replace(first, **changed), stage["pace"])
            for stage, changed in zip(self.plan["stages"], own, strict=True)
        )

    def _projection(
        self,
        config: FitConfig,
        kernel: Kernel,
        centers: Tensor,
        rows: Points,
        mesh: Mesh,
        parts: dict[str, Tensor],
    ) -> NystromProjection | ExactProjection | EigenProProjection:
        """With what is staged as it is in `parts`."""
        if self.plan["projection"] == "exact":
            return ExactProjection(parts["factor"], parts["directions"], parts["shrink"], mesh)
        basis = parts["basis"]
        if self.plan["projection"] == "eigenpro":
            tensors = EigenProTensors(**{name: parts[name] for name in EigenProTensors.__slots__})
            passes = Passes(
                self.plan["center_batch_size"],
                float(self.plan["center_step_size"]),
                config.solver.projection_passes,
                config.solver.projection_tolerance,
            )
            return EigenProProjection.of(kernel, rows, kernel.right(centers), tensors, passes, mesh)
        eigenvalues = torch.tensor(self.description["model_eigenvalues"], device=mesh.device).to(basis)
        half, shrink, tempering = parts["half"], parts[STAGED], parts.get("tempering")
        return NystromProjection(
            basis, half, shrink, self.plan["mu"], self.plan["n_leading"], mesh, eigenvalues, tempering
        )


def _factored(core: Tensor) -> dict[str, Tensor]:
    """The core of bundle formats 1 and 2, (..., r, r) in float32, as half @ diag(shrink) @ half'."""
    values, vectors = torch.linalg.eigh(core.double())
    return {"half": vectors, STAGED: values.clamp_min(0)}


def _on_device(kernel: Kernel, device: torch.device) -> Kernel:
    if isinstance(kernel, RadialKernel):
        return replace(kernel, centre=kernel.centre.to(device))
    return kernel
