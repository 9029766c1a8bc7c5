"""A model as one module of plain PyTorch operations, which `torch.export` turns into a program.

The kernels of the solver write into given memory and branch on devices and values, which torch.export cannot follow.
So their formulas stand here once more; the tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ep3stream.errors import InputError
from ep3stream.solver.cell_effects import CellEffects, Factor
from ep3stream.solver.columns import ColumnKernel
from ep3stream.solver.dot_product import NtkKernel, PolynomialKernel
from ep3stream.solver.input_directions import LeadingDirections
from ep3stream.solver.kernels import CallableKernel, RadialKernel
from ep3stream.solver.linear_part import LinearPart
from ep3stream.solver.model import Predictor

_TILE_CENTERS = 4096
_EXAMPLE_ROWS = 8


class ServedModel(torch.nn.Module):
    """Maps x, (n, d), to outputs, (n, c), both float32 and in the units of the data; not finite inputs give nan.

    With offsets x is float64, and outputs are where targets have offsets.

    O(npd) time, and memory for n times 4096 kernel values: choose n accordingly.
    """

    input_shift: Tensor
    input_scale: Tensor
    bends: Tensor
    numbers: Tensor
    number_at: Tensor
    codes: Tensor
    code_at: Tensor
    last: Tensor
    directions: Tensor
    input_leading: Tensor
    input_origin: Tensor
    centre: Tensor
    centers: Tensor
    weights: Tensor
    offset: Tensor
    target_scale: Tensor
    linear_weights: Tensor
    linear_constant: Tensor
    linear_range: Tensor
    x_offset: Tensor
    y_offset: Tensor

    def __init__(self, model: Predictor) -> None:
        super().__init__()
        self.of_kernel = _formula(model.kernel)
        centre = getattr(model.kernel, "centre", torch.zeros(model.inputs.n_inputs))
        for name, tensor in {
            "input_shift": model.inputs.shift,
            "input_scale": model.inputs.scale,
            "centre": centre,
            "centers": model.inputs(model.centers) - centre.to(model.centers.device),
            "weights": model.weights * model.targets.scale,
            "offset": model.targets.offset,
            "target_scale": model.targets.scale,
        }.items():
            self.register_buffer(name, tensor.detach().cpu().float().contiguous())
        self.has_bends = bool(model.inputs.bends)
        if self.has_bends:
            self.register_buffer("bends", torch.tensor(model.inputs.bends))
        self.n_scaled, self.has_codes = model.inputs.n_scaled, bool(model.inputs.n_codes)
        self.has_directions = model.inputs.directions is not None
        if model.inputs.directions is not None:
            self.register_buffer("directions", model.inputs.directions.detach().cpu())
        self.stretch = 0.0
        if (leading := model.inputs.leading) is not None:
            self.stretch = leading.stretch
            for name, tensor in leading.tensors().items():
                self.register_buffer(name, tensor.detach().cpu())
        if self.has_codes:
            layout = model.inputs.layout(torch.device("cpu"))
            for name in ("numbers", "number_at", "codes", "code_at", "last"):
                self.register_buffer(name, getattr(layout, name))
        self.has_linear = model.linear is not None
        if model.linear is not None:
            for name, tensor in model.linear.tensors().items():
                self.register_buffer(name, tensor.detach().cpu())
        self.effects = None if model.effects is None else _ServedEffects(model.effects)
        x, y = (None, None) if model.offsets is None else (model.offsets.x, model.offsets.y)
        self.has_x, self.has_y = x is not None, y is not None and bool(y.any())
        for name, values in (("x_offset", x), ("y_offset", y)):
            if values is not None:
                self.register_buffer(name, torch.from_numpy(values))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, (n, c), for x of (n, d)."""
        if self.has_x:
            x = (x - self.x_offset).float()
        inputs = self._scaled(x)
        if self.has_directions:
            is_vector = self.directions.ndim == 1
            inputs = inputs * self.directions if is_vector else inputs @ self.directions
        if self.stretch:
            inputs = LeadingDirections(self.input_leading, self.input_origin, self.stretch)(inputs)
        outputs = self.offset.expand(x.shape[0], -1)
        if self.has_linear:
            linear = LinearPart(self.linear_weights, self.linear_constant, self.linear_range)
            outputs = outputs + linear(inputs) * self.target_scale
        inputs = inputs - self.centre
        for start in range(0, len(self.centers), _TILE_CENTERS):
            tile = slice(start, start + _TILE_CENTERS)
            outputs = outputs + self.of_kernel(inputs, self.centers[tile]) @ self.weights[tile]
        if self.effects is not None:
            outputs = outputs + self.effects(x) * self.target_scale
        return outputs.double() + self.y_offset if self.has_y else outputs

    def _scaled(self, x: Tensor) -> Tensor:
        """What `InputScaling.scaled` makes of x, (n, d): numbers scaled or bent, codes as 0/1 features; (n, D)."""
        scaled = x - self.input_shift
        if self.has_bends:
            scaled = torch.where(self.bends > 0, torch.asinh(scaled * self.bends), scaled)
        scaled = scaled * self.input_scale
        if not self.has_codes:
            return scaled
        codes = x[:, self.codes]
        places = torch.minimum(codes.long().clamp_min(0), self.last)
        values = (codes == places).to(scaled) * self.input_scale[self.codes] + (codes - codes)
        points = scaled.new_zeros(x.shape[0], self.n_scaled)
        points = points.index_copy(1, self.number_at, scaled[:, self.numbers])
        return points.scatter(1, self.code_at + places, values)


class _ServedEffects(torch.nn.Module):
    """Maps x, (n, d), to the effects of its cells, (n, c), in the unit of coded targets; their tensors are buffers."""

    values: Tensor

    def __init__(self, effects: CellEffects) -> None:
        super().__init__()
        self._features = [factor.feature for factor in effects.factors]
        self._crosses = effects.crosses
        self.register_buffer("values", effects.values.cpu())
        for number, factor in enumerate(effects.factors):
            self.register_buffer(f"edges_{number}", factor.edges.cpu().clone())  # They may share memory.

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the effects of each row's cells."""
        factors = [
            Factor(feature, self.get_buffer(f"edges_{number}"))
            for number, feature in enumerate(self._features)
        ]
        return CellEffects(tuple(factors), self._crosses, self.values)(x)


def exported_program(model: Predictor) -> ExportedProgram:
    """The model as a program for any number of rows; InputError for a callable that torch.export cannot follow."""
    example = model.centers[:1].cpu().expand(_EXAMPLE_ROWS, -1).contiguous()
    served = ServedModel(model).eval()
    if served.has_x:
        example = example.double() + served.x_offset
    try:
        with torch.no_grad():
            return torch.export.export(served, (example,), dynamic_shapes={"x": {0: Dim("rows")}})
    except Exception as error:  # torch.export raises errors of many types.
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the {model.kernel.name} kernel cannot be exported as a program ({reason}); write it with plain torch "
            "operations, without branches on values"
        ) from error


def _formula(kernel: object) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of x, (n, d), and z, (p, d), that returns K(X, Z), (n, p)."""
    if isinstance(kernel, RadialKernel):
        return lambda x, z: _radial(kernel, x, z)
    if isinstance(kernel, ColumnKernel):
        return _columns(kernel)
    if isinstance(kernel, PolynomialKernel):
        return lambda x, z: ((x @ z.T) / kernel.bandwidth**2 + kernel.offset) ** kernel.degree
    if isinstance(kernel, NtkKernel):
        return lambda x, z: _tangent(kernel, x, z)
    assert isinstance(kernel, CallableKernel)
    return lambda x, z: kernel.function(z, x).T


def _radial(kernel: RadialKernel, x: Tensor, z: Tensor) -> Tensor:
    """phi of the distances; the formulas are those of `kernels.RadialKernel`, the smaller norms of `kernels._norms`."""
    x, z = x / kernel.bandwidth, z / kernel.bandwidth
    kept = 1 - (4 + math.sqrt(x.shape[1]) / 4) * torch.finfo(x.dtype).eps
    norms = x.square().sum(1)[:, None] + z.square().sum(1)
    squared = (kept * norms - 2 * (x @ z.T)).clamp_min(0)
    if kernel.name == "gaussian":
        return (-squared / 2).exp()
    if kernel.name == "dispersal":
        return (-(squared ** (kernel.shape / 2))).exp()
    if kernel.name == "rational_quadratic":
        return (-kernel.shape * (squared / (2 * kernel.shape)).log1p()).exp()
    distance = squared.sqrt()
    if kernel.name == "laplacian":
        return (-distance).exp()
    if kernel.name == "matern32":
        return (1 + math.sqrt(3) * distance) * (-math.sqrt(3) * distance).exp()
    assert kernel.name == "matern52"
    return (1 + math.sqrt(5) * distance + 5 / 3 * squared) * (-math.sqrt(5) * distance).exp()


def _columns(kernel: ColumnKernel) -> Callable[[Tensor, Tensor], Tensor]:
    """The product over the columns in use, whose numbers become constants of the program."""
    parts = (
        kernel.used,
        *(each[kernel.used] for each in (kernel.is_category, kernel.weights, kernel.shares)),
    )
    columns = list(zip(*(part.tolist() for part in parts), strict=True))

    def product(x: Tensor, z: Tensor) -> Tensor:
        found = torch.ones((), dtype=x.dtype)
        for j, is_category, weight, share in columns:
            distance = (x[:, j, None] - z[:, j]).abs()
            exponent = weight * (distance > 0) if is_category else (weight * distance) ** kernel.power
            factor = (-exponent).exp()
            found = found * (factor if kernel.name == "product" else (1 + share * factor) / (1 + share))
        return found

    return product


def _tangent(kernel: NtkKernel, x: Tensor, z: Tensor) -> Tensor:
    """The recursion of NtkKernel, in float64 throughout."""
    x, z = x.double(), z.double()
    if kernel.on_sphere:
        x, z = _unit(x), _unit(z)
    norms = x.norm(dim=1, keepdim=True) * z.norm(dim=1)
    cosine = (_unit(x) @ _unit(z).T).clamp(-1, 1)
    value = norms * cosine + kernel.bias**2
    for _ in range(1, kernel.depth):
        rest = math.pi - cosine.acos()
        cosine = (((1 - cosine * cosine).clamp_min(0).sqrt() + cosine * rest) / math.pi).clamp(-1, 1)
        value = value * (rest / math.pi) + norms * cosine + kernel.bias**2
    values: Tensor = value.float()
    return values


def _unit(points: Tensor) -> Tensor:
    """x / |x|, and zero for the zero vector."""
    norms: Tensor = points.norm(dim=1, keepdim=True)
    return points / norms.clamp_min(torch.finfo(points.dtype).tiny)
