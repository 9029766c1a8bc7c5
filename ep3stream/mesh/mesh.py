"""The ranks of a fit, their devices, which centers each of them holds, and the collectives between them.

A rank is a process with one device. Rank 0 is the leader: it writes the run. The first rank of each machine is its
reader: it reads the data for all ranks of the machine. With one rank every collective returns at once, so that no
caller asks how many ranks there are.

Every collective raises RankError when another rank has ended or does not answer in time; any other error, such as
torch.OutOfMemoryError, passes unchanged. Bytes below are those of the tensors given, which `Mesh.sent` counts.
"""

from __future__ import annotations

import json
import re
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
from ep3stream.mesh.shared_collectives import LostPeer, SharedCollectives, new_shared_file

Result = TypeVar("Result")

# Whole tensors travel between the leader and the shards in pieces, so that no device needs room for another's shard.
_PIECE_BYTES = 64 << 20
_CACHE_LINE_BYTES = 64
_GOES_ON = "the same command goes on from the last checkpoint"

# Gloo raises a plain RuntimeError and NCCL a DistError for everything: only the words tell a lost rank from the rest.
_LOST_PEER_WORDS = re.compile(
    "timed out|timeout|closed by peer|socket closed|pair closure|connection reset|broken pipe|read error|write error"
    "|ncclRemoteError|ncclSystemError|communicator was aborted",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Groups:
    """The process groups of torch.distributed, by whom they reach and where their tensors lie.

    host: all ranks, tensors in host memory; node_host: the ranks of this machine, tensors in host memory; node_device:
    those ranks, tensors on the device. None is torch's default group, of all ranks with tensors on the device.
    """

    host: dist.ProcessGroup | None = None
    node_host: dist.ProcessGroup | None = None
    node_device: dist.ProcessGroup | None = None


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's place among the ranks of a fit.

    Of p centers each rank holds a shard of consecutive rows; the first p mod size shards have one row more.
    local_rank and local_size: the place among the ranks of this machine. sent: bytes given so far to each kind of
    collective, `all_reduce`, `broadcast`, `gather`, `scatter`, `node` (within a machine) and `control` (decisions and
    errors); docs/scaling.md says what of these crosses a link. shared: collectives in shared memory, which replace
    gloo's for tensors in host memory where all ranks are on this machine.
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
        """The mesh of the initialised process group, or a mesh of one rank where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1, device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_leader(self) -> bool:
        """Whether this rank writes the run, logs and prints."""
        return self.rank == 0

    @property
    def is_reader(self) -> bool:
        """Whether this rank reads the data for its machine."""
        return self.local_rank == 0

    def shard_range(self, n_rows: int) -> range:
        """Which of `n_rows` rows are in this rank's shard."""
        return self._shard_range_of(self.rank, n_rows)

    def shard_starts(self, n_rows: int) -> list[int]:
        """The first row of each rank's shard of `n_rows` rows."""
        return [self._shard_range_of(rank, n_rows).start for rank in range(self.size)]

    def _shard_range_of(self, rank: int, n_rows: int) -> range:
        share, extra = divmod(n_rows, self.size)
        start = rank * share + min(rank, extra)
        return range(start, start + share + (rank < extra))

    # Collectives on tensors of the device, within a step.

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over the ranks in place and returns it, with the same bits on every rank.

        In a ring each rank sends and receives 2 (size - 1) / size of the tensor's bytes; in shared memory each rank
        writes its own tensor and reads all of them.
        """
        if self.size > 1:
            with self._collective("all_reduce", tensor) as packed:
                if self.shared is not None and tensor.device.type == "cpu":
                    self.shared.sum_(packed)
                else:
                    dist.all_reduce(packed)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Fills `tensor` with the leader's values in place and returns it; each other rank receives its bytes."""
        if self.size > 1:
            with self._collective("broadcast", tensor) as packed:
                dist.broadcast(packed, src=0)
        return tensor

    def all_gather_rows(self, shard: Tensor, n_rows: int) -> Tensor:
        """All `n_rows` rows, (n_rows, ...), on every rank, of a tensor held in shards of rows.

        O(n_rows) memory. An all-reduce of the whole, whose other rows are zeros: twice the bytes of an all-gather.
        """
        if self.size == 1:
            return shard
        rows = self.shard_range(n_rows)
        whole = shard.new_zeros((n_rows, *shard.shape[1:]))
        whole[rows.start : rows.stop] = shard
        return self.all_reduce(whole)

    # Collectives between shards and host memory, for files.

    def gather(self, shard: Tensor, n_rows: int, dim: int = 0) -> Tensor | None:
        """The whole tensor, of size `n_rows` along `dim`, in the leader's host memory; None on the other ranks.

        The shards lie along `dim`. Each other rank sends the bytes of its shard, in pieces of 64 MiB.
        """
        if self.size == 1:
            return shard
        self._count("gather", shard)
        with self._lost_peers_named():
            if not self.is_leader:
                for piece in _pieces(shard.contiguous().view(-1)):
                    dist.send(piece, dst=0)
                return None
            shape = list(shard.shape)
            shape[dim] = n_rows
            whole = torch.empty(shape, dtype=shard.dtype)
            for rank in range(self.size):
                rows = self._shard_range_of(rank, n_rows)
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
        """This rank's shard along `dim`, on its device, of the leader's tensor `whole`; the other ranks give None.

        The leader sends each other rank the bytes of its shard, in pieces of 64 MiB: a memory map is read shard by
        shard, and the leader's device holds a shard and a piece at most.
        """
        if self.size == 1:
            assert whole is not None
            return whole.to(self.device)
        shape, dtype = self._form_of(whole)
        mine = self.shard_range(shape[dim])
        with self._lost_peers_named():
            if whole is not None:
                for rank in range(1, self.size):
                    rows = self._shard_range_of(rank, shape[dim])
                    for part in _pieces(whole.narrow(dim, rows.start, len(rows)).contiguous().view(-1)):
                        self._count("scatter", part)
                        dist.send(part.to(self.device), dst=rank)
                return whole.narrow(dim, mine.start, len(mine)).to(self.device, copy=True)
            shape[dim] = len(mine)
            shard = torch.empty(shape, dtype=dtype, device=self.device)
            for piece in _pieces(shard.view(-1)):
                dist.recv(piece, src=0)
        return shard

    def replicate(self, whole: Tensor | None) -> Tensor:
        """The leader's tensor in the host memory of every rank; the other ranks give None and receive its bytes."""
        if self.size == 1:
            assert whole is not None
            return whole
        shape, dtype = self._form_of(whole)
        tensor = torch.empty(shape, dtype=dtype) if whole is None else whole.contiguous()
        self._count("broadcast", tensor)
        with self._lost_peers_named():
            for piece in _pieces(tensor.view(-1)):
                dist.broadcast(piece, src=0, group=self.groups.host)
        return tensor

    def _form_of(self, whole: Tensor | None) -> tuple[list[int], torch.dtype]:
        """Shape and dtype of the leader's tensor, on every rank."""
        form = self.broadcast_object(lambda: None if whole is None else [list(whole.shape), str(whole.dtype)])
        return form[0], _dtype(form[1])

    # Decisions and errors, some bytes each.

    def all_reduce_max(self, values: Sequence[int]) -> list[int]:
        """The largest over the ranks of each of `values`, of which every rank gives as many; 8 bytes each."""
        if self.size == 1:
            return list(values)
        words = torch.tensor(values, dtype=torch.int64)
        with self._collective("control", words):
            if self.shared is not None:
                self.shared.max_(words)
            else:
                dist.all_reduce(words, dist.ReduceOp.MAX, group=self.groups.host)
        largest: list[int] = words.tolist()
        return largest

    def broadcast_object(self, action: Callable[[], Any]) -> Any:
        """Runs `action` on the leader alone and returns its result, which must fit into JSON, on every rank.

        An error of `action` is raised on every rank.
        """
        value = self.on_leader(action)
        return value if self.size == 1 else json.loads(self._broadcast_bytes(json.dumps(value).encode(), 0))

    def on_leader(self, action: Callable[[], Result]) -> Result | None:
        """Runs `action` on the leader alone and returns its result there, None on the other ranks.

        An error of `action` is raised on every rank.
        """
        return self.all_or_raise(lambda: action() if self.is_leader else None)

    def all_or_raise(self, action: Callable[[], Result]) -> Result:
        """Runs `action` on every rank and returns this rank's result, once it has succeeded on all of them.

        Else every rank raises the error of the first rank where `action` failed: the error itself there, and elsewhere
        a copy with `from_rank`, or a RankError if the error is not one of ep3stream's. `action` must not call a
        collective: where it fails on one rank, the other ranks would wait in that collective.
        """
        if self.size == 1:
            return action()
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        first_failed = self.size - self.all_reduce_max([0 if failure is None else self.size - self.rank])[0]
        if first_failed == self.size:
            return result
        description = b"" if failure is None else json.dumps([type(failure).__name__, str(failure)]).encode()
        description = self._broadcast_bytes(description, first_failed)
        if failure is not None and first_failed == self.rank:
            raise failure
        raise _error_of_rank(first_failed, *json.loads(description))

    def _broadcast_bytes(self, data: bytes, source: int, group: dist.ProcessGroup | None = None) -> bytes:
        """The bytes of the rank `source`, which must not be empty, on every rank of the group; default: all ranks."""
        length = torch.tensor([len(data)])
        self._broadcast_on_host(length, source, group)
        if self.rank == source:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        else:
            content = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast_on_host(content, source, group)
        return bytes(content.numpy())

    def _broadcast_on_host(self, tensor: Tensor, source: int, group: dist.ProcessGroup | None) -> None:
        with self._collective("control", tensor):
            if (
                self.shared is not None
            ):  # All ranks are on this machine, so that its group is that of all ranks.
                self.shared.broadcast_(tensor, source)
            else:
                dist.broadcast(tensor, src=source, group=group or self.groups.host)

    # Within a machine: the data that its reader has read.

    def once_per_node(self, make: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """The host tensors that `make` returns on each machine's reader, in memory that the machine's ranks share.

        A rank that writes to them changes what the other ranks of its machine see. An error of `make` on any machine
        is raised on every rank. Nothing is sent but the tensors' shapes.
        """
        return self._share_in_node(self.all_or_raise(lambda: list(make()) if self.is_reader else None))

    def node_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the device for `broadcast_in_node`; on CPUs one that the machine's ranks share."""
        if self.device.type != "cpu" or self.local_size == 1:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        return self._share_in_node([torch.zeros(tuple(shape), dtype=dtype)] if self.is_reader else None)[0]

    def broadcast_in_node(self, buffer: Tensor) -> None:
        """Fills a `node_buffer` with the values of the machine's reader, on each of the machine's ranks.

        On GPUs each other rank receives the buffer's bytes. On CPUs nothing is sent, since the ranks share the buffer:
        the values are there once a collective that the reader called after it wrote them has returned.
        """
        if self.local_size == 1:
            return
        with self._collective("node", buffer) as packed:
            if self.device.type != "cpu":
                dist.broadcast(packed, src=self._reader, group=self.groups.node_device)

    @property
    def _reader(self) -> int:
        """The rank that reads for this machine."""
        return self.rank - self.local_rank

    def _share_in_node(self, tensors: list[Tensor] | None) -> list[Tensor]:
        """The reader's host tensors, copied to a file in memory that every rank of the machine maps.

        The other ranks give None. The file's name is gone when this returns or raises; the maps stay.
        """
        if self.local_size == 1:
            assert tensors is not None
            return tensors
        path, description = None, b""
        if tensors is not None:
            n_bytes = sum(_aligned(tensor.numel() * tensor.element_size()) for tensor in tensors)
            path = new_shared_file(n_bytes)
            forms = [(list(tensor.shape), str(tensor.dtype)) for tensor in tensors]
            description = json.dumps([str(path), n_bytes, forms]).encode()
        try:
            description = self._broadcast_bytes(description, self._reader, self.groups.node_host)
            views = _mapped_views(*json.loads(description))
            if tensors is not None:
                for tensor, view in zip(tensors, views, strict=True):
                    view.copy_(tensor)
            with self._lost_peers_named():
                # Every rank has mapped the file, and its content is there.
                dist.barrier(group=self.groups.node_host)
        finally:
            if path is not None:
                path.unlink()
        return views

    @contextmanager
    def _collective(self, kind: str, tensor: Tensor) -> Iterator[Tensor]:
        """Counts the bytes of `tensor` and gives it, contiguous, to a collective that works in place."""
        self._count(kind, tensor)
        packed = tensor.contiguous()  # NCCL and the shared memory take no other.
        with self._lost_peers_named():
            yield packed
        if packed is not tensor:
            tensor.copy_(packed)

    def _count(self, kind: str, tensor: Tensor) -> None:
        self.sent[kind] += tensor.numel() * tensor.element_size()

    @contextmanager
    def _lost_peers_named(self) -> Iterator[None]:
        """RankError in place of what torch raises when a rank has ended or does not answer in time."""
        try:
            yield
        except RuntimeError as error:
            if not _is_lost_peer(error):
                raise
            reason = str(error).splitlines()[0]
            raise RankError(
                f"rank {self.rank} of {self.size} waits for another one in vain ({reason:.200}); {_GOES_ON}"
            ) from error


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed since a rank has ended or does not answer, and not for want of memory or the like."""
    if isinstance(error, LostPeer):
        return True
    # torch.OutOfMemoryError and torch.AcceleratorError are RuntimeErrors too.
    is_of_backend = type(error) is RuntimeError or isinstance(error, dist.DistError)
    return is_of_backend and _LOST_PEER_WORDS.search(str(error)) is not None


def _pieces(flat: Tensor) -> Sequence[Tensor]:
    """Consecutive parts of at most 64 MiB; none of an empty tensor, which is not sent."""
    return flat.split(max(1, _PIECE_BYTES // flat.element_size())) if len(flat) else ()


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return dtype


def _mapped_views(file: str, n_bytes: int, forms: Sequence[tuple[list[int], str]]) -> list[Tensor]:
    """Tensors of these shapes and dtypes, one after another in a map of the file, each from a new cache line on."""
    mapped = torch.from_file(file, shared=True, size=n_bytes, dtype=torch.uint8)
    views, start = [], 0
    for shape, dtype_name in forms:
        dtype = _dtype(dtype_name)
        length = torch.Size(shape).numel() * dtype.itemsize
        views.append(mapped[start : start + length].view(dtype).view(shape))
        start += _aligned(length)
    return views


def _aligned(n_bytes: int) -> int:
    """The next multiple of a cache line, at least one."""
    return -(-max(1, n_bytes) // _CACHE_LINE_BYTES) * _CACHE_LINE_BYTES


def _error_of_rank(rank: int, name: str, message: str) -> Ep3streamError:
    """The error that another rank has raised: of its type if that is one of ep3stream's, else a RankError."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, Ep3streamError):
        error: Ep3streamError = kind(message)
    else:
        error = RankError(f"rank {rank} failed ({name}: {message}); {_GOES_ON}")
    error.from_rank = rank
    return error
