"""Large kernel machines on data that does not fit in memory.

import ep3stream

ep3stream.convert(["flights.csv"], "flights.zarr", ep3stream.ConvertConfig(target="delay"))
ep3stream.fit("flights.zarr", "runs/first")
ep3stream.load("runs/first").predict(x)
"""

from importlib import import_module

# What type checkers take for true. `typing` has it too, and takes 8 ms in which a SIGTERM would end the process.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from ep3stream.config import ConvertConfig as ConvertConfig
    from ep3stream.config import DataConfig as DataConfig
    from ep3stream.config import FitConfig as FitConfig
    from ep3stream.config import KernelConfig as KernelConfig
    from ep3stream.config import RunConfig as RunConfig
    from ep3stream.config import SolverConfig as SolverConfig
    from ep3stream.conversion.convert import convert
    from ep3stream.errors import ConfigError as ConfigError
    from ep3stream.errors import DamagedDataError as DamagedDataError
    from ep3stream.errors import DivergedError as DivergedError
    from ep3stream.errors import Ep3streamError as Ep3streamError
    from ep3stream.errors import InputError as InputError
    from ep3stream.errors import Interrupted as Interrupted
    from ep3stream.errors import SourceError as SourceError
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

# Imported when asked for (PEP 562): torch and zarr take two seconds, which `ep3stream --help` need not wait for, and
# the settings a tenth, in which `ep3stream fit` could not yet hold back a SIGTERM.
# The imports above say the same to type checkers and editors; a test holds the two together.
_LAZY = {
    "ConfigError": "ep3stream.errors",
    "ConvertConfig": "ep3stream.config",
    "DamagedDataError": "ep3stream.errors",
    "DataConfig": "ep3stream.config",
    "DivergedError": "ep3stream.errors",
    "Ep3streamError": "ep3stream.errors",
    "FitConfig": "ep3stream.config",
    "FitPlan": "ep3stream.planning.forecast",
    "InputError": "ep3stream.errors",
    "Interrupted": "ep3stream.errors",
    "KernelClassifier": "ep3stream.estimator",
    "KernelConfig": "ep3stream.config",
    "KernelModel": "ep3stream.online.kernel_model",
    "KernelRegressor": "ep3stream.estimator",
    "RunConfig": "ep3stream.config",
    "SolverConfig": "ep3stream.config",
    "SourceError": "ep3stream.errors",
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
    if name in ("config", "errors"):
        return import_module(f"{__name__}.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value  # The next time is as fast as any other name.
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
