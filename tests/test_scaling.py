"""The tables of docs/scaling.md are what the tool prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_document_has_the_tables_of_the_command_it_names() -> None:
    document = (ROOT / "docs" / "scaling.md").read_text()
    assert "    python tools/scaling.py\n" in document
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "scaling.py")], capture_output=True, check=True, timeout=250
    )
    printed = done.stdout.decode().strip()
    assert printed.count("| 64 |") == 2
    assert printed in document
