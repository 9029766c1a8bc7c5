"""Tensors and JSON written to a directory all or nothing, and never read back without their digests checked.

    NAME/tensors.safetensors
    NAME/manifest.json          kind, version, description, size and digest of the tensors, its own digest

Set-ups, checkpoints and models are bundles. Written under a temporary name, fsynced, then renamed; one of the
same name is set aside first and removed last, so that at any moment `find_bundle` finds the old or the new one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ep3stream.data.backend import fsync
from ep3stream.data.signed_json import signed_bytes, signed_object
from ep3stream.errors import DamagedDataError, InputError

BUNDLE_VERSION = 1
_TENSORS, _MANIFEST = "tensors.safetensors", "manifest.json"
_MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Bundle:
    """What `write_bundle` was given."""

    tensors: dict[str, Tensor]
    description: dict[str, Any]


def write_bundle(
    path: Path, kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Writes the directory `path`, replacing one of that name.

    Raises InputError naming the path, the bytes needed and the remedy when the disk refuses; nothing that was
    there before is lost then.
    """
    partial, aside = _partial(path), _aside(path)
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fsync(path.parent.parent)
        shutil.rmtree(partial, ignore_errors=True)
        _require_space(path.parent, n_bytes)
        _fill(partial, kind, tensors, description)
        if path.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
            path.replace(aside)
        partial.replace(path)
        fsync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(
            f"{path} cannot be written ({error}); it needs {n_bytes / 1e6:.1f} MB: free space or correct permissions"
        ) from error


def _fill(partial: Path, kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    partial.mkdir()
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, partial / _TENSORS)
    fsync(partial / _TENSORS)
    content = {
        "kind": kind,
        "format_version": BUNDLE_VERSION,
        "description": dict(description),
        "tensors": {
            "bytes": (partial / _TENSORS).stat().st_size,
            "digest": file_digest(partial / _TENSORS),
        },
    }
    (partial / _MANIFEST).write_bytes(signed_bytes(content))
    fsync(partial / _MANIFEST)
    fsync(partial)


def find_bundle(path: Path) -> Path | None:
    """Where the bundle `path` lies: under its name, or set aside by a writer killed between two renames."""
    return next((place for place in (path, _aside(path)) if place.is_dir()), None)


def read_bundle(path: Path, kind: str) -> Bundle:
    """Everything in `path`, checked: DamagedDataError for what is not as written, InputError for a newer version."""
    content = _manifest(path, kind)
    tensors = path / _TENSORS
    declared = content["tensors"]
    try:
        size = tensors.stat().st_size
        digest = file_digest(tensors) if size == declared["bytes"] else "of another size"
        if digest != declared["digest"]:
            raise DamagedDataError(
                f"{tensors} is damaged: {size} bytes, digest {digest}; its manifest says {declared}"
            )
        return Bundle(load_file(tensors), content["description"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise DamagedDataError(
            f"{tensors} cannot be read ({error!r:.200}); restore it or remove {path}"
        ) from error


def check_bundle_size(path: Path, kind: str) -> None:
    """Raises as `read_bundle` does, but reads the manifest only and compares the tensors' size with it."""
    declared, tensors = _manifest(path, kind)["tensors"].get("bytes"), path / _TENSORS
    size = tensors.stat().st_size if tensors.is_file() else None
    if size is None or size != declared:
        found = "is missing" if size is None else f"has {size} bytes"
        raise DamagedDataError(f"{tensors} {found}; it must have {declared}; restore it or remove {path}")


def _manifest(path: Path, kind: str) -> dict[str, Any]:
    manifest = path / _MANIFEST
    try:
        if manifest.stat().st_size > _MAX_MANIFEST_BYTES:
            raise DamagedDataError(
                f"{manifest} is larger than {_MAX_MANIFEST_BYTES} bytes; it is not one of ours"
            )
        content = signed_object(manifest.read_bytes(), str(manifest), f"restore it or remove {path}")
    except OSError as error:
        raise DamagedDataError(f"{manifest} cannot be read ({error}); restore it or remove {path}") from error
    version = content.get("format_version")
    if type(version) is int and version > BUNDLE_VERSION:
        raise InputError(
            f"{path} has format version {version}, this ep3stream reads up to {BUNDLE_VERSION}; update it"
        )
    shape = (content.get("kind"), type(content.get("description")), type(content.get("tensors")))
    if version != BUNDLE_VERSION or shape != (kind, dict, dict):
        raise DamagedDataError(f"{manifest} does not describe a {kind}; restore it or remove {path}")
    return content


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file's content all or nothing."""
    partial = _partial(path)
    try:
        partial.write_bytes(data)
        fsync(partial)
        partial.replace(path)
        fsync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written ({error}); free space or correct permissions") from error


def write_json(path: Path, value: object) -> None:
    """Replaces a file by readable JSON."""
    write_file(path, json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")


def file_digest(path: Path) -> str:
    """xxh3_128 of a file's bytes, in constant memory."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            state.update(piece)
    return state.hexdigest()


def _require_space(directory: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < n_bytes + (1 << 20):
        raise OSError(f"only {free / 1e6:.1f} MB are free")


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")
