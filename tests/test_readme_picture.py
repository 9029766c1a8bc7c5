"""The command that draws the README's picture, on a tiny fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

TOOL = Path(__file__).parent.parent / "tools" / "readme_picture.py"
SVG = "{http://www.w3.org/2000/svg}"


def test_a_killed_and_resumed_fit_becomes_a_small_svg_without_scripts(tmp_path):
    out = tmp_path / "picture.svg"
    command = [sys.executable, TOOL, out, "--rows", "40000", "--centers", "50"]
    subprocess.run(list(map(str, command)), check=True, timeout=250, capture_output=True)
    text = out.read_text()
    root = ElementTree.fromstring(text)
    classes = [path.get("class") for path in root.iter(f"{SVG}path")]
    assert {"main", "faint", "point", "undone", "resume", "cross"} <= set(classes)
    assert not list(root.iter(f"{SVG}script"))
    assert not any(word in text for word in ("href", "url(", "@import", "nan"))
    assert len(text) < 60_000
