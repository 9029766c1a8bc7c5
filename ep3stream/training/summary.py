"""run.json: the store, the plan and the set-up of a fit, for people, scripts and the report."""

from __future__ import annotations

import platform
from typing import Any

import torch

from ep3stream.config import FitConfig
from ep3stream.mesh import Mesh
from ep3stream.run.setup import Setup
from ep3stream.store.json_files import created_by
from ep3stream.store.manifest import column_statistics
from ep3stream.store.reader import RowStore
from ep3stream.stream.order import RowOrder
from ep3stream.training.validation import ValidationRows

RUN_FORMAT_VERSION = 1
_MOST_COLUMNS = 200


def summary(setup: Setup, store: RowStore, order: RowOrder, config: FitConfig, mesh: Mesh) -> dict[str, Any]:
    """The content of run.json."""
    manifest, description = store.manifest, setup.description
    is_cuda = mesh.device.type == "cuda"
    told = {
        "format": "ep3stream-run",
        "format_version": RUN_FORMAT_VERSION,
        "created_by": created_by(),
        "store": {
            "path": str(store.path),
            "fingerprint": manifest.fingerprint,
            "split": config.data.split,
            "n_rows": order.n_rows,
            "validation": ValidationRows.of_setup(config, setup).to_json(),
            "n_features": manifest.n_features,
            "n_outputs": manifest.n_outputs,
            "task": manifest.task,
        },
        "statistics": _statistics(store, config.data.split),
        "target_names": list(manifest.target_names),
        "class_names": None if manifest.class_names is None else list(manifest.class_names),
        "plan": setup.plan.to_json()
        | {
            "steps_per_epoch": order.steps_per_epoch,
            "n_steps": config.solver.n_steps(order.steps_per_epoch),
        },
        "choices": description.get("choices", {}),
        "setup": {
            name: description[name]
            for name in ("elapsed_s", "data_eigenvalues", "model_eigenvalues", "lambda_max", "kappa_max")
        }
        | {"mu": setup.plan.mu},
        "environment": {
            "device": torch.cuda.get_device_name(mesh.device) if is_cuda else platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    for learnt in ("column_weights", "metric", "linear"):
        if learnt in description:
            told[learnt] = description[learnt]
    return told


def _statistics(store: RowStore, split: str) -> dict[str, Any]:
    """Of the split's first features, of its targets or classes: the page can be drawn again without the store."""
    manifest, info = store.manifest, store.manifest.splits[split]
    told: dict[str, Any] = {
        "features": column_statistics(manifest.feature_names, info.features, manifest.offsets.x)[
            :_MOST_COLUMNS
        ]
    }
    if info.targets is not None:
        statistics = column_statistics(manifest.target_names, info.targets, manifest.offsets.y)
        told["targets"] = statistics[:_MOST_COLUMNS]
    if info.class_counts is not None:
        told["class_counts"] = list(info.class_counts)[:_MOST_COLUMNS]
    return told
