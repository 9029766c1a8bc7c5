"""Which process people hear, told without torch."""

from __future__ import annotations

import os


def speaks() -> bool:
    """Whether this process is the one that people hear: the leader, or the only one."""
    return os.environ.get("RANK", "0") == "0"
