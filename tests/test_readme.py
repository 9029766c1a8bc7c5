"""The README is short, its Python runs, and what it links to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("quick_columns")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readme_has_at_most_120_lines():
    assert len(README.splitlines()) <= 120


def test_the_python_example_runs_and_predicts_well(tmp_path, monkeypatch, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    assert "20_000" in snippet
    exec(compile(snippet.replace("20_000", "6_000"), "README.md", "exec"), {})
    r2 = re.search(r"'r2': ([\d.]+)", capsys.readouterr().out)
    assert r2 is not None
    assert float(r2[1]) > 0.95


def test_what_the_readme_links_to_is_there_and_the_comparison_has_as_many_rows_as_it_says():
    linked = [link.partition("#")[0] for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", README)]
    assert len(linked) > 20
    assert [link for link in linked if not (ROOT / link).exists()] == []
    rows = re.findall(r"^\| \*\*", (ROOT / "docs" / "comparison.md").read_text(), re.MULTILINE)
    assert f"has {len(rows)} rows" in README


def test_the_tools_that_measured_the_figures_are_there_with_these_options():
    commands = re.findall(r"python (tools/\w+\.py)([^`\n]*)", README)
    assert len(commands) > 5
    for tool, options in commands:
        source = (ROOT / tool).read_text()
        assert all(f'"{option}"' in source for option in re.findall(r"--[a-z0-9-]+", options)), tool
