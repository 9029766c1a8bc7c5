"""Values as text: a line of JSON for programs; bytes, seconds and numbers as people read them in a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def json_text(value: object) -> str:
    """One line of JSON; infinities and NaN, which JSON does not have, become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bytes_text(n_bytes: int) -> str:
    """A number of bytes with its unit, as 1.5 GB."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} bytes"


def clock_text(seconds: float) -> str:
    """Seconds as minutes and hours, 4:05 or 1:02:03."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def number_text(value: object) -> str:
    """Six digits of a float, whole numbers with commas, and any other value as `str` gives it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def table_text(content: RenderableType, width: int = 80, is_terminal: bool = False) -> str:
    """Tables of `rich` as lines of at most `width` columns, without blanks at the ends of lines.

    The same in every pipe: only on a terminal are there styles. Nothing in a cell is taken for markup.
    """
    from rich.console import Console

    file = StringIO()
    console = Console(
        file=file, width=width, force_terminal=is_terminal, markup=False, emoji=False, highlight=False
    )
    console.print(content)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
