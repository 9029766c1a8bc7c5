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
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ep3stream.data.signed_json import signed_bytes, signed_object
from ep3stream.data.small_files import read_small_file, require_own_file
from ep3stream.errors import DamagedDataError, DiskError, InputError
from ep3stream.run.files import disk

# 2: a set-up may have stages. 3: that of `nystrom` has half and shrink instead of core. 1 and 2 are read too.
BUNDLE_VERSION = 3
_TENSORS, _MANIFEST = "tensors.safetensors", "manifest.json"
_MAX_MANIFEST_BYTES = 16 << 20
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
    partial = _partial(path)
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
        disk.remove(_aside(path))
    except OSError as error:
        disk.remove(partial)
        raise DiskError(
            f"{path} cannot be written ({error}); it needs {n_bytes / 1e6:.1f} MB: free space or correct permissions"
        ) from error


def _fill(partial: Path, kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    file = partial / _TENSORS
    disk.make_directory(partial)
    disk.write(file, _safetensors(tensors))
    disk.sync(file)
    content = {
        "kind": kind,
        "format_version": BUNDLE_VERSION,
        "description": dict(description),
        "tensors": {"bytes": file.stat().st_size, "digest": file_digest(file)},
    }
    disk.write(partial / _MANIFEST, [signed_bytes(content)])
    disk.sync(partial / _MANIFEST)
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
        disk.remove(_aside(path))


def _set_aside(path: Path) -> None:
    disk.remove(_aside(path))
    disk.rename(path, _aside(path))


def find_bundle(path: Path) -> Path | None:
    """Where the bundle `path` lies: under its name, or set aside by a writer killed between two renames."""
    return next((place for place in (path, _aside(path)) if place.is_dir()), None)


def read_bundle(path: Path, kind: str) -> Bundle:
    """Everything in `path`, checked: DamagedDataError for what is not as written, InputError for a newer version."""
    description, tensors = check_bundle(path, kind), path / _TENSORS
    try:
        return Bundle(_mapped(tensors), description)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _mapped(file: Path) -> dict[str, Tensor]:
    """Each in a memory map of its own: whoever drops one gives its pages back."""
    with safe_open(file, "pt") as opened:
        names = opened.keys()
    tensors = {}
    for name in names:
        with safe_open(file, "pt") as opened:
            tensors[name] = opened.get_tensor(name)
    return tensors


def check_bundle(path: Path, kind: str) -> dict[str, Any]:
    """Reads and checks every byte, as `read_bundle` does and raises, in constant memory; gives the description."""
    content, tensors = _manifest(path, kind), path / _TENSORS
    declared = content["tensors"]
    try:
        size = require_own_file(tensors)
        digest = file_digest(tensors) if size == declared["bytes"] else "of another size"
        if digest != declared["digest"]:
            raise DamagedDataError(
                f"{tensors} is damaged: {size} bytes, digest {digest}, but its manifest says {declared!r:.120}; "
                f"restore it or remove {path}"
            )
    except (OSError, KeyError) as error:
        raise _unreadable(path, error) from error
    description: dict[str, Any] = content["description"]
    return description


def _unreadable(path: Path, error: Exception) -> DamagedDataError:
    return DamagedDataError(f"{path / _TENSORS} cannot be read ({error!r:.200}); restore it or remove {path}")


def read_description(path: Path, kind: str) -> dict[str, Any]:
    """What `write_bundle` was told beside the tensors, which are not read; raises as `read_bundle` does."""
    description: dict[str, Any] = _manifest(path, kind)["description"]
    return description


def check_bundle_size(path: Path, kind: str) -> None:
    """Raises as `read_bundle` does, but reads the manifest only and compares the tensors' size with it."""
    declared, tensors = _manifest(path, kind)["tensors"].get("bytes"), path / _TENSORS
    try:
        size = require_own_file(tensors)
    except OSError as error:
        found = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise DamagedDataError(f"{tensors} {found}; restore it or remove {path}") from error
    if size != declared:
        raise DamagedDataError(
            f"{tensors} has {size} bytes; it must have {declared}; restore it or remove {path}"
        )


def _manifest(path: Path, kind: str) -> dict[str, Any]:
    manifest = path / _MANIFEST
    try:
        require_own_file(manifest)
        data = read_small_file(manifest, _MAX_MANIFEST_BYTES)
        content = signed_object(data, str(manifest), f"restore it or remove {path}")
    except OSError as error:
        raise DamagedDataError(f"{manifest} cannot be read ({error}); restore it or remove {path}") from error
    version = content.get("format_version")
    if type(version) is int and version > BUNDLE_VERSION:
        raise InputError(
            f"{path} has format version {version}, this ep3stream reads up to {BUNDLE_VERSION}; update it"
        )
    shape = (content.get("kind"), type(content.get("description")), type(content.get("tensors")))
    if type(version) is not int or not 1 <= version <= BUNDLE_VERSION or shape != (kind, dict, dict):
        raise DamagedDataError(f"{manifest} does not describe a {kind}; restore it or remove {path}")
    return content


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file's content all or nothing; DiskError if the disk refuses."""
    partial = _partial(path)
    try:
        disk.write(partial, [data])
        disk.sync(partial)
        disk.rename(partial, path)
        disk.sync(path.parent)
    except OSError as error:
        disk.remove(partial)
        raise DiskError(f"{path} cannot be written ({error}); free space or correct permissions") from error


def write_json(path: Path, value: object) -> None:
    """Replaces a file by readable JSON."""
    write_file(path, json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")


def file_digest(path: Path) -> str:
    """xxh3_128 of a file's bytes, in constant memory."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            state.update(piece)
    return state.hexdigest()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")
