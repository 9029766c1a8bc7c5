"""What a release is made of fits together; that it builds, installs and runs is a slow test."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = (ROOT / ".github" / "workflows" / "tests.yml").read_text()


def test_the_citation_is_of_this_version_and_licence():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert f"\nlicense: {PROJECT['license']}\n" in citation
    assert "Toward Large Kernel Models" in citation


def test_the_pythons_that_are_tested_are_those_that_are_promised():
    tested = re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.*)\]", WORKFLOW)[1])
    promised = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert tested == promised
    assert PROJECT["requires-python"] == f">={tested[0]}"


def test_ci_runs_what_contributing_tells_a_developer_to_run():
    assert "run: make test" in WORKFLOW
    assert "make test" in (ROOT / "CONTRIBUTING.md").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_every_dependency_of_the_package_is_pinned_for_tests():
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in
              (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}  # fmt: skip
    named = [re.match(r"[A-Za-z0-9-]+", line)[0].lower() for line in PROJECT["dependencies"]]
    assert set(named) <= pinned


def test_types_are_part_of_the_package():
    assert (ROOT / "ep3stream" / "py.typed").exists()


@pytest.mark.slow
def test_wheel_and_sdist_build_install_and_work_in_an_empty_environment():
    pytest.importorskip("build")
    command = [sys.executable, "tools/check_release.py", "--constraint", "constraints.txt"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1500)
