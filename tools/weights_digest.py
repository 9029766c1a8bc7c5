"""Digests of what fits end with, to show that a change of the code has not changed a bit of the weights.

    python tools/weights_digest.py > before.json        # in the checkout before the change
    python tools/weights_digest.py --against before.json

Three stores (numbers from a table to Zarr, classes to HDF5, float16 rows in the source's own order) and three
projections, and some settings besides. The digests hold on one machine and one version of torch: other processors round
in another order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

import ep3stream
from ep3stream import ConvertConfig, DataConfig, FitConfig, KernelConfig, RunConfig, SolverConfig

_ROWS = 3000


def stores(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of each store, made there."""
    random = np.random.default_rng(0)
    x = random.normal(size=(_ROWS, 7))
    noise = random.normal(size=(_ROWS, 2))
    y = np.stack([np.sin(x[:, 0]) + x[:, 1] * x[:, 2], np.abs(x[:, 3])], 1) + 0.1 * noise
    columns = [*(f"x{i}" for i in range(7)), "a", "b"]
    table = folder / "table.csv"
    np.savetxt(table, np.hstack([x, y]), delimiter=",", header=",".join(columns), comments="")
    splits = {"train": 0.8, "validation": 0.1, "test": 0.1}
    numbers = ConvertConfig(target=("a", "b"), splits=splits)
    yield "numbers", converted([table], folder / "numbers.zarr", numbers)
    labels = (x[:, 0] + x[:, 1] > 0).astype(np.int64) + (x[:, 2] > 1)
    pair = folder / "x.npy", folder / "y.npy"
    np.save(pair[0], x.astype(np.float32))
    np.save(pair[1], labels)
    yield "classes", converted(pair, folder / "classes.h5", ConvertConfig(splits=splits))
    np.save(pair[1], y[:, 0])
    halves = ConvertConfig(dtype="float16", shuffle=False, segment_bytes=4096)
    yield "halves", converted(pair, folder / "halves.zarr", halves)


def converted(source: list[Path] | tuple[Path, Path], store: Path, config: ConvertConfig) -> Path:
    """The store made from a table's files, or from the arrays x and y."""
    if isinstance(source, tuple):
        ep3stream.convert(None, store, config, x_file=source[0], y_file=source[1])
    else:
        ep3stream.convert(source, store, config)
    return store


def configs(name: str) -> Iterator[tuple[str, FitConfig]]:
    """Settings to fit with, by name."""
    data, laplacian = DataConfig(validate="none"), KernelConfig("laplacian")
    run = RunConfig(seed=3, memory_bytes=256 << 20, checkpoint_steps=5)
    solver = SolverConfig(centers=200, epochs=2, model_rank=40, nystrom_samples=300, batch_size=64)
    for projection in ("nystrom", "exact", "eigenpro"):
        yield projection, FitConfig(data, laplacian, replace(solver, projection=projection), run)
    automatic = replace(solver, batch_size=0, model_rank=0, nystrom_samples=0)
    yield "automatic", FitConfig(data, laplacian, automatic, run)
    yield "gaussian", FitConfig(data, KernelConfig("gaussian", 3.0), replace(solver, ridge=1e-4), run)
    if name == "classes":
        weighted = replace(solver, class_weights="balanced", patience=2, validate_every=0.5)
        yield "weighted", FitConfig(DataConfig(validate="validation"), laplacian, weighted, run)


def digest(run: Path) -> dict[str, str]:
    """Of the tensors of the set-up, of the last checkpoint and of the model."""
    places = {"setup": run / "setup", "model": run / "model"}
    places["checkpoint"] = max((run / "checkpoints").iterdir())
    files = {name: next(place.glob("*.safetensors")) for name, place in places.items()}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in files.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, metavar="FILE.json", help="what the digests have to be")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for store_name, store in stores(folder):
            for name, config in configs(store_name):
                run = ep3stream.fit(store, folder / f"{store_name}-{name}", config)
                found[f"{store_name} {name}"] = digest(run)
    if options.against is None:
        print(json.dumps(found, indent=1))
        return 0
    wanted = json.loads(options.against.read_text())
    different = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    print("\n".join(f"{name}: {wanted.get(name)} but {found.get(name)}" for name in different))
    print(f"{len(found) - len(different)} of {len(wanted)} the same")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
