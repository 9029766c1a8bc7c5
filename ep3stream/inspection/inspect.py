"""What a store or a run holds: read from its metadata (`inspect`), or read whole and checked (`verify`).

torch, whose import takes two seconds, is imported only where tensors are read.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from ep3stream.config import READ_TIMEOUT_S
from ep3stream.disk import read_small_file
from ep3stream.errors import ConfigError, DamagedDataError, InputError
from ep3stream.run.bundle import check_bundle_size, file_digest, find_bundle, read_description
from ep3stream.run.directory import RunDirectory
from ep3stream.run.event_log import read_lines
from ep3stream.run.state import MAX_SUMMARY_BYTES, is_finished, list_checkpoints, read_summary
from ep3stream.store.backend import row_bytes
from ep3stream.store.files import Location, ObjectUrl, location
from ep3stream.store.manifest import Manifest, SplitInfo, column_statistics
from ep3stream.store.object_files import ObjectFiles
from ep3stream.store.reader import open_store
from ep3stream.store.verify import VerifyProgress, verify_store


def inspect(path: Path | str | ObjectUrl) -> dict[str, Any]:
    """The contents of a store or a run as JSON; raises InputError for anything else."""
    place = location(path)
    return _inspect_run(RunDirectory(place)) if _is_run(place) else _inspect_store(place)


def verify(
    path: Path | str | ObjectUrl,
    *,
    quick: bool = False,
    progress: Callable[[VerifyProgress], None] | None = None,
    read_timeout_s: float = READ_TIMEOUT_S,
) -> list[str]:
    """Reads every byte of a store or a run; returns a sentence for each damaged piece, none if all is as written.

    quick: checks only sizes, presence and metadata, in the time it takes to list the files, and misses a changed byte
    in a row or a weight. progress: called as bytes are read. read_timeout_s: of a store, as in a fit. Raises InputError
    for what is neither store nor run.
    """
    place = location(path)
    if _is_run(place):
        return _verify_run(RunDirectory(place), quick, progress)
    try:
        with open_store(place, read_timeout_s) as store:
            return verify_store(store, quick=quick, progress=progress)
    except DamagedDataError as error:
        return [str(error)]


def _is_run(path: Location) -> TypeGuard[Path]:
    return isinstance(path, Path) and (RunDirectory(path).config.is_file() or RunDirectory(path).is_begun())


def _inspect_store(path: Location) -> dict[str, Any]:
    with open_store(path) as store:
        manifest = store.manifest
        return {
            "what": "store",
            "path": str(path),
            "format": "hdf5" if isinstance(path, Path) and path.is_file() else "zarr",
            "format_version": manifest.format_version,
            "created_by": manifest.created_by,
            "fingerprint": manifest.fingerprint,
            "task": manifest.task,
            "n_features": manifest.n_features,
            "n_outputs": manifest.n_outputs,
            "x_dtype": manifest.x_dtype,
            "codec": manifest.codec,
            "bytes_raw": row_bytes(manifest) * sum(info.n_rows for info in manifest.splits.values()),
            "bytes_on_disk": _bytes_on_disk(path) if isinstance(path, Path) else ObjectFiles(path).n_bytes(),
            "shuffle_seed": manifest.shuffle_seed,
            "source": [dict(file) for file in manifest.source],
            "conversion": dict(manifest.conversion),
            "target_names": list(manifest.target_names),
            "class_names": None if manifest.class_names is None else list(manifest.class_names),
            "splits": {name: _split(info, manifest) for name, info in manifest.splits.items()},
            "features": {
                name: column_statistics(manifest.feature_names, info.features, manifest.offsets.x)
                for name, info in manifest.splits.items()
            },
        }


def _split(info: SplitInfo, manifest: Manifest) -> dict[str, Any]:
    content: dict[str, Any] = {
        "rows": info.n_rows,
        "segments": info.n_segments,
        "segment_rows": info.segment_rows,
        "segments_per_file": info.segments_per_file,
    }
    if info.class_counts is not None:
        content["class_counts"] = list(info.class_counts)
    if info.targets is not None:
        offsets = manifest.offsets.y
        content["target_mean"] = (offsets + info.targets.mean).tolist()
        content["target_std"] = list(info.targets.std)
        content["targets"] = column_statistics(manifest.target_names, info.targets, offsets)
    return content


def _inspect_run(directory: RunDirectory) -> dict[str, Any]:
    config, summary = directory.read_config(), read_summary(directory)
    last = {record.get("kind"): record for record in read_lines(directory.metrics)}
    return {
        "what": "run",
        "path": str(directory.path),
        "created_by": summary.get("created_by"),
        "finished": is_finished(directory),
        "store": summary.get("store"),
        "plan": summary.get("plan"),
        "column_weights": summary.get("column_weights"),
        "metric": summary.get("metric"),
        "linear": summary.get("linear"),
        "effects": summary.get("effects"),
        "checkpoints": _checkpoints(directory),
        "overrides": directory.read_overrides(),
        "last_step": last.get("step"),
        "last_validation": last.get("validation"),
        "last_event": last.get("event"),
        # Without the diagnosis, which is long and only for the report.
        "evaluations": [
            {name: value for name, value in record.items() if name != "diagnosis"}
            for record in read_lines(directory.evaluations)
        ],
        "config": config.to_toml(),
    }


def _checkpoints(directory: RunDirectory) -> list[dict[str, Any]]:
    """Step, bytes and state of each checkpoint, newest first; each is read whole."""
    setup_digest, checkpoints = _setup_digest(directory), []
    for step, path in list_checkpoints(directory.checkpoints):
        n_bytes, state = _bytes_on_disk(path), "verified"
        try:
            _check_checkpoint(setup_digest, path)
        except DamagedDataError as error:
            state = f"damaged: {error}"
        except InputError as error:
            state = f"unreadable: {error}"
        if path.exists():
            checkpoints.append({"step": step, "bytes": n_bytes, "state": state})
    return checkpoints


def _verify_run(
    directory: RunDirectory, quick: bool, progress: Callable[[VerifyProgress], None] | None
) -> list[str]:
    """Raises InputError for a file of a newer format version: this version cannot tell whether it is damaged."""
    began, n_read, problems = time.perf_counter(), 0, []
    checks = list(_run_checks(directory, quick))
    n_total = sum(n_bytes for n_bytes, _ in checks)
    for n_bytes, check in checks:
        try:
            check()
        except (DamagedDataError, ConfigError) as error:
            problems.append(str(error))
        n_read += n_bytes
        if progress is not None and not quick:
            progress(VerifyProgress(n_read, n_total, time.perf_counter() - began))
    return problems


def _run_checks(directory: RunDirectory, quick: bool) -> Iterator[tuple[int, Callable[[], object]]]:
    """(bytes, the function that checks) for each file or bundle of a run."""

    def read(path: Path, kind: str) -> None:
        from ep3stream.run.bundle import read_bundle

        if quick:
            check_bundle_size(path, kind)
        else:
            read_bundle(path, kind)

    yield _bytes_on_disk(directory.config), directory.read_config
    yield _bytes_on_disk(directory.summary), partial(_require_json, directory.summary)
    for piece in (directory.setup, directory.checkpoints, directory.model):
        yield 0, partial(_require_directory, piece)
    if list_checkpoints(directory.checkpoints):
        yield 0, partial(_require_setup, directory.setup)
    if directory.setup.exists():
        yield _bytes_on_disk(directory.setup), partial(read, directory.setup, "set-up")
    if (model := find_bundle(directory.model)) is not None:
        yield _bytes_on_disk(model), partial(read, model, "model")
    check: Callable[[Path], object] = partial(_check_checkpoint, None if quick else _setup_digest(directory))
    if not quick and _is_damaged(directory.setup):
        check = partial(read, kind="checkpoint")  # Which set-up it belongs to cannot be told.
    for _, path in list_checkpoints(directory.checkpoints):
        yield _bytes_on_disk(path), partial(check, path)


def _require_json(path: Path) -> None:
    """DamagedDataError for a file that is there and is not JSON."""
    try:
        json.loads(read_small_file(path, MAX_SUMMARY_BYTES))
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedDataError(
            f"{path} is not what was written ({error!r:.200}); restore it, or let the fit write it again"
        ) from error


def _require_setup(path: Path) -> None:
    """DamagedDataError where the set-up to which the checkpoints belong is missing."""
    if not path.exists():
        raise DamagedDataError(f"{path} is missing, without which no checkpoint can be used; restore it")


def _require_directory(path: Path) -> None:
    """DamagedDataError for a file in the place of a directory."""
    if os.path.lexists(path) and not path.is_dir():
        raise DamagedDataError(f"{path} is not a directory; restore it or remove it")


def _is_damaged(setup: Path) -> bool:
    """Whether the manifest of a set-up cannot be read."""
    try:
        read_description(setup, "set-up")
    except (DamagedDataError, InputError):
        return True
    return False


def _setup_digest(directory: RunDirectory) -> str:
    """The digest that each checkpoint of the run must name; empty if there is no set-up."""
    manifest = directory.setup / "manifest.json"
    return file_digest(manifest) if manifest.is_file() else ""


def _check_checkpoint(setup_digest: str | None, path: Path) -> None:
    """Reads a checkpoint whole, or checks only its size if no digest is given.

    Raises DamagedDataError, but not for a checkpoint that a running fit has removed in the meantime.
    """
    try:
        if setup_digest is None:
            check_bundle_size(path, "checkpoint")
        else:
            from torch import device

            from ep3stream.run.checkpoint import load_checkpoint

            load_checkpoint(path, setup_digest, device("cpu"))
    except DamagedDataError:
        if path.exists():
            raise


def _bytes_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files below a directory; a running fit may remove them meanwhile."""
    if path.is_file():
        return path.stat().st_size
    # os.walk passes over a directory that is gone, which Path.rglob does not.
    files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    n_bytes = 0
    for file in files:
        with suppress(FileNotFoundError):
            n_bytes += file.stat().st_size
    return n_bytes
