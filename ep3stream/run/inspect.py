"""What lies at a path, told without reading it all (`inspect`), or read whole and checked (`verify`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ep3stream.data.manifest import ColumnStatistics, SplitInfo
from ep3stream.data.store import open_store
from ep3stream.errors import DamagedDataError, InputError
from ep3stream.run.bundle import read_bundle
from ep3stream.run.checkpoint import list_checkpoints
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
    config = directory.read_config()
    events = [record for record in read_lines(directory.metrics) if record.get("kind") == "event"]
    steps = [record for record in read_lines(directory.metrics) if record.get("kind") == "step"]
    return {
        "what": "run",
        "path": str(directory.path),
        "finished": directory.model.is_dir(),
        "checkpoints": [step for step, _ in list_checkpoints(directory.checkpoints)],
        "last_step": steps[-1] if steps else None,
        "last_event": events[-1] if events else None,
        "evaluations": read_lines(directory.evaluations),
        "config": config.to_toml(),
    }


def _verify_run(directory: RunDirectory) -> list[str]:
    bundles = [(directory.setup, "set-up"), (directory.model, "model")]
    pieces = [(path, kind) for path, kind in bundles if path.exists()]
    pieces += [(path, "checkpoint") for _, path in list_checkpoints(directory.checkpoints)]
    problems = []
    for path, kind in pieces:
        try:
            read_bundle(path, kind)
        except (DamagedDataError, InputError) as error:
            problems.append(str(error))
    return problems


def _bytes_on_disk(path: Path) -> int:
    files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
    return sum(file.stat().st_size for file in files)
