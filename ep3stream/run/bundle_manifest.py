"""What a bundle says of itself and whether it is whole, without torch, which takes two seconds to import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from ep3stream.disk import read_small_file, require_own_file
from ep3stream.errors import DamagedDataError, InputError
from ep3stream.store.json_files import signed_object

# 2: a set-up may have stages. 3: that of `nystrom` has half and shrink instead of core. 1 and 2 are read too.
BUNDLE_VERSION = 3

TENSORS, MANIFEST = "tensors.safetensors", "manifest.json"

_MAX_MANIFEST_BYTES = 16 << 20

_PIECE_BYTES = 4 << 20


def find_bundle(path: Path) -> Path | None:
    """Where the bundle `path` lies: under its name, or set aside by a writer killed between two renames."""
    return next((place for place in (path, aside(path)) if place.is_dir()), None)


def aside(path: Path) -> Path:
    """Where a writer puts it while the new one takes its name."""
    return path.with_name(f".{path.name}.old")


def check_bundle(path: Path, kind: str) -> dict[str, Any]:
    """Reads and checks every byte, as `read_bundle` does and raises, in constant memory; gives the description."""
    content, tensors = _manifest(path, kind), path / TENSORS
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
        raise unreadable(path, error) from error
    description: dict[str, Any] = content["description"]
    return description


def unreadable(path: Path, error: Exception) -> DamagedDataError:
    """The error about tensors that cannot be read."""
    return DamagedDataError(f"{path / TENSORS} cannot be read ({error!r:.200}); restore it or remove {path}")


def read_description(path: Path, kind: str) -> dict[str, Any]:
    """What `write_bundle` was told beside the tensors, which are not read; raises as `read_bundle` does."""
    description: dict[str, Any] = _manifest(path, kind)["description"]
    return description


def check_bundle_size(path: Path, kind: str) -> None:
    """Raises as `read_bundle` does, but reads the manifest only and compares the tensors' size with it."""
    declared, tensors = _manifest(path, kind)["tensors"].get("bytes"), path / TENSORS
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
