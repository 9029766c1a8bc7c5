"""How good a model is on the rows of a split, streamed: memory does not grow with the number of rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.config import READ_TIMEOUT_S
from ep3stream.errors import InputError
from ep3stream.mesh import Mesh, joined
from ep3stream.prediction.diagnosis import ClassDiagnosis, RegressionDiagnosis, diagnosis_for
from ep3stream.prediction.models import load
from ep3stream.prediction.scores import ClassScores, RegressionScores
from ep3stream.run.directory import RunDirectory
from ep3stream.run.event_log import append_line
from ep3stream.run.launch import Job, n_ranks_to_launch, run_on_ranks
from ep3stream.run.node_rows import node_pieces
from ep3stream.run.state import open_store_of
from ep3stream.solver.kernels import KernelFunction
from ep3stream.solver.model import ModelShard, Predictor
from ep3stream.store.columns import code_values
from ep3stream.store.files import ObjectUrl
from ep3stream.store.reader import RowStore, SplitReader
from ep3stream.store.scan import Segment, scan
from ep3stream.store.unseen_values import UnseenValues

OutputBatch = tuple[Tensor, NDArray[Any] | None]
"""Outputs of some rows, (rows, c), and their y, None on ranks that do not read."""

RANK_TIMEOUT_S = 1800.0

# A batch of outputs has at most so many rows and so many values: 16 MiB of float32.
_OUTPUT_ROWS = 8192
_OUTPUT_VALUES = 1 << 22
logger = logging.getLogger(__name__)


def evaluate(
    run: Path | str,
    store: Path | str | ObjectUrl,
    split: str | None = None,
    kernel: KernelFunction | None = None,
    reference: Mapping[str, Any] | None = None,
    devices: int | Literal["auto"] = 1,
    read_timeout_s: float = READ_TIMEOUT_S,
) -> dict[str, Any]:
    """Scores of the run's model on a split of any store with the same columns.

    Returns n and mse; for regression rmse and r2; for classification accuracy, top5 and, for two classes, auc. A score
    that the rows do not define is nan. The scores are also appended to RUN/evaluations.jsonl, with the `reference` and
    with a `diagnosis` of residuals or confusions, both for the report.

    split: by default `test`, or the only split. kernel: the callable that the fit was given, if any.
    reference: another method's scores, {"name": ..., score: ...}. devices: each has a share of the centers, as in
    `fit`. read_timeout_s: as in a fit. Raises InputError naming the columns that differ.
    """
    if (n_ranks := n_ranks_to_launch(devices)) > 1:
        plain = None if reference is None else dict(reference)
        job = Job.of(
            "evaluate",
            kernel,
            run=str(run),
            store=str(store),
            split=split,
            reference=plain,
            read_timeout_s=read_timeout_s,
        )
        scores: dict[str, Any] = run_on_ranks(job, n_ranks, max_restarts=0)
        return scores
    with joined(RANK_TIMEOUT_S) as mesh:
        model = mesh.on_leader(lambda: load(run, kernel))
        with mesh.all_or_raise(lambda: open_store_of(run, store, read_timeout_s)) as rows:
            reader = mesh.all_or_raise(lambda: rows.split(split or default_split(rows)))
            conversion = rows.manifest.conversion
            by_split = conversion.get("unknown_by_split")
            in_split = by_split.get(reader.info.name) if isinstance(by_split, Mapping) else None
            for unseen in map(UnseenValues.of, (conversion.get("unknown"), in_split)):
                if mesh.is_leader and unseen:
                    logger.warning("%s was converted with values unknown to the model: %s", rows.path, unseen)
            shard = scatter_model(model, reader, mesh, kernel)
            diagnosis = None if model is None else diagnosis_for(model)
            scores = score_rows(shard, reader, lambda: scan(reader), diagnosis=diagnosis)
            record = {"store": str(rows.path), "split": reader.info.name, **scores}
        if diagnosis is not None:
            record["diagnosis"] = diagnosis.result()
        if reference is not None:
            record["reference"] = dict(reference)
        mesh.on_leader(lambda: append_line(RunDirectory(Path(run).absolute()).evaluations, record))
    return scores


def score_rows(
    model: ModelShard,
    reader: SplitReader,
    segments: Callable[[], Iterable[Segment]],
    diagnosis: ClassDiagnosis | RegressionDiagnosis | None = None,
) -> dict[str, Any]:
    """The scores on the rows of `segments`, the same on every rank.

    diagnosis: is given the same rows.
    """
    classes = reader.manifest.class_names
    totals = ClassScores(classes) if classes is not None else RegressionScores()
    for outputs, y in output_batches(model, segments):
        if y is None:
            continue
        predicted = outputs.double().cpu().numpy()
        totals.add(predicted, y)
        if diagnosis is not None:
            diagnosis.add(predicted, y)
    scores: dict[str, Any] = model.mesh.broadcast_object(totals.result)
    return scores


def score_ridges(
    model: ModelShard, classes: tuple[str, ...] | None, segments: Callable[[], Iterable[Segment]]
) -> list[dict[str, Any]]:
    """The scores of the models of each ridge on the rows of `segments`, the same on every rank.

    classes: their names, None for regression. `weighted_error` is the mean over rows and outputs of the fit's
    objective without the ridge, in the units of the fit.
    """
    targets = replace(model.targets, ridge_factors=(1.0,)).to(torch.device("cpu"))
    n_ridges = len(model.targets.ridge_factors)
    totals = [ClassScores(classes) if classes is not None else RegressionScores() for _ in range(n_ridges)]
    weighted = [0.0] * n_ridges
    for outputs, y in output_batches(model, segments):
        if y is None:
            continue
        for number, some in enumerate(outputs.cpu().chunk(n_ridges, dim=1)):
            totals[number].add(some.double().numpy(), y)
            weighted[number] += float(targets.weighted_squares(some, torch.from_numpy(y)))

    def result() -> list[dict[str, Any]]:
        scores = [each.result() for each in totals]
        return [
            {**each, "weighted_error": error / (each["n"] * targets.n_outputs)}
            for each, error in zip(scores, weighted, strict=True)
        ]

    scores: list[dict[str, Any]] = model.mesh.broadcast_object(result)
    return scores


def output_batches(model: ModelShard, segments: Callable[[], Iterable[Segment]]) -> Iterator[OutputBatch]:
    """The model's outputs for the rows of `segments`, a few rows at a time: outputs may far exceed the inputs."""
    n_rows = max(_OUTPUT_ROWS, model.rows_at_once())
    n_rows = max(1, min(n_rows, _OUTPUT_VALUES // model.targets.n_columns))
    for x, y in node_pieces(model.mesh, segments, len(model.inputs.shift), n_rows):
        if y is not None and model.change is not None and not model.targets.is_classification:
            y = y - model.change[1]  # In float64.
        yield model.outputs(x), y


def default_split(store: RowStore) -> str:
    """The split to use if none is named: the only one, else `test`."""
    names = list(store.manifest.splits)
    return names[0] if len(names) == 1 else "test"


def scatter_model(
    model: Predictor | None, reader: SplitReader, mesh: Mesh, kernel: KernelFunction | None
) -> ModelShard:
    """This rank's share of the leader's model; `model` is None on the other ranks.

    Raises InputError on all ranks unless the store has the model's columns.
    """
    mesh.on_leader(lambda: None if model is None else _check_columns(model, reader))
    tensors = {} if model is None else model.tensors()
    names, description = mesh.broadcast_object(
        lambda: None if model is None else [list(tensors), model.description()]
    )

    def shard(name: str) -> Tensor:
        send = mesh.scatter_rows if name in ("centers", "weights") else mesh.replicate
        return send(tensors.get(name)).to(mesh.device)

    own = Predictor.of({name: shard(name) for name in names}, description, kernel)
    return own.prepared(mesh, reader.manifest.offsets)


def _check_columns(model: Predictor, reader: SplitReader) -> None:
    manifest = reader.manifest
    pairs = (
        ("features", model.feature_names, tuple(manifest.feature_names)),
        ("targets", model.target_names, tuple(manifest.target_names)),
        ("classes", model.class_names, None if manifest.class_names is None else tuple(manifest.class_names)),
    )
    for what, of_model, of_store in pairs:
        if of_model != of_store:
            difference = _first_difference(of_model, of_store)
            raise InputError(
                f"{reader.path} has other {what} than the model: {difference}; convert it in the same way"
            )

    record = None if model.frames is None else model.frames.record
    known = None if record is None else code_values(record["columns"])
    for name, values in code_values(manifest.columns).items():
        if known is not None and known.get(name) != values:
            raise InputError(
                f"{reader.path} has other categories of {name!r} than the model, so that its codes mean something "
                "else; convert it with --like the store of the model"
            )


def _first_difference(of_model: tuple[str, ...] | None, of_store: tuple[str, ...] | None) -> str:
    if of_model is None or of_store is None:
        return "one is for classification, the other for regression"
    if len(of_model) != len(of_store):
        return f"{len(of_store)} where the model has {len(of_model)}"
    place = next(i for i, pair in enumerate(zip(of_model, of_store, strict=True)) if pair[0] != pair[1])
    return f"number {place + 1} is {of_store[place]!r} where the model has {of_model[place]!r}"
