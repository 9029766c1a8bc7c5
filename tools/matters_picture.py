"""The tutorial's picture: what the columns of a fit are worth, as bars, from RUN/run.json.

    python tools/matters_picture.py RUN [docs/matters.svg] [--columns 10]

RUN is a fit with a kernel on columns, such as `.demo/run` after `make demo`. The picture has no scripts and no fonts of
its own, and follows the reader's light or dark mode.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from readme_picture import STYLE, WIDTH

LEFT, TOP, ROW, BAR = 210, 64, 26, 16
LONGEST = WIDTH - LEFT - 90
BARS = ".bar { fill: #2468c4; } @media (prefers-color-scheme: dark) { .bar { fill: #6ea8f5; } }"


def shares_of(run: Path) -> list[tuple[str, float]]:
    """Names and shares of the columns, the largest first. Raises SystemExit where the run tells of none."""
    told = json.loads((run / "run.json").read_text()).get("column_weights")
    if not told or not (whole := sum(column["importance"] for column in told["columns"])):
        raise SystemExit(
            f"{run} tells nothing of its columns: it has no kernel on columns, or learnt nothing"
        )
    return [(column["name"], column["importance"] / whole) for column in told["columns"]]


def svg(shares: Sequence[tuple[str, float]], title: str) -> str:
    """A bar for each column, the longest as long as there is room."""
    height = TOP + ROW * len(shares) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{BARS}</style>",
        f'<rect class="page border" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        f'<text class="title" x="20" y="34">{escape(title)}</text>',
    ]
    most = max(share for _, share in shares)
    for row, (name, share) in enumerate(shares):
        y, width = TOP + ROW * row, max(1.0, LONGEST * share / most)
        parts.append(f'<text class="end" x="{LEFT - 10}" y="{y + BAR - 3}">{escape(name)}</text>')
        parts.append(f'<rect class="bar" x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2"/>')
        parts.append(f'<text x="{LEFT + width + 8:.1f}" y="{y + BAR - 3}">{100 * share:.0f}%</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("out", nargs="?", type=Path, default=Path("docs/matters.svg"))
    parser.add_argument("--columns", type=int, default=10)
    parser.add_argument("--title", default="What matters for the delay of a flight")
    options = parser.parse_args()
    options.out.write_text(svg(shares_of(options.run)[: options.columns], options.title))


if __name__ == "__main__":
    main()
