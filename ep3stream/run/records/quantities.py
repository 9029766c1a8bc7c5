"""Bytes, seconds and numbers as people read them in a terminal."""

from __future__ import annotations


def bytes_text(n_bytes: int) -> str:
    """A number of bytes in the unit that makes it short."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} bytes"


def clock_text(seconds: float) -> str:
    """As 4:05 or 1:02:03."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def number_text(value: object) -> str:
    """Six digits of a fraction, whole numbers with commas, anything else as it is."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
