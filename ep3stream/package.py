"""The package's own name and version, as written into everything it makes."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def created_by() -> str:
    """`ep3stream 0.1.0`; the version is unknown in a source tree that is not installed."""
    try:
        return f"ep3stream {version('ep3stream')}"
    except PackageNotFoundError:
        return "ep3stream unknown"
