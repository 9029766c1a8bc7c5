"""What lies at a path where a store or a run was expected, in the words of an error."""

from __future__ import annotations

import os
from pathlib import Path

from ep3stream.data.manifest import MANIFEST_NAME

# What a run has from its first moment on, by which people's mix-ups of runs and stores are told here.
RUN_MARK = "config.toml"


def found_at(path: Path) -> str:
    """`a file`, `an empty directory`, `a store`, `the RUN of a fit` ...: for people, and for nothing else."""
    try:
        if path.is_dir():
            return _found_in(path)
        if path.is_file():
            return "a store" if _has_manifest(path) else "a file"
    except OSError as error:
        return f"not to be read ({error.strerror})"
    return "a link that leads nowhere" if os.path.lexists(path) else "not there"


def _found_in(directory: Path) -> str:
    names = {item.name for item in directory.iterdir()}
    if not names:
        return "an empty directory"
    if MANIFEST_NAME in names:
        return "a store"
    return "the RUN of a fit" if RUN_MARK in names else "a directory of other things"


def _has_manifest(path: Path) -> bool:
    import h5py  # Half a second that `status` need not wait for.

    if not h5py.is_hdf5(path):
        return False
    with h5py.File(path, "r") as file:
        return MANIFEST_NAME in file
