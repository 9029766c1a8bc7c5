"""Whether a set-up read from disk is one that a fit can use: every field it will read, before it reads any.

A run's set-up as it lies in RUN/setup, and what a fit makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ep3stream.config import KERNEL_DEFAULTS, FitConfig, Task
from ep3stream.errors import DamagedDataError, InputError
from ep3stream.mesh import Mesh
from ep3stream.run.bundle import Bundle, read_bundle
from ep3stream.run.bundle_manifest import file_digest
from ep3stream.solver.eigenpro import EigenProProjection, EigenProTensors, Passes
from ep3stream.solver.exact import ExactProjection
from ep3stream.solver.gpu import fuses
from ep3stream.solver.kernels import CALLABLE, CallableKernel, Kernel, KernelFunction, RadialKernel
from ep3stream.solver.model import InputScaling
from ep3stream.solver.named_kernels import named_kernel, with_precision
from ep3stream.solver.points import Points
from ep3stream.solver.projection import NystromProjection
from ep3stream.solver.step import Solver, SolverState, Stage
from ep3stream.solver.targets import TargetCode
from ep3stream.store.reader import SplitReader
from ep3stream.stream.order import RowOrder

Shape = tuple[int, ...]

_WHOLE = ("excluded_rows", "center_order")

_DOUBLE = ("factor", "directions", "half", "shrink")

_LARGEST = 1e38


def require_complete(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Every number possible, every tensor of its shape and type; raises KeyError, TypeError or ValueError if not."""
    plan = description["plan"]
    _require_numbers(plan)
    _require_names(description)
    if plan["kernel"] != CALLABLE:
        parameters = {item: plan[item] for item in KERNEL_DEFAULTS[plan["kernel"]]}
        named_kernel(plan["kernel"], parameters, tensors.get("kernel_centre"))
    for name, shape in _shapes(tensors, description).items():
        dtype = torch.int64 if name in _WHOLE else torch.float64 if name in _DOUBLE else torch.float32
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != dtype:
            raise ValueError(f"{name} is {found.dtype} {tuple(found.shape)}, not {dtype} {shape}")
    if plan["projection"] == "eigenpro":
        order = tensors["center_order"].sort()[0]
        if not torch.equal(order, torch.arange(len(order))):
            raise ValueError("center_order is no order of the centers")


def _require_numbers(plan: Mapping[str, Any]) -> None:
    for name in ("n_centers", "window_segments", "batch_size"):
        if type(plan[name]) is not int or not 1 <= plan[name] < 1 << 40:
            raise ValueError(f"{name} is {plan[name]!r:.50}")
    devices = plan.get("devices", 1)  # Formats 1 and 2 knew of one.
    if type(devices) is not int or not 1 <= devices <= plan["n_centers"]:
        raise ValueError(f"devices is {devices!r:.50}")
    started = plan.get("start_rows", 0)  # Formats 1 to 3 began without.
    if type(started) is not int or not 0 <= started < 1 << 40:
        raise ValueError(f"start_rows is {started!r:.50}")
    positive = ["step_size"]
    if plan["projection"] == "nystrom":
        positive.append("mu")
        if type(plan["n_leading"]) is not int or plan["n_leading"] < 0:
            raise ValueError(f"n_leading is {plan['n_leading']!r:.50}")
    elif plan["projection"] == "eigenpro":
        positive.append("center_step_size")
        size = plan["center_batch_size"]
        if type(size) is not int or not 1 <= size <= plan["n_centers"]:
            raise ValueError(f"center_batch_size is {size!r:.50}")
    elif plan["projection"] != "exact":
        raise ValueError(f"projection is {plan['projection']!r:.50}")
    last = -1
    for stage in plan.get("stages", []):
        if type(stage["first_row"]) is not int or not last < stage["first_row"] < 1 << 60:
            raise ValueError(f"first_row of a stage is {stage['first_row']!r:.50}")
        last = stage["first_row"]
        if not (_is_float32(stage["pace"]) and stage["pace"] > 0):
            raise ValueError(f"pace of a stage is {stage['pace']!r:.50}")
    for name in positive:
        if not (_is_float32(plan[name]) and plan[name] > 0):
            raise ValueError(f"{name} is {plan[name]!r:.50}")


def _is_float32(value: Any) -> bool:
    """Whether torch takes it for a number: whole ones of JSON may be beyond int64, others beyond float32."""
    return abs(value) < _LARGEST if type(value) is float else type(value) is int and abs(value) < 1 << 63


def _require_names(description: Mapping[str, Any]) -> None:
    names, is_classification = description["names"], description["task"] == "classification"
    if description["task"] not in get_args(Task) or is_classification != (names["classes"] is not None):
        raise ValueError(f"task is {description['task']!r:.50}")
    for what in ("features", "targets", *(["classes"] if is_classification else [])):
        if not isinstance(names[what], list) or not all(isinstance(name, str) for name in names[what]):
            raise ValueError(f"names of {what} are {names[what]!r:.50}")


def _shapes(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> dict[str, Shape]:
    """What each tensor must be; those that give a size of their own give it here."""
    plan, names = description["plan"], description["names"]
    p, d, c = plan["n_centers"], len(names["features"]), len(names["classes"] or names["targets"])
    shapes: dict[str, Shape] = {"centers": (p, d), "input_shift": (d,), "input_scale": (d,)}
    shapes |= {"target_offset": (c,), "target_scale": (c,), "excluded_rows": (len(tensors["excluded_rows"]),)}
    # Format 1 had one stage.
    stages = (len(plan["stages"]),) if "stages" in plan else ()
    optional = {"target_weights": (c,), "tempering": (p,), "kernel_centre": (d,)}
    shapes |= {name: shape for name, shape in optional.items() if name in tensors}
    if plan["projection"] == "exact":
        q = tensors["shrink"].shape[-1]
        return shapes | {"factor": (p, p), "directions": (p, q), "shrink": (*stages, q)}
    if plan["projection"] == "eigenpro":
        (s, q), (n_landmarks, r) = tensors["data_vectors"].shape, tensors["model_vectors"].shape
        if n_landmarks > p:
            raise ValueError(f"{n_landmarks} landmarks for {p} centers")
        shapes |= {"basis": (p, q), "sample": (s, d), "data_vectors": (s, q), "center_order": (p,)}
        return shapes | {"model_vectors": (n_landmarks, r), "model_weights": (r,)}
    # Formats 1 and 2 had the product of half and shrink.
    r = tensors["core" if "core" in tensors else "half"].shape[-1]
    eigenvalues = description["model_eigenvalues"]
    if len(eigenvalues) != r or not all(map(_is_float32, eigenvalues)):
        raise ValueError(f"model_eigenvalues are {eigenvalues!r:.50}, not {r} numbers")
    shapes |= {"basis": (p, r)}
    if "start" in tensors:
        shapes["start"] = (r, c)
    if "core" in tensors:
        return shapes | {"core": (*stages, r, r)}
    return shapes | {"half": (r, r), "shrink": (*stages, r)}


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
    def scattered(cls, whole: Setup | None, mesh: Mesh) -> Setup:
        """Each rank's, of the one that the leader has loaded: the only rank that has to see the files."""
        if mesh.size == 1:
            assert whole is not None
            return whole
        tensors = {} if whole is None else whole.tensors
        told = mesh.broadcast_object(
            lambda: None if whole is None else [list(tensors), whole.description, whole.digest]
        )
        shards = {
            name: mesh.scatter_rows(tensors.get(name)) if name in _BY_CENTER else mesh.copy(tensors.get(name))
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
        half, shrink, center_damping = parts["half"], parts[STAGED], parts.get("tempering")
        return NystromProjection(
            basis, half, shrink, self.plan["mu"], self.plan["n_leading"], mesh, eigenvalues, center_damping
        )


def _factored(core: Tensor) -> dict[str, Tensor]:
    """The core of bundle formats 1 and 2, (..., r, r) in float32, as half @ diag(shrink) @ half'."""
    values, vectors = torch.linalg.eigh(core.double())
    return {"half": vectors, STAGED: values.clamp_min(0)}


def _on_device(kernel: Kernel, device: torch.device) -> Kernel:
    if isinstance(kernel, RadialKernel):
        return replace(kernel, centre=kernel.centre.to(device))
    return kernel
