"""Every page runs from top to bottom, what it links to exists, and what is not run is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from doc_snippets import run_page, snippets

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]

# Blocks that cannot run here, by page. A block that joins them is a change of this list, on purpose.
NOT_RUN = {"index.md": 1, "dask-cluster.md": 1}

# What a reader is told -> what is run here.
SMALLER: dict[str, dict[str, str]] = {
    "tutorial.md": {
        "n_rows=20_000": "n_rows=1_500",
        "n_rows=2_000": "n_rows=100",
        "--minutes 1": "--minutes 0.02",
        "--centers 4000": "--centers 100",
    },
    "resuming.md": {
        "(20_000, 6)": "(1_000, 6)",
        "--centers 2000": "--centers 100",
        "centers=2000": "centers=100",
    },
    "tuning.md": {
        "20_000": "1_000",
        "--minutes 2": "--minutes 0.02",
        "--centers 3000": "--centers 100",
        "(500, 1000, 2000)": "(50, 100)",
    },
    "own-kernel.md": {"10_000": "2_000", "centers=400": "centers=200"},
    "own-loader.md": {"(40, seed": "(6, seed", "randn(800": "randn(200", "centers=800": "centers=200"},
    "dask-cluster.md": {"8_000": "1_000", "centers=500": "centers=100"},
    "migrating-from-falkon.md": {"10_000": "2_000", "8000": "1600", "centers=1000": "centers=200"},
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_snippet_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not any(snippet.is_code for snippet in snippets(page)):
        pytest.skip("no code on this page")
    monkeypatch.chdir(tmp_path)
    if page.name in FIXTURES:
        FIXTURES[page.name]()
    assert run_page(page, SMALLER.get(page.name, {})) == []


def test_blocks_that_are_not_run_are_counted_and_say_why() -> None:
    marked = [snippet for page in PAGES for snippet in snippets(page) if snippet.reason is not None]
    counts = {name: sum(snippet.page == name for snippet in marked) for name in {s.page for s in marked}}
    assert counts == NOT_RUN
    assert all(snippet.is_code for snippet in marked)


FIXTURES: dict[str, Callable[[], None]] = {}
