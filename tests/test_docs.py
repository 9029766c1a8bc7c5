"""Every page runs from top to bottom, what it links to exists, and what is not run is counted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from doc_snippets import run_page, snippets
from small_stores import plain_config

import ep3stream

pytestmark = pytest.mark.usefixtures("quick_columns")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ARCHITECTURE = (DOCS / "architecture.md").read_text()
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
WITH_CODE = [page for page in PAGES if any(snippet.is_code for snippet in snippets(page))]

# Blocks that cannot run here, by page. A block that joins them is a change of this list, on purpose.
NOT_RUN = {"index.md": 1, "dask-cluster.md": 1}

# What a reader is told -> what is run here.
SMALLER: dict[str, dict[str, str]] = {
    "README.md": {"20_000": "1_000"},
    "commands.md": {
        "tune flights.zarr": "tune flights.zarr --minutes 0.02",
        "runs/first runs/second": "runs/first",
    },
    "tutorial.md": {
        "n_rows=20_000": "n_rows=1_500",
        "n_rows=2_000": "n_rows=100",
        "--minutes 1": "--minutes 0.02",
        "fit orders.zarr": "fit --centers 100 --epochs 2 orders.zarr",
        "fit log_orders.zarr": "fit --centers 100 --epochs 2 log_orders.zarr",
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
        "(500, 1000, 2000)": "(50,)",
    },
    "python.md": {
        "KernelClassifier(random_state=0)": "KernelClassifier(n_centers=100, epochs=2, random_state=0)",
        "[10.0, 30.0]": "[10.0]",
        "n_centers=200": "n_centers=100, epochs=2",
        "n_centers=500, random_state": "n_centers=100, epochs=2, random_state",
        "n_centers=500": "n_centers=100",
        "(20_000, 8), chunks=(2_000": "(500, 8), chunks=(100",
        "10_000": "2_000",
    },
    "own-kernel.md": {"10_000": "2_000", "centers=400": "centers=200"},
    "own-loader.md": {"(40, seed": "(6, seed", "randn(800": "randn(200", "centers=800": "centers=200"},
    "dask-cluster.md": {"8_000": "1_000", "centers=500": "centers=100"},
    "migrating-from-falkon.md": {"10_000": "2_000", "8000": "1600", "centers=1000": "centers=200"},
}


def flights() -> None:
    """Tables with the columns that the commands name."""
    for name, first in (("flights.csv", 0), ("next_month.csv", 5000)):
        rows = [
            f"{(7 * i) % 24},{['EWR', 'JFK', 'LGA'][i % 3]},{i % 17 - 5}" for i in range(first, first + 1000)
        ]
        Path(name).write_text("\n".join(["hour,origin,arr_delay", *rows, ""]))


def exported_model() -> None:
    """What `ep3stream export` made, and rows for it."""
    x = np.random.default_rng(0).standard_normal((500, 3)).astype(np.float32)
    np.save("rows.npy", x[:5])
    ep3stream.convert((x, x[:, 0]), "flights.zarr")
    ep3stream.fit("flights.zarr", "run", plain_config(solver={"centers": 50}))
    ep3stream.export("run", "flights-model")


# What a page takes for granted.
FIXTURES: dict[str, Callable[[], None]] = {
    "README.md": flights,
    "commands.md": flights,
    "formats.md": exported_model,
}


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_every_snippet_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name in FIXTURES:
        FIXTURES[page.name]()
    assert run_page(page, SMALLER.get(page.name, {})) == []


def test_blocks_that_are_not_run_are_counted_and_say_why() -> None:
    marked = [snippet for page in PAGES for snippet in snippets(page) if snippet.reason is not None]
    counts = {name: sum(snippet.page == name for snippet in marked) for name in {s.page for s in marked}}
    assert counts == NOT_RUN
    assert all(snippet.is_code for snippet in marked)


def pages_of(entry: Any) -> list[str]:
    """The files of a navigation, however deep."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in pages_of(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    # Without its tags for Python objects, which only mkdocs knows.
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text().split("\nnav:")[1])
    assert sorted(pages_of(navigation)) == sorted(page.name for page in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_to_a_page_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, heading = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in headings]
            assert heading in anchors, f"{page.name} links to {target}, {linked.name} has {anchors}"


def test_tests_and_tools_that_the_pages_name_exist_with_these_options() -> None:
    for page in PAGES:
        text = page.read_text()
        for file, name in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", text):
            assert f"def {name}" in (ROOT / file).read_text(), f"{page.name} names {file}::{name}"
        for tool, options in re.findall(r"python (tools/\w+\.py)([^\n`]*)", text):
            source = (ROOT / tool).read_text()
            for option in re.findall(r"--[a-z0-9-]+", options):
                assert f'"{option}"' in source, f"{page.name}: {tool} has no {option}"


def files_in_tree(tree: str) -> list[str]:
    """The paths of an annotated tree of files: rooms end with a slash, files of a room are indented below it."""
    paths, room = [], ""
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith("    "):
            paths.append(room + name)
        elif name.endswith("/"):
            room = name
        else:
            paths.append(name)
    return paths


def test_the_architecture_page_lists_every_file_of_the_package_once_and_no_other() -> None:
    (tree,) = re.findall(r"^```text\nep3stream/\n(.*?)^```$", ARCHITECTURE, re.DOTALL | re.MULTILINE)
    package = ROOT / "ep3stream"
    files = [path for path in package.rglob("*") if path.suffix in (".py", ".jinja")]
    # An `__init__.py` that only says what its room is for is the room.
    files = [path for path in files if path.name != "__init__.py" or path.read_text().count("\n") > 1]
    assert sorted(files_in_tree(tree)) == sorted(str(path.relative_to(package)) for path in files)


def test_every_file_that_the_architecture_page_names_exists() -> None:
    named = re.findall(r"(?<![\w/])(?!RUN/)((?:[\w.]+/)+\w+\.(?:py|md|toml|html\.jinja))\b", ARCHITECTURE)
    assert len(named) > 60
    roots = (ROOT, ROOT / "ep3stream")
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []


def test_every_file_of_the_package_that_a_page_names_exists() -> None:
    rooms = "|".join(path.name for path in (ROOT / "ep3stream").iterdir() if (path / "__init__.py").exists())
    for page in PAGES:
        for name in re.findall(
            rf"(?<![\w/.])(?:ep3stream/)?((?:{rooms}|data|batchwise)/[\w/]+\.py)", page.read_text()
        ):
            assert (ROOT / "ep3stream" / name).exists(), f"{page.name} names {name}"


def test_a_flow_chart_becomes_rows_of_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    from docs_diagrams import drawn, on_page_markdown, parsed, placed

    text = 'flowchart TD\na["x < y<br/>z"]\nb["next"]\nc["last"]\na --> b\na -->|far| c\nb --> c\n'
    nodes, edges = parsed(text)
    assert placed(nodes, edges) == {"a": 0, "b": 1, "c": 2}
    assert "x &lt; y<br>z" in drawn(text)
    assert "far" in on_page_markdown(f"before\n\n```mermaid\n{text}```\n")
    for wrong in ("flowchart TD\na ==> b", 'flowchart TD\na["x"]\na --> b'):
        with pytest.raises(ValueError, match="a flow chart has"):
            drawn(wrong)
    with pytest.raises(ValueError, match="circle"):
        drawn(text + "c --> a\n")


def test_every_flow_chart_of_the_pages_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    from docs_diagrams import on_page_markdown

    assert on_page_markdown(ARCHITECTURE).count('class="diagram"') == 2
    assert all("```mermaid" not in on_page_markdown(page.read_text()) for page in PAGES)


def test_the_page_of_settings_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    from settings_table import main

    assert main(["--check"]) == 0, "run python tools/settings_table.py"
