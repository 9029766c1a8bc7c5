"""Checkpoints of a run: saved all or nothing, loaded newest first, and only if every byte is as written."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ep3stream.errors import DamagedDataError
from ep3stream.run.bundle import Bundle, read_bundle, write_bundle
from ep3stream.solver.guard import Guard, RunningLoss
from ep3stream.solver.step import SolverState

logger = logging.getLogger(__name__)

_KIND = "checkpoint"
_NAME = re.compile(r"step-(\d{12})")


@dataclass(slots=True)
class Progress:
    """Everything a fit needs to go on: solver and guard, the cursor, and losses the guard has yet to see.

    elapsed_s, waited_s: seconds over all sittings.
    """

    step: int
    state: SolverState
    guard: Guard
    unseen_losses: list[float]
    elapsed_s: float = 0.0
    waited_s: float = 0.0


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return directory / f"step-{step:012d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints there are, newest first; unchecked."""
    if not directory.is_dir():
        return []
    named = [(match, path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in named), reverse=True)


def save_checkpoint(directory: Path, progress: Progress, setup_digest: str, keep: int) -> Path:
    """Writes the checkpoint of `progress` and removes all but the newest `keep`."""
    path = checkpoint_path(directory, progress.step)
    guard = progress.guard
    tensors = progress.state.tensors() | guard.tensors()
    description = {
        "setup_digest": setup_digest,
        "step": progress.step,
        "averaged": progress.state.averaged,
        "unseen_losses": [_encode(loss) for loss in progress.unseen_losses],
        "elapsed_s": progress.elapsed_s,
        "waited_s": progress.waited_s,
        "guard": {
            "step_size": guard.step_size,
            "loss": _encode_loss(guard.loss),
            "good_loss": _encode_loss(guard.good_loss),
            "good_averaged": guard.good_averaged,
            "good_step": guard.good_step,
            "n_cuts": guard.n_cuts,
        },
    }
    write_bundle(path, _KIND, tensors, description)
    for _, old in list_checkpoints(directory)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def load_newest_checkpoint(directory: Path, setup_digest: str, device: torch.device) -> Progress | None:
    """The newest checkpoint that is sound; damaged ones are named in the log and passed over.

    None where there is no checkpoint at all. Raises DamagedDataError when there are some and none is sound.
    """
    damage = []
    for _, path in list_checkpoints(directory):
        try:
            return _progress(read_bundle(path, _KIND), path, setup_digest, device)
        except DamagedDataError as error:
            logger.warning("passing over a damaged checkpoint: %s", error)
            damage.append(error)
    if damage:
        raise DamagedDataError(
            f"{directory} holds no sound checkpoint: {damage[0]}; remove them to start again"
        )
    return None


def _progress(bundle: Bundle, path: Path, setup_digest: str, device: torch.device) -> Progress:
    content = bundle.description
    try:
        if content["setup_digest"] != setup_digest:
            raise DamagedDataError(f"{path} belongs to another set-up than the one in its run; remove it")
        tensors = {name: tensor.to(device) for name, tensor in bundle.tensors.items()}
        state = SolverState(tensors["weights"], tensors["velocity"], tensors["average"], content["averaged"])
        saved = content["guard"]
        guard = Guard(
            saved["step_size"],
            _decode_loss(saved["loss"]),
            tensors["good_weights"],
            tensors["good_average"],
            saved["good_averaged"],
            _decode_loss(saved["good_loss"]),
            saved["good_step"],
            saved["n_cuts"],
        )
        losses = [float(loss) for loss in content["unseen_losses"]]
        return Progress(content["step"], state, guard, losses, content["elapsed_s"], content["waited_s"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedDataError(f"{path} lacks a field ({error!r}); remove it") from error


def _encode(value: float) -> str:
    return repr(value)  # JSON has no infinity; a float's repr is exact.


def _encode_loss(loss: RunningLoss) -> dict[str, Any]:
    return {name: _encode(v) if isinstance(v, float) else v for name, v in asdict(loss).items()}


def _decode_loss(saved: Mapping[str, Any]) -> RunningLoss:
    return RunningLoss(int(saved["n_steps"]), *(float(saved[name]) for name in ("mean", "first", "best")))
