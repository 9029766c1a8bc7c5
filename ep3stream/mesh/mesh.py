"""Ranks, devices and who owns which centers.

A rank is a process with a device of its own; rank 0 is the leader, and the first rank of each machine reads the data
for that machine. With one rank every method returns at once, so that no caller asks how many there are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ep3stream import errors
from ep3stream.errors import Ep3streamError, RankError
from ep3stream.mesh.shared_collectives import SharedCollectives, new_map

Result = TypeVar("Result")

_PIECE_BYTES = 64 << 20

_GOES_ON = "the same command goes on from the last checkpoint"


@dataclass(frozen=True, slots=True)
class Groups:
    """Whom a collective reaches: everyone or this machine's ranks, with tensors of the host or of the device.

    None stands for torch's default group.
    """

    host: dist.ProcessGroup | None = None
    node_host: dist.ProcessGroup | None = None
    node_device: dist.ProcessGroup | None = None


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's place among the ranks of a fit, one process per device.

    Centers 0..p-1 are dealt in runs of consecutive rows: the first p mod size ranks hold one more. local_rank and
    local_size: the place among the ranks of this machine. sent: bytes of the tensors given to each kind of
    collective so far, `all_reduce`, `node`, `gather`, `deal`, `copy` and `word`; docs/scaling.md says what of these
    crosses a link. shared: what the ranks say to each other goes through it, but for tensors on devices and for what
    gloo carries once.
    """

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0
    local_size: int = 1
    sent: Counter[str] = field(default_factory=Counter, compare=False, repr=False)
    groups: Groups = field(default_factory=Groups, compare=False, repr=False)
    shared: SharedCollectives | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of_this_process(cls, device: torch.device) -> Mesh:
        """The initialised process group's mesh, or a mesh of one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1, device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_leader(self) -> bool:
        """Whether this rank writes the run and is_main_process to people."""
        return self.rank == 0

    @property
    def reads(self) -> bool:
        """Whether this rank reads the data for its machine."""
        return self.local_rank == 0

    def owned(self, n_rows: int) -> range:
        """Row numbers of this rank's shard of `n_rows` rows."""
        return self._owned_by(self.rank, n_rows)

    def _owned_by(self, rank: int, n_rows: int) -> range:
        share, extra = divmod(n_rows, self.size)
        start = rank * share + min(rank, extra)
        return range(start, start + share + (rank < extra))

    # Tensors of the device, within a step.

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place; the same bits on every rank."""
        if self.size > 1:
            self._count("all_reduce", tensor)
            with self._talking():
                if self.shared is not None and tensor.device.type == "cpu":
                    self.shared.sum_(tensor)
                else:
                    dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The leader's `tensor` on every rank, in place."""
        if self.size > 1:
            self._count("copy", tensor)
            with self._talking():
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

    # Between the shards and the leader's memory, for files.

    def gather(self, shard: Tensor, n_rows: int, dim: int = 0) -> Tensor | None:
        """The whole of a tensor whose `dim` is held by shards, in the leader's host memory; None on the others.

        In pieces, so that no device needs room for another's shard.
        """
        if self.size == 1:
            return shard
        self._count("gather", shard)
        with self._talking():
            if not self.is_leader:
                for piece in _pieces(shard.contiguous().view(-1)):
                    dist.send(piece, dst=0)
                return None
            shape = list(shard.shape)
            shape[dim] = n_rows
            whole = torch.empty(shape, dtype=shard.dtype)
            for rank in range(self.size):
                rows = self._owned_by(rank, n_rows)
                target = whole.narrow(dim, rows.start, len(rows))
                if rank == 0:
                    target.copy_(shard)
                    continue
                flat = torch.empty(target.numel(), dtype=shard.dtype)
                for part in _pieces(flat):
                    piece = shard.new_empty(len(part))
                    dist.recv(piece, src=rank)
                    part.copy_(piece)
                target.copy_(flat.view(target.shape))
        return whole

    def scatter_rows(self, whole: Tensor | None, dim: int = 0) -> Tensor:
        """This rank's shard, on its device, of the leader's `whole` tensor; the others give None.

        What the leader holds as a memory map is read piece by piece, and nothing of it is on its device but its shard.
        """
        if self.size == 1:
            assert whole is not None
            return whole.to(self.device)
        shape, dtype = self._form(whole)
        mine = self.owned(shape[dim])
        with self._talking():
            if whole is not None:
                for rank in range(1, self.size):
                    rows = self._owned_by(rank, shape[dim])
                    for part in _pieces(whole.narrow(dim, rows.start, len(rows)).contiguous().view(-1)):
                        self._count("deal", part)
                        dist.send(part.to(self.device), dst=rank)
                return whole.narrow(dim, mine.start, len(mine)).to(self.device, copy=True)
            shape[dim] = len(mine)
            shard = torch.empty(shape, dtype=dtype, device=self.device)
            for piece in _pieces(shard.view(-1)):
                dist.recv(piece, src=0)
        return shard

    def copy(self, whole: Tensor | None) -> Tensor:
        """The leader's tensor in the host memory of every rank; the others give None."""
        if self.size == 1:
            assert whole is not None
            return whole
        shape, dtype = self._form(whole)
        tensor = torch.empty(shape, dtype=dtype) if whole is None else whole.contiguous()
        self._count("copy", tensor)
        with self._talking():
            for piece in _pieces(tensor.view(-1)):
                dist.broadcast(piece, src=0, group=self.groups.host)
        return tensor

    def _form(self, whole: Tensor | None) -> tuple[list[int], torch.dtype]:
        form = self.broadcast_object(lambda: None if whole is None else [list(whole.shape), str(whole.dtype)])
        return form[0], _dtype(form[1])

    # Words: what is decided, and what went wrong.

    def all_reduce_max(self, wishes: Sequence[int]) -> list[int]:
        """Place by place the largest of what the ranks give, the same on all of them."""
        if self.size == 1:
            return list(wishes)
        words = torch.tensor(wishes, dtype=torch.int64)
        self._count("word", words)
        with self._talking():
            if self.shared is not None:
                self.shared.max_(words)
            else:
                dist.all_reduce(words, dist.ReduceOp.MAX, group=self.groups.host)
        found: list[int] = words.tolist()
        return found

    def broadcast_object(self, action: Callable[[], Any]) -> Any:
        """What `action` returns on the leader, the only rank that does it, on every rank: anything JSON can hold.

        Its error is raised on every rank.
        """
        value = self.on_leader(action)
        return value if self.size == 1 else json.loads(self._said(json.dumps(value).encode(), 0))

    def on_leader(self, action: Callable[[], Result]) -> Result | None:
        """What `action` returns on the leader, the only rank that does it; its error is raised on every rank."""
        return self.all_or_raise(lambda: action() if self.is_leader else None)

    def all_or_raise(self, action: Callable[[], Result]) -> Result:
        """What `action` returns here, once it has succeeded on every rank.

        Else every rank raises the error of the first one it failed on: that error itself there, a copy elsewhere.
        `action` must not talk to other ranks, or a failing one would leave them waiting.
        """
        if self.size == 1:
            return action()
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        first = self.size - self.all_reduce_max([0 if failure is None else self.size - self.rank])[0]
        if first == self.size:
            return result
        told = self._said(b"" if failure is None else _told(failure), first)
        if failure is not None and first == self.rank:
            raise failure
        raise _heard(told, first)

    def _said(self, data: bytes, speaker: int) -> bytes:
        """The speaker's bytes on every rank."""
        words = torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8)
        length = torch.tensor([len(words)])
        self._host_broadcast(length, speaker)
        if self.rank != speaker:
            words = torch.empty(int(length), dtype=torch.uint8)
        self._host_broadcast(words, speaker)
        return bytes(words.numpy())

    def _host_broadcast(self, words: Tensor, speaker: int) -> None:
        self._count("word", words)
        with self._talking():
            if self.shared is not None:
                self.shared.copy_(words, speaker)
            else:
                dist.broadcast(words, src=speaker, group=self.groups.host)

    # Within a machine: what its reader has read.

    def once_a_node(self, make: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """The host tensors that `make` gives on the rank that reads, in memory that the machine's ranks share.

        An error on any machine is raised on every rank. Who writes to them writes to what all of these ranks see.
        """
        made = self.all_or_raise(lambda: list(make()) if self.reads else None)
        return self._shared(made)

    def node_room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the device that `tell_node` fills: on CPUs memory shared by the ranks of the machine."""
        if self.device.type != "cpu" or self.local_size == 1:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        return self._shared([torch.zeros(tuple(shape), dtype=dtype)] if self.reads else None)[0]

    def tell_node(self, room: Tensor) -> None:
        """The reader's `room` becomes that of the machine's other ranks: on CPUs once all have next agreed."""
        if self.local_size == 1:
            return
        self._count("node", room)
        if self.device.type != "cpu":
            with self._talking():
                dist.broadcast(room, src=self.rank - self.local_rank, group=self.groups.node_device)

    def _shared(self, tensors: list[Tensor] | None) -> list[Tensor]:
        """The reader's host tensors, which the others give None for, mapped by every rank of the machine."""
        if self.local_size == 1:
            assert tensors is not None
            return tensors
        forms = [(list(each.shape), str(each.dtype)) for each in tensors or []]
        n_bytes = sum(_aligned(each) for each in tensors or [])
        path = new_map(n_bytes) if tensors is not None else None
        told = json.loads(self._node_said(json.dumps([str(path), n_bytes, forms]).encode()))
        mapped, views = torch.from_file(told[0], shared=True, size=told[1], dtype=torch.uint8), []
        for shape, dtype in told[2]:
            kind = _dtype(dtype)
            length = torch.Size(shape).numel() * kind.itemsize
            views.append(mapped[:length].view(kind).view(shape))
            mapped = mapped[_aligned(views[-1]) :]
        for mine, view in zip(tensors or [], views, strict=False):
            view.copy_(mine)
        self._node_said(b"")  # All have mapped it, and the content is there.
        if path is not None:
            path.unlink()
        return views

    def _node_said(self, data: bytes) -> bytes:
        words = torch.zeros(4096, dtype=torch.uint8)
        words[: len(data)] = torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8)[: len(data)]
        with self._talking():
            dist.barrier(group=self.groups.node_host)
            dist.broadcast(words, src=self.rank - self.local_rank, group=self.groups.node_host)
        return bytes(words.numpy()).rstrip(b"\0")

    def _count(self, kind: str, tensor: Tensor) -> None:
        self.sent[kind] += tensor.numel() * tensor.element_size()

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """RankError in place of what torch raises when a rank has gone or keeps silent."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RankError(
                f"rank {self.rank} of {self.size} waits for another one in vain ({reason:.200}); {_GOES_ON}"
            ) from error


def _pieces(flat: Tensor) -> Sequence[Tensor]:
    """Of at most 64 MiB each; none of an empty tensor, which nobody sends."""
    return flat.split(max(1, _PIECE_BYTES // flat.element_size())) if len(flat) else ()


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return dtype


def _aligned(tensor: Tensor) -> int:
    """Its bytes, up to the next multiple of a cache line."""
    return -(-max(1, tensor.numel() * tensor.element_size()) // 64) * 64


def _told(error: Exception) -> bytes:
    return json.dumps([type(error).__name__, str(error)]).encode()


def _heard(told: bytes, rank: int) -> Ep3streamError:
    """The error of another rank, which tells of it itself."""
    name, message = json.loads(told)
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, Ep3streamError):
        error: Ep3streamError = kind(message)
    else:
        error = RankError(f"rank {rank} failed ({name}: {message}); {_GOES_ON}")
    error.told_by = rank
    return error
