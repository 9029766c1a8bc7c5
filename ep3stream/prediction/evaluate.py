"""How good a model is on a split, and its predictions for one: streamed, in memory that does not grow with n."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.config import MIB, Format
from ep3stream.conversion.categories import UnseenValues
from ep3stream.conversion.spec import StoreSpec
from ep3stream.conversion.writer import create_store
from ep3stream.errors import InputError
from ep3stream.mesh import Mesh, joined
from ep3stream.prediction.diagnosis import ClassDiagnosis, RegressionDiagnosis, diagnosis_for
from ep3stream.prediction.models import load
from ep3stream.prediction.scores import ClassScores, RegressionScores
from ep3stream.prediction.tables import is_dask_array, predict_lazily
from ep3stream.run.directory import RunDirectory
from ep3stream.run.event_log import append_line
from ep3stream.run.launch import Job, n_ranks_to_launch, run_on_ranks
from ep3stream.run.node_rows import node_pieces
from ep3stream.solver.kernels import KernelFunction
from ep3stream.solver.model import ModelShard, Predictor
from ep3stream.solver.targets import TargetCode
from ep3stream.store.files import ObjectUrl, location
from ep3stream.store.reader import RowStore, SplitReader, open_store
from ep3stream.stream.scan import Segment, scan

_LOGGER = logging.getLogger(__name__)

_OUTPUT_ROWS = 8192

_OUTPUT_VALUES = 1 << 22

_SEGMENT_BYTES = 16 * MIB

_RANK_TIMEOUT_S = 1800.0

Outputs = tuple[Tensor, NDArray[Any] | None]


def evaluate(
    run: Path | str,
    store: Path | str | ObjectUrl,
    split: str | None = None,
    kernel: KernelFunction | None = None,
    reference: Mapping[str, Any] | None = None,
    devices: int | Literal["auto"] = 1,
) -> dict[str, Any]:
    """Scores of the run's model on a split of any store with the same columns; `test`, or the only one.

    n and mse; rmse and r2 for regression; accuracy, top5 and auc (two classes) for classification; nan for a
    score that the rows do not define. The result is added to RUN/evaluations.jsonl, with `reference`,
    {"name": ..., score: ...}, another method's scores for the report to show beside it, and with a `diagnosis` of
    residuals or confusions for it to draw. With several `devices` each has its share of the centers, as in `fit`.
    Raises InputError naming columns that differ.
    """
    if (n_ranks := n_ranks_to_launch(devices)) > 1:
        known = None if reference is None else dict(reference)
        job = Job.of("evaluate", kernel, run=str(run), store=str(store), split=split, reference=known)
        scores: dict[str, Any] = run_on_ranks(job, n_ranks, max_restarts=0)
        return scores
    with joined(_RANK_TIMEOUT_S) as mesh:
        model = mesh.on_leader(lambda: load(run, kernel))
        with mesh.all_or_raise(lambda: open_store(store)) as rows:
            reader = mesh.all_or_raise(lambda: rows.split(split or _usual_split(rows)))
            if mesh.is_leader and (unseen := UnseenValues.of(rows.manifest.conversion.get("unknown"))):
                _LOGGER.warning("%s was converted with values unknown to the model: %s", rows.path, unseen)
            shard = _dealt(model, reader, mesh, kernel)
            diagnosis = None if model is None else diagnosis_for(model)
            scores = score_rows(shard, reader, lambda: scan(reader), diagnosis=diagnosis)
            record = {"store": str(rows.path), "split": reader.info.name, **scores}
        if diagnosis is not None:
            record["diagnosis"] = diagnosis.result()
        if reference is not None:
            record["reference"] = dict(reference)
        mesh.on_leader(lambda: append_line(RunDirectory(Path(run).absolute()).evaluations, record))
    return scores


def _dealt(
    model: Predictor | None, reader: SplitReader, mesh: Mesh, kernel: KernelFunction | None
) -> ModelShard:
    """Each rank's share of the leader's model; InputError unless the store has its columns."""
    mesh.on_leader(lambda: None if model is None else check_columns(model, reader))
    tensors = {} if model is None else model.tensors()
    told = mesh.broadcast_object(lambda: None if model is None else [list(tensors), model.description()])
    by_center = ("centers", "weights")
    shards = {
        name: (mesh.scatter_rows if name in by_center else mesh.copy)(tensors.get(name)).to(mesh.device)
        for name in told[0]
    }
    return Predictor.of(shards, told[1], kernel).prepared(mesh)


def _usual_split(store: RowStore) -> str:
    names = list(store.manifest.splits)
    return names[0] if len(names) == 1 else "test"


def score_rows(
    model: ModelShard,
    reader: SplitReader,
    parts: Callable[[], Iterable[Segment]],
    targets: TargetCode | None = None,
    diagnosis: ClassDiagnosis | RegressionDiagnosis | None = None,
) -> dict[str, Any]:
    """The scores on `parts` of a split's rows, on every rank; with `targets`, a fit's own, `weighted_error` too.

    That is the mean over rows and outputs of what the fit makes small, less the ridge, in the fit's units. `diagnosis`
    sees the same rows.
    """
    classes = reader.manifest.class_names
    totals = ClassScores(classes) if classes is not None else RegressionScores()
    weighted = 0.0
    for outputs, y in _outputs(model, reader, parts):
        if y is None:
            continue
        predicted = outputs.double().cpu().numpy()
        totals.add(predicted, y)
        if diagnosis is not None:
            diagnosis.add(predicted, y)
        if targets is not None:
            weighted += float(targets.weighted_squares(outputs.cpu(), torch.from_numpy(y)))

    def result() -> dict[str, Any]:
        scores = totals.result()
        if targets is not None:
            scores["weighted_error"] = weighted / (scores["n"] * targets.n_outputs)
        return scores

    scores: dict[str, Any] = model.mesh.broadcast_object(result)
    return scores


def predict(
    run: Path | str,
    store: Any,
    out: Path | str | None = None,
    split: str | None = None,
    kernel: KernelFunction | None = None,
    scores: bool = False,
    devices: int | Literal["auto"] = 1,
) -> Any:
    """Writes the model's predictions for every row of a split, in the store's order; returns their number.

    Given a Dask array, (n, d), and no `out`, it returns the predictions as a lazy Dask array, by blocks.
    The split is `test`, or the store's only one, unless named.
    An `out` ending in .npy becomes an array: targets (n,) or (n, c) float32, class ids (n,) int32, or with
    `scores` the (n, c) outputs behind them. Otherwise `out` becomes a store (HDF5 if it ends in .h5 or .hdf5)
    whose x are the outputs, (n, c), and whose y is the y of the rows. `devices`: as in `evaluate`.
    """
    if is_dask_array(store) and out is None:
        return predict_lazily(load(run, kernel), store, scores)
    if is_dask_array(store) or out is None:
        raise InputError(
            "predictions of a store go to `out`, those of a Dask array are returned; correct the call"
        )
    place = location(out)
    if isinstance(place, ObjectUrl):
        raise InputError(f"{place} is in a bucket; predictions are written to a disk: give a path")
    out = place
    if out.exists():
        raise InputError(f"{out} exists; remove it or choose another name")
    if (n_ranks := n_ranks_to_launch(devices)) > 1:
        paths = {"run": str(run), "store": str(store), "out": str(out)}
        job = Job.of("predict", kernel, **paths, split=split, scores=scores)
        return run_on_ranks(job, n_ranks, max_restarts=0)
    with joined(_RANK_TIMEOUT_S) as mesh:
        model = mesh.on_leader(lambda: load(run, kernel))
        with mesh.all_or_raise(lambda: open_store(store)) as rows:
            reader = mesh.all_or_raise(lambda: rows.split(split or _usual_split(rows)))
            outputs = _outputs(_dealt(model, reader, mesh, kernel), reader, lambda: scan(reader))
            if model is None:
                deque(outputs, maxlen=0)  # The leader writes what all compute.
            else:
                write = _write_npy if out.suffix == ".npy" else _write_store
                write(model, reader, out, scores, outputs)
            return reader.info.n_rows


def check_columns(model: Predictor, reader: SplitReader) -> None:
    """Raises InputError unless the store has the columns and classes the model was fitted to."""
    manifest = reader.manifest
    pairs = (
        ("features", model.feature_names, tuple(manifest.feature_names)),
        ("targets", model.target_names, tuple(manifest.target_names)),
        ("classes", model.class_names, None if manifest.class_names is None else tuple(manifest.class_names)),
    )
    for what, mine, theirs in pairs:
        if mine != theirs:
            different = _first_difference(mine, theirs)
            raise InputError(
                f"{reader.path} has other {what} than the model: {different}; convert it in the same way"
            )


def _first_difference(mine: tuple[str, ...] | None, theirs: tuple[str, ...] | None) -> str:
    if mine is None or theirs is None:
        return "one is for classification, the other for regression"
    if len(mine) != len(theirs):
        return f"{len(theirs)} where the model has {len(mine)}"
    place = next(i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1])
    return f"number {place + 1} is {theirs[place]!r} where the model has {mine[place]!r}"


def _outputs(
    model: ModelShard, reader: SplitReader, parts: Callable[[], Iterable[Segment]]
) -> Iterator[Outputs]:
    """Outputs and, on ranks that read, y, of a few rows at a time: those of a segment may far exceed its inputs."""
    n_rows = max(1, min(_OUTPUT_ROWS, _OUTPUT_VALUES // model.targets.n_outputs))
    for x, y in node_pieces(model.mesh, parts, reader.manifest.n_features, n_rows):
        yield model.outputs(x), y


def _write_npy(
    model: Predictor, reader: SplitReader, out: Path, scores: bool, found: Iterator[Outputs]
) -> None:
    n_rows, n_outputs = reader.info.n_rows, len(model.targets.offset)
    as_ids = model.class_names is not None and not scores
    flat = as_ids or (n_outputs == 1 and not scores)
    dtype = np.dtype(np.int32 if as_ids else np.float32)
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (n_rows,) if flat else (n_rows, n_outputs),
    }
    partial = out.with_name(f".{out.name}.partial")
    try:
        # Not a memory map: on a full disk, writing to one ends the process by SIGBUS.
        with partial.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for outputs, _ in found:
                values = (outputs.argmax(1) if as_ids else outputs).cpu().numpy()
                file.write(values.astype(dtype, order="C", copy=False).data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error}); free space or choose another place") from error
    finally:
        partial.unlink(missing_ok=True)


def _write_store(
    model: Predictor, reader: SplitReader, out: Path, scores: bool, found: Iterator[Outputs]
) -> None:
    manifest = reader.manifest
    spec = StoreSpec(
        task=manifest.task,
        n_features=manifest.n_outputs,
        n_outputs=manifest.n_outputs,
        x_dtype="float32",
        feature_names=model.class_names or model.target_names,
        target_names=model.target_names,
        class_names=model.class_names,
        columns={"predictions_of": manifest.fingerprint},
        shuffle_seed=manifest.shuffle_seed,
        source=(),
        segment_bytes=min(max(4096, reader.info.segment_rows * manifest.n_outputs * 4), _SEGMENT_BYTES),
    )
    chosen: Format = "hdf5" if out.suffix in (".h5", ".hdf5") else "zarr"
    with create_store(out, spec, chosen) as writer:
        for outputs, y in found:
            assert y is not None  # This rank reads.
            writer.append(reader.info.name, outputs.cpu().numpy(), y)
        writer.commit()
