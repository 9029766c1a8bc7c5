"""Every setting of a conversion and of a fit, checked before any work; a fit's settings read and write TOML."""

from ep3stream.config.convert import (
    MIB,
    Categories,
    Codec,
    ConvertConfig,
    DatePart,
    Format,
    Missing,
    Task,
    Unknown,
    XDtype,
)
from ep3stream.config.fit import (
    CONFIG_VERSION,
    MAX_CONFIG_BYTES,
    READ_TIMEOUT_S,
    DataConfig,
    FitConfig,
    RunConfig,
    Scale,
)
from ep3stream.config.kernel import KERNEL_DEFAULTS, KernelConfig, KernelName
from ep3stream.config.parse import parse_bytes, parse_names, parse_renames, parse_splits, parse_weights
from ep3stream.config.solver import Precision, Projection, SolverConfig, StepRule

__all__ = [
    "CONFIG_VERSION",
    "KERNEL_DEFAULTS",
    "MAX_CONFIG_BYTES",
    "MIB",
    "READ_TIMEOUT_S",
    "Categories",
    "Codec",
    "ConvertConfig",
    "DataConfig",
    "DatePart",
    "FitConfig",
    "Format",
    "KernelConfig",
    "KernelName",
    "Missing",
    "Precision",
    "Projection",
    "RunConfig",
    "Scale",
    "SolverConfig",
    "StepRule",
    "Task",
    "Unknown",
    "XDtype",
    "parse_bytes",
    "parse_names",
    "parse_renames",
    "parse_splits",
    "parse_weights",
]
