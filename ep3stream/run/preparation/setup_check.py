"""Whether a set-up read from disk is one that a fit can use: every field it will read, before it reads any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from ep3stream.config import KERNEL_DEFAULTS, Task
from ep3stream.solver.kernels import CALLABLE
from ep3stream.solver.named_kernels import named_kernel

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
