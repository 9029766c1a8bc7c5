"""Small files that are replaced all or nothing."""

from __future__ import annotations

import json
from pathlib import Path

from ep3stream.errors import DiskError
from ep3stream.run.files import disk


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file's content all or nothing; DiskError if the disk refuses."""
    partial = partial_path(path)
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


def partial_path(path: Path) -> Path:
    """Where what is to be `path` is written first."""
    return path.with_name(f".{path.name}.partial")
