"""Settings of all tests: how examples are drawn, and what a run says at its end about tests that did not run."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every run of continuous integration, new ones on a developer's machine. A busy machine may
# hold any example up, so there is no deadline; examples that share a directory make paths of their own in it.
unhurried = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.register_profile("dev", unhurried)
settings.register_profile("ci", unhurried, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# A shell gives what it starts in the background an ignored SIGINT, which all processes below would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def level_of_the_log() -> Iterator[None]:
    """The command line and the tools set the level of the package's logger; the next test finds it as it was."""
    package = logging.getLogger("ep3stream")
    level = package.level
    yield
    package.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def quick_measurements() -> Iterator[None]:
    """How fast this machine is, is measured in a moment: no test asks how exactly.

    Where no test has imported torch, none fits, and it is not waited for.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:
            patch.setattr("ep3stream.training.budget._ROUNDS", 3)
            patch.setattr("ep3stream.planning.pilot._STEP_FOR_S", 0.02)
        yield


@pytest.fixture(scope="module")
def quick_columns() -> Iterator[None]:
    """Kernels on columns learn their weights from few rows in few steps: enough for small problems."""
    yield from _learning_in(steps=20, small_steps=10, near_steps=30)


@pytest.fixture(scope="module")
def fewest_steps() -> Iterator[None]:
    """As `quick_columns`, in a few steps of each kind: on a pretended GPU a step takes ten times as long."""
    yield from _learning_in(steps=8, small_steps=4, near_steps=6)


def _learning_in(steps: int, small_steps: int, near_steps: int) -> Iterator[None]:
    from ep3stream.solver import column_weights

    few = {"_STEPS": steps, "_SMALL_STEPS": small_steps, "_ROWS": 300, "_CENTERS": 50, "_SHARP_ROWS": 1000}
    large = {"_LARGE_ROWS": 300, "_LARGE_CENTERS": 50}
    near = {"_NEAR_STEPS": near_steps, "_NEAR_ROWS": 400, "_FEWEST_NEAR_ROWS": 200, "_NEAR_CENTERS": 80}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (few | large | near).items():
            patch.setattr(column_weights, name, value)
        yield


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """Lists the skipped tests by reason, and the markers that were not selected.

    Works under xdist too: its reports carry (file, line, reason) as the skipped test's process made them.
    """
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    terminalreporter.section("not run", sep="-")
    for reason, n_tests in sorted(reasons.items(), key=lambda entry: (-entry[1], entry[0])):
        terminalreporter.line(f"{n_tests:>5} skipped: {reason}")
    if not reasons:
        terminalreporter.line("no test was skipped")
    terminalreporter.line(f"selected: -m {config.getoption('markexpr') or 'all'!r}")
