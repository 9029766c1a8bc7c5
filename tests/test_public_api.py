"""The public names are frozen here: a change of them is a change of this list, on purpose."""

from __future__ import annotations

import ep3stream

NAMES = [
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

# Imported when asked for, since they need scikit-learn; left out of `import *` for the same reason.
LAZY = ["KernelClassifier", "KernelRegressor"]


def test_the_public_names_are_these_and_all_exist():
    assert ep3stream.__all__ == NAMES
    assert all(hasattr(ep3stream, name) for name in [*NAMES, *LAZY])


def test_every_public_name_says_what_it_is():
    assert all(getattr(ep3stream, name).__doc__ for name in [*NAMES, *LAZY])


def test_every_error_ends_a_command_with_its_own_exit_code():
    codes = {
        "InputError": 2,
        "ConfigError": 2,
        "SourceError": 2,
        "DamagedDataError": 3,
        "DivergedError": 4,
        "Interrupted": 75,
    }
    assert {name: getattr(ep3stream, name).exit_code for name in codes} == codes
    assert all(issubclass(getattr(ep3stream, name), ep3stream.Ep3streamError) for name in codes)
