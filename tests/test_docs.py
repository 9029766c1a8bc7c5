"""Every Python snippet of the guides runs, in the order in which it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = ["python.md"]


@pytest.mark.parametrize("name", GUIDES)
def test_the_snippets_of_a_guide_run(name, tmp_path, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"{name}, snippet {number + 1}", "exec"), {})
    assert snippets
