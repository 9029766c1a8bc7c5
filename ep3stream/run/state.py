"""How far a run is, by its files: its summary, checkpoints and model, none of whose tensors are read."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from ep3stream.disk import read_small_file
from ep3stream.errors import DamagedDataError
from ep3stream.run.bundle_manifest import find_bundle, read_description
from ep3stream.run.directory import RunDirectory

logger = logging.getLogger(__name__)

MODEL_KIND = "model"

_NAME = re.compile(r"step-(\d{12})")

_MAX_SUMMARY_BYTES = 1 << 26


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return directory / f"step-{step:012d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints there are, newest first; unchecked."""
    if not directory.is_dir():
        return []
    named = [(match, path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in named), reverse=True)


def model_step(directory: RunDirectory) -> int | None:
    """After how many steps the model in RUN/model was written; None where there is none that says so."""
    path = find_bundle(directory.model)
    try:
        step = None if path is None else read_description(path, MODEL_KIND).get("step")
    except DamagedDataError as error:
        logger.warning("%s", error)
        return None
    return step if type(step) is int else None


def is_finished(directory: RunDirectory) -> bool:
    """Whether there is a model, and the fit has not gone on since."""
    newest = max((step for step, _ in list_checkpoints(directory.checkpoints)), default=0)
    step = model_step(directory)
    return find_bundle(directory.model) is not None and (step is None or step >= newest)


def read_summary(directory: RunDirectory) -> dict[str, Any]:
    """run.json; empty before the set-up is done, or where somebody changed it to something else."""
    try:
        content = json.loads(read_small_file(directory.summary, _MAX_SUMMARY_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
