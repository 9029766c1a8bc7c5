"""Ranks, devices and who owns which centers: the only user of torch.distributed."""

from ep3stream.mesh.join import devices_here, is_rank, joined, require_devices, speaks
from ep3stream.mesh.ranks import Mesh

__all__ = ["Mesh", "devices_here", "is_rank", "joined", "require_devices", "speaks"]
