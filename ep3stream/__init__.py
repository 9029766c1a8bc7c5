"""Large kernel machines on data that does not fit in memory.

import ep3stream

ep3stream.convert(["flights.csv"], "flights.zarr", ep3stream.ConvertConfig(target="delay"))
ep3stream.fit("flights.zarr", "runs/first")
ep3stream.load("runs/first").predict(x)
"""

from ep3stream.config import (
    ConvertConfig,
    DataConfig,
    FitConfig,
    KernelConfig,
    RunConfig,
    SolverConfig,
)
from ep3stream.data.conversion.convert import convert
from ep3stream.data.store import open_store
from ep3stream.errors import (
    ConfigError,
    DamagedDataError,
    DivergedError,
    Ep3streamError,
    InputError,
    Interrupted,
    SourceError,
)
from ep3stream.run.batchwise.model import KernelModel
from ep3stream.run.fitting.fit import fit
from ep3stream.run.inspection.inspect import inspect, verify
from ep3stream.run.planning.forecast import FitPlan, plan
from ep3stream.run.reporting.compare import write_comparison
from ep3stream.run.reporting.report import write_report
from ep3stream.run.tuning.tune import TuneResult, tune
from ep3stream.run.using.evaluate import evaluate, predict
from ep3stream.run.using.export import export
from ep3stream.run.using.models import load

__all__ = [
    "ConfigError",
    "ConvertConfig",
    "DamagedDataError",
    "DataConfig",
    "DivergedError",
    "Ep3streamError",
    "FitConfig",
    "FitPlan",
    "InputError",
    "Interrupted",
    "KernelConfig",
    "KernelModel",
    "RunConfig",
    "SolverConfig",
    "SourceError",
    "TuneResult",
    "convert",
    "evaluate",
    "export",
    "fit",
    "inspect",
    "load",
    "open_store",
    "plan",
    "predict",
    "tune",
    "verify",
    "write_comparison",
    "write_report",
]

# They need scikit-learn, which nothing else here does: imported when asked for, and not part of `import *`.
_LAZY = ("KernelClassifier", "KernelRegressor")


def __getattr__(name: str) -> object:
    if name in _LAZY:
        from ep3stream import estimator

        return getattr(estimator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
