"""A short run of tools/torture.py; and that it sees what it is there to see."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def torture(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(TOOLS)
    import torture

    yield torture
    for name in ("torture", "faults"):
        sys.modules.pop(name, None)


def python(*arguments: object) -> list[str]:
    """The lines a new process prints, which has no threads of other tests' and so may fork."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=TOOLS, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_no_run_is_lost_or_ends_otherwise_whatever_is_done_to_it(tmp_path):
    amounts = ["--kills", 4, "--terms", 2, "--full-disks", 2, "--damages", 6]
    *_, kinds, total = python("torture.py", *amounts, "--directory", tmp_path)
    assert kinds.startswith("damage ")
    name, n_runs, n_blows, lost, wrong, identical = total.split()
    assert (name, n_runs, lost, wrong, identical) == ("all", "14", "0", "0", "14")
    assert int(n_blows) >= 14


# A package that is worse than ours in one way, and trials that must show it: numbers of those that do.
SABOTAGED = """
import json, shutil, sys
from pathlib import Path
from unittest.mock import patch
import torture
from ep3stream.run.bundle import read_description

directory = Path(sys.argv[1])
torture.compiled("report.html.jinja")
subject = torture.make_subject(directory, ".zarr")

def verdicts(kind, numbers, target, replacement):
    with patch(target, replacement), patch("torture.DAMAGES", ("flip",)):
        results = [torture.try_one(kind, number, 0, [subject], directory) for number in numbers]
    return [(result.verdict, result.why) for result in results]

print(json.dumps({
    "begins anew": verdicts(
        "kill, in a save", [0], "ep3stream.training.fit.load_newest_checkpoint", lambda *_: None
    ),
    "trusts damage": verdicts("damage", [4, 5, 7], "ep3stream.run.bundle.check_bundle", read_description),
    "says nothing": verdicts("damage", [1, 5], "ep3stream.run.checkpoint.logger.warning", lambda *_: None),
    "drops what it saved": verdicts(
        "kill, in a save", [0], "ep3stream.run.checkpoint._remove_old", lambda path, *_: shutil.rmtree(path)
    ),
}))
"""


def test_a_package_that_loses_trusts_or_conceals_something_is_found_out(tmp_path):
    (found,) = map(json.loads, python("-c", SABOTAGED, tmp_path))
    assert {name: max(results)[0] for name, results in found.items()} == {
        "begins anew": "lost",
        "trusts damage": "wrong",
        "says nothing": "wrong",
        "drops what it saved": "lost",
    }
    whys = {name: " ".join(why for _, why in results) for name, results in found.items()}
    assert "not from" in whys["trusts damage"]
    assert "no word about" in whys["says nothing"]
    assert "was told to be saved" in whys["drops what it saved"]


def test_the_same_command_goes_on_where_it_was_and_anew_with_another_package(torture, tmp_path, monkeypatch):
    file = tmp_path / "torture-0" / "results.json"
    assert torture.read_results(file) == {}
    results = {"damage": [torture.Result("identical", "", [("flip", 0)]), torture.Result("wrong", "x", [])]}
    torture.write_results(file, results)
    assert torture.read_results(file) == results
    monkeypatch.setattr(torture, "package_digest", lambda: "another")
    assert torture.read_results(file) == {}
    assert not file.exists()


def test_the_kinds_of_one_option_share_its_number(torture):
    options = torture.parsed(["--kills", "7", "--terms", "4", "--full-disks", "1", "--damages", "0"])
    assert list(torture.numbers(options).values()) == [3, 4, 2, 2, 0, 1, 0]
