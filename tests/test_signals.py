"""However early or late, a SIGTERM ends a fit with 75, all being saved, or leaves it the exit code it has anyway."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_stores import PLAIN_OPTIONS, make_store

from ep3stream.run.directory import RunDirectory
from ep3stream.run.state import is_finished

FIT = [*PLAIN_OPTIONS, "--centers", "50", "--batch-size", "32"]

# Runs a command line, and sends its process a SIGTERM at each of the moments: as a module is about to be imported, as
# Python ends, and once Python has given up its handlers.
STRUCK = """
import atexit, os, runpy, signal, sys

moments, sys.argv = sys.argv[1].split(), ["ep3stream", *sys.argv[2:]]

def strike(kill=os.kill, process=os.getpid(), number=signal.SIGTERM):
    kill(process, number)

class Finder:
    def find_spec(name, path=None, target=None):
        if name in moments:
            moments.remove(name)
            strike()

class Last:
    def __del__(self, strike=strike):
        strike()

sys.meta_path.insert(0, Finder)
if "exit" in moments:
    atexit.register(strike)
    sys.last = Last()
runpy.run_module("ep3stream", run_name="__main__")
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "smooth.zarr", n_rows=2000)


def struck(moments: str, *words: object) -> tuple[int, str]:
    """The exit code of a command that was sent a SIGTERM at these moments, and what it said."""
    command = [sys.executable, "-c", STRUCK, moments, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    return done.returncode, done.stderr


def test_a_sigterm_before_the_fit_can_handle_it_waits_for_the_fit(store: Path, tmp_path: Path) -> None:
    code, said = struck("ep3stream.cli torch", "fit", store, tmp_path / "run", *FIT)
    assert code == 75, said
    assert said.splitlines()[-1].startswith("ep3stream: SIGTERM: stopped at step 0 ")
    code, said = struck("", "fit", store, tmp_path / "run", *FIT)
    assert code == 0, said


def test_a_sigterm_after_the_fit_changes_nothing(store: Path, tmp_path: Path) -> None:
    code, said = struck("exit", "fit", store, tmp_path / "run", *FIT)
    assert code == 0, said
    assert is_finished(RunDirectory(tmp_path / "run"))


def test_a_sigterm_before_an_error_leaves_the_exit_code_of_the_error(tmp_path: Path) -> None:
    code, said = struck("ep3stream.cli exit", "fit", tmp_path / "none", tmp_path / "run")
    assert code == 2, said
    assert struck("ep3stream.cli", "fit", "--no-such-option")[0] == 2


def test_a_sigterm_to_a_conversion_ends_it_with_75_or_comes_too_late(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("a,y\n1,2\n3,4\n")
    words = ("convert", table, tmp_path / "t.zarr", "--target", "y")
    code, said = struck("ep3stream.cli torch", *words)
    assert code == 75, said
    assert said.splitlines()[-1] == "ep3stream: stopped by SIGTERM; run the same command to go on"
    code, said = struck("exit", *words)
    assert code == 0, said


def test_other_commands_end_at_once(tmp_path: Path) -> None:
    assert struck("ep3stream.cli", "inspect", tmp_path)[0] == -signal.SIGTERM


def test_signals_that_were_held_back_are_handled_and_then_ignored() -> None:
    program = """
import os, signal
from ep3stream.run.signals import Signals, hold_signals

hold_signals(signal.SIGTERM, signal.SIGUSR1)
for number in (signal.SIGTERM, signal.SIGUSR1):
    os.kill(os.getpid(), number)
with Signals() as signals:
    print(signals.stop_name, signals.wants_checkpoint)
os.kill(os.getpid(), signal.SIGTERM)
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stdout) == (0, "SIGTERM True\nTrue\n"), done.stderr


def holds_sigterm(process: subprocess.Popen[str]) -> bool:
    """Whether SIGTERM is blocked, caught or ignored in the main thread of a process that runs."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    masks = dict(line.split(":", 1) for line in status.splitlines())
    return any(int(masks[name], 16) >> (signal.SIGTERM - 1) & 1 for name in ("SigBlk", "SigCgt", "SigIgn"))


def end_of_a_fit(command: list[str], after_s: float | None, to_group: bool) -> tuple[int, str, float]:
    """Exit code, last line and seconds since it holds SIGTERM, of a fit that gets one `after_s` seconds later."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not holds_sigterm(process):
        time.sleep(0.001)
    began = time.monotonic()
    if after_s is not None:
        time.sleep(after_s)
        if process.poll() is None:
            (os.killpg if to_group else os.kill)(process.pid, signal.SIGTERM)
    lines = process.communicate(timeout=250)[1].splitlines()
    return process.returncode, lines[-1] if lines else "", time.monotonic() - began


PARTS = 10


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(("devices", "n_moments"), [(1, 10), (2, 2)])
def test_a_sigterm_at_any_moment_ends_a_fit_with_75_or_0(
    store: Path, tmp_path: Path, devices: int, n_moments: int, part: int
) -> None:
    """With several devices to all of their processes, as a scheduler does. The last moments are beyond the end."""

    def command(run: str) -> list[str]:
        fit = [sys.executable, "-m", "ep3stream", "fit", str(store), str(tmp_path / run), *FIT]
        return [*fit, "--devices", str(devices)]

    code, last, length_s = end_of_a_fit(command("alone"), None, False)
    assert code == 0, last
    for moment in range(part, n_moments * PARTS, PARTS):
        after_s = length_s * moment / (n_moments * PARTS - 5)
        code, last, _ = end_of_a_fit(command(f"run-{moment}"), after_s, devices > 1)
        assert code in (0, 75), f"{after_s:.3f} s of {length_s:.3f}: {last}"
        assert code == 0 or "SIGTERM: stopped at step" in last
