"""The commands that draw the pictures of README and tutorial."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

TOOLS = Path(__file__).parent.parent / "tools"
TOOL = TOOLS / "readme_picture.py"
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


def test_the_columns_of_a_run_become_bars_as_long_as_they_are_worth(tmp_path):
    columns = [{"name": "day & hour", "importance": 0.3}, {"name": "distance", "importance": 0.1}]
    (tmp_path / "run.json").write_text(json.dumps({"column_weights": {"columns": columns}}))
    out = tmp_path / "matters.svg"
    subprocess.run(
        [sys.executable, TOOLS / "matters_picture.py", tmp_path, out], check=True, capture_output=True
    )
    root = ElementTree.parse(out).getroot()
    day, distance = (float(bar.get("width")) for bar in root.iter(f"{SVG}rect") if bar.get("class") == "bar")
    assert abs(day / distance - 3) < 0.01
    assert {"day & hour", "75%", "25%"} <= {text.text for text in root.iter(f"{SVG}text")}


def test_a_run_that_tells_nothing_of_its_columns_has_no_picture_of_them(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    command = [sys.executable, TOOLS / "matters_picture.py", tmp_path, tmp_path / "matters.svg"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode
    assert "tells nothing of its columns" in failed.stderr
    assert not (tmp_path / "matters.svg").exists()
