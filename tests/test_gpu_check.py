"""The tool for machines with a GPU runs, at toy sizes, where there is none, and without what stores need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pretended_cuda import finished, start

TOOLS = Path(__file__).parents[1] / "tools"
WITHOUT = {
    "zarr",
    "h5py",
    "dask",
    "distributed",
    "pyarrow",
    "numcodecs",
    "xxhash",
    "rich",
    "safetensors",
    "tomli_w",
}


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["verdict"] for row in rows if "limit" in row]


def test_a_dry_run_on_the_cpu_checks_and_times_everything(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is installed on no other system than Linux")
    program = f"""
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {WITHOUT!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
sys.argv = ["gpu_check.py", "--cpu", "--out", {str(tmp_path / "found.json")!r}]
runpy.run_path({str(TOOLS / "gpu_check.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=280)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert len(verdicts(rows)) > 100
    assert set(verdicts(rows)) == {"right"}
    not_here = {row["part"] for row in rows if row["what"] == "not here"}
    assert not_here == {"KernelModel", "stream"}
    steps = [row for row in rows if row["part"] == "step" and "rows_per_s" in row]
    shown = [f"{precision}, by torch" for precision in ("float32", "bf16x3", "tf32", "bfloat16")]
    assert [", ".join(row["what"].split(", ")[-2:]) for row in steps] == 2 * shown
    assert sum("Triton's product runs" in row["what"] for row in rows) == 2 * 2 * 3 * 2
    assert all(row["rows_per_s"] > 0 and row["plain_rows_per_s"] > 0 for row in steps)


def test_on_a_pretended_gpu_every_path_is_right_and_waits_for_nothing(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is installed on no other system than Linux")
    tool, out = str(TOOLS / "gpu_check.py"), tmp_path / "found.json"
    finished(start(tmp_path, tool, "--toy", "--out", str(out), "--only", "paths,columns,ring,step,fused"))
    rows = json.loads(out.read_text())["rows"]
    assert set(verdicts(rows)) == {"right"}
    assert sum("wait for the GPU" in row["what"] for row in rows) == 10
    assert sum("evaluations_per_s" in name for row in rows for name in row) >= 4
    assert sum(row["what"].endswith("by one program") for row in rows) == 2 * 3


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The modules gpu_check and gpu_parts."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import gpu_check
    import gpu_parts

    return gpu_check, gpu_parts


ABOUT = {"device": "none", "date": "2026-12-01", "torch": "2", "cuda": None, "triton": False}


def test_a_part_that_fails_leaves_the_others_and_the_rows_so_far(
    tools: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, parts = tools
    out = tmp_path / "found.json"
    report = parts.Report(torch.device("cpu"), 0.0, True, 100.0, out, ABOUT)

    def fails(report: Any) -> None:
        report.check("first", "one and one", 0.5, 0.1)
        raise ValueError("no such kernel")

    def succeeds(report: Any) -> None:
        assert json.loads(out.read_text())["rows"] == report.rows
        report.add("second", "a step", rows_per_s=1234.5)
        report.add("second", "another", rows_per_s=2.0, starved=0.25)
        report.limit_s = 0.0

    parts_in_order = {"first": fails, "second": succeeds, "third": succeeds}
    monkeypatch.setattr(parts, "PARTS", parts_in_order)
    check.run(report, set())
    found = json.loads(out.read_text())
    assert found == {**ABOUT, "rows": report.rows}
    assert report.failed == ["one and one", "first"]
    told = check.page(found)
    for line in (
        "1 checks, 1 of them wrong.",
        "* Wrong: one and one, 0.5 (limit 0.1)",
        "* first: ended by an error (ValueError: no such kernel)",
        "* third: not begun (the 0 s were over)",
        "| second | rows per s | starved |\n|---|---|---|\n| a step | 1234 |  |\n| another | 2 | 0.25 |",
    ):
        assert line in told, told
