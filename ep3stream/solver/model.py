"""The trained model, in the units of the data: f(x) = offset + scale * (sum_i alpha_i K(x, z_i) + W' s(x) + effects).

`Predictor` is a whole model, `ModelShard` one rank's share of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.errors import DamagedDataError, InputError
from ep3stream.mesh import Mesh
from ep3stream.solver.blocks import times_kernel
from ep3stream.solver.cell_effects import EFFECT_TENSORS, CellEffects
from ep3stream.solver.gpu import float32_products
from ep3stream.solver.input_scaling import InputScaling
from ep3stream.solver.kernels import CALLABLE, CallableKernel, Kernel, KernelFunction
from ep3stream.solver.linear_part import LINEAR_TENSORS, LinearPart
from ep3stream.solver.named_kernels import kernel_tensors, named_kernel
from ep3stream.solver.points import Points, UnpreparedPoints
from ep3stream.solver.targets import TargetCode
from ep3stream.solver.tiles import predicted_rows
from ep3stream.values.labels import LabelType, as_labels
from ep3stream.values.offsets import Offsets, shifted


class FrameColumns(Protocol):
    """Makes x of tables for a model (`prediction/frames.py`)."""

    @property
    def record(self) -> Mapping[str, Any] | None:
        """How the columns of a table become the features; None if that is not known."""
        ...

    def __call__(self, x: Any) -> tuple[NDArray[Any], bool] | None:
        """x of a table, and whether it is less the model's offsets already; None for what is no table."""
        ...


@dataclass(frozen=True, slots=True)
class ModelShard:
    """This rank's share of a model, ready to predict together with the other ranks.

    centers: p_shard points, scaled and prepared; weights: (c, p_shard); both on the mesh's device.
    change: where rows come from a store of other offsets than the model's: what is to be subtracted from x, (d,), on
    the device, and from y, (c,), to make them the model's; None for nothing. effects: of cells, and linear:
    the linear part, both whole on every rank, if any.
    """

    kernel: Kernel
    centers: Points
    weights: Tensor
    inputs: InputScaling
    targets: TargetCode
    mesh: Mesh
    change: tuple[Tensor, NDArray[np.float64]] | None = None
    effects: CellEffects | None = None
    linear: LinearPart | None = None

    def rows_at_once(self) -> int:
        """How many rows are computed at once, the same on every rank, all of which must ask."""
        own = predicted_rows(self.weights.device, *self.centers.prepared.shape)
        return -self.mesh.all_reduce_max([-own])[0]

    @float32_products()
    def outputs(self, x: Tensor) -> Tensor:
        """f(x), (n, c), in the units of the targets, for x, (n, d), the same on every rank; O(n p_shard d) time.

        x is less the offsets of the store, and f(x) less those of the model's targets.

        Raises InputError where x is not finite.
        """
        parts = []
        for rows in torch.split(x, self.rows_at_once()):
            if self.change is not None:
                rows = rows.double() - self.change[0]
            rows = rows.to(self.weights)
            scaled = self.inputs(rows)
            if not bool(torch.isfinite(scaled).all()):
                raise InputError(
                    "x has a value that is not finite in float32, whose largest number is 3.4e38; fill or drop missing "
                    "values first"
                )
            share = times_kernel(self.kernel, self.weights, self.centers, self.kernel.right(scaled))
            predicted = self.mesh.all_reduce(share)
            if self.linear is not None:
                self.linear.add_(predicted, scaled)
            if self.effects is not None:
                predicted = predicted + self.effects(rows).T
            parts.append(self.targets.decode(predicted))
        return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class Predictor:
    """A kernel machine ready to predict.

    centers: (p, d), in the units of the data; weights: (p, c); class_names: None for regression. offsets: what
    `predict` subtracts from x, and adds to the outputs, in float64; centers and scalings are less these. None for none.
    label_type: what the classes are called in `predict`. frames: makes x of a DataFrame. effects: of cells, and
    linear: the linear part, if any.
    """

    kernel: Kernel
    centers: Tensor
    weights: Tensor
    inputs: InputScaling
    targets: TargetCode
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]
    class_names: tuple[str, ...] | None
    offsets: Offsets | None = None
    label_type: LabelType = "text"
    frames: FrameColumns | None = None
    effects: CellEffects | None = None
    linear: LinearPart | None = None

    @property
    def labels(self) -> NDArray[Any]:
        """The label of each class, (c,), as `predict` returns them; none for regression."""
        return as_labels(self.class_names or (), self.label_type)

    @property
    def output_dtype(self) -> type[np.float32] | type[np.float64]:
        """Of the outputs that `predict` and `decision_function` return: float64 where targets have offsets."""
        return np.float32 if self.offsets is None or not self.offsets.y.any() else np.float64

    @property
    def n_features(self) -> int:
        """d, the number of features of a row."""
        return self.centers.shape[1]

    def to(self, device: torch.device) -> Predictor:
        """The same model on another device."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        function = self.kernel.function if isinstance(self.kernel, CallableKernel) else None
        return replace(Predictor.of(tensors, self.description(), function), frames=self.frames)

    def without(self, offsets: Offsets) -> Predictor:
        """The same model for rows that are less these offsets of features already, as a store gives them."""
        own = self.offsets or Offsets.none(self.n_features, self.targets.n_outputs)
        left = Offsets(own.x - offsets.x, own.y)
        return replace(self, offsets=left if left else None)

    def prepared(self, mesh: Mesh | None = None, offsets: Offsets | None = None) -> ModelShard:
        """The model with centers prepared for blocks, to be used for many calls of `outputs`.

        mesh: where this model has one rank's share of the centers, the mesh of all ranks. offsets: those of the rows to
        come, where they are not the model's own.
        """
        change = None
        if offsets is not None:
            own = self.offsets or Offsets.none(self.n_features, self.targets.n_outputs)
            if left := own - offsets:
                change = (torch.from_numpy(left.x).to(self.centers.device), left.y)
        return ModelShard(
            self.kernel,
            UnpreparedPoints(self.centers, lambda some: self.kernel.left(self.inputs(some))).whole(),
            self.weights.T.contiguous(),
            self.inputs,
            self.targets,
            mesh or Mesh(0, 1, self.centers.device),
            change,
            self.effects,
            self.linear,
        )

    def outputs(self, x: Tensor, prepared: ModelShard | None = None) -> Tensor:
        """f(x), (n, c), in the units of the targets, for x, (n, d), on the model's device; O(npd) time.

        Both are less the model's offsets. `as_stored` and `with_offsets` make x of values, and values of f(x).
        For classes, column k is the score of class k, fitted to be 1 for its rows and 0 for the others. Raises
        InputError where x has another number of features, or values that are not finite.
        """
        if x.ndim != 2 or x.shape[1] != self.n_features:
            raise InputError(
                f"x has the shape {tuple(x.shape)}; the model takes (n, {self.n_features}) features"
            )
        return (prepared or self.prepared()).outputs(x)

    def predict(self, x: NDArray[Any] | Tensor) -> NDArray[Any]:
        """The targets, (n,) or (n, c), for regression; the labels, (n,), for classification.

        x: (n, d), or a DataFrame or other table, whose columns are found by name: the features, or the columns of the
        files that the model's store was made of. Whole-number and boolean labels of a store come back as such.
        """
        outputs = self.decision_function(x)
        if self.class_names is not None:
            labels: NDArray[Any] = self.labels[outputs.argmax(1)]
            return labels
        return outputs[:, 0] if outputs.shape[1] == 1 else outputs

    def decision_function(self, x: NDArray[Any] | Tensor) -> NDArray[Any]:
        """The outputs behind `predict`, (n, c), for x of (n, d)."""
        return self.with_offsets(self.outputs(self.as_stored(x)).cpu().numpy())

    def as_stored(self, x: NDArray[Any] | Tensor) -> Tensor:
        """x, (n, d), less the offsets of the features, as a tensor; InputError where x is no array of numbers.

        x may be a table if the model knows how its columns are found.
        """
        if self.frames is not None and (table := self.frames(x)) is not None:
            x, is_stored = table
            if is_stored:
                return _as_tensor(x).to(self.centers.device)
        if self.offsets is None or not self.offsets.x.any():
            return _as_tensor(x)
        values = x.detach().cpu().numpy() if isinstance(x, Tensor) else _as_numbers(x)
        if values.ndim != 2 or values.shape[1] != self.n_features:
            return _as_tensor(x)  # `outputs` refuses it.
        return _as_tensor(shifted(values, self.offsets.x)).to(self.centers.device)

    def with_offsets(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """Outputs, (n, c), with the offsets of the targets added in float64, where they have some."""
        if self.offsets is None or not self.offsets.y.any():
            return outputs
        added: NDArray[np.float64] = outputs.astype(np.float64) + self.offsets.y
        return added

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the model by name, on the CPU, for a model file."""
        tensors = {
            "centers": self.centers,
            "weights": self.weights,
            **self.inputs.tensors(),
            "target_offset": self.targets.offset,
            "target_scale": self.targets.scale,
        }
        tensors |= kernel_tensors(self.kernel)
        if self.offsets:
            # Only where there are some, so that a version that knows no offsets refuses the model.
            tensors["x_offset"], tensors["y_offset"] = map(torch.from_numpy, (self.offsets.x, self.offsets.y))
        if self.effects is not None:
            tensors |= self.effects.tensors()
        if self.linear is not None:
            tensors |= self.linear.tensors()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def description(self) -> dict[str, Any]:
        """All that `tensors` leaves out, as JSON: the kernel's name and parameters, and names."""
        return {
            "kernel": {"name": self.kernel.name, **self.kernel.parameters},
            "feature_names": list(self.feature_names),
            "target_names": list(self.target_names),
            "class_names": None if self.class_names is None else list(self.class_names),
            **({} if self.label_type == "text" else {"label_type": self.label_type}),
            **self.inputs.description(),
            **({} if self.effects is None else {"effects": self.effects.description()}),
            **({} if self.linear is None else {"linear": self.linear.description()}),
        }

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        description: Mapping[str, Any],
        function: KernelFunction | None = None,
    ) -> Predictor:
        """The model from its `tensors` and `description`; a callable kernel must be given again as `function`.

        Raises InputError where `function` is missing or not wanted, DamagedDataError for shapes that do not fit.
        """
        spec = description["kernel"]
        name, parameters = spec["name"], {item: spec[item] for item in spec if item != "name"}
        kernel: Kernel
        inputs = _described_inputs(tensors, description)
        _require_shapes(tensors, description, inputs)
        if name != CALLABLE:
            if function is not None:
                raise InputError(f"the model was fitted with the {name} kernel; leave kernel= out")
            kernel = named_kernel(name, parameters, tensors)
        elif function is None:
            raise InputError("the model was fitted with a callable kernel; pass it as kernel=")
        else:
            kernel = CallableKernel(function)
        classes = description["class_names"]
        offsets = None
        if "x_offset" in tensors:
            offsets = Offsets(*(tensors[name].double().cpu().numpy() for name in ("x_offset", "y_offset")))
        return cls(
            kernel,
            tensors["centers"],
            tensors["weights"],
            inputs,
            TargetCode(classes is not None, tensors["target_offset"], tensors["target_scale"]),
            tuple(description["feature_names"]),
            tuple(description["target_names"]),
            None if classes is None else tuple(classes),
            offsets,
            description.get("label_type", "text"),
            effects=_described_effects(tensors, description),
            linear=_described_linear(tensors, description, inputs.n_inputs),
        )


def unmasked(values: Any, name: str) -> Any:
    """The values, none of which a masked array masks; InputError otherwise: what lies under a mask is no value."""
    parts = values if isinstance(values, list | tuple) else [values]
    if any(isinstance(part, np.ma.MaskedArray) and np.ma.is_masked(part) for part in parts):
        raise InputError(
            f"{name} has masked values, which are missing ones; fill them in or leave those rows out"
        )
    return values


def _as_tensor(x: NDArray[Any] | Tensor) -> Tensor:
    """x itself if it is a tensor, or else as a float32 tensor; InputError where x is no array of numbers."""
    if isinstance(x, Tensor):
        return x
    array = _as_numbers(x)
    with np.errstate(over="ignore"):  # Too large values become infinite, and `outputs` refuses them.
        return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))


def _as_numbers(x: Any) -> NDArray[Any]:
    try:
        array = np.asarray(unmasked(x, "x"))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"x is no array ({error}); give an array of numbers, (n, d)") from error
    if array.dtype.kind not in "biuf":
        raise InputError(f"x holds {array.dtype}, not numbers; give an array of numbers, (n, d)")
    return array


def _described_inputs(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> InputScaling:
    try:
        return InputScaling.described(tensors, description)
    except ValueError as error:
        raise DamagedDataError(f"the model's {error}; fit again") from error


def _described_effects(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> CellEffects | None:
    if (found := description.get("effects")) is None:
        return None
    try:
        return CellEffects.described(
            tensors, found, len(tensors["input_shift"]), len(tensors["target_offset"])
        )
    except ValueError as error:
        raise DamagedDataError(f"the model's {error}; fit again") from error


def _described_linear(
    tensors: Mapping[str, Tensor], description: Mapping[str, Any], n_inputs: int
) -> LinearPart | None:
    try:
        n_outputs = len(tensors["target_offset"])
        return LinearPart.described(tensors, description.get("linear"), n_inputs, n_outputs)
    except ValueError as error:
        raise DamagedDataError(f"the model's {error}; fit again") from error


def _require_shapes(
    tensors: Mapping[str, Tensor], description: Mapping[str, Any], inputs: InputScaling
) -> None:
    """Raises DamagedDataError unless the tensors agree on d, p and c with one another and with the names."""
    for key in ("feature_names", "target_names", "class_names"):
        names = description[key]
        is_named = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
        if not is_named and not (key == "class_names" and names is None):
            raise DamagedDataError(f"{key} of the model are {names!r:.60}, not a list of names; fit again")
    d, c = len(description["feature_names"]), len(description["class_names"] or description["target_names"])
    p = len(tensors["centers"])
    vectors = {
        "input_shift": d,
        "input_scale": d,
        "target_offset": c,
        "target_scale": c,
        "kernel_centre": inputs.n_inputs,
    }
    doubles = {"x_offset": d, "y_offset": c}
    expected: dict[str, tuple[int, ...]] = {"centers": (p, d), "weights": (p, c)}
    expected |= {name: (size,) for name, size in (vectors | doubles).items()} | {"kernel_metric": (3, d)}
    expected |= inputs.direction_shapes()
    others = EFFECT_TENSORS if "effects" in description else frozenset()
    others |= set(LINEAR_TENSORS) if "linear" in description else frozenset()
    for name, tensor in tensors.items():
        if name in others:  # Their class looks at them.
            continue
        dtype = torch.float64 if name in doubles else torch.float32
        if tuple(tensor.shape) != expected.get(name) or tensor.dtype != dtype:
            raise DamagedDataError(
                f"{name} of the model is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {expected.get(name)}; "
                "fit again"
            )
