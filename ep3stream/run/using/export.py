"""A model for other programs: tensors and JSON whose layout docs/formats.md states, and a `torch.export` program."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ep3stream.errors import InputError
from ep3stream.package import created_by
from ep3stream.run.using.models import kept_columns, load
from ep3stream.solver.kernels import KernelFunction
from ep3stream.solver.model import Predictor
from ep3stream.solver.serving import exported_program

EXPORT_VERSION = 1
TENSORS, DESCRIPTION, PROGRAM = "model.safetensors", "model.json", "program.pt2"


def export(run: Path | str, out: Path | str, kernel: KernelFunction | None = None) -> Path:
    """Writes the model of a run, or of `save`, to a new directory `out`; returns it.

    Nothing there needs ep3stream: `model.safetensors` and `model.json` say all that predictions depend on, and
    `program.pt2` makes them: torch.export.load(file).module()(x), x of (n, d) float32. A callable kernel has to be
    given again, and is only in the program.
    Raises InputError where `out` exists or cannot be written, and for a callable that torch cannot export.
    """
    place = Path(out).absolute()
    if place.exists():
        raise InputError(f"{place} exists; remove it or choose another name")
    model = load(run, kernel)
    program = exported_program(model)
    partial = place.with_name(f".{place.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(model.tensors(), partial / TENSORS)
        text = json.dumps(_description(model, kept_columns(run)), indent=1, allow_nan=False)
        (partial / DESCRIPTION).write_text(text + "\n")
        # safetensors makes a file that its owner alone may read.
        (partial / TENSORS).chmod((partial / DESCRIPTION).stat().st_mode)
        torch.export.save(program, partial / PROGRAM)
        partial.replace(place)
    except OSError as error:
        raise InputError(
            f"{place} cannot be written ({error}); free space or choose another place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return place


def _description(model: Predictor, columns: dict[str, Any] | None) -> dict[str, Any]:
    p, d = model.centers.shape
    return {
        "format": "ep3stream-model",
        "format_version": EXPORT_VERSION,
        "created_by": created_by(),
        "task": "regression" if model.class_names is None else "classification",
        "n_centers": p,
        "n_features": d,
        "n_outputs": model.targets.n_outputs,
        **model.description(),
        "conversion": columns,
    }
