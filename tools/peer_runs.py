"""One method on Fashion-MNIST in a process of its own; `bench_peers.py` starts it and reads the lines it prints.

    python tools/peer_runs.py METHOD DATA [--path CHECKOUT] [--epochs 2] [--samples 2000] [--level 200] ...

Each line is JSON: epochs, wall and CPU seconds since the method was handed its data, test accuracy and mse. The clocks
stand still while a model is scored. METHOD is `ep3stream`, or a peer, imported as its authors left it from CHECKOUT;
`stand_in` and `accept_eigvals` make up for what their code needs and a current environment lacks, and change none of
its arithmetic.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

Outputs = Callable[[Tensor], Tensor]


class Race:
    """The data, and clocks that stand still while a model is scored."""

    def __init__(self, data: Path, n_centers: int, seed: int) -> None:
        def load(name: str) -> Tensor:
            return torch.from_numpy(np.load(data / f"{name}.npy", allow_pickle=False))

        self.x, self.x_test = load("train-x"), load("test-x")
        y, y_test = load("train-y").long(), load("test-y").long()
        self.y, self.y_test = (torch.nn.functional.one_hot(labels).float() for labels in (y, y_test))
        drawn = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))
        self.centers = self.x[drawn[:n_centers]].clone()
        self.lines = sys.stdout

    def begin(self) -> None:
        """The method is handed its data."""
        self.spent = np.zeros(2)
        self.began = clocks()

    def lap(self, epochs: float, outputs: Outputs) -> tuple[float, float]:
        """Prints the line of a model, n rows to (n, c), and returns its accuracy and mse."""
        self.spent += clocks() - self.began
        with torch.no_grad():
            found = torch.cat([outputs(rows) for rows in self.x_test.split(2000)])
        accuracy = float((found.argmax(1) == self.y_test.argmax(1)).float().mean())
        mse = float((found - self.y_test).square().mean())
        seconds, cpu_seconds = self.spent
        line = {"epochs": epochs, "seconds": seconds, "cpu_seconds": cpu_seconds}
        line |= {"accuracy": accuracy, "mse": mse}
        print(json.dumps(line), file=self.lines, flush=True)
        self.began = clocks()
        return accuracy, mse


def run_ep3stream(race: Race, options: argparse.Namespace) -> None:
    """`fit` from the store, the whole call; the test rows are predicted by the model it wrote."""
    import ep3stream

    config = ep3stream.FitConfig(
        data=ep3stream.DataConfig(scale="none", validate="none"),
        kernel=ep3stream.KernelConfig(bandwidth=options.bandwidth),
        solver=ep3stream.SolverConfig(centers=options.centers, epochs=options.epochs),
        run=ep3stream.RunConfig(seed=options.seed),
    )
    run = options.data / "run"
    shutil.rmtree(run, ignore_errors=True)
    race.begin()
    ep3stream.fit(options.data / "train.zarr", run, config)
    race.lap(options.epochs, ep3stream.load(run).outputs)


def run_eigenpro3(race: Race, options: argparse.Namespace) -> None:
    """github.com/EigenPro/EigenPro3: the model's constructor, which prepares, and `fit`, scored after each epoch."""
    datasets = dict.fromkeys(("MNIST", "EMNIST", "FashionMNIST", "KMNIST", "CIFAR10"))
    stand_in("torchvision")
    stand_in("torchvision.datasets", **datasets)
    accept_eigvals()
    from eigenpro3.kernels import laplacian
    from eigenpro3.models import KernelModel

    def kernel(x: Tensor, z: Tensor) -> Tensor:
        return laplacian(x, z, bandwidth=options.bandwidth)

    def scored(weights: Tensor, centers: Tensor, *_: Any) -> float:
        return race.lap(model.epoch + 1, lambda x: kernel(x, centers) @ weights)[0]

    race.begin()
    model = KernelModel(
        race.y.shape[1],
        race.centers,
        kernel,
        X=race.x,
        y=race.y,
        n_nystrom_samples=options.samples,
        data_preconditioner_level=options.level,
    )
    model.fit(model.train_loaders, val_loader=[], epochs=int(options.epochs), score_fn=scored)


def run_eigenpro(race: Race, options: argparse.Namespace) -> None:
    """github.com/EigenPro/EigenPro, "delayed projections": `fit`, its own score after each epoch replaced by ours."""
    stand_in("termcolor", colored=lambda text, _: text)
    stand_in("tabulate", tabulate=lambda *_, **__: "")
    stand_in("tqdm", tqdm=lambda items, **_: items)
    import eigenpro.kernels as kernels
    import eigenpro.models.sharded_kernel_machine as machine
    import eigenpro.solver as solver
    import eigenpro.utils.metrics as metrics
    from eigenpro.utils.device import Device

    def kernel(x: Tensor, z: Tensor) -> Tensor:
        return kernels.laplacian(x, z, bandwidth=options.bandwidth)

    n_scored = 0

    def scored(model: Any, *_: Tensor) -> tuple[float, float]:
        nonlocal n_scored
        n_scored += 1
        accuracy, mse = race.lap(n_scored, lambda x: model.forward(x, train=False))
        return mse, accuracy

    metrics.get_performance = scored
    race.begin()
    device = Device.create(use_gpu_if_available=False)
    solver.fit(
        machine.create_sharded_kernel_machine(race.centers, race.y.shape[1], kernel, device),
        race.x,
        race.y,
        race.x_test,
        race.y_test,
        device,
        kernel=kernel,
        n_data_pcd_nyst_samples=options.samples,
        n_model_pcd_nyst_samples=options.samples,
        n_data_pcd_eigenvals=options.level,
        n_model_pcd_eigenvals=options.level,
        epochs=int(options.epochs),
    )


def run_falkon(race: Race, options: argparse.Namespace) -> None:
    """github.com/FalkonML/falkon: a `fit` each of 3, 5, 10 and 20 iterations of conjugate gradients; 20 is its default.

    What its kernels compile when first used is compiled before the clocks start.
    """
    import falkon

    settings = falkon.FalkonOptions(use_cpu=True)
    kernel = falkon.kernels.LaplacianKernel(sigma=options.bandwidth, opt=settings)

    def fitted(n_rows: int, n_centers: int, iterations: int) -> Any:
        model = falkon.Falkon(
            kernel=kernel, penalty=options.penalty, M=n_centers, maxiter=iterations, options=settings
        )
        return model.fit(race.x[:n_rows], race.y[:n_rows])

    fitted(2000, 100, 1).predict(race.x_test[:2000])
    for iterations in (3, 5, 10, 20):
        race.begin()
        model = fitted(len(race.x), options.centers, iterations)
        race.lap(iterations, model.predict)


def clocks() -> np.ndarray:
    """Wall and CPU seconds; on a machine with other work only the second compares."""
    return np.array([time.perf_counter(), time.process_time()])


def stand_in(name: str, **attributes: Any) -> None:
    """A module of that name with these attributes, where there is none: for imports that a run makes no use of."""
    try:
        importlib.import_module(name)
    except ImportError:
        module = ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module


def accept_eigvals() -> None:
    """Gives scipy.linalg.eigh back the argument `eigvals`, which SciPy 1.14 has dropped for `subset_by_index`."""
    import scipy.linalg

    current = scipy.linalg.eigh

    def eigh(matrix: Any, *, eigvals: tuple[int, int] | None = None, **settings: Any) -> Any:
        return current(matrix, **({"subset_by_index": eigvals} if eigvals else {}), **settings)

    scipy.linalg.eigh = eigh


METHODS = {
    "ep3stream": run_ep3stream,
    "eigenpro3": run_eigenpro3,
    "eigenpro": run_eigenpro,
    "falkon": run_falkon,
}


def main() -> None:
    options = arguments()
    if hasattr(os, "sched_setaffinity"):
        # Threads beside torch's, such as those that decode, get no further cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    np.random.seed(options.seed)  # The one EigenPro draws from.
    if options.path:
        sys.path.insert(0, str(options.path))
    race = Race(options.data, options.centers, options.seed)
    with contextlib.redirect_stdout(sys.stderr):  # What the peers print is not ours to read.
        METHODS[options.method](race, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("data", type=Path)
    parser.add_argument("--path", type=Path)
    parser.add_argument("--epochs", default=1, type=float)
    parser.add_argument("--centers", default=5000, type=int)
    parser.add_argument("--bandwidth", default=10, type=float)
    parser.add_argument("--samples", default=2000, type=int)
    parser.add_argument("--level", default=200, type=int)
    parser.add_argument("--penalty", default=1e-6, type=float)
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--seed", default=0, type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
