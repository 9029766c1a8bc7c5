"""What people and machines see while a fit goes on: bars of any width, lines in pipes, JSON, `status`, completion."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from small_stores import PLAIN_OPTIONS, make_store, plain_config

import ep3stream
from ep3stream import InputError, cli
from ep3stream.cli import progress
from ep3stream.conversion.convert import ConvertProgress
from ep3stream.inspection.status import status
from ep3stream.run.clock import FitProgress

NOW = FitProgress(
    step=400,
    n_steps=1000,
    epoch=0.8,
    rows=80_000,
    rows_per_s=12_345.0,
    loss=0.1234,
    starved=0.05,
    eta_s=3700.0,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """rows.zarr, and a finished run."""
    folder = tmp_path_factory.mktemp("terminal")
    make_store(folder / "rows.zarr")
    solver = {"centers": 50, "batch_size": 16, "validate_every": 0.5}
    config = plain_config(solver=solver, data={"validate": "test"})
    ep3stream.fit(folder / "rows.zarr", folder / "run", config)
    return folder


def screen(width: int, bar) -> str:
    """What a terminal of that width shows last, without its escape codes."""
    out = io.StringIO()
    with bar(Console(file=out, width=width, force_terminal=True)) as show:
        show(NOW if bar is progress.fit_bar else ConvertProgress("read", 80_000, 0.4, 10**9, 60.0))
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    return [line for line in re.split(r"[\r\n]+", plain) if line.strip()][-1]


@pytest.mark.parametrize("bar", [progress.fit_bar, progress.convert_bar], ids=["fit", "convert"])
@pytest.mark.parametrize("width", [30, 45, 60, 80, 100, 200])
def test_a_bar_has_one_line_of_whole_words_in_any_width(bar, width):
    shown = screen(width, bar).rstrip()
    assert len(shown) <= width
    assert "…" not in shown
    assert ("40%" if bar is progress.fit_bar else "1:30 to go") in shown
    words = ["1:01:40 to go", "loss 0.1234", "12.3k rows/s", "starved 5%", "epoch 0.80"]
    if width == 200 and bar is progress.fit_bar:
        assert all(word in shown for word in words)


def test_in_a_pipe_a_line_comes_now_and_then(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "ep3stream")
    with progress.fit_bar(Console(file=io.StringIO(), force_terminal=False)) as show:
        show(NOW)
        assert not caplog.messages
        monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
        show(NOW)
    assert caplog.messages == ["fit: 40%, 1:01:40 to go, loss 0.1234, 12.3k rows/s, starved 5%, epoch 0.80"]


def test_json_logs_are_objects_of_one_line_each_with_the_progress_among_them(
    made, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    store = str(made / "rows.zarr")
    assert (
        cli.main(
            [
                "fit",
                store,
                str(tmp_path / "run"),
                "--centers",
                "50",
                "--batch-size",
                "16",
                "--json-logs",
                *PLAIN_OPTIONS,
            ]
        )
        == 0
    )
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    steps = [line["progress"]["step"] for line in lines if "progress" in line]
    assert steps
    assert steps == sorted(steps)
    assert "model in" in lines[-1]["message"]


@pytest.mark.parametrize("place", ["before", "after"])
def test_an_error_is_json_too_and_quiet_leaves_only_that(made, capsys, place):
    words = ["evaluate", str(made / "none"), str(made / "rows.zarr")]
    words = ["--json-logs", *words] if place == "before" else [*words, "--json-logs"]
    assert cli.main([*words, "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    error = json.loads(line)
    assert (error["level"], error["exit_code"]) == ("error", 2)
    assert "none" in error["message"]


def test_status_of_a_finished_run(made):
    now = status(made / "run")
    assert (now["state"], now["holder"], now["eta_s"]) == ("finished", None, None)
    assert now["step"] == now["n_steps"] == now["checkpoint"]["step"]
    assert now["event"]["event"] == "finish"
    assert now["validation"]["r2"] > 0.5
    assert 0 <= now["starved"] <= 1


def test_status_is_told_in_words_and_in_json(made, capsys):
    assert cli.main(["status", str(made / "run")]) == 0
    words = capsys.readouterr().out
    assert re.search(r"run: finished, as of \d+:\d\d ago\nstep 74 of 74 \(100\.0%\), epoch 1\n", words), words
    assert "validation on test at epoch 1: r2 0." in words
    assert cli.main(["status", str(made / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"


@pytest.fixture
def start_fit() -> Iterator[Callable[[Path, Path], subprocess.Popen[bytes]]]:
    """Starts a fit that would take ten minutes or more, in a process of its own; ends with the test."""
    fits = []

    def start(store: Path, run: Path) -> subprocess.Popen[bytes]:
        options = ["--centers", "50", "--batch-size", "16", "--epochs", "5000", "--checkpoint-steps", "200"]
        options += PLAIN_OPTIONS
        command = [sys.executable, "-m", "ep3stream", "--quiet", "fit", str(store), str(run), *options]
        fits.append(subprocess.Popen(command))
        return fits[-1]

    yield start
    for fit in fits:
        fit.kill()
        fit.wait()


def wait_for(run: Path, condition) -> dict:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        try:
            if condition(now := status(run)):
                return now
        except InputError:
            pass  # There is no run yet.
        time.sleep(0.1)
    raise AssertionError("it did not come to that")


def test_status_from_another_process_sees_a_fit_run_and_die_and_stop(made, start_fit, tmp_path):
    run = tmp_path / "run"
    fit = start_fit(made / "rows.zarr", run)
    now = wait_for(run, lambda now: now["eta_s"] and now["checkpoint"])
    assert f"process {fit.pid} on " in now["holder"]
    assert (now["state"], now["step"] > 0) == ("running", True)
    assert now["n_steps"] == 5000 * 74
    fit.kill()
    fit.wait()
    died = status(run)
    assert (died["state"], died["eta_s"]) == ("died", None)
    fit = start_fit(made / "rows.zarr", run)
    wait_for(run, lambda now: now["state"] == "running")
    fit.send_signal(signal.SIGTERM)
    assert fit.wait() == 75
    assert status(run)["state"] == "stopped"
    assert status(run)["checkpoint"]["step"] > 0


def test_a_lock_of_another_machine_is_called_unknown(made, tmp_path):
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    (run / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "2026-01-01"}))
    now = status(run)
    assert now["state"] == "unknown"
    assert now["holder"] == "process 1 on elsewhere since 2026-01-01"


def test_status_reads_only(made, tmp_path):
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    status(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def completed(script: str, words: list[str]) -> set[str]:
    """What bash offers for the last word."""
    line = " ".join(words)
    program = f"""
source {script}
COMP_WORDS=({" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'
COMP_POINT={len(line)}
$(complete -p ep3stream | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    return set(
        subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
def test_bash_completes_commands_options_and_choices(tmp_path, capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "ep3stream.bash"
    script.write_text(capsys.readouterr().out)
    commands = {
        "convert",
        "tune",
        "fit",
        "evaluate",
        "predict",
        "export",
        "inspect",
        "verify",
        "status",
        "completion",
    }
    assert commands <= completed(str(script), ["ep3stream", ""])
    assert "--centers" in completed(str(script), ["ep3stream", "fit", "--cen"])
    assert {"nystrom", "exact", "eigenpro"} <= completed(
        str(script), ["ep3stream", "fit", "--projection", ""]
    )


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script_that_knows_the_commands(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("ep3stream", "predict", "nystrom"))
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
