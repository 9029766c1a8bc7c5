"""The state of a run as its files tell it: summary, checkpoints and model. Tensors are not read."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ep3stream.disk import read_small_file
from ep3stream.errors import DamagedDataError
from ep3stream.run.bundle import find_bundle, read_description
from ep3stream.run.directory import RunDirectory
from ep3stream.store.files import ObjectUrl, location

if TYPE_CHECKING:
    from ep3stream.store.reader import RowStore

logger = logging.getLogger(__name__)

MODEL_KIND = "model"
_NAME = re.compile(r"step-(\d{12})")
MAX_SUMMARY_BYTES = 1 << 26


def checkpoint_path(directory: Path, step: int) -> Path:
    """The path of the checkpoint after `step` steps, in the directory of checkpoints."""
    return directory / f"step-{step:012d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of all checkpoints in the directory, newest first, sound or not."""
    if not directory.is_dir():
        return []
    named = [(match, path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in named), reverse=True)


def model_step(directory: RunDirectory) -> int | None:
    """The step whose weights the model in RUN/model has; None where there is no model, or its manifest is damaged."""
    path = find_bundle(directory.model)
    try:
        step = None if path is None else read_description(path, MODEL_KIND).get("step")
    except DamagedDataError as error:
        logger.warning("%s", error)
        return None
    return step if type(step) is int else None


def is_finished(directory: RunDirectory) -> bool:
    """Whether the run has a model and no checkpoint of a later step, as a fit with more epochs leaves."""
    if find_bundle(directory.model) is None:
        return False
    step, checkpoints = model_step(directory), list_checkpoints(directory.checkpoints)
    return step is None or not checkpoints or step >= checkpoints[0][0]


def read_summary(directory: RunDirectory) -> dict[str, Any]:
    """The content of run.json; empty before the set-up is done, or where the file holds no JSON object."""
    try:
        content = json.loads(read_small_file(directory.summary, MAX_SUMMARY_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def open_store_of(run: Path | str, place: str | Path | ObjectUrl, read_timeout_s: float) -> RowStore:
    """`open_store`, for a run; DamagedDataError for what was the store of the run and is no store any more."""
    from ep3stream.store.reader import (  # Half a second, which `status` need not wait for.
        NoStoreError,
        open_store,
    )

    try:
        return open_store(place, read_timeout_s)
    except NoStoreError as error:
        named = read_summary(RunDirectory(Path(run).absolute())).get("store")
        if isinstance(named, dict) and named.get("path") == str(location(place)):
            raise DamagedDataError(
                f"{place} was the store of {run} and is none any more: {error}; restore it, or use a new RUN"
            ) from error
        raise
