"""A CUDA device that is not there: tensors that say cuda:0 and keep their numbers in host memory.

After `install()` device="cuda" works in this process, for good; `PRETENDED_DEVICES` says how many there are. What a GPU
refuses is refused: operands on different devices, numpy() of a device tensor, a generator of the other device, what
Triton or NCCL do not take. What costs a GPU time is counted by `counted`: waits for the device, and launches; bytes of
all tensors by `memory`, in a device of `PRETENDED_BYTES`. Triton's programs are stood in for by torch's formulas:
`test_triton.py` runs the programs themselves. Speed, races, the rounding of tensor cores, and memory inside an operator
are not pretended.

A CPU build of torch cannot ask for the guard of a CUDA device: methods that would are decided here in Python.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = str(Path(__file__).parents[1] / "ep3stream") + os.sep
INDEX, COUNT = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("PRETENDED_DEVICES", "1"))
CUDA, CPU = torch.device("cuda", INDEX), torch.device("cpu")
TOTAL_BYTES = int(os.environ.get("PRETENDED_BYTES", 80 << 30))

_generators: set[int] = set()
_pinned: set[int] = set()
_local = threading.local()


@dataclass
class Counts:
    """waits: how often the host waited for the device, by kind and line; launches: of operators, by name.

    Of products in float32 it is told apart whether they are in TF32.
    """

    waits: Counter = field(default_factory=Counter)
    launches: Counter = field(default_factory=Counter)


@contextlib.contextmanager
def counted(counts: Counts) -> Iterator[Counts]:
    """What this thread does within the context is added to `counts`."""
    before, _local.counts = getattr(_local, "counts", None), counts
    try:
        yield counts
    finally:
        _local.counts = before


def _place() -> str:
    """The innermost line of the package that leads here."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return "outside" if frame is None else f"{frame.f_code.co_filename[len(PACKAGE) :]}:{frame.f_lineno}"


def _waits(kind: str) -> None:
    if (counts := getattr(_local, "counts", None)) is not None:
        counts.waits[f"{kind} at {_place()}"] += 1


def _launches(name: str) -> None:
    if (counts := getattr(_local, "counts", None)) is not None:
        counts.launches[name] += 1


class _End(weakref.ref):
    """A tensor's, with the storage that it uses."""

    __slots__ = ("n_bytes", "storage")


class _Memory:
    """Bytes that the device's tensors take now, and the most that they took."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._users: Counter[int] = Counter()
        self._ends: dict[int, _End] = {}
        self._lock = threading.RLock()  # A tensor may end while another one is counted.

    def follow(self, tensor: DeviceTensor) -> None:
        """Counts the tensor's storage, which it may share with others, until the last of them ends."""
        storage = tensor.inner.untyped_storage()
        address, n_bytes = storage._cdata, storage.nbytes()
        self._change(address, n_bytes, 1)
        # weakref.finalize, which also acts at exit, takes 2.7 times as long.
        end = _End(tensor, self._ended)
        end.storage, end.n_bytes = address, n_bytes
        self._ends[id(end)] = end

    def _ended(self, end: _End) -> None:
        del self._ends[id(end)]
        self._change(end.storage, end.n_bytes, -1)

    def _change(self, storage: int, n_bytes: int, by: int) -> None:
        with self._lock:
            self._users[storage] += by
            if self._users[storage] == max(by, 0):
                self.live += by * n_bytes
                self.peak = max(self.peak, self.live)

    def forget_peak(self) -> None:
        self.peak = self.live


memory = _Memory()


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _is_host(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, DeviceTensor)


def inner(value: Any) -> Any:
    """The host's tensor of a device tensor; other values as they are."""
    return value.inner if isinstance(value, DeviceTensor) else value


class DeviceTensor(Tensor):
    """A tensor of the pretended device, whose numbers are those of `inner`."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor) -> DeviceTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=CUDA,
        )
        made.inner = numbers
        memory.follow(made)
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def numpy(self, *_: Any, **__: Any):
        raise TypeError("can't convert a cuda tensor to numpy; copy it to the host first")

    __array__ = numpy

    def tolist(self):
        _waits("tolist")
        return self.inner.tolist()

    def item(self):
        _waits("item")
        return self.inner.item()

    def __bool__(self):
        return bool(self.item())

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    __index__ = __int__

    def __getitem__(self, index):
        if any(isinstance(part, Tensor) for part in _parts(index)):
            _launches("index")
        return DeviceTensor(self.inner[_index(index)])

    def __setitem__(self, index, value):
        _launches("setitem")
        if _is_host(value):
            _waits("upload")
        self.inner[_index(index)] = inner(value)

    def __deepcopy__(self, memo):
        return DeviceTensor(self.inner.clone())

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.inner!r})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def contiguous(self):
        return self if self.is_contiguous() else self.clone(memory_format=torch.contiguous_format)

    def nonzero(self):
        return _run(torch.ops.aten.nonzero.default, (self,), {})

    def cpu(self):
        return _run(torch.ops.aten._to_copy.default, (self,), {"device": CPU})

    def copy_(self, source, non_blocking=False):
        return _copy(self, source)


for _name in ("float", "double", "half", "bfloat16", "long", "int", "bool"):
    setattr(DeviceTensor, _name, lambda self, _name=_name: self.to(getattr(torch, _name)))


def _parts(index: Any) -> Any:
    return index if isinstance(index, tuple | list) else (index,)


def _index(index: Any) -> Any:
    for part in _parts(index):
        if isinstance(part, DeviceTensor) and part.dtype == torch.bool:
            _waits("boolean index")
        elif _is_host(part) and part.dim():
            _waits("upload of an index")
    return _mapped(inner, index)


# Isinstance of a union takes twice as long as that of a tuple.
_HOLDING = (list, tuple, dict)


def _mapped(function: Callable[[Any], Any], values: Any) -> Any:
    """The values, of lists, tuples and dicts, with each replaced; in a tenth of the time of torch's own `tree_map`."""
    if isinstance(values, _HOLDING):
        if isinstance(values, dict):
            return {name: _mapped(function, value) for name, value in values.items()}
        return type(values)([_mapped(function, value) for value in values])
    return function(values)


def _leaves(values: Any) -> list[Any]:
    """What lists, tuples and dicts hold. Each operator asks: without generators it takes a third of the time."""
    found: list[Any] = []
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, _HOLDING):
            found += _leaves(value)
        else:
            found.append(value)
    return found


# Operators that wait for a number, that take indices, and that start nothing.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "bincount"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh"}
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
_MAKING = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_")


@functools.cache
def _name_of(func: Any) -> str:
    """Without its namespace: as torch gives it, it is made anew each time."""
    return func._schema.name.split("::")[1]


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator: refused or counted as with a GPU, computed on the CPU."""
    name, leaves = _name_of(func), _leaves(args)
    if kwargs:
        leaves += _leaves(kwargs)
    ours = [each for each in leaves if isinstance(each, DeviceTensor)]
    device, generator = kwargs.get("device"), kwargs.get("generator")
    is_here = _is_cuda(device) if device is not None else bool(ours)
    if generator is not None and (generator._cdata in _generators) != is_here:
        raise RuntimeError(f"a generator of the wrong device for {func}")
    if not ours and not is_here:
        pins = kwargs.get("pin_memory")
        found = func(*args, **(kwargs | {"pin_memory": False} if pins else kwargs))
        if pins:
            _pinned.add(address := found.untyped_storage().data_ptr())
            weakref.finalize(found, _pinned.discard, address)
        return found
    if name == "_to_copy":
        return _to_copy(func, args[0], kwargs, is_here)
    if name == "copy_":
        return _copy(*args[:2])
    if name in _WAITING:
        _waits(name)
    if name in _INDEXING:
        _index(args[1])
    elif ours or not name.startswith(_MAKING):
        for each in leaves:
            if _is_host(each) and each.dim():
                raise RuntimeError(
                    f"{func}: expected all tensors on {CUDA}, but one of {tuple(each.shape)} is not"
                )
    plain = _mapped(inner, args), _mapped(inner, kwargs if device is None else kwargs | {"device": CPU})
    if func is torch.ops.aten.mm.dtype:  # bfloat16 into float32, which CPUs do not have.
        found = plain[0][0].float() @ plain[0][1].float()
    elif func is torch.ops.aten.mm.dtype_out:
        found = torch.mm(plain[0][0].float(), plain[0][1].float(), out=plain[1]["out"])
    else:
        found = func(*plain[0], **plain[1])
    if is_here and not func.is_view and name not in _FREE:
        # bfloat16 into float32 is no product in TF32.
        in_tf32 = (
            name in _PRODUCTS and _multiplies_in_tf32() and found.dtype == plain[0][0].dtype == torch.float32
        )
        _launches(f"{name} in TF32" if in_tf32 else name)
    return _mapped(lambda value: _wrapped(value, ours), found) if is_here else found


def _multiplies_in_tf32() -> bool:
    """What the program has set; torch before 2.9 has the older name alone."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def _wrapped(value: Any, ours: list[DeviceTensor]) -> Any:
    """In place, and into `out`, it is the same tensor as before."""
    for each in ours:
        if each.inner is value and (each.shape, each.stride()) == (value.shape, value.stride()):
            return each
    return DeviceTensor(value) if isinstance(value, Tensor) else value


def _to_copy(func: Any, source: Tensor, kwargs: dict[str, Any], is_here: bool) -> Tensor:
    if not is_here:
        _waits("copy to the host")
    elif _is_host(source):
        _upload(source)
    _launches("_to_copy")
    kept = {name: value for name, value in kwargs.items() if name in ("dtype", "memory_format", "layout")}
    found = func(inner(source), **kept)
    return DeviceTensor(found) if is_here else found


def _copy(target: Tensor, source: Tensor) -> Tensor:
    if _is_host(target):
        _waits("copy to the host")
    elif _is_host(source):
        _upload(source)
    _launches("copy_")
    inner(target).copy_(inner(source))
    return target


def _upload(source: Tensor) -> None:
    if source.numel() and not source.is_pinned():
        _waits("upload")


class _Everywhere(TorchDispatchMode):
    """Sees operators that have no device tensor yet, such as torch.zeros(..., device="cuda")."""

    _should_skip_dynamo = classmethod(lambda cls: False)  # Otherwise torch imports its compiler, for seconds.

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _GeneratorType(type):
    real = torch.Generator

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls.real)


class _Generator(metaclass=_GeneratorType):
    """In the place of torch.Generator: the CPU's, some of which are remembered as the device's."""

    def __new__(cls, device: Any = "cpu"):
        made = cls.real("cpu")
        (_generators.add if _is_cuda(device) else _generators.discard)(made._cdata)
        return made


class _Event:
    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.enable_timing = enable_timing

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        _waits("event")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        assert self.enable_timing
        assert other.enable_timing
        return 0.1


class _Stream:
    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = CUDA

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def wait_event(self, event: _Event) -> None:
        pass

    def synchronize(self) -> None:
        _waits("synchronize")


def _set_device(device: Any) -> None:
    index = device if isinstance(device, int) else torch.device(device).index
    assert index in (None, INDEX), f"this process pretends {CUDA} alone"


def _cuda() -> dict[str, Any]:
    """Of torch.cuda what the package uses."""
    stream = _Stream()
    properties = types.SimpleNamespace(total_memory=TOTAL_BYTES, multi_processor_count=132, name="pretended")
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: COUNT,
        "current_device": lambda: INDEX,
        "set_device": _set_device,
        "device": lambda device: contextlib.nullcontext(),
        "mem_get_info": lambda device=None: (TOTAL_BYTES, TOTAL_BYTES),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "memory_allocated": lambda device=None: memory.live,
        "max_memory_allocated": lambda device=None: memory.peak,
        "reset_peak_memory_stats": lambda device=None: memory.forget_peak(),
        "empty_cache": lambda: None,
        "set_sync_debug_mode": lambda mode: None,
        "synchronize": lambda device=None: stream.synchronize(),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
    }


def _patch_tensors() -> None:
    """What torch.Tensor and its factories would ask of a CUDA build."""
    real_to, real_copy, real_get = Tensor.to, Tensor.copy_, Tensor.__getitem__
    real_tensor, real_as_tensor = torch.tensor, torch.as_tensor

    def full(value: Any) -> Any:
        """ "cuda" alone would ask the driver for the current device."""
        return CUDA if isinstance(value, str | torch.device) and str(value) == "cuda" else value

    def to(self, *args, **kwargs):
        return real_to(self, *map(full, args), **{name: full(value) for name, value in kwargs.items()})

    def copy(self, source, non_blocking=False):
        return (
            _copy(self, source) if isinstance(source, DeviceTensor) else real_copy(self, source, non_blocking)
        )

    def get(self, index):
        if any(isinstance(part, DeviceTensor) for part in _parts(index)):
            raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")
        return real_get(self, index)

    def tensor(*args, device=None, **kwargs):
        made = real_tensor(*args, **kwargs)
        return made.to(CUDA) if _is_cuda(device) else made

    def as_tensor(value, dtype=None, device=None):
        found = value if isinstance(value, DeviceTensor) else real_as_tensor(value, dtype=dtype)
        return found.to(device or found.device, dtype or found.dtype)

    Tensor.to, Tensor.copy_, Tensor.__getitem__ = to, copy, get
    Tensor.is_pinned = lambda self, *_: self.untyped_storage().data_ptr() in _pinned
    torch.tensor, torch.as_tensor, torch.Generator = tensor, as_tensor, _Generator


def _stand_in_for_triton() -> None:
    """The functions that launch Triton's programs, by torch, for matrices as the programs take them."""
    from ep3stream.solver import gpu, triton_columns, triton_gemm, triton_products, triton_radial
    from ep3stream.solver.kernels import _PROFILES

    def require(*matrices: Tensor, contiguous: bool = True) -> list[Tensor]:
        for each in matrices:
            assert isinstance(each, DeviceTensor), "Triton got a tensor of the host"
            assert each.is_contiguous() or (not contiguous and each.stride(1) == 1), "rows are not contiguous"
        return [each.inner for each in matrices]

    def phi(squared: Tensor, kind: int, shape: float) -> Tensor:
        _PROFILES[gpu.KINDS[kind]].apply(squared, shape, squared)
        return squared

    def exponents(a: Tensor, b: Tensor, n_numbers: int, power: float) -> tuple[Tensor, Tensor]:
        difference = (a[:, :, None] - b[:, None, :]).abs()
        return difference[:n_numbers] ** power, difference[n_numbers:] != 0

    def columns(a, b, constants, n_numbers, is_anova, power) -> Tensor:
        e, differ = exponents(a, b, n_numbers, power)
        first, second = constants[:, :, None, None]
        if is_anova:
            numbers = first[:n_numbers] + second[:n_numbers] * torch.exp2(-e)
            return numbers.prod(0) * torch.where(differ, first[n_numbers:], 1.0).prod(0)
        return torch.exp2(-e.sum(0) - (first[n_numbers:] * differ).sum(0))

    def radial_profile(squared, kind, shape, out) -> None:
        _launches("radial_profile")
        mine, into = require(squared, out, contiguous=False)
        into.copy_(phi(mine.clamp_min(0), kind, shape))

    def radial_gemm(a, b, kind, shape, weights=None, block=None) -> Tensor | None:
        _launches("radial_gemm")
        left, right = require(a, b)
        assert left.dtype == right.dtype
        formed = phi((left.float() @ right.float().T).clamp_min_(0), kind, shape)
        if block is not None:
            require(block, contiguous=False)[0].copy_(formed)
        if weights is None:
            return None
        _launches("sum of the parts")
        return DeviceTensor(require(weights)[0] @ formed)

    def times(weights, a, b, kind, shape, constants=None, n_numbers=0) -> Tensor:
        _launches("times")
        _launches("sum of the parts")
        w, left, right = require(weights, a, b)
        if constants is None:
            distances = torch.cdist(
                left.T.double(), right.T.double(), compute_mode="donot_use_mm_for_euclid_dist"
            )
            block = phi(distances.square().float(), kind, shape)
        else:
            (values,) = require(constants)
            block = columns(left, right, values, n_numbers, gpu.KINDS[kind] == "anova", shape)
        return DeviceTensor(w @ block)

    def column_block(a, b, constants, n_numbers, is_anova, power, out) -> None:
        _launches("column_block")
        (into,) = require(out, contiguous=False)
        into.copy_(columns(*require(a, b, constants), n_numbers, is_anova, power))

    def column_sums(a, b, constants, n_numbers, is_anova, power, weighted) -> Tensor:
        _launches("column_sums")
        (left, right, (rests, shares)), (mine,) = (
            require(a, b, constants),
            require(weighted, contiguous=False),
        )
        e, differ = exponents(left, right, n_numbers, power)
        t = mine.double().expand_as(e)
        if is_anova:
            shared = shares[:n_numbers, None, None] * torch.exp2(-e)
            t = t * shared / (rests[:n_numbers, None, None] + shared)
        of_numbers = torch.stack([t.sum((1, 2)), (t * e).sum((1, 2))])
        differing = (mine.double() * differ).sum((1, 2))
        return DeviceTensor(torch.cat([of_numbers, torch.stack([0 * differing, differing])], 1))

    triton_radial.radial_profile, triton_products.times = radial_profile, times
    triton_gemm.radial_gemm = radial_gemm
    triton_columns.column_block, triton_columns.column_sums = column_block, column_sums
    gpu.triton_runs = lambda device_type: device_type == "cuda"


def _stand_in_for_nccl() -> None:
    """gloo in NCCL's place, which takes contiguous tensors of the device alone; gloo's own groups take the host's."""
    real_init, real_group = dist.init_process_group, dist.new_group
    are_nccl: dict[Any, bool] = {}

    def init(backend=None, *args, **kwargs):
        are_nccl[None] = backend == "nccl"
        kwargs.pop("device_id", None)
        return real_init("gloo", *args, **kwargs)

    def new_group(ranks=None, *args, backend=None, **kwargs):
        group = real_group(ranks, *args, backend="gloo", **kwargs)
        are_nccl[group] = are_nccl[None] if backend is None else backend == "nccl"
        return group

    def checked(name: str) -> Any:
        real = getattr(dist, name)

        def collective(tensor, *args, **kwargs):
            is_nccl = are_nccl[kwargs.get("group")]
            if isinstance(tensor, DeviceTensor) != is_nccl:
                raise RuntimeError(f"{name}: the tensor and its group are of different devices")
            if is_nccl and not tensor.is_contiguous():
                raise ValueError(f"{name}: tensors must be contiguous")
            return real(inner(tensor), *args, **kwargs)

        return collective

    dist.init_process_group, dist.new_group = init, new_group
    for name in ("all_reduce", "broadcast", "reduce", "send", "recv", "isend", "irecv"):
        setattr(dist, name, checked(name))


def install() -> None:
    """Makes this process pretend, in every thread."""
    for name, value in _cuda().items():
        setattr(torch.cuda, name, value)
    _patch_tensors()
    _stand_in_for_triton()
    _stand_in_for_nccl()
    _Everywhere().__enter__()
    real_run = threading.Thread.run

    def run(self: threading.Thread) -> None:
        with _Everywhere():
            real_run(self)

    threading.Thread.run = run
