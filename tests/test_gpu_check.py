"""The tool for machines with a GPU runs, at toy sizes, where there is none, and without what stores need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "gpu_check.py"
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
runpy.run_path({str(TOOL)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=280)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {"check", "peak", "fashion", "step", "fused", "all"}
    verdicts = [row["verdict"] for row in rows if "limit" in row]
    assert len(verdicts) > 40
    assert set(verdicts) == {"right"}
    steps = [row for row in rows if row["part"] == "step"]
    assert [row["what"].split()[-1] for row in steps] == ["float32", "tf32", "bfloat16"]
    assert all(row["rows_per_s"] > 0 and row["plain_rows_per_s"] > 0 for row in steps)
