"""Ranks, devices and who owns which centers: the only user of torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's place among the ranks of a fit, one process per device.

    Centers 0..p-1 are dealt in runs of consecutive rows: the first p mod size ranks hold one more.
    With size 1 every collective returns at once, so no caller asks how many ranks there are.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def of_this_process(cls, device: torch.device) -> Mesh:
        """The initialised process group's mesh, or a mesh of one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(0, 1, device)

    def owned(self, n_rows: int) -> range:
        """Row numbers of this rank's shard of `n_rows` rows."""
        share, extra = divmod(n_rows, self.size)
        start = self.rank * share + min(self.rank, extra)
        return range(start, start + share + (self.rank < extra))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's `tensor` on every rank, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def gather_rows(self, shard: Tensor, n_rows: int) -> Tensor:
        """All `n_rows` rows of a tensor held by shards, on every rank: O(n_rows) memory."""
        if self.size == 1:
            return shard
        rows = self.owned(n_rows)
        whole = shard.new_zeros((n_rows, *shard.shape[1:]))
        whole[rows.start : rows.stop] = shard
        return self.all_reduce(whole)
