"""Numbers, times, sizes and shares as the report's text: typeset, short, a dash for what is not known."""

from __future__ import annotations

import math

from ep3stream.reporting.run_json import as_float

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 3) -> str:
    """`value` to `digits` significant digits, integers whole: 0.0217, 15,204, 1.20e-7 (typeset)."""
    if not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if -4 <= int(exponent) < 12:
        return f"{value:,.{max(digits - 1 - int(exponent), 0)}f}".replace("-", MINUS)
    return f"{mantissa} {TIMES} {power_of_ten(int(exponent))}".replace("-", MINUS)


def power_of_ten(exponent: int) -> str:
    """10⁻³, in superscripts."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def duration(seconds: float) -> str:
    """Seconds in the two units that matter: 3.2 s, 41 s, 4 min 05 s, 3 h 12 min, 2 d 03 h."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 10:
        return f"{number(max(seconds, 0.0), 2)} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def size(n_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves at least one: 512 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024:
            return f"{number(n_bytes)} {unit}"
        n_bytes /= 1024
    return f"{number(n_bytes)} TiB"


def percent(fraction: float) -> str:
    """A fraction in percent, with one decimal: 87.5%."""
    return f"{100 * fraction:.1f}%".replace("-", MINUS)


def count(value: object) -> str:
    """A JSON number, rounded to a whole one, with commas between its thousands."""
    return f"{as_float(value):,.0f}" if math.isfinite(as_float(value)) else DASH


def plural(value: object, noun: str) -> str:
    """A count with its noun: `1 center`, `5,000 centers`."""
    return f"{count(value)} {noun}" + ("" if as_float(value) == 1 else "s")
