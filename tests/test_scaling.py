"""The tables of docs/scaling.md are what the tools print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("tool", "row", "times"), [("scaling", "| 64 |", 2), ("gpu_time", "1,048,576", 7)])
def test_the_document_has_the_tables_of_the_command_it_names(tool: str, row: str, times: int) -> None:
    document = (ROOT / "docs" / "scaling.md").read_text()
    assert f"    python tools/{tool}.py\n" in document
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{tool}.py")], capture_output=True, check=True, timeout=250
    )
    printed = done.stdout.decode().strip()
    assert printed.count(row) == times
    assert printed in document
