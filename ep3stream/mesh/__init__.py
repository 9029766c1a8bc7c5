"""Ranks, devices and who owns which centers: the only user of torch.distributed."""

from importlib import import_module
from typing import TYPE_CHECKING

from ep3stream.mesh.leader import speaks

if TYPE_CHECKING:
    from ep3stream.mesh.join import devices_here, is_rank, joined, require_devices
    from ep3stream.mesh.ranks import Mesh

__all__ = ["Mesh", "devices_here", "is_rank", "joined", "require_devices", "speaks"]


def __getattr__(name: str) -> object:
    """Imported when asked for: torch takes two seconds, which who only asks whether to speak need not wait for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"ep3stream.mesh.{'ranks' if name == 'Mesh' else 'join'}")
    value: object = getattr(module, name)
    globals()[name] = value
    return value
