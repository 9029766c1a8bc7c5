"""Large kernel machines on data that does not fit in memory.

import ep3stream

ep3stream.convert(["flights.csv"], "flights.zarr", ep3stream.ConvertConfig(target="delay"))
ep3stream.fit("flights.zarr", "runs/first")
ep3stream.load("runs/first").predict(x)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ep3stream.config import ConvertConfig, DataConfig, FitConfig, KernelConfig, RunConfig, SolverConfig
from ep3stream.errors import (
    ConfigError,
    DamagedDataError,
    DivergedError,
    Ep3streamError,
    InputError,
    Interrupted,
    SourceError,
)

if TYPE_CHECKING:
    from ep3stream.conversion.convert import convert
    from ep3stream.estimator import KernelClassifier as KernelClassifier
    from ep3stream.estimator import KernelRegressor as KernelRegressor
    from ep3stream.inspection.inspect import inspect, verify
    from ep3stream.online.kernel_model import KernelModel
    from ep3stream.planning.forecast import FitPlan, plan
    from ep3stream.prediction.evaluate import evaluate
    from ep3stream.prediction.models import export, load
    from ep3stream.prediction.predict import predict
    from ep3stream.reporting.compare import write_comparison
    from ep3stream.reporting.report import write_report
    from ep3stream.store.reader import open_store
    from ep3stream.stream.torch_dataset import StoreDataset
    from ep3stream.training.fit import fit
    from ep3stream.tuning.tune import TuneResult, tune

# KernelClassifier and KernelRegressor, which need scikit-learn, are no part of `import *`.
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
    "StoreDataset",
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

# Imported when asked for (PEP 562): torch and zarr take two seconds, which `ep3stream --help` need not wait for.
# The imports above say the same to type checkers and editors; a test holds the two together.
_LAZY = {
    "FitPlan": "ep3stream.planning.forecast",
    "KernelClassifier": "ep3stream.estimator",
    "KernelModel": "ep3stream.online.kernel_model",
    "KernelRegressor": "ep3stream.estimator",
    "StoreDataset": "ep3stream.stream.torch_dataset",
    "TuneResult": "ep3stream.tuning.tune",
    "convert": "ep3stream.conversion.convert",
    "evaluate": "ep3stream.prediction.evaluate",
    "export": "ep3stream.prediction.models",
    "fit": "ep3stream.training.fit",
    "inspect": "ep3stream.inspection.inspect",
    "load": "ep3stream.prediction.models",
    "open_store": "ep3stream.store.reader",
    "plan": "ep3stream.planning.forecast",
    "predict": "ep3stream.prediction.predict",
    "tune": "ep3stream.tuning.tune",
    "verify": "ep3stream.inspection.inspect",
    "write_comparison": "ep3stream.reporting.compare",
    "write_report": "ep3stream.reporting.report",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value  # The next time is as fast as any other name.
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
