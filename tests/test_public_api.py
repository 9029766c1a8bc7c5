"""The public names are frozen here: a change of them is a change of this list, on purpose."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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

# Imported when asked for, since they need scikit-learn; left out of `import *` for the same reason.
LAZY = ["KernelClassifier", "KernelRegressor"]


def test_the_public_names_are_these_and_all_exist():
    assert ep3stream.__all__ == NAMES
    assert all(hasattr(ep3stream, name) for name in [*NAMES, *LAZY])


def test_what_is_imported_when_asked_for_is_what_type_checkers_are_told():
    """A name of `_LAZY` that no checker knows, or the other way round, or from another module, is found here."""
    tree = ast.parse(Path(ep3stream.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in checked.body for alias in node.names}
    assert told == ep3stream._LAZY
    assert set(told) <= {*NAMES, *LAZY}
    assert {*NAMES, *LAZY} <= set(dir(ep3stream))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'fti'"):
        _ = ep3stream.fti


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


def test_the_package_imports_nothing_before_it_is_used():
    """All that is imported before `main` is time in which a SIGTERM ends a fit with nothing saved."""
    program = (
        "import sys; before = set(sys.modules); import ep3stream.__main__; "
        "print(sorted(set(sys.modules) - before - {'ep3stream', 'ep3stream.__main__'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = {name.partition(".")[0] for name in ast.literal_eval(done.stdout)}
    assert found <= {"importlib", "warnings", "_warnings"}


def test_rooms_are_found_where_they_always_were():
    program = "import ep3stream; print(ep3stream.config.FitConfig is ep3stream.FitConfig, ep3stream.errors.__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "ep3stream.errors"]
