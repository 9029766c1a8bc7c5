"""A fit's set-up: what is computed once before the first step, and what the first and every resumed step reads.

On disk the set-up is the bundle RUN/setup: tensors (centers, scalings, preconditioner) and a description. Keys on
disk and names in memory differ where older formats had other words: `tempering` is the center damping, and `pace` of
a stage its step scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ep3stream.config import KERNEL_DEFAULTS, FitConfig, Precision, RunConfig, Task
from ep3stream.errors import DamagedDataError, InputError
from ep3stream.mesh import Mesh
from ep3stream.run.bundle import file_digest, read_bundle
from ep3stream.run.directory import SETUP_KIND
from ep3stream.solver.blocks import fuses
from ep3stream.solver.columns import ColumnKernel
from ep3stream.solver.eigenpro import EigenProProjection, EigenProTensors, Passes
from ep3stream.solver.exact import ExactProjection
from ep3stream.solver.input_scaling import InputScaling
from ep3stream.solver.kernels import CALLABLE, CallableKernel, Kernel, KernelFunction, RadialKernel
from ep3stream.solver.linear_part import LinearPart
from ep3stream.solver.named_kernels import named_kernel, with_precision
from ep3stream.solver.points import Points, UnpreparedPoints
from ep3stream.solver.projection import NystromProjection
from ep3stream.solver.step import Solver, SolverState, Stage
from ep3stream.solver.tail import LocalTail
from ep3stream.solver.targets import TargetCode
from ep3stream.store.manifest import SplitInfo
from ep3stream.stream.order import RowOrder

# Bytes, of what torch allocates in host memory.
_ALIGNMENT = 64

# Tensors with a row for each center: every rank keeps its own rows of them.
_BY_CENTER = frozenset({"centers", "basis", "tempering", "tail"})

# The tensor that each stage has its own of: stacked by stage. A set-up of bundle format 1 has one stage and no stack.
STAGED = "shrink"
HELD_ROWS = "held_rows"
_WHOLE = ("excluded_rows", HELD_ROWS, "center_order")
_DOUBLE = ("factor", "directions", "half", "shrink")
_LARGEST = 1e38
# Of the plan, and what they are below.
_COUNTS = dict.fromkeys(("model_rank", "data_rank", "n_landmarks", "nystrom_samples", "n_leading"), 1 << 40)
_COUNTS |= {"start_rows": 1 << 40, "group_size": 1 << 40, "n_directions": 1 << 40, "memory_bytes": 1 << 60}


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage of the fit: from row `first_row` on its steps are `step_scale` times as long as the first stage's.

    n_flattened: how many leading directions of the data its projection shrinks; None where that is not known.
    """

    first_row: int
    step_scale: float
    n_flattened: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupPlan:
    """The sizes, the kernel and the steps of a fit, as the set-up has settled them; in JSON under `plan`.

    kernel_parameters: by name, those of `KERNEL_DEFAULTS[kernel]`. stages: empty in bundle format 1.
    memory: planned bytes on each device by item; memory_bytes: the budget for all of them.
    center_batch_size, center_step_size: of EigenPro's passes over the centers. start_rows: how many rows the head
    start was learnt from, 0 without one; start_ridge: its ridge. group_size: centers of a group of the local tail, 0
    without one. n_directions: how many directions of the inputs the kernel takes, 0 for the inputs themselves.
    ridge_factors: multiples of the ridge that are fitted side by side, of which validations choose; none for one.
    precision: of the kernel's inputs; None in set-ups of earlier versions, where the settings say it. averaging: that
    of settings without one; None in set-ups of earlier versions.
    """

    n_centers: int
    window_segments: int
    batch_size: int
    step_size: float
    projection: str
    kernel: str
    kernel_parameters: Mapping[str, Any]
    model_rank: int = 0
    data_rank: int = 0
    n_landmarks: int = 0
    nystrom_samples: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)
    step_rule: str = "measured"
    stages: tuple[StagePlan, ...] = ()
    momentum: float = 0.0
    ridge: float = 0.0
    mu: float | None = None
    devices: int = 1
    memory_bytes: int = 0
    n_leading: int = 0
    center_batch_size: int | None = None
    center_step_size: float | None = None
    start_rows: int = 0
    start_ridge: float | None = None
    ridge_factors: tuple[float, ...] = ()
    group_size: int = 0
    n_directions: int = 0
    precision: Precision | None = None
    averaging: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The plan with the keys of RUN/setup and run.json; absent values are left out."""
        content = {name: value for name, value in asdict(self).items() if value is not None}
        del content["kernel_parameters"]
        for name in ("start_rows", "ridge_factors", "group_size", "n_directions"):
            if not content[name]:
                del content[name]
        stages = [
            {"first_row": stage.first_row, "pace": stage.step_scale}
            | ({} if stage.n_flattened is None else {"n_flattened": stage.n_flattened})
            for stage in self.stages
        ]
        return {**content, "bandwidth": None, **self.kernel_parameters, "stages": stages}

    def spare_bytes(self, run: RunConfig, device: torch.device) -> int:
        """Host memory beside the solver's arrays: of the budget what they leave, or, with a GPU, that of its host."""
        if device.type == "cuda":
            return run.host_memory_bytes
        return max(0, run.memory_bytes - sum(self.memory.values()))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SetupPlan:
        """The plan that `require_complete` has checked, of any bundle format."""
        known = {name: content[name] for name in cls.__slots__ if name in content}
        names = KERNEL_DEFAULTS.get(content["kernel"], {})
        stages = tuple(
            StagePlan(stage["first_row"], stage["pace"], stage.get("n_flattened"))
            for stage in content.get("stages", [])
        )
        made = {
            "kernel_parameters": {name: content[name] for name in names},
            "stages": stages,
            "ridge_factors": tuple(content.get("ridge_factors", ())),
        }
        return cls(**known | made)


@dataclass(frozen=True, slots=True)
class Setup:
    """The part of a fit that never changes. A resumed fit reads it from RUN/setup.

    Loaded, the tensors are whole and memory maps. Scattered, those with a row for each center are this rank's shard.
    description: JSON; its `plan` is typed as `plan`. digest: of the bundle, empty for a set-up that is in memory only.
    """

    tensors: dict[str, Tensor]
    description: dict[str, Any]
    plan: SetupPlan
    digest: str = ""

    @classmethod
    def load(cls, path: Path) -> Setup:
        """Read from `path` and checked against its digests; raises DamagedDataError."""
        bundle = read_bundle(path, SETUP_KIND)
        try:
            require_complete(bundle.tensors, bundle.description)
            plan = SetupPlan.from_json(bundle.description["plan"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DamagedDataError(
                f"{path} has a missing or impossible field ({error!r}); use a new RUN"
            ) from error
        return cls(bundle.tensors, bundle.description, plan, file_digest(path / "manifest.json"))

    @classmethod
    def scattered(cls, whole: Setup | None, mesh: Mesh) -> Setup:
        """The set-up with each rank's own rows of it. Only the leader has `whole`, and has to see the files."""
        if mesh.size == 1:
            assert whole is not None
            return whole
        tensors = {} if whole is None else whole.tensors
        told = mesh.broadcast_object(
            lambda: None if whole is None else [list(tensors), whole.description, whole.digest]
        )
        shards = {
            name: mesh.scatter_rows(tensors.get(name))
            if name in _BY_CENTER
            else mesh.replicate(tensors.get(name))
            for name in told[0]
        }
        return cls(shards, told[1], SetupPlan.from_json(told[1]["plan"]), told[2])

    def without_centers(self) -> Setup:
        """The set-up without the tensors that have a row for each center: a solver holds those it needs."""
        return replace(self, tensors={k: v for k, v in self.tensors.items() if k not in _BY_CENTER})

    def inputs(self) -> InputScaling:
        """The model's input transform."""
        return _inputs(self.tensors, self.description)

    def targets(self) -> TargetCode:
        """How targets enter the least-squares problem and how outputs leave it."""
        tensors = self.tensors
        return TargetCode(
            self.description["task"] == "classification",
            tensors["target_offset"],
            tensors["target_scale"],
            tensors.get("target_weights"),
        )

    def linear(self) -> LinearPart | None:
        """The linear part of the model, if it has one."""
        return _linear(self.tensors, self.description, self.inputs().n_inputs)

    def ridge_targets(self) -> TargetCode:
        """`targets` with columns of alpha for each ridge of the fit."""
        return replace(self.targets(), ridge_factors=self.plan.ridge_factors or (1.0,))

    def kernel(self, function: KernelFunction | None) -> Kernel:
        """The kernel of the set-up, or `function`; InputError unless the set-up was made with the same."""
        name = self.plan.kernel
        is_named = name != CALLABLE
        if is_named == (function is not None):
            remedy = "leave kernel= out" if is_named else "pass that callable as kernel="
            raise InputError(f"the fit was set up with the {name} kernel; {remedy} or use a new RUN")
        if function is not None:
            return CallableKernel(function)
        return named_kernel(name, self.plan.kernel_parameters, self.tensors)

    def order(self, split: SplitInfo, seed: int) -> RowOrder:
        """The order of the split's rows; DamagedDataError where the set-up was not made for so many."""
        plan = self.plan
        if plan.batch_size > split.n_rows or plan.window_segments > split.n_segments:
            raise DamagedDataError(
                f"the set-up has batches of {plan.batch_size} rows and windows of {plan.window_segments} segments, "
                f"but the split has {split.n_rows} rows in {split.n_segments}; use a new RUN"
            )
        excluded = self.tensors["excluded_rows"].numpy()
        return RowOrder(
            seed, split.n_rows, split.segment_rows, plan.window_segments, plan.batch_size, excluded
        )

    def solver(self, config: FitConfig, function: KernelFunction | None, mesh: Mesh) -> Solver:
        """The solver of a scattered set-up, ready to step.

        Raises DamagedDataError where a kernel block of the set-up exceeds the memory it was made for.
        """
        kernel = self.kernel(function)
        if isinstance(kernel, RadialKernel):
            kernel = replace(kernel, centre=kernel.centre.to(mesh.device))
        if isinstance(kernel, CallableKernel):
            kernel = kernel.without_waits(mesh.device)
        # Earlier versions did not record what the settings had said, which was never `auto`.
        kernel = with_precision(kernel, self.plan.precision or config.solver.precision)
        centers, targets = self._points(kernel.left, mesh.device), self.ridge_targets().to(mesh.device)
        stages, linear = self._stages(config, kernel, centers, mesh), self.linear()
        return Solver(
            kernel,
            centers,
            stages[0].projection,
            targets,
            config.solver.used_momentum,
            config.solver.used_averaging,
            mesh,
            self._block_memory(kernel, centers, targets.n_columns, config.run.memory_bytes, mesh),
            self.plan.ridge if config.solver.ridge is None else config.solver.ridge,
            stages[1:],
            None if linear is None else linear.to(mesh.device),
        )

    def initial_state(self, solver: Solver) -> SolverState:
        """The state before the first step: the head start of the set-up, or zero where there is none.

        The tail average counts a head start as if its rows had been steps.
        """
        state = solver.initial_state()
        if (coefficients := self.tensors.get("start")) is not None:
            assert isinstance(solver.projection, NystromProjection)
            solver.targets.by_ridge(state.weights).copy_(solver.projection.weights_of(coefficients))
            state.average.copy_(state.weights)
            state.averaged = self.plan.start_rows // self.plan.batch_size
        return state

    def _points(self, prepare: Callable[[Tensor], Points], device: torch.device) -> Points:
        """The centers of this rank, scaled and prepared on the device."""
        inputs = self.inputs().to(device)
        return UnpreparedPoints(
            self.tensors["centers"], lambda some: prepare(inputs(some.to(device)))
        ).whole()

    def _block_memory(
        self, kernel: Kernel, centers: Points, n_columns: int, asked_bytes: int, mesh: Mesh
    ) -> Tensor | None:
        """Memory for the kernel block of a shard.

        None where the products are fused, and where the set-up was planned for more devices than there are now: the
        block is then formed anew, twice a step.
        """
        plan = self.plan
        # On a GPU the set-up has found out what is free.
        memory_bytes = max(asked_bytes, plan.memory_bytes if mesh.device.type == "cuda" else 0)
        batch_size = plan.batch_size
        largest_shard = -(-plan.n_centers // plan.devices)
        if 4 * largest_shard * batch_size > memory_bytes:
            raise DamagedDataError(
                f"the set-up has kernel blocks of {4 * largest_shard * batch_size} bytes, more than the memory of "
                f"{memory_bytes} it was made for; use a new RUN"
            )
        # A step that is scored multiplies weights and their average at once.
        is_fused = fuses(kernel, mesh.device, 2 * n_columns)
        if is_fused or 4 * len(centers) * batch_size > memory_bytes:
            return None
        return torch.zeros(len(centers) * batch_size, device=mesh.device)

    def _stages(self, config: FitConfig, kernel: Kernel, centers: Points, mesh: Mesh) -> tuple[Stage, ...]:
        """The stages of the fit. centers: this rank's, as left points of the kernel."""
        tensors = {
            name: _as_made(name, tensor.to(mesh.device))
            for name, tensor in self.tensors.items()
            if name not in ("centers", "excluded_rows", HELD_ROWS)
        }
        staged = ["eigenvalue_scale"]
        if "core" in tensors:
            tensors |= _factored(tensors["core"])
            staged.append("half")
        if STAGED in tensors:
            # `nystrom` stores the scale itself, `exact` 1 minus it, of which `ExactProjection.tensors` says more.
            stored = tensors.pop(STAGED)
            tensors["eigenvalue_scale"] = 1 - stored if self.plan.projection == "exact" else stored
        first = self._projection(config, kernel, centers, mesh, tensors)
        if not self.plan.stages or isinstance(first, EigenProProjection):
            return (Stage(0, first),)
        own: list[dict[str, Any]] = [
            {name: tensors[name][number] for name in staged} for number in range(len(self.plan.stages))
        ]
        return tuple(
            Stage(stage.first_row, replace(first, **changed), stage.step_scale)
            for stage, changed in zip(self.plan.stages, own, strict=True)
        )

    def _projection(
        self,
        config: FitConfig,
        kernel: Kernel,
        centers: Points,
        mesh: Mesh,
        tensors: dict[str, Tensor],
    ) -> NystromProjection | ExactProjection | EigenProProjection:
        """The projection of the set-up; its staged tensor may still be the stack of all stages."""
        plan = self.plan
        if plan.projection == "exact":
            return ExactProjection(
                tensors["factor"], tensors["directions"], tensors["eigenvalue_scale"], mesh
            )
        basis = tensors["basis"]
        if plan.projection == "eigenpro":
            assert plan.center_batch_size is not None  # `require_complete` has seen both.
            assert plan.center_step_size is not None
            own = EigenProTensors(**{name: tensors[name] for name in EigenProTensors.__slots__})
            passes = Passes(
                plan.center_batch_size,
                float(plan.center_step_size),
                config.solver.projection_passes,
                config.solver.projection_tolerance,
            )
            return EigenProProjection.of(
                kernel, centers, self._points(kernel.right, mesh.device), own, passes, mesh
            )
        eigenvalues = torch.tensor(self.description["model_eigenvalues"], device=mesh.device).to(basis)
        assert plan.mu is not None  # `require_complete` has seen it.
        return NystromProjection(
            basis,
            tensors["half"],
            tensors["eigenvalue_scale"],
            plan.mu,
            plan.n_leading,
            mesh,
            eigenvalues,
            tensors.get("tempering"),
            LocalTail(tensors["tail"], plan.n_centers, mesh) if "tail" in tensors else None,
            isinstance(kernel, ColumnKernel),
        )


def _as_made(name: str, tensor: Tensor) -> Tensor:
    """The tensor as the set-up had it in memory: in the memory map of a file the last bits of products may differ."""
    if name == "basis":  # Column by column.
        return tensor.T.clone(memory_format=torch.contiguous_format).T
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _linear(
    tensors: Mapping[str, Tensor], description: Mapping[str, Any], n_inputs: int
) -> LinearPart | None:
    return LinearPart.described(tensors, description.get("linear"), n_inputs, len(tensors["target_offset"]))


def _inputs(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> InputScaling:
    return InputScaling.described(tensors, description)


def _factored(core: Tensor) -> dict[str, Tensor]:
    """The core of bundle formats 1 and 2, (..., r, r) in float32, as half @ diag(shrink) @ half', by name."""
    values, vectors = torch.linalg.eigh(core.double())
    return {"half": vectors, STAGED: values.clamp_min(0)}


def require_complete(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Every number possible, every tensor of its shape and type; raises KeyError, TypeError or ValueError if not."""
    plan = description["plan"]
    _require_numbers(plan)
    _require_names(description)
    _require_validation(tensors, description)
    if plan["kernel"] != CALLABLE:
        parameters = {item: plan[item] for item in KERNEL_DEFAULTS[plan["kernel"]]}
        kernel = named_kernel(plan["kernel"], parameters, tensors)
        if (precision := plan.get("precision", "float32")) not in get_args(Precision):
            raise ValueError(f"precision is {precision!r:.50}")
        with_precision(kernel, precision)
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
    for name, limit in _COUNTS.items():  # Earlier formats knew of fewer.
        count = plan.get(name, 0)
        if type(count) is not int or not 0 <= count < limit:
            raise ValueError(f"{name} is {count!r:.50}")
    for name in ("ridge", "start_ridge", "momentum", "averaging"):
        value = plan.get(name, 0.0)
        if not (_is_float32(value) and value >= 0):
            raise ValueError(f"{name} is {value!r:.50}")
    factors = plan.get("ridge_factors", [])
    if not isinstance(factors, list) or not all(_is_float32(each) and each > 0 for each in factors):
        raise ValueError(f"ridge_factors is {factors!r:.50}")
    positive = ["step_size"]
    if plan["projection"] == "nystrom":
        positive.append("mu")
        if "n_leading" not in plan:
            raise ValueError("there is no n_leading")
    elif plan["projection"] == "eigenpro":
        positive.append("center_step_size")
        size = plan["center_batch_size"]
        if type(size) is not int or not 1 <= size <= plan["n_centers"]:
            raise ValueError(f"center_batch_size is {size!r:.50}")
    elif plan["projection"] != "exact":
        raise ValueError(f"projection is {plan['projection']!r:.50}")
    if "stages" in plan and not plan["stages"]:
        raise ValueError("there are no stages")
    last = -1
    for stage in plan.get("stages", []):
        if type(stage["first_row"]) is not int or not last < stage["first_row"] < 1 << 60:
            raise ValueError(f"first_row of a stage is {stage['first_row']!r:.50}")
        last = stage["first_row"]
        flattened = stage.get("n_flattened", 0)
        if type(flattened) is not int or not 0 <= flattened < 1 << 60:
            raise ValueError(f"n_flattened of a stage is {flattened!r:.50}")
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


def _require_validation(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Rows that are held out are sorted, among the rows that are not trained on, and as many as the record says."""
    held, recorded = tensors.get(HELD_ROWS), description.get("validation", {"split": None})
    if not isinstance(recorded, dict) or "split" not in recorded:
        raise ValueError(f"validation is {recorded!r:.80}")
    n_held = recorded.get("n_held", 0)
    if recorded.keys() > {"split", "n_held"} or not isinstance(recorded["split"], str | None):
        raise ValueError(f"validation is {recorded!r:.80}")
    if n_held != (0 if held is None else len(held)):
        raise ValueError(f"n_held is {n_held!r:.50}")
    if held is not None and (held.ndim != 1 or not bool(torch.isin(held, tensors["excluded_rows"]).all())):
        raise ValueError("held_rows are not among excluded_rows")
    if held is not None and bool((held.diff() <= 0).any()):
        raise ValueError("held_rows are not sorted")


def _shapes(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """What each tensor must be; those that give a size of their own give it here."""
    plan, names = description["plan"], description["names"]
    p, d, c = plan["n_centers"], len(names["features"]), len(names["classes"] or names["targets"])
    inputs = _inputs(tensors, description)
    n_inputs = inputs.n_inputs
    shapes: dict[str, tuple[int, ...]] = {"centers": (p, d), "input_shift": (d,), "input_scale": (d,)}
    shapes |= inputs.direction_shapes()
    shapes |= {"target_offset": (c,), "target_scale": (c,), "excluded_rows": (len(tensors["excluded_rows"]),)}
    # Format 1 had one stage.
    stages = (len(plan["stages"]),) if "stages" in plan else ()
    optional = {
        "target_weights": (c,),
        "tempering": (p,),
        "kernel_centre": (n_inputs,),
        "kernel_metric": (3, d),
        HELD_ROWS: (description.get("validation", {}).get("n_held", 0),),
    }
    shapes |= {name: shape for name, shape in optional.items() if name in tensors}
    if (linear := _linear(tensors, description, n_inputs)) is not None:
        shapes |= {name: tuple(tensor.shape) for name, tensor in linear.tensors().items()}
    if "tail" in tensors:
        if plan["projection"] != "nystrom" or not 1 <= tensors["tail"].shape[-1] <= p:
            raise ValueError(f"tail is {tuple(tensors['tail'].shape)} for {p} centers")
        shapes["tail"] = (p, tensors["tail"].shape[-1])
    if plan["projection"] == "exact":
        q = tensors["shrink"].shape[-1]
        return shapes | {"factor": (p, p), "directions": (p, q), "shrink": (*stages, q)}
    if plan["projection"] == "eigenpro":
        (s, q), (n_landmarks, r) = tensors["data_vectors"].shape, tensors["model_vectors"].shape
        if n_landmarks > p:
            raise ValueError(f"{n_landmarks} landmarks for {p} centers")
        shapes |= {"basis": (p, q), "sample": (s, n_inputs), "data_vectors": (s, q), "center_order": (p,)}
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
