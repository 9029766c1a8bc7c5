"""From the name and parameters of a kernel, in settings and model files, to the kernel; and the median heuristics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ep3stream.config import KERNEL_DEFAULTS, KernelConfig, PrecisionChoice
from ep3stream.errors import ConfigError
from ep3stream.solver.columns import COLUMN_KERNELS, ColumnKernel
from ep3stream.solver.dot_product import NtkKernel, PolynomialKernel
from ep3stream.solver.kernels import Kernel, RadialKernel

NAMED_KERNELS = tuple(KERNEL_DEFAULTS)


def measured_kernel(choice: KernelConfig, sample: Tensor, centre: Tensor) -> Kernel:
    """The kernel of the settings, its bandwidth measured on sample, (n, d), scaled inputs, where it is `median`.

    centre: (d,), the mean of the scaled inputs; only radial kernels use it. Raises ConfigError where there is no
    median, or where K(x, x) is not finite for a row of the sample.
    """
    parameters = choice.parameters()
    if parameters.get("bandwidth") == "median":
        measure = median_norm if choice.name == "polynomial" else median_bandwidth
        parameters["bandwidth"] = measure(sample)
    kernel = named_kernel(choice.name, parameters, {"kernel_centre": centre})
    if not bool(kernel.diagonal(sample).isfinite().all()):
        raise ConfigError(
            f"the {choice.name} kernel with {parameters} is not finite in float32 for the sampled rows; "
            "use a larger bandwidth, a smaller degree or --scale auto"
        )
    return kernel


def kernel_tensors(kernel: Kernel) -> dict[str, Tensor]:
    """What `named_kernel` needs of a kernel beside name and parameters, by the name in files."""
    if isinstance(kernel, RadialKernel):
        return {"kernel_centre": kernel.centre}
    if isinstance(kernel, ColumnKernel):
        return {"kernel_metric": kernel.metric}
    return {}


def named_kernel(name: str, parameters: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Kernel:
    """The kernel with this name and all of its parameters; ConfigError for an unknown name or a missing parameter.

    tensors: for radial kernels `kernel_centre`, (d,); for those on columns `kernel_metric`, (3, d); others are ignored.
    """
    KernelConfig(name, **parameters)  # type: ignore[arg-type]
    missing = [item for item in KERNEL_DEFAULTS[name] if parameters.get(item) in (None, "median")]
    if missing:
        raise ConfigError(f"the {name} kernel needs {', '.join(missing)}")
    if name == "polynomial":
        return PolynomialKernel(**parameters)
    if name in ("ntk_relu", "ntk_relu_unit_sphere"):
        return NtkKernel(**parameters, on_sphere=name == "ntk_relu_unit_sphere")
    needed = "kernel_metric" if name in COLUMN_KERNELS else "kernel_centre"
    if needed not in tensors:
        raise ConfigError(f"the {name} kernel needs {needed}, which is not there")
    if name in COLUMN_KERNELS:
        return ColumnKernel.of(name, tensors[needed], **parameters)
    return RadialKernel(name, centre=tensors[needed], **parameters)


def with_precision(kernel: Kernel, precision: PrecisionChoice) -> Kernel:
    """The kernel with inputs rounded to this precision; ConfigError unless it is float32 or the kernel is radial.

    `auto`, where nothing has settled it, is float32.
    """
    if precision == "auto" or precision == "float32":
        return kernel
    if not isinstance(kernel, RadialKernel):
        raise ConfigError(
            f"precision is {precision!r}, but the kernel {kernel.name!r} is evaluated in float32; leave precision out"
        )
    return replace(kernel, precision=precision)


def median_bandwidth(x: Tensor) -> float:
    """Median distance between rows of x, (n, d), in random order, from up to 4n pairs across its two halves; O(nd).

    The median heuristic: a typical pair then has K(x, z) = exp(-1) under the Laplacian kernel. Raises ConfigError for
    fewer than two rows, and where half of the pairs coincide.
    """
    half = len(x) // 2
    one, other = x[:half], x[half : 2 * half]
    pairs = [(one - other.roll(shift, 0)).norm(dim=1) for shift in range(min(half, 8))]
    if not pairs:
        raise ConfigError(
            f"{len(x)} sample is left beside the centers and the rows to validate on, too few to measure a distance; "
            "give more rows, fewer centers, or a bandwidth"
        )
    median = float(torch.cat(pairs).median())
    if median == 0:
        raise ConfigError(
            f"bandwidth is 'median' but half of the {len(x)} sampled rows or more coincide; "
            "give --bandwidth a positive number"
        )
    return median


def median_norm(x: Tensor) -> float:
    """Median |x| of the rows of x, (n, d), as a bandwidth: a typical row has K(x, x) = (1 + offset)^degree.

    Raises ConfigError where the median is zero.
    """
    median = float(x.norm(dim=1).median()) if len(x) else 0.0
    if median == 0:
        raise ConfigError(
            f"bandwidth is 'median' but half of the {len(x)} sampled rows or more are zero; "
            "give --bandwidth a positive number"
        )
    return median
