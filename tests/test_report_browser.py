"""The report page in a real browser: curves are where they can be seen, nothing overflows, no script fails."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_report import EVALUATION, eventful_metrics, run_json, write_run

from ep3stream.reporting.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

# As root in a container, and without a word to any network.
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--virtual-time-budget=2000", "--dump-dom",
]  # fmt: skip

# What a person would look for: curves that lie in their frames, a page no wider than the window, a read-out on hover.
LOOK = """<script>
const faults = []; addEventListener("error", e => faults.push(String(e.message)));
addEventListener("load", () => {
  // A diverging step is drawn a twentieth beyond its frame, which hides it.
  const beyond = (a, b) => Math.max((b.left - a.left) / b.width, (a.right - b.right) / b.width,
                                    (b.top - a.top) / b.height, (a.bottom - b.bottom) / b.height);
  const charts = [...document.querySelectorAll(".plot")].filter(p => p.offsetParent).map(p => {
    const frame = p.querySelector(".frame"), box = frame.getBoundingClientRect();
    const drawn = [...frame.querySelectorAll("path.main, path.bars")].map(c => c.getBoundingClientRect());
    frame.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2 }));
    return { label: p.getAttribute("aria-label"), told: p.querySelector("output").textContent,
             wide: Math.min(...drawn.map(c => c.width / box.width)),
             beyond: Math.max(...drawn.map(c => beyond(c, box))) };
  });
  const seen = { charts, faults, window: innerWidth, page: document.documentElement.scrollWidth,
                 ink: getComputedStyle(document.body).color };
  document.body.insertAdjacentHTML("beforeend", "<pre id=seen></pre>");
  document.getElementById("seen").textContent = JSON.stringify(seen);
});
</script>"""

DIAGNOSIS = {
    "confusion": {"classes": ["cat", "dog"], "counts": [[40, 2], [3, 55]]},
    "mistakes": [{"class": "dog", "predicted": "cat", "rows": 3, "of": 58}],
    "calibration": [
        {"rows": 50, "confidence": 0.6, "accuracy": 0.7},
        {"rows": 50, "confidence": 0.9, "accuracy": 0.97},
    ],
    "residuals": [
        {
            "target": "t",
            "histogram": {"low": -3, "high": 3, "counts": [1, 5, 9, 4, 2], "below": 1, "above": 0},
            "bands": [{"rows": 9, "predicted": p, "quantiles": [-2 * p, -p, 0, p, 2 * p]} for p in (1, 2, 3)],
        }
    ],
}


def look(page: Path, width: int) -> dict[str, Any]:
    """What the page looks like in a window of this width."""
    assert CHROMIUM is not None
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("<head>", "<head>" + LOOK, 1))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},900"]
    done = subprocess.run(
        [*command, probed.as_uri()], capture_output=True, text=True, timeout=250, check=True
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:] + done.stderr[-2000:]
    return dict(json.loads(html.unescape(found[1])))


@pytest.mark.parametrize("width", [1100, 500])
def test_every_curve_is_seen_and_read_out_and_nothing_overflows(tmp_path: Path, width: int) -> None:
    evaluation = EVALUATION | {"diagnosis": DIAGNOSIS}
    seen = look(
        write_report(write_run(tmp_path / "run", run_json(), eventful_metrics(), [evaluation])), width
    )
    assert seen["faults"] == []
    assert {chart["label"] for chart in seen["charts"]} == {
        "Running loss against rows seen", "Validation accuracy against rows seen",
        "Residuals by prediction", "Residuals", "Calibration", "Throughput",
        "Waiting for data", "Data preconditioner", "Model preconditioner", "Step size",
    }  # fmt: skip
    for chart in seen["charts"]:
        assert chart["wide"] > 0.25, chart
        assert chart["beyond"] < 0.06, chart
        assert re.search(r": -?[\d.,]+", chart["told"]), chart
    assert seen["page"] <= seen["window"]
