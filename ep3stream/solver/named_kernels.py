"""The kernels of the settings and of model files, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ep3stream.config import KERNEL_DEFAULTS, KernelConfig, Precision
from ep3stream.errors import ConfigError
from ep3stream.solver.dot_product import NtkKernel, PolynomialKernel
from ep3stream.solver.kernels import Kernel, RadialKernel, median_bandwidth

NAMED_KERNELS = tuple(KERNEL_DEFAULTS)


def measured_kernel(choice: KernelConfig, sample: Tensor, centre: Tensor) -> Kernel:
    """The kernel of the settings; a bandwidth that is `median` is measured on sample, (n, d), scaled inputs.

    centre: (d,), the mean of scaled inputs, used by kernels of the distance only. Raises ConfigError where
    there is no median, or where K(x, x) is not finite for a row of the sample.
    """
    parameters = choice.parameters()
    if parameters.get("bandwidth") == "median":
        measure = median_norm if choice.name == "polynomial" else median_bandwidth
        parameters["bandwidth"] = measure(sample)
    kernel = named_kernel(choice.name, parameters, centre)
    if not bool(kernel.diagonal(sample).isfinite().all()):
        raise ConfigError(
            f"the {choice.name} kernel with {parameters} is not finite in float32 for the sampled rows; "
            "use a larger bandwidth, a smaller degree or --scale standard"
        )
    return kernel


def named_kernel(name: str, parameters: Mapping[str, Any], centre: Tensor | None) -> Kernel:
    """The kernel that has this `name` and these `parameters`, all of them; ConfigError if there is none.

    centre: (d,) for kernels of the distance; the others have none.
    """
    KernelConfig(name, **parameters)  # type: ignore[arg-type]
    missing = [item for item in KERNEL_DEFAULTS[name] if parameters.get(item) in (None, "median")]
    if missing:
        raise ConfigError(f"the {name} kernel needs {', '.join(missing)}")
    if name == "polynomial":
        return PolynomialKernel(**parameters)
    if name in ("ntk_relu", "ntk_relu_unit_sphere"):
        return NtkKernel(**parameters, on_sphere=name == "ntk_relu_unit_sphere")
    if centre is None:
        raise ConfigError(f"the {name} kernel needs the centre of the inputs")
    return RadialKernel(name, centre=centre, **parameters)


def with_precision(kernel: Kernel, precision: Precision) -> Kernel:
    """The kernel of inputs of this precision; ConfigError where it has no use for another than float32."""
    if precision == "float32":
        return kernel
    if not isinstance(kernel, RadialKernel):
        raise ConfigError(
            f"precision is {precision!r}, but the kernel {kernel.name!r} is evaluated in float32; leave precision out"
        )
    return replace(kernel, precision=precision)


def median_norm(x: Tensor) -> float:
    """Median |x| of the rows of x, (n, d): K(x, x) = (1 + offset)^degree for a typical row; ConfigError if 0."""
    median = float(x.norm(dim=1).median()) if len(x) else 0.0
    if median == 0:
        raise ConfigError(
            f"bandwidth is 'median' but half of the {len(x)} sampled rows or more are zero; "
            "give --bandwidth a positive number"
        )
    return median
