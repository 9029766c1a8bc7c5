"""The trained model f(x) = offset + scale * sum_i alpha_i K(x, z_i), in the units of the data.

How much a kernel machine's outputs change along each input: the diagonal of its average gradient outer product.

Radhakrishnan, Beaglehole, Pandit and Belkin (Science 2024, "Mechanism for feature learning in neural networks and
backpropagation-free machine learning models") take the kernel's distances in the metric of that matrix and fit again;
its diagonal weighs each feature by what the last model made of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.config import Scale
from ep3stream.errors import DamagedDataError, InputError
from ep3stream.mesh import Mesh
from ep3stream.solver.blocks import tiles, times_kernel
from ep3stream.solver.kernels import CALLABLE, CallableKernel, Kernel, KernelFunction, RadialKernel
from ep3stream.solver.named_kernels import named_kernel
from ep3stream.solver.points import Points
from ep3stream.solver.targets import TargetCode

_PREDICT_ROWS = 2048


@dataclass(frozen=True, slots=True)
class InputScaling:
    """(x - shift) * scale, per feature; shift and scale: (d,). A constant feature has the scale 0."""

    shift: Tensor
    scale: Tensor

    @classmethod
    def of(cls, kind: Scale, mean: Tensor, std: Tensor, minimum: Tensor, maximum: Tensor) -> InputScaling:
        """`standard` to mean 0 and variance 1, `minmax` to [0, 1], `none` leaves inputs as they are."""
        if kind == "standard":
            return cls(mean.float(), _inverse(std).float())
        if kind == "minmax":
            return cls(minimum.float(), _inverse(maximum - minimum).float())
        return cls(torch.zeros_like(mean, dtype=torch.float32), torch.ones_like(mean, dtype=torch.float32))

    def __call__(self, x: Tensor) -> Tensor:
        """Scaled copy of x, (n, d)."""
        return (x - self.shift).mul_(self.scale)  # Fresh memory costs more than arithmetic.

    def to(self, device: torch.device) -> InputScaling:
        """On another device."""
        return InputScaling(self.shift.to(device), self.scale.to(device))


def _inverse(spread: Tensor) -> Tensor:
    return torch.where(spread > 0, 1 / spread.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


@dataclass(frozen=True, slots=True)
class ModelShard:
    """This rank's share of a model, ready to predict with the others.

    centers: p_shard of them, scaled and prepared; weights: (c, p_shard); both on the mesh's device.
    """

    kernel: Kernel
    centers: Points
    weights: Tensor
    inputs: InputScaling
    targets: TargetCode
    mesh: Mesh

    def outputs(self, x: Tensor) -> Tensor:
        """f(x), (n, c), for the same x, (n, d), on every rank, in the units of the targets; O(n p_shard d) time.

        Raises InputError where x is not finite.
        """
        parts = [self._outputs_of(rows) for rows in torch.split(x, _PREDICT_ROWS)]
        return torch.cat(parts) if parts else x.new_empty(0, self.targets.n_outputs)

    def _outputs_of(self, x: Tensor) -> Tensor:
        x = self.inputs(x.to(self.weights))
        if not bool(torch.isfinite(x).all()):
            raise InputError("x has a value that is not finite; fill or drop missing values first")
        share = times_kernel(self.kernel, self.weights, self.centers, self.kernel.right(x))
        return self.targets.decode(self.mesh.all_reduce(share))


@dataclass(frozen=True, slots=True)
class Predictor:
    """A kernel machine ready to predict.

    centers: (p, d) in the units of the data; weights: (p, c). class_names is None for regression.
    """

    kernel: Kernel
    centers: Tensor
    weights: Tensor
    inputs: InputScaling
    targets: TargetCode
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]
    class_names: tuple[str, ...] | None

    @property
    def n_features(self) -> int:
        """d."""
        return self.centers.shape[1]

    def to(self, device: torch.device) -> Predictor:
        """The same model on another device."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        function = self.kernel.function if isinstance(self.kernel, CallableKernel) else None
        return Predictor.of(tensors, self.description(), function)

    def prepared(self, mesh: Mesh | None = None) -> ModelShard:
        """Centers ready for blocks and weights outputs-first, to be reused over many calls of `outputs`.

        mesh: of the ranks that have the other centers, where this is a shard.
        """
        return ModelShard(
            self.kernel,
            self.kernel.left(self.inputs(self.centers)),
            self.weights.T.contiguous(),
            self.inputs,
            self.targets,
            mesh or Mesh(0, 1, self.centers.device),
        )

    def outputs(self, x: Tensor, prepared: ModelShard | None = None) -> Tensor:
        """f(x) for x of (n, d), on the model's device: (n, c), in the units of the targets; O(npd) time.

        For classes, column k is the fitted probability-like score of class k. Raises InputError when x has
        another number of features or values that are not finite.
        """
        if x.ndim != 2 or x.shape[1] != self.n_features:
            raise InputError(
                f"x has the shape {tuple(x.shape)}; the model takes (n, {self.n_features}) features"
            )
        return (prepared or self.prepared()).outputs(x)

    def predict(self, x: NDArray[Any] | Tensor) -> NDArray[Any]:
        """Targets, (n,) or (n, c), for regression; class names, (n,), for classification. x: (n, d)."""
        outputs = self.decision_function(x)
        if self.class_names is not None:
            labels: NDArray[np.str_] = np.asarray(self.class_names)[outputs.argmax(1)]
            return labels
        return outputs[:, 0] if outputs.shape[1] == 1 else outputs

    def decision_function(self, x: NDArray[Any] | Tensor) -> NDArray[np.float32]:
        """The scores behind `predict`, (n, c)."""
        scores: NDArray[np.float32] = self.outputs(_as_tensor(x)).cpu().numpy()
        return scores

    def tensors(self) -> dict[str, Tensor]:
        """Everything numeric, by name, for a model file."""
        tensors = {
            "centers": self.centers,
            "weights": self.weights,
            "input_shift": self.inputs.shift,
            "input_scale": self.inputs.scale,
            "target_offset": self.targets.offset,
            "target_scale": self.targets.scale,
        }
        if isinstance(self.kernel, RadialKernel):
            tensors["kernel_centre"] = self.kernel.centre
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def description(self) -> dict[str, Any]:
        """Everything else, as JSON."""
        return {
            "kernel": {"name": self.kernel.name, **self.kernel.parameters},
            "feature_names": list(self.feature_names),
            "target_names": list(self.target_names),
            "class_names": None if self.class_names is None else list(self.class_names),
        }

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        description: Mapping[str, Any],
        function: KernelFunction | None = None,
    ) -> Predictor:
        """The model that `tensors` and `description` came from; a callable kernel must be given again.

        Raises InputError when `function` is missing or not wanted, DamagedDataError for shapes that do not fit.
        """
        spec = description["kernel"]
        name, parameters = spec["name"], {item: spec[item] for item in spec if item != "name"}
        kernel: Kernel
        _require_shapes(tensors, description)
        if name != CALLABLE:
            if function is not None:
                raise InputError(f"the model was fitted with the {name} kernel; leave kernel= out")
            kernel = named_kernel(name, parameters, tensors.get("kernel_centre"))
        elif function is None:
            raise InputError("the model was fitted with a callable kernel; pass it as kernel=")
        else:
            kernel = CallableKernel(function)
        classes = description["class_names"]
        return cls(
            kernel,
            tensors["centers"],
            tensors["weights"],
            InputScaling(tensors["input_shift"], tensors["input_scale"]),
            TargetCode(classes is not None, tensors["target_offset"], tensors["target_scale"]),
            tuple(description["feature_names"]),
            tuple(description["target_names"]),
            None if classes is None else tuple(classes),
        )


def _as_tensor(x: NDArray[Any] | Tensor) -> Tensor:
    """x as it is, or as a float32 tensor over memory that torch may call its own; raises InputError."""
    if isinstance(x, Tensor):
        return x
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise InputError(f"x is no array ({error}); give an array of numbers, (n, d)") from error
    if array.dtype.kind not in "biuf":
        raise InputError(f"x holds {array.dtype}, not numbers; give an array of numbers, (n, d)")
    with np.errstate(over="ignore"):  # Such values become infinite, which `outputs` names.
        return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))


def _require_shapes(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """DamagedDataError unless d, p and c agree among the tensors and with the names."""
    for key in ("feature_names", "target_names", "class_names"):
        names = description[key]
        is_named = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
        if not is_named and not (key == "class_names" and names is None):
            raise DamagedDataError(f"{key} of the model are {names!r:.60}, not a list of names; fit again")
    d, c = len(description["feature_names"]), len(description["class_names"] or description["target_names"])
    p = len(tensors["centers"])
    vectors = {"input_shift": d, "input_scale": d, "target_offset": c, "target_scale": c, "kernel_centre": d}
    expected = {"centers": (p, d), "weights": (p, c)} | {name: (size,) for name, size in vectors.items()}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected.get(name) or tensor.dtype != torch.float32:
            raise DamagedDataError(
                f"{name} of the model is {tensor.dtype} {tuple(tensor.shape)}, not float32 {expected.get(name)}; "
                "fit again"
            )


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
