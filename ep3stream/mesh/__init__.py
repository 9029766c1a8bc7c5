"""Ranks, devices and which rank holds which centers: the only room that uses torch.distributed."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ep3stream.mesh.join import devices_here, has_met, is_rank, joined, require_devices
    from ep3stream.mesh.mesh import Mesh

__all__ = ["Mesh", "devices_here", "has_met", "is_main_process", "is_rank", "joined", "require_devices"]


def is_main_process() -> bool:
    """Whether this process logs and prints: it is the leader of several ranks, or alone."""
    return os.environ.get("RANK", "0") == "0"


def __getattr__(name: str) -> object:
    """Imports a name when it is first asked for (PEP 562): `is_main_process` must not wait two seconds for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"ep3stream.mesh.{'mesh' if name == 'Mesh' else 'join'}")
    value: object = getattr(module, name)
    globals()[name] = value
    return value
