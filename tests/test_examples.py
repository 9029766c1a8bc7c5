"""The examples run, at small sizes, and reach what they promise."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.usefixtures("quick_columns")

EXAMPLES = Path(__file__).parents[1] / "examples"
# The flights are a demonstration of minutes: `make demo`.
APART = ["flights_demo", "flights_table"]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "sizes", "least"),
    [
        ("own_kernel", {"n_rows": 3000, "n_centers": 300}, 0.8),
        ("own_loader", {"n_batches": 12, "n_centers": 200}, 0.97),
        ("digits", {"epochs": 2}, 0.95),
        ("resume_after_kill", {"n_rows": 3000, "n_centers": 100, "kernel": "laplacian"}, True),
    ],
)
def test_an_example_reaches_what_it_promises(name, sizes, least, tmp_path):
    assert example(name).main(tmp_path, **sizes) >= least


def test_the_example_on_dask_arrays_learns_by_blocks():
    assert example("dask_arrays").main(n_rows=8000, n_centers=300) > 0.6


def test_every_example_is_tested_and_listed():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    tested = set(re.findall(r'\("(\w+)", \{|example\("(\w+)"\)', Path(__file__).read_text()))
    assert names == {name for pair in tested for name in pair if name} | set(APART)
    listed = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    assert all(f"{path.name}`" in listed for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))


def test_the_notebook_runs_from_top_to_bottom_and_is_stored_without_outputs(capsys):
    notebook = json.loads((EXAMPLES / "first_look.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {"__name__": "notebook"}
    for number, cell in enumerate(cells):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        source = "".join(cell["source"]).replace("N_ROWS = 20_000", "N_ROWS = 6_000")
        source = source.replace("centers=1000", "centers=400")
        exec(compile(source, f"cell {number}", "exec"), names)
    assert "17 h ####" in capsys.readouterr().out
