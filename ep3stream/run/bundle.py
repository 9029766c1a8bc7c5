"""Tensors and JSON written to a directory all or nothing, and never read back without their digests checked.

    NAME/tensors.safetensors
    NAME/manifest.json          kind, version, description, size and digest of the tensors, its own digest

Set-ups, checkpoints and models are bundles. Written under a temporary name, fsynced, then renamed; one of the
same name is set aside first and removed last, so that at any moment `find_bundle` finds the old or the new one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ep3stream import disk
from ep3stream.disk import partial_path
from ep3stream.errors import DiskError
from ep3stream.run.bundle_manifest import (
    BUNDLE_VERSION,
    MANIFEST,
    TENSORS,
    aside,
    check_bundle,
    file_digest,
    unreadable,
)
from ep3stream.store.json_files import signed_bytes

_PIECE_BYTES = 4 << 20

# In the order in which their tensors lie in a file: none is larger than the one before, so that all are aligned.
_DTYPES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32"}


@dataclass(frozen=True, slots=True)
class Bundle:
    """What `write_bundle` was given."""

    tensors: dict[str, Tensor]
    description: dict[str, Any]


def write_bundle(
    path: Path, kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Writes the directory `path`, replacing one of that name.

    Raises DiskError naming the path, the bytes needed and the remedy when the disk refuses; nothing that was
    there before is lost then.
    """
    partial = partial_path(path)
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    try:
        disk.make_directory(path.parent)
        disk.sync(path.parent.parent)
        disk.remove(partial)
        disk.require_space(path.parent, n_bytes)
        _fill(partial, kind, tensors, description)
        if path.is_dir():
            _set_aside(path)
        disk.rename(partial, path)
        disk.sync(path.parent)
        disk.remove(aside(path))
    except OSError as error:
        disk.remove(partial)
        raise DiskError(
            f"{path} cannot be written ({error}); it needs {n_bytes / 1e6:.1f} MB: free space or correct permissions"
        ) from error


def _fill(partial: Path, kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    file = partial / TENSORS
    disk.make_directory(partial)
    disk.write(file, _safetensors(tensors))
    disk.sync(file)
    content = {
        "kind": kind,
        "format_version": BUNDLE_VERSION,
        "description": dict(description),
        "tensors": {"bytes": file.stat().st_size, "digest": file_digest(file)},
    }
    disk.write(partial / MANIFEST, [signed_bytes(content)])
    disk.sync(partial / MANIFEST)
    disk.sync(partial)


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, those of the library's own `save_file`, in pieces.

    A thread that is inside the library when the interpreter ends aborts the process; one that writes pieces does not.
    """
    names = sorted(tensors, key=lambda name: ([*_DTYPES].index(tensors[name].dtype), name))
    header, end = {}, 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        dtype, shape = _DTYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        data = np.ascontiguousarray(tensors[name].cpu().numpy()).reshape(-1).view(np.uint8).data
        yield from (data[first : first + _PIECE_BYTES] for first in range(0, len(data), _PIECE_BYTES))


def remove_bundle(path: Path) -> None:
    """Removes it, as readers see it all at once: what a kill leaves of it has lost its name."""
    with suppress(OSError):
        _set_aside(path)
        disk.remove(aside(path))


def _set_aside(path: Path) -> None:
    disk.remove(aside(path))
    disk.rename(path, aside(path))


def read_bundle(path: Path, kind: str) -> Bundle:
    """Everything in `path`, checked: DamagedDataError for what is not as written, InputError for a newer version."""
    description, tensors = check_bundle(path, kind), path / TENSORS
    try:
        return Bundle(_mapped(tensors), description)
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error


def _mapped(file: Path) -> dict[str, Tensor]:
    """Each in a memory map of its own: whoever drops one gives its pages back."""
    with safe_open(file, "pt") as opened:
        names = opened.keys()
    tensors = {}
    for name in names:
        with safe_open(file, "pt") as opened:
            tensors[name] = opened.get_tensor(name)
    return tensors
