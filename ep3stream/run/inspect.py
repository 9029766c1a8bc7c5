"""What lies at a path, told without reading it all (`inspect`), or read whole and checked (`verify`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ep3stream.data.manifest import ColumnStatistics, SplitInfo
from ep3stream.data.store import open_store
from ep3stream.errors import ConfigError, DamagedDataError
from ep3stream.run.bundle import file_digest, find_bundle, read_bundle
from ep3stream.run.checkpoint import list_checkpoints, load_checkpoint
from ep3stream.run.directory import RunDirectory
from ep3stream.run.metrics import read_lines


def inspect(path: Path | str) -> dict[str, Any]:
    """A store's or a run's contents as JSON; raises InputError for anything else."""
    path = Path(path).absolute()
    return _inspect_run(RunDirectory(path)) if _is_run(path) else _inspect_store(path)


def verify(path: Path | str) -> list[str]:
    """Reads every byte of a store or a run: a sentence for each damaged piece; empty if all is as written."""
    path = Path(path).absolute()
    if _is_run(path):
        return _verify_run(RunDirectory(path))
    try:
        with open_store(path) as store:
            return store.verify()
    except DamagedDataError as error:
        return [str(error)]


def _is_run(path: Path) -> bool:
    return RunDirectory(path).config.is_file()


def _inspect_store(path: Path) -> dict[str, Any]:
    with open_store(path) as store:
        manifest = store.manifest
        return {
            "what": "store",
            "path": str(path),
            "format": "zarr" if path.is_dir() else "hdf5",
            "format_version": manifest.format_version,
            "created_by": manifest.created_by,
            "fingerprint": manifest.fingerprint,
            "task": manifest.task,
            "n_features": manifest.n_features,
            "n_outputs": manifest.n_outputs,
            "x_dtype": manifest.x_dtype,
            "codec": manifest.codec,
            "bytes_on_disk": _bytes_on_disk(path),
            "shuffle_seed": manifest.shuffle_seed,
            "source": [dict(file) for file in manifest.source],
            "target_names": list(manifest.target_names),
            "class_names": None if manifest.class_names is None else list(manifest.class_names),
            "splits": {name: _split(info) for name, info in manifest.splits.items()},
            "features": {
                name: _columns(manifest.feature_names, info.features)
                for name, info in manifest.splits.items()
            },
        }


def _split(info: SplitInfo) -> dict[str, Any]:
    content: dict[str, Any] = {
        "rows": info.n_rows,
        "segments": info.n_segments,
        "segment_rows": info.segment_rows,
    }
    if info.class_counts is not None:
        content["class_counts"] = list(info.class_counts)
    if info.targets is not None:
        content["target_mean"], content["target_std"] = list(info.targets.mean), list(info.targets.std)
    return content


def _columns(names: tuple[str, ...], statistics: ColumnStatistics) -> list[dict[str, Any]]:
    values = zip(
        names,
        statistics.mean,
        statistics.std,
        statistics.minimum,
        statistics.maximum,
        statistics.missing,
        strict=True,
    )
    keys = ("name", "mean", "std", "min", "max", "missing")
    return [dict(zip(keys, column, strict=True)) for column in values]


def _inspect_run(directory: RunDirectory) -> dict[str, Any]:
    config, summary = directory.read_config(), _summary(directory)
    last = {record.get("kind"): record for record in read_lines(directory.metrics)}
    return {
        "what": "run",
        "path": str(directory.path),
        "created_by": summary.get("created_by"),
        "finished": find_bundle(directory.model) is not None,
        "store": summary.get("store"),
        "plan": summary.get("plan"),
        "checkpoints": [step for step, _ in list_checkpoints(directory.checkpoints)],
        "last_step": last.get("step"),
        "last_validation": last.get("validation"),
        "last_event": last.get("event"),
        "evaluations": read_lines(directory.evaluations),
        "config": config.to_toml(),
    }


def _summary(directory: RunDirectory) -> dict[str, Any]:
    """run.json; empty before the set-up is done, or where somebody changed it to something else."""
    try:
        content = json.loads(directory.summary.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _verify_run(directory: RunDirectory) -> list[str]:
    """A newer format version is raised as the InputError it is: nobody knows whether that is damaged."""
    checks: list[Callable[[], object]] = [directory.read_config]
    if directory.setup.exists():
        checks.append(lambda: read_bundle(directory.setup, "set-up"))
    if (model := find_bundle(directory.model)) is not None:
        checks.append(lambda: read_bundle(model, "model"))
    manifest = directory.setup / "manifest.json"
    digest = file_digest(manifest) if manifest.is_file() else ""
    checks += [
        partial(load_checkpoint, path, digest, torch.device("cpu"))
        for _, path in list_checkpoints(directory.checkpoints)
    ]
    problems = []
    for check in checks:
        try:
            check()
        except (DamagedDataError, ConfigError) as error:
            problems.append(str(error))
    return problems


def _bytes_on_disk(path: Path) -> int:
    files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
    return sum(file.stat().st_size for file in files)
