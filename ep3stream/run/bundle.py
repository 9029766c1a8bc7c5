"""Bundles: tensors and JSON in a directory, written all or nothing and never read without a check of their digests.

    NAME/tensors.safetensors
    NAME/manifest.json          kind, version, description, size and digest of the tensors, the manifest's digest

Set-ups, checkpoints and models are bundles. A bundle is written under a temporary name, synced, then renamed. One of
the same name is first set aside and removed last, so that `find_bundle` finds the old or the new one at any moment.

Nothing here imports torch, which takes two seconds, until tensors are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from ep3stream import disk
from ep3stream.disk import partial_path, read_small_file, require_own_file
from ep3stream.errors import DamagedDataError, DiskError, InputError
from ep3stream.store.json_files import signed_bytes, signed_object

if TYPE_CHECKING:
    from torch import Tensor

# 2: a set-up may have stages. 3: a set-up of `nystrom` has half and shrink instead of core. 4: features of a set-up or
# model may be codes, which `inputs` names; a set-up of `nystrom` may have a local tail. 5: a set-up may have several
# ridges, with weights for each in a checkpoint. All earlier ones are read too.
BUNDLE_VERSION = 5
TENSORS, MANIFEST = "tensors.safetensors", "manifest.json"
_MAX_MANIFEST_BYTES = 16 << 20
_PIECE_BYTES = 4 << 20

# In the order in which tensors lie in a file: no element is larger than those before, so that all are aligned.
_DTYPES = {"int64": "I64", "float64": "F64", "float32": "F32", "int32": "I32"}


@dataclass(frozen=True, slots=True)
class Bundle:
    """The tensors and the description that `write_bundle` was given."""

    tensors: dict[str, Tensor]
    description: dict[str, Any]


def write_bundle(
    path: Path, kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Writes the directory `path`, replacing a bundle of that name.

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
        disk.remove(_aside(path))
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
    """The bytes of a safetensors file, the same as of the library's `save_file`, in pieces of 4 MiB.

    A thread that is inside the library when the interpreter ends aborts the process; one that writes pieces does not.
    """
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: ([*_DTYPES].index(dtypes[name]), name))
    header, end = {}, 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        dtype, shape = _DTYPES[dtypes[name]], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        data = np.ascontiguousarray(tensors[name].cpu().numpy()).reshape(-1).view(np.uint8).data
        yield from (data[first : first + _PIECE_BYTES] for first in range(0, len(data), _PIECE_BYTES))


def remove_bundle(path: Path) -> None:
    """Removes a bundle, for readers all at once: it loses its name first."""
    with suppress(OSError):
        _set_aside(path)
        disk.remove(_aside(path))


def _set_aside(path: Path) -> None:
    disk.remove(_aside(path))
    disk.rename(path, _aside(path))


def _aside(path: Path) -> Path:
    """Where a bundle lies while the new one takes its name."""
    return path.with_name(f".{path.name}.old")


def find_bundle(path: Path) -> Path | None:
    """Where the bundle `path` lies: under its name, or set aside by a writer killed between two renames; or None."""
    return next((place for place in (path, _aside(path)) if place.is_dir()), None)


def read_bundle(path: Path, kind: str) -> Bundle:
    """The bundle at `path`, each tensor in a memory map, once every byte is checked.

    Raises DamagedDataError for a bundle that is not as written, or not of this kind, and InputError for one of a newer
    version.
    """
    description, file = check_bundle(path, kind), path / TENSORS
    try:
        with safe_open(file, "pt") as opened:
            names = opened.keys()
        tensors = {}
        for name in names:
            # A map for each: whoever drops a tensor gives its pages back.
            with safe_open(file, "pt") as opened:
                tensors[name] = opened.get_tensor(name)
        return Bundle(tensors, description)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def check_bundle(path: Path, kind: str) -> dict[str, Any]:
    """Reads and checks every byte in constant memory; returns the description. Raises as `read_bundle` does."""
    content, file = _manifest(path, kind), path / TENSORS
    declared = content["tensors"]
    try:
        size = require_own_file(file)
        digest = file_digest(file) if size == declared["bytes"] else "of another size"
        if digest != declared["digest"]:
            raise DamagedDataError(
                f"{file} is damaged: {size} bytes, digest {digest}, but its manifest says {declared!r:.120}; "
                f"restore it or remove {path}"
            )
    except (OSError, KeyError) as error:
        raise _unreadable(path, error) from error
    description: dict[str, Any] = content["description"]
    return description


def _unreadable(path: Path, error: Exception) -> DamagedDataError:
    return DamagedDataError(f"{path / TENSORS} cannot be read ({error!r:.200}); restore it or remove {path}")


def check_bundle_size(path: Path, kind: str) -> None:
    """Checks the manifest, and the tensors' size against it, without reading them; raises as `read_bundle` does."""
    declared, file = _manifest(path, kind)["tensors"].get("bytes"), path / TENSORS
    try:
        size = require_own_file(file)
    except OSError as error:
        found = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise DamagedDataError(f"{file} {found}; restore it or remove {path}") from error
    if size != declared:
        raise DamagedDataError(
            f"{file} has {size} bytes; it must have {declared}; restore it or remove {path}"
        )


def read_description(path: Path, kind: str) -> dict[str, Any]:
    """The description of a bundle whose manifest is sound; its tensors are not read. Raises as `read_bundle` does."""
    description: dict[str, Any] = _manifest(path, kind)["description"]
    return description


def _manifest(path: Path, kind: str) -> dict[str, Any]:
    manifest = path / MANIFEST
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


def file_digest(path: Path) -> str:
    """xxh3_128 of a file's bytes, in constant memory."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            state.update(piece)
    return state.hexdigest()
