"""What lies at a path, told without reading it all (`inspect`), or read whole and checked (`verify`).

How well a fit would mix the rows of a store, for `inspect --order`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ep3stream.config import RunConfig
from ep3stream.errors import ConfigError, DamagedDataError, InputError
from ep3stream.run.bundle_manifest import check_bundle_size, file_digest, find_bundle
from ep3stream.run.directory import RunDirectory
from ep3stream.run.event_log import read_lines
from ep3stream.run.state import is_finished, list_checkpoints, read_summary
from ep3stream.store.backend import row_bytes
from ep3stream.store.files import Location, ObjectUrl, location
from ep3stream.store.manifest import Manifest, SplitInfo, column_statistics
from ep3stream.store.object_files import ObjectFiles
from ep3stream.store.reader import SplitReader, open_store
from ep3stream.store.verify import VerifyProgress
from ep3stream.stream.order import SHARES, RowOrder, order_quality
from ep3stream.training.plan import window_segments
from ep3stream.training.set_up import shape_of


def inspect(path: Path | str | ObjectUrl) -> dict[str, Any]:
    """A store's or a run's contents as JSON; raises InputError for anything else."""
    place = location(path)
    return _inspect_run(RunDirectory(place)) if _is_run(place) else _inspect_store(place)


def verify(
    path: Path | str | ObjectUrl,
    *,
    quick: bool = False,
    progress: Callable[[VerifyProgress], None] | None = None,
) -> list[str]:
    """Reads every byte of a store or a run: a sentence for each damaged piece; empty if all is as written.

    quick: only sizes, presence and metadata, in the time it takes to list the files; a changed byte in a row or
    a weight is not seen. Raises InputError for what is neither store nor run.
    """
    place = location(path)
    if _is_run(place):
        return _verify_run(RunDirectory(place), quick, progress)
    try:
        with open_store(place) as store:
            return store.verify(quick=quick, progress=progress)
    except DamagedDataError as error:
        return [str(error)]


def _is_run(path: Location) -> TypeGuard[Path]:
    return isinstance(path, Path) and RunDirectory(path).config.is_file()


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
                name: column_statistics(manifest.feature_names, info.features)
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
        content["target_mean"], content["target_std"] = list(info.targets.mean), list(info.targets.std)
        content["targets"] = column_statistics(manifest.target_names, info.targets)
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
        "checkpoints": _checkpoints(directory),
        "overrides": directory.read_overrides(),
        "last_step": last.get("step"),
        "last_validation": last.get("validation"),
        "last_event": last.get("event"),
        # What the report draws of them is long, and the file has it.
        "evaluations": [
            {name: value for name, value in record.items() if name != "diagnosis"}
            for record in read_lines(directory.evaluations)
        ],
        "config": config.to_toml(),
    }


def _checkpoints(directory: RunDirectory) -> list[dict[str, Any]]:
    """Step, bytes and state of each, newest first, all read whole: `verified`, or what is wrong."""
    found = []
    for step, path in list_checkpoints(directory.checkpoints):
        n_bytes, state = _bytes_on_disk(path), "verified"
        try:
            _check_checkpoint(_setup_digest(directory), path)
        except DamagedDataError as error:
            state = f"damaged: {error}"
        except InputError as error:
            state = f"unreadable: {error}"
        if path.exists():
            found.append({"step": step, "bytes": n_bytes, "state": state})
    return found


def _verify_run(
    directory: RunDirectory, quick: bool, progress: Callable[[VerifyProgress], None] | None
) -> list[str]:
    """A newer format version is raised as the InputError it is: nobody knows whether that is damaged."""
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
    """The bytes of each piece of a run, and what reads and checks it."""
    read = check_bundle_size if quick else _read_bundle
    yield _bytes_on_disk(directory.config), directory.read_config
    if directory.setup.exists():
        yield _bytes_on_disk(directory.setup), partial(read, directory.setup, "set-up")
    if (model := find_bundle(directory.model)) is not None:
        yield _bytes_on_disk(model), partial(read, model, "model")
    check = partial(_check_checkpoint, None if quick else _setup_digest(directory))
    for _, path in list_checkpoints(directory.checkpoints):
        yield _bytes_on_disk(path), partial(check, path)


def _setup_digest(directory: RunDirectory) -> str:
    """Which checkpoints must name; empty where there is no set-up."""
    manifest = directory.setup / "manifest.json"
    return file_digest(manifest) if manifest.is_file() else ""


def _check_checkpoint(setup_digest: str | None, path: Path) -> None:
    """Whole, or only its size if no digest is given; one that a running fit has removed by now is none."""
    try:
        if setup_digest is None:
            check_bundle_size(path, "checkpoint")
        else:
            _load_checkpoint(path, setup_digest)
    except DamagedDataError:
        if path.exists():
            raise


# torch, which takes two seconds to import, is left to where tensors are read: the rest of `inspect` has no need of it.


def _read_bundle(path: Path, kind: str) -> None:
    from ep3stream.run.bundle import read_bundle

    read_bundle(path, kind)


def _load_checkpoint(path: Path, setup_digest: str) -> None:
    from torch import device

    from ep3stream.run.checkpoint import load_checkpoint

    load_checkpoint(path, setup_digest, device("cpu"))


def _bytes_on_disk(path: Path) -> int:
    n_bytes = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        with suppress(FileNotFoundError):  # A running fit removes old checkpoints.
            n_bytes += file.stat().st_size if file.is_file() else 0
    return n_bytes


# Of a fit whose memory allows it.
_BATCH_ROWS = 4096


def order_report(
    place: Path | str | ObjectUrl, memory_bytes: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """For each split, the measures of `OrderQuality` for the first epoch of a fit with this memory, as JSON.

    Reads the manifest and no row. Raises InputError where there is no store.
    """
    memory_bytes = memory_bytes or RunConfig().memory_bytes
    with open_store(place) as store:
        is_shuffled = store.manifest.shuffle_seed is not None
        splits = {name: _measured(store.split(name), memory_bytes, seed) for name in store.manifest.splits}
        return {
            "path": str(store.path),
            "is_shuffled": is_shuffled,
            "memory_bytes": memory_bytes,
            "order": splits,
        }


def _measured(reader: SplitReader, memory_bytes: int, seed: int) -> dict[str, Any]:
    info = reader.info
    window = window_segments(shape_of(reader), memory_bytes)
    order = RowOrder(seed, info.n_rows, info.segment_rows, window, _BATCH_ROWS, np.empty(0, np.int64))
    quality = order_quality(order)
    return {**asdict(quality), "shares": list(SHARES), "relative": quality.relative}


def describe_order(report: dict[str, Any]) -> str:
    """The report in words: a table for each split, and what it means."""
    lines = [str(report["path"])]
    for name, split in report["order"].items():
        head = "  ".join(f"{100 * share:>12.0f}%" for share in split["shares"])
        lines += [
            "",
            f"split {name}: {split['n_rows']:,} rows, of which {split['window_rows']:,} are mixed at a time",
            f"neighbours are apart, in rows  {head}",
            _row("in the first epoch", split["distances"]),
            _row("in a perfect shuffle", split["perfect"]),
            f"in the median {100 * split['relative']:.1f}% as far as in a perfect shuffle; "
            f"{100 * split['same_batch']:.2f}% of them meet in a batch of {split['batch_rows']:,} rows, "
            f"{100 * split['perfect_same_batch']:.2f}% there",
        ]
    return "\n".join([*lines, "", _verdict(report)])


def _row(title: str, distances: list[float]) -> str:
    return f"{title:<30} " + "  ".join(f"{distance:>13,.0f}" for distance in distances)


def _verdict(report: dict[str, Any]) -> str:
    if report["is_shuffled"]:
        return "The conversion has shuffled all rows: neighbours in the store are strangers, however near they stay."
    worst = min(split["relative"] for split in report["order"].values())
    if worst > 0.9:
        return "The store is in its source's order, but all of it is mixed in memory: nothing is lost."
    return (
        "The store is in its source's order. If that order says anything about the targets, convert again without "
        "--no-shuffle, or give the fit more --memory, a quarter of which is for mixing."
    )
