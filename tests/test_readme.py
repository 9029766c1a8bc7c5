"""What the README shows works, and what it lists exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs_and_predicts_well(tmp_path, monkeypatch, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    r2 = re.search(r"'r2': ([\d.]+)", capsys.readouterr().out)
    assert r2 is not None
    assert float(r2[1]) > 0.95


def test_the_file_tree_lists_every_module_once():
    tree = README.split("## Where things are")[1].split("    tools/ ")[0]
    listed = re.findall(r"[\w*]+\.py", tree)
    modules = [path.name for path in (ROOT / "ep3stream").rglob("*.py") if path.parent.name != "ep3stream"]
    modules = [name for name in modules if name != "__init__.py"]
    assert sorted(name for name in listed if name in modules) == sorted(modules)


def test_what_the_readme_links_to_is_there_and_the_comparison_has_as_many_rows_as_it_says():
    linked = [link.partition("#")[0] for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", README)]
    assert len(linked) > 20
    assert [link for link in linked if not (ROOT / link).exists()] == []
    rows = re.findall(r"^\| \*\*", (ROOT / "docs" / "comparison.md").read_text(), re.MULTILINE)
    assert f"has {len(rows)} rows" in README
