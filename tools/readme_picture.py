"""The README's picture: the loss curve of a fit that is killed and started again, drawn by the report's own charts.

    python tools/readme_picture.py [docs/picture.svg] [--rows N] [--centers P] [--keep DIRECTORY]

Makes rows of a smooth function with noise, converts them, fits them, kills the fit without warning in the middle of an
epoch, starts it again, and draws RUN/metrics.jsonl. The picture has no scripts and no fonts of its own, and follows the
reader's light or dark mode.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import signal
import tempfile
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np

import ep3stream
from ep3stream import ConvertConfig, DataConfig, FitConfig, KernelConfig, RunConfig, SolverConfig
from ep3stream.reporting.charts import loss_chart
from ep3stream.reporting.curves import Chart
from ep3stream.reporting.records import RunRecords, Steps

EPOCHS = 2
BATCH_SIZE = 512
KILLED_AT = 0.24  # of all steps
CHECKPOINTS = 12  # in the whole fit, about

WIDTH, HEIGHT = 800, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 100, 54  # margins around the frame

STYLE = """
.page { fill: #ffffff; } .border { stroke: #d9dbd7; }
text { fill: #565b66; font: 13px system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
.title { fill: #16181d; font-size: 18px; font-weight: 600; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.grid { stroke: #e8e9e6; } .base { stroke: #717782; }
.faint { stroke: #c3d6f0; } .main { stroke: #2468c4; stroke-width: 2.25; }
.undone { stroke: #e0455f; stroke-width: 9; stroke-opacity: .5; }
.cross { stroke: #c2334a; stroke-width: 2.5; } .killed { fill: #c2334a; font-weight: 600; }
.note { stroke: #ffffff; stroke-width: 5; paint-order: stroke; stroke-linejoin: round; }
.point { stroke: #cf5a1c; stroke-width: 9; }
.resume { stroke: #565b66; stroke-width: 1.5; stroke-dasharray: 1 5; }
@media (prefers-color-scheme: dark) {
  .page { fill: #14161a; } .border { stroke: #2f343b; }
  text { fill: #aab0ba; } .title { fill: #eceef1; }
  .grid { stroke: #262b31; } .base { stroke: #8b919c; }
  .faint { stroke: #2b4569; } .main { stroke: #6ea8f5; }
  .note { stroke: #14161a; } .undone { stroke: #f0727f; } .cross { stroke: #f0727f; } .killed { fill: #f0727f; }
  .point { stroke: #f0914f; } .resume { stroke: #aab0ba; }
}
"""

LEGEND = {
    "faint": "each batch, before its step",
    "main": "mean of the last 128 steps",
    "point": "validation split",
}


def make_store(folder: Path, n_rows: int) -> Path:
    """Rows of a smooth function of six numbers with a little noise, as a store with a validation split."""
    random = np.random.default_rng(0)
    x = random.uniform(-2, 2, (n_rows, 6)).astype(np.float32)
    y = np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + np.abs(x[:, 3]) + 0.05 * random.standard_normal(n_rows)
    splits = {"train": 0.95, "validation": 0.05}
    store = folder / "rows.zarr"
    ep3stream.convert((x, y.astype(np.float32)), store, ConvertConfig(splits=splits))
    return store


def fit_until_killed(store: Path, run: Path, config: FitConfig) -> None:
    """For a process of its own: fits, and kills itself well after a checkpoint."""

    def kill(now: ep3stream.FitProgress) -> None:
        since_checkpoint = now.step % config.run.checkpoint_steps / config.run.checkpoint_steps
        if now.step >= KILLED_AT * now.n_steps and since_checkpoint >= 0.6:
            os.kill(os.getpid(), signal.SIGKILL)

    ep3stream.fit(store, run, config, observe=kill)


def killed_and_resumed(store: Path, run: Path, n_rows: int, n_centers: int) -> RunRecords:
    """The records of the whole fit, with the steps that the kill has lost among the undone ones."""
    n_steps = EPOCHS * n_rows // BATCH_SIZE
    config = FitConfig(
        DataConfig(validate="validation"),
        KernelConfig("matern52"),
        SolverConfig(centers=n_centers, epochs=EPOCHS, batch_size=BATCH_SIZE, validate_every=EPOCHS / 10),
        RunConfig(checkpoint_steps=max(n_steps // CHECKPOINTS, 2)),
    )
    process = multiprocessing.get_context("spawn").Process(target=fit_until_killed, args=(store, run, config))
    process.start()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise SystemExit(f"the fit ended with code {process.exitcode}; it was to be killed")
    killed = RunRecords.read(run).steps
    ep3stream.fit(store, run, config)
    records = RunRecords.read(run)
    resumed_at = next(e["step"] for e in records.events if e["event"] == "resume")
    lost = Steps({name: column[killed["step"] >= resumed_at] for name, column in killed.columns.items()})
    is_redone = np.isin(records.steps["step"], lost["step"])
    if not np.array_equal(records.steps["loss"][is_redone], lost["loss"]):
        raise SystemExit("the steps after the checkpoint have come out differently")
    return replace(records, undone=(lost,))


def svg(chart: Chart, title: str, remark: str) -> str:
    """A chart of the report as an SVG file of its own; the page would put the text beside the curves, in HTML."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    x_scale, y_scale = (right - LEFT) / 1000, (bottom - TOP) / 1000

    def placed(path: str) -> str:
        path = re.sub(
            r"(-?[\d.]+),(-?[\d.]+)",
            lambda at: f"{LEFT + float(at[1]) * x_scale:.1f},{TOP + float(at[2]) * y_scale:.1f}",
            path,
        )
        return path.replace("V1000", f"V{bottom}")

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page border" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
        f'<text class="title" x="20" y="34">{escape(title)}</text>',
        f'<text x="20" y="56">{escape(remark)}</text>',
        f'<text x="20" y="{TOP - 12}">{escape(chart.y.label)}</text>',
        f'<text class="end" x="{right}" y="{HEIGHT - 14}">{escape(chart.x.label)}</text>',
        f'<path class="base" d="M{LEFT},{bottom}H{right}"/>',
    ]
    for at, text in chart.y.ticks:
        y = bottom - at / 100 * (bottom - TOP)
        parts.append(f'<path class="grid" d="M{LEFT},{y:.1f}H{right}"/>')
        parts.append(f'<text class="end" x="{LEFT - 8}" y="{y + 4.5:.1f}">{text}</text>')
    for at, text in chart.x.ticks:
        x = LEFT + at / 100 * (right - LEFT)
        parts.append(f'<path class="base" d="M{x:.1f},{bottom}v5"/>')
        parts.append(f'<text class="middle" x="{x:.1f}" y="{bottom + 20}">{text}</text>')
    parts.append(f'<svg width="{WIDTH}" height="{bottom}" overflow="hidden">')
    parts += [f'<path class="{line.role}" d="{placed(line.path)}"/>' for line in chart.lines]
    parts.append("</svg>")
    for line in chart.lines:
        x, y = (float(value) for value in re.findall(r"([\d.]+),([\d.]+)", placed(line.path))[-1])
        if line.role == "undone":
            parts.append(f'<path class="cross" d="M{x - 5},{y - 5}l10,10m0,-10l-10,10"/>')
            parts.append(f'<text class="note killed" x="{x + 10}" y="{y - 12}">killed</text>')
        elif line.role == "resume":
            parts.append(f'<text class="note" x="{x + 8}" y="{TOP + 14}">started again from here</text>')
    x = right - 218
    parts.append(f'<rect class="page" x="{x - 10}" y="{TOP}" width="228" height="{22 * len(LEGEND) + 4}"/>')
    for row, (role, name) in enumerate(LEGEND.items()):
        y = TOP + 14 + 22 * row
        sample = f"M{x + 12},{y}h0" if role == "point" else f"M{x},{y}h24"
        parts.append(f'<path class="{role}" d="{sample}"/><text x="{x + 34}" y="{y + 4.5}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=Path, default=Path("docs/picture.svg"))
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--centers", type=int, default=4000)
    parser.add_argument(
        "--keep", type=Path, metavar="DIRECTORY", help="for the store and the run; new or empty"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        store = make_store(folder, options.rows)
        records = killed_and_resumed(store, folder / "run", options.rows, options.centers)
    chart = loss_chart(records, "rows")
    assert chart is not None
    title = "A fit that was killed, and started again by the same command"
    remark = (
        f"{options.rows:,} rows, {options.centers:,} centers. "
        "The steps after the last checkpoint (red) are taken again, with the same result."
    )
    options.out.write_text(svg(chart, title, remark))
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
