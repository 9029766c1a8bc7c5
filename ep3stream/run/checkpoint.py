"""Checkpoints of a run: written all or nothing, loaded newest first, used only if every byte is as written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ep3stream import disk
from ep3stream.errors import DamagedDataError
from ep3stream.mesh import Mesh
from ep3stream.run.bundle import check_bundle, read_bundle, remove_bundle, write_bundle
from ep3stream.run.state import checkpoint_path, list_checkpoints
from ep3stream.solver.guard import Guard, RunningLoss, RunningScore
from ep3stream.solver.step import SolverState
from ep3stream.solver.targets import TargetCode
from ep3stream.stream.prefetch import StreamTimes

logger = logging.getLogger(__name__)

_KIND = "checkpoint"
_TENSORS = ("weights", "velocity", "average", "good_weights", "good_average")


@dataclass(frozen=True, slots=True)
class Best:
    """The best model that a fit has validated.

    weights: (c, p_shard). error: its weighted squared error after `step` steps. n_since: validations since then.
    rows: the name of the rows that it was validated on, empty where that is not known. ridge: the number of its ridge
    among those of the fit.
    """

    weights: Tensor
    error: float
    step: int
    n_since: int = 0
    rows: str = ""
    ridge: int = 0


@dataclass(slots=True)
class Progress:
    """Everything that a fit needs to go on: the cursor, the solver's state, the guard, and running scores.

    unseen_losses: batch losses that the guard has not seen. elapsed_s: seconds of all processes of this run so far;
    of these, waited_s for data, stalled_s for checkpoints, validated_s for validations. streamed: seconds of reading,
    which goes on beside the steps. running_score: the running loss of the average. best: None before the first
    validation.
    """

    step: int
    state: SolverState
    guard: Guard
    unseen_losses: list[float]
    elapsed_s: float = 0.0
    waited_s: float = 0.0
    running_score: RunningScore = field(default_factory=RunningScore)
    best: Best | None = None
    stalled_s: float = 0.0
    validated_s: float = 0.0
    streamed: StreamTimes = field(default_factory=StreamTimes)

    def average_weights(self, n_outputs: int, ridge: int | None = None) -> Tensor:
        """The average, (c, p_shard), of the ridge of this number; None: of the best validated one, or the first."""
        if ridge is None:
            ridge = 0 if self.best is None else self.best.ridge
        return self.state.average[ridge * n_outputs : (ridge + 1) * n_outputs]

    def snapshot(self) -> Progress:
        """A copy that later steps do not change: it has its own weights, velocity and average, O(p c) memory."""
        state = self.state
        copies = {name: tensor.clone() for name, tensor in state.tensors().items()}
        return replace(
            self,
            state=SolverState(**copies, averaged=state.averaged),
            guard=replace(self.guard),
            unseen_losses=[*self.unseen_losses],
            streamed=replace(self.streamed),
        )


def save_checkpoint(directory: Path, progress: Progress, setup_digest: str, keep: int) -> Path:
    """Writes the checkpoint of `progress`, reads it back, and only then removes all but the newest `keep`.

    Raises DiskError when the disk refuses it and DamagedDataError when it does not give back what was written; the
    checkpoints before it are untouched then.
    """
    path = checkpoint_path(directory, progress.step)
    tensors, description = _parts(progress)
    write_bundle(path, _KIND, tensors, {"setup_digest": setup_digest, **description})
    try:
        check_bundle(path, _KIND)
    except DamagedDataError:
        remove_bundle(path)
        raise
    _remove_old(directory, progress.step, keep)
    return path


def _parts(progress: Progress) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a progress by name, each (c, p_shard), and everything else as JSON."""
    guard = progress.guard
    tensors = progress.state.tensors() | guard.tensors()
    description = {
        "step": progress.step,
        "averaged": progress.state.averaged,
        "unseen_losses": [_encode(loss) for loss in progress.unseen_losses],
        "elapsed_s": progress.elapsed_s,
        "waited_s": progress.waited_s,
        "stalled_s": progress.stalled_s,
        "validated_s": progress.validated_s,
        "streamed": asdict(progress.streamed),
        "model_loss": _encode(progress.running_score.loss),
        "n_scored": progress.running_score.n,
        "no_better": progress.running_score.no_better,
        "guard": {
            "step_size": guard.step_size,
            "loss": _encode_loss(guard.loss),
            "good_loss": _encode_loss(guard.good_loss),
            "good_averaged": guard.good_averaged,
            "good_step": guard.good_step,
            "due_step": guard.due_step,
            "n_cuts": guard.n_cuts,
        },
    }
    if (best := progress.best) is not None:
        tensors["best_weights"] = best.weights
        description["best"] = {
            "error": _encode(best.error),
            "step": best.step,
            "n_since": best.n_since,
            "rows": best.rows,
            "ridge": best.ridge,
        }
    return tensors, description


def gathered(progress: Progress, n_centers: int, mesh: Mesh) -> Progress | None:
    """A copy with the rows of all ranks, on the leader; None on the other ranks. O(p c) host memory on the leader."""
    if mesh.size == 1:
        return progress.snapshot()
    tensors, description = _parts(progress)
    whole = {name: mesh.gather(tensor, n_centers, dim=1) for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in whole.items() if tensor is not None}
    return _progress(kept, description) if kept else None


def scattered(saved: Progress | None, mesh: Mesh) -> Progress | None:
    """Each rank's part of the progress that the leader has loaded, on its device; None where there is none."""
    tensors, description = ({}, None) if saved is None else _parts(saved)
    told = mesh.broadcast_object(lambda: None if description is None else [list(tensors), description])
    if told is None:
        return None
    return _progress({name: mesh.scatter_rows(tensors.get(name), dim=1) for name in told[0]}, told[1])


def _remove_old(directory: Path, step: int, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints up to `step`, those beyond it, and what killed writers left."""
    there = list_checkpoints(directory)
    # A fit goes on from the newest sound one: any beyond it are damaged, and would push sound ones out.
    beyond = [path for later, path in there if later > step]
    for path in [*beyond, *(path for _, path in there[len(beyond) + keep :])]:
        remove_bundle(path)
    for path in directory.glob(".step-*"):
        disk.remove(path)


def load_newest_checkpoint(directory: Path, setup_digest: str, device: torch.device) -> Progress | None:
    """The newest checkpoint that is sound; damaged ones are named in the log and passed over.

    None where there is no checkpoint at all. Raises DamagedDataError when there are some and none is sound.
    """
    damage: dict[Path, DamagedDataError] = {}
    # Listed anew each time: beside a running fit, old ones go and new ones come.
    while paths := [path for _, path in list_checkpoints(directory) if path not in damage]:
        try:
            return load_checkpoint(paths[0], setup_digest, device)
        except DamagedDataError as error:
            damage[paths[0]] = error
            if paths[0].exists():
                logger.warning("passing over a damaged checkpoint: %s", error)
    if damage:
        raise DamagedDataError(
            f"{directory} holds no sound checkpoint: {next(iter(damage.values()))}; remove them to start again"
        )
    return None


def require_shape(progress: Progress, targets: TargetCode, n_centers: int, directory: Path) -> None:
    """DamagedDataError unless the weights are (R c, p), those of the best model (c, p): a digest tells no shape."""
    best, expected = progress.best, (targets.n_columns, n_centers)
    found = tuple(progress.state.weights.shape)
    if found == expected and best is not None:
        found, expected = tuple(best.weights.shape), (targets.n_outputs, n_centers)
    if found != expected or (best is not None and best.ridge >= len(targets.ridge_factors)):
        raise DamagedDataError(
            f"{directory} has weights of {found} at step {progress.step}, not {expected} as the set-up; "
            "remove that checkpoint"
        )


def load_checkpoint(path: Path, setup_digest: str, device: torch.device) -> Progress:
    """The checkpoint at `path`; DamagedDataError unless it is as written and belongs to this set-up."""
    bundle = read_bundle(path, _KIND)
    content = bundle.description
    try:
        if content["setup_digest"] != setup_digest:
            raise DamagedDataError(f"{path} belongs to another set-up than the one in its run; remove it")
        tensors = {name: tensor.to(device) for name, tensor in bundle.tensors.items()}
        _require_alike([tensors[name] for name in _TENSORS])
        progress = _progress(tensors, content)
        if checkpoint_path(path.parent, progress.step) != path:
            raise ValueError(f"step {progress.step}")
        return progress
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedDataError(f"{path} has a missing or impossible field ({error!r}); remove it") from error


def _progress(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Progress:
    """The progress of these parts; KeyError, TypeError, ValueError or OverflowError for an impossible part."""
    state = SolverState(
        tensors["weights"], tensors["velocity"], tensors["average"], _count(content["averaged"])
    )
    saved, best = content["guard"], content.get("best")
    guard = Guard(
        float(saved["step_size"]),
        _decode_loss(saved["loss"]),
        tensors["good_weights"],
        tensors["good_average"],
        _count(saved["good_averaged"]),
        _decode_loss(saved["good_loss"]),
        _count(saved["good_step"]),
        _count(saved["due_step"]),
        _count(saved["n_cuts"]),
    )
    return Progress(
        _count(content["step"]),
        state,
        guard,
        [float(loss) for loss in content["unseen_losses"]],
        float(content["elapsed_s"]),
        float(content["waited_s"]),
        # The first versions did not record these.
        RunningScore(
            float(content["model_loss"]), _count(content["n_scored"]), float(content.get("no_better", 0.0))
        ),
        None if best is None else _decode_best(best, tensors["best_weights"]),
        float(content.get("stalled_s", 0.0)),
        float(content.get("validated_s", 0.0)),
        StreamTimes(**{name: float(seconds) for name, seconds in dict(content.get("streamed", {})).items()}),
    )


def _decode_best(saved: Mapping[str, Any], weights: Tensor) -> Best:
    n_since, rows = _count(saved["n_since"]), saved.get("rows", "")
    if not isinstance(rows, str):
        raise ValueError(f"rows {rows!r:.50}")
    _require_alike([weights])
    ridge = _count(saved.get("ridge", 0))  # Formats 1 to 4 had one.
    return Best(weights, float(saved["error"]), _count(saved["step"]), n_since, rows, ridge)


def _require_alike(tensors: Sequence[Tensor]) -> None:
    """ValueError unless all tensors are float32 matrices of one shape, (c, p)."""
    if len({tuple(tensor.shape) for tensor in tensors}) > 1 or tensors[0].ndim != 2:
        raise ValueError(f"shapes {[tuple(tensor.shape) for tensor in tensors]}")
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        raise ValueError(f"dtypes {[tensor.dtype for tensor in tensors]}")


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.50} is not a number of steps")
    return value


def _encode(value: float) -> str:
    return repr(value)  # JSON has no infinity; a float's repr is exact.


def _encode_loss(loss: RunningLoss) -> dict[str, Any]:
    return {name: _encode(v) if isinstance(v, float) else v for name, v in asdict(loss).items()}


def _decode_loss(saved: Mapping[str, Any]) -> RunningLoss:
    return RunningLoss(int(saved["n_steps"]), *(float(saved[name]) for name in ("mean", "first", "best")))
