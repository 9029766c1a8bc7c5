"""The projections against the dense ridge solution on the same centers, on problems that differ in kind.

    python tools/bench_problems.py [--only sphere,tabular] [--epochs 1,3] [--eigenpro-epochs 1] [--seeds 0]

    sphere    d = 3, smooth but for a kink; Laplacian
    smooth    d = 8, smooth; Gaussian
    teacher   d = 64, a random network's 10 outputs; Laplacian
    clusters  d = 200, 400 clusters of different widths in 100 classes; Laplacian
    tabular   d = 20, skewed and binary columns, much noise; Laplacian
    fashion   d = 784, Fashion-MNIST, 10 classes; Laplacian; skipped where its files are not
    blobs     d = 3, inputs in 30 clusters of different widths; Gaussian
    uneven    d = 20, noise of uneven size; Matern 5/2
    classes   d = 30, 100 classes by a random network, with noise; Gaussian
    network   d = 64, a random network without noise; Laplacian
    harmonics d = 16, functions of the first three degrees on the unit sphere; Gaussian
    heavy     d = 10, rows far out: Student's t; Laplacian
    grid      d = 3, rows that all but coincide, centers among them; dispersal, gamma .7
    labels    d = 24, 100 classes, three tenths of the labels at random; ReLU NTK
    narrow    d = 12, a bandwidth at which K(Z, Z) is nearly the identity; Gaussian
    wide      d = 6, a bandwidth at which it has a few eigenvalues only; Gaussian
    cubic     d = 8, the function of `smooth`; polynomial of the third degree, whose matrices have rank 165
    few       d = 15, 2500 centers and 3000 rows; Matern 3/2

The last eight were made after the defaults had been chosen, to see whether they hold elsewhere.

Rows are drawn by seed; 10,000 are kept to test on, and the centers are not trained on. `KernelModel` trains with its
defaults, `eigenpro` on the published sample of 2000, with the published batch and step size. The columns:

    epochs    of `exact` and `nystrom`, one fit read after each of --epochs; of `eigenpro`, --eigenpro-epochs, of which
              a fraction is that part of the rows, and 0 leaves it out. Below it `nystrom` is run for as many, or such a
              part of one, as take the same kernel evaluations.
    Ge        10^9 kernel evaluations: entries of all blocks formed between the start of a fit and its end, set-up,
              measurement of the step size and passes over the centers included. Every row that `nystrom` trains on
              takes p, so that evaluations less n p epochs are those of its set-up, and the rows for a given number of
              evaluations follow. `dense` takes n p + p^2.
    seconds   of the same calls, and of the dense solution before it is scored, in float64
    mse       on the test rows, mean over outputs; of `dense`, the least over ridges of 0 and 1e-9 to 1e-1, four a
              decade, a choice made on these very rows
    excess    mse / mse of `dense` - 1
    ratio     of nystrom's excess to exact's after as many epochs; after `eigenpro`, to that of eigenpro

A dense solution costs n p^2: DIRECTORY/problems keeps its scores. Delete that after changing how rows are made,
or the ridges.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from bench_fashion import read_idx
from torch import Tensor

from ep3stream import DivergedError, KernelModel
from ep3stream.config import KernelConfig, KernelName
from ep3stream.online.sources import RowForm
from ep3stream.solver.dot_product import NtkKernel, PolynomialKernel
from ep3stream.solver.kernels import RadialKernel
from ep3stream.solver.least_squares import RidgePath
from ep3stream.solver.named_kernels import named_kernel
from ep3stream.solver.points import Points

FASHION = "/usr/share/datasets/fashion-mnist"
TEST_ROWS = 10_000
RIDGES = (0.0, *(10.0 ** (quarter / 4) for quarter in range(-36, -3)))
SAMPLES = {"eigenpro": 2000, "exact": 3000, "nystrom": 3000}

KERNELS: tuple[Any, ...] = (RadialKernel, PolynomialKernel, NtkKernel)

Make = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Problem:
    """How its rows are made, how many, and the kernel.

    n_rows: all of them, TEST_ROWS and the centers included; n_classes: 0 for regression.
    """

    name: str
    make: Make
    n_rows: int
    n_centers: int
    kernel: KernelConfig
    n_classes: int = 0

    @property
    def task(self) -> Literal["classification", "regression"]:
        """What y is."""
        return "classification" if self.n_classes else "regression"


@dataclass(frozen=True, slots=True)
class Rows:
    """Those of one seed: x (n, d) and y to train on, as many to test on, and the centers, (p, d)."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    centers: Tensor

    @classmethod
    def of(cls, problem: Problem, seed: int) -> Rows:
        """The last rows made are those to test on. Raises FileNotFoundError for data that are not there."""
        generator = torch.Generator().manual_seed(seed + 11)
        x, y = problem.make(problem.n_rows, generator)
        n_train = len(x) - TEST_ROWS
        order = torch.randperm(n_train, generator=generator)
        drawn, trained = order[: problem.n_centers], order[problem.n_centers :]
        return cls(x[trained], y[trained], x[n_train:], y[n_train:], x[drawn])

    def n_outputs(self, problem: Problem) -> int:
        """c."""
        return problem.n_classes or self.y.shape[1]


@dataclass(frozen=True, slots=True)
class Run:
    """A method's figures after so many epochs."""

    method: str
    epochs: float
    evaluations: int
    seconds: float
    mse: float


@dataclass(slots=True)
class Meter:
    """What was spent while `running`."""

    evaluations: int = 0
    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts the entries of the kernels' blocks: all of them are formed by one method of each class."""
        formed = {kind: kind.block for kind in KERNELS}

        def block(kernel: Any, z: Points, x: Points, out: Tensor | None = None) -> Tensor:
            self.evaluations += len(z) * len(x)
            return formed[type(kernel)](kernel, z, x, out)

        for kind in KERNELS:
            kind.block = block
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began
            for kind, own in formed.items():
                kind.block = own


def main() -> None:
    options = arguments()
    logging.getLogger("ep3stream").setLevel(logging.ERROR)
    if options.threads:
        torch.set_num_threads(options.threads)
    print(
        f"{'problem':<9} {'seed':>4} {'method':<9} {'epochs':>7} {'Ge':>7} {'seconds':>8} {'mse':>10} "
        f"{'excess':>8} {'ratio':>6}"
    )
    for problem in PROBLEMS:
        if problem.name not in options.only:
            continue
        for seed in options.seeds:
            try:
                rows = Rows.of(problem, seed)
            except FileNotFoundError as error:
                print(f"{problem.name:<9} skipped: {error}")
                break
            dense = dense_run(problem, rows, seed, Path(options.directory) / "problems")
            label = f"{problem.name:<9} {seed:>4}"
            print(label, line(dense, dense, None), flush=True)
            for run, rival in races(problem, rows, seed, options.epochs, options.eigenpro_epochs):
                print(label, line(run, dense, rival), flush=True)


def line(run: Run, dense: Run, rival: Run | None) -> str:
    """The columns after problem and seed; `rival` is the run whose excess this one's is divided by."""
    excess = run.mse / dense.mse - 1
    other = rival.mse / dense.mse - 1 if rival else 0.0
    ratio = f"{excess / other:.2f}" if other > 0 else "-"
    epochs = f"{run.epochs:.2f}" if run.epochs else "-"
    spent = f"{epochs:>7} {run.evaluations / 1e9:>7.3f} {run.seconds:>8.1f}"
    return f"{run.method:<9} {spent} {run.mse:>10.6f} {excess:>8.3f} {ratio:>6}"


def races(
    problem: Problem, rows: Rows, seed: int, epochs: Sequence[int], eigenpro_epochs: float
) -> Iterator[tuple[Run, Run | None]]:
    """Every run with the one it is to be compared with: after as many epochs, then at as many evaluations."""
    exact = trained(problem, rows, seed, "exact", epochs)
    nystrom = trained(problem, rows, seed, "nystrom", epochs)
    for theirs, ours in zip(exact, nystrom, strict=True):
        yield theirs, None
        yield ours, theirs
    if not eigenpro_epochs:
        return
    (published,) = trained(problem, rows, seed, "eigenpro", [eigenpro_epochs])
    yield published, None
    epoch = rows.x.shape[0] * problem.n_centers
    set_up = nystrom[0].evaluations - nystrom[0].epochs * epoch
    if published.evaluations > set_up:
        as_many = (published.evaluations - set_up) / epoch
        yield trained(problem, rows, seed, "nystrom", [as_many])[0], published


def trained(
    problem: Problem,
    rows: Rows,
    seed: int,
    method: Literal["eigenpro", "exact", "nystrom"],
    epochs: Sequence[float],
) -> list[Run]:
    """One fit, read after each of `epochs`, which ascend; the mse is nan from where it diverges."""
    model = KernelModel(
        rows.centers,
        problem.kernel,
        rows.n_outputs(problem),
        task=problem.task,
        projection=method,
        nystrom_samples=SAMPLES[method],
        seed=seed,
    )
    meter, done, found = Meter(), 0.0, []
    for until in epochs:
        try:
            with meter.running():
                train(model, rows, until - done)
            mse = model.score(rows.x_test, rows.y_test)["mse"]
        except DivergedError:
            spent = meter.evaluations, meter.seconds
            return found + [Run(method, later, *spent, math.nan) for later in epochs[len(found) :]]
        done = until
        found.append(Run(method, until, meter.evaluations, meter.seconds, mse))
    return found


def train(model: KernelModel, rows: Rows, epochs: float) -> None:
    """Whole epochs, then as many of the rows, which are in random order, as make up the fraction."""
    part, whole = math.modf(epochs)
    model.fit((rows.x, rows.y), int(whole))
    if n_rows := round(part * len(rows.x)):
        model.fit_epoch((rows.x[:n_rows], rows.y[:n_rows]))


def dense_run(problem: Problem, rows: Rows, seed: int, directory: Path) -> Run:
    """The ridge solution that does best on the test rows, from `directory` where it is known."""
    sizes = f"{problem.n_rows}-{TEST_ROWS}-{problem.n_centers}"
    kernel = "-".join(
        [problem.kernel.name, *(f"{value:g}" for value in problem.kernel.parameters().values())]
    )
    path = directory / f"{problem.name}-{sizes}-{kernel}-seed{seed}.json"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(solve_dense(problem, rows)))
    kept = json.loads(path.read_text())
    return Run("dense", 0, kept["evaluations"], kept["seconds"], min(kept["mse_by_ridge"].values()))


def solve_dense(problem: Problem, rows: Rows) -> dict[str, object]:
    """mse of each of RIDGES, on the test rows, in the unit of y."""
    form = RowForm(rows.x.shape[1], rows.n_outputs(problem), problem.task, rows.x.device)
    (x, y), (x_test, y_test) = form.pair(rows.x, rows.y), form.pair(rows.x_test, rows.y_test)
    targets, meter = form.code(y), Meter()
    centre = rows.centers.double().mean(0)
    kernel = named_kernel(problem.kernel.name, problem.kernel.parameters(), {"kernel_centre": centre})
    with meter.running():
        path = RidgePath.of(kernel, rows.centers, x, y, targets)
    squares, _ = path.held_out(x_test, y_test, RIDGES)
    mse = (squares * targets.scale.double().square()).mean(1)
    by_ridge = dict(zip((f"{ridge:g}" for ridge in RIDGES), mse.tolist(), strict=True))
    return {"mse_by_ridge": by_ridge, "evaluations": meter.evaluations, "seconds": meter.seconds}


def sphere(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(n_rows, 3, generator=generator)
    x /= x.norm(dim=1, keepdim=True)
    waves = torch.sin(4 * x[:, 0] + x[:, 1]) * torch.cos(3 * x[:, 2]) + x[:, 0] * x[:, 1]
    bump = 0.5 * torch.exp(-20 * (x - torch.tensor([0.6, 0, 0.8])).square().sum(1))
    y = (waves + bump + 0.5 * x[:, 2].abs())[:, None]
    return x, y + 0.02 * torch.randn(y.shape, generator=generator)


def smooth(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.rand(n_rows, 8, generator=generator)
    y = torch.sin(2 * math.pi * x[:, 0] * x[:, 1]) + 2 * (x[:, 2] - 0.5).square()
    y = (y + x[:, 3] + 0.5 * x[:, 4] * torch.cos(5 * x[:, 5]))[:, None]
    return x, y + 0.05 * torch.randn(y.shape, generator=generator)


def teacher(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    fixed = torch.Generator().manual_seed(5)
    inner = torch.randn(64, 50, generator=fixed) / 8
    outer = torch.randn(50, 10, generator=fixed) / 7
    x = torch.randn(n_rows, 64, generator=generator)
    y = torch.relu(x @ inner) @ outer * 3
    return x, y + 0.1 * torch.randn(y.shape, generator=generator)


def clusters(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four clusters a class, each row with a width of its own."""
    means = torch.randn(400, 200, generator=torch.Generator().manual_seed(6)) * 0.42
    cluster = torch.randint(0, 400, (n_rows,), generator=generator)
    noise = torch.randn(n_rows, 200, generator=generator)
    width = 0.5 + torch.rand(n_rows, 1, generator=generator)
    return means[cluster] + noise * width, cluster // 4


def tabular(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ten normal columns, five log-normal and five binary ones, standardised."""
    x = torch.randn(n_rows, 20, generator=generator)
    x[:, 10:] = x[:, 10:].exp() / 2
    x[:, 15:] = (x[:, 15:] > 1).float()
    y = torch.sin(2 * x[:, 0]) * x[:, 1] + (x[:, 2] > 0) * x[:, 3] + x[:, 10].log1p() + x[:, 15] * x[:, 4]
    y = (y + 0.3 * x[:, 5:10].sum(1))[:, None]
    return (x - x.mean(0)) / x.std(0), y + torch.randn(y.shape, generator=generator)


def fashion(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The last 10,000 are the test images of the data set."""
    parts = []
    for prefix in ("train", "t10k"):
        x = read_idx(FASHION, f"{prefix}-images-idx3-ubyte.gz").reshape(-1, 784) / 255
        y = read_idx(FASHION, f"{prefix}-labels-idx1-ubyte.gz")
        parts.append((torch.from_numpy(x).float(), torch.from_numpy(y).long()))
    x, y = (torch.cat(both) for both in zip(*parts, strict=True))
    return x[-n_rows:], y[-n_rows:]


def blobs(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    means = torch.randn(30, 3, generator=torch.Generator().manual_seed(7)) * 1.5
    width = 0.1 + 0.4 * torch.rand(30, 1, generator=torch.Generator().manual_seed(8))
    cluster = torch.randint(0, 30, (n_rows,), generator=generator)
    x = means[cluster] + width[cluster] * torch.randn(n_rows, 3, generator=generator)
    y = torch.sin(3 * x[:, 0]) + torch.cos(2 * x[:, 1] * x[:, 2]) + 0.3 * (x[:, 0] - x[:, 2]).abs()
    return x, y[:, None] + 0.1 * torch.randn(n_rows, 1, generator=generator)


def uneven(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(n_rows, 20, generator=generator)
    y = torch.sin(x[:, 0] + x[:, 1]) + x[:, 2] * x[:, 3] + 0.5 * x[:, 4:8].square().sum(1).sqrt()
    spread = (0.1 + 0.5 * (x[:, 0] > 0).float() * x[:, 1].abs())[:, None]
    return x, y[:, None] + spread * torch.randn(n_rows, 1, generator=generator)


def classes(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    fixed = torch.Generator().manual_seed(9)
    inner = torch.randn(30, 60, generator=fixed) / 5
    outer = torch.randn(60, 100, generator=fixed)
    x = torch.randn(n_rows, 30, generator=generator)
    noise = torch.randn(n_rows, 100, generator=generator)
    return x, (torch.tanh(x @ inner) @ outer + 1.5 * noise).argmax(1)


def network(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    fixed = torch.Generator().manual_seed(10)
    inner = torch.randn(64, 50, generator=fixed) * 2 / 8
    outer = torch.randn(50, 1, generator=fixed) / 50**0.5
    x = torch.randn(n_rows, 64, generator=generator)
    return x, torch.tanh(x @ inner) @ outer


def harmonics(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Functions of the first three degrees on the unit sphere."""
    fixed = torch.Generator().manual_seed(12)
    x = torch.nn.functional.normalize(torch.randn(n_rows, 16, generator=generator))
    first, second, third = (x @ torch.randn(16, 20, generator=fixed) for _ in range(3))
    y = (first + first * second + 2 * first * second * third).mean(1, keepdim=True)
    return x, y + 0.05 * torch.randn(y.shape, generator=generator)


def heavy(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Student's t with 2.5 degrees of freedom: a few rows lie very far out."""
    chi = (torch.randn(n_rows, 5, generator=generator).square().sum(1) / 5).sqrt() ** 1.4
    x = torch.randn(n_rows, 10, generator=generator) / chi[:, None]
    y = torch.tanh(x[:, 0] * x[:, 1]) + x[:, 2].abs().log1p() + torch.sin(x[:, 3] + x[:, 4])
    return x, y[:, None] + 0.3 * torch.randn(n_rows, 1, generator=generator)


def grid(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clusters on a coarse grid, so that many rows, and some of the centers, are all but the same point."""
    means = torch.randn(25, 3, generator=torch.Generator().manual_seed(13)) * 2
    cluster = torch.randint(0, 25, (n_rows,), generator=generator)
    x = ((means[cluster] + 0.3 * torch.randn(n_rows, 3, generator=generator)) * 8).round() / 8
    y = torch.sin(2 * x[:, 0]) * torch.cos(x[:, 1]) + (x[:, 2] > 0.06) * 0.5
    x += 1e-5 * torch.randn(x.shape, generator=generator)
    return x, y[:, None] + 0.1 * torch.randn(n_rows, 1, generator=generator)


def labels(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A hundred classes, three tenths of the labels drawn at random."""
    inner = torch.randn(24, 100, generator=torch.Generator().manual_seed(14))
    x = torch.randn(n_rows, 24, generator=generator)
    y = (x @ inner + 0.5 * (x.square() @ inner)).argmax(1)
    drawn = torch.randint(0, 100, (n_rows,), generator=generator)
    return x, torch.where(torch.rand(n_rows, generator=generator) < 0.3, drawn, y)


def narrow(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For a bandwidth at which K(Z, Z) is nearly the identity."""
    x = torch.randn(n_rows, 12, generator=generator)
    y = torch.sin(x[:, 0]) + 0.5 * x[:, 1] * x[:, 2]
    return x, y[:, None] + 0.1 * torch.randn(n_rows, 1, generator=generator)


def wide(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For a bandwidth at which K(Z, Z) has hardly more than its first few eigenvalues."""
    x = torch.rand(n_rows, 6, generator=generator)
    y = x[:, 0] * x[:, 1] + torch.sin(3 * x[:, 2]) + (x[:, 3] - x[:, 4]).square()
    return x, y[:, None] + 0.05 * torch.randn(n_rows, 1, generator=generator)


def few(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For hardly more rows than centers."""
    x = torch.randn(n_rows, 15, generator=generator)
    y = torch.sin(x[:, 0] + x[:, 1]) + torch.relu(x[:, 2]) * x[:, 3]
    return x, y[:, None] + 0.2 * torch.randn(n_rows, 1, generator=generator)


def radial(name: KernelName, bandwidth: float, shape: float | None = None) -> KernelConfig:
    return KernelConfig(name, bandwidth, shape)


PROBLEMS = (
    Problem("sphere", sphere, 80_000, 3000, radial("laplacian", 1.0)),
    Problem("smooth", smooth, 80_000, 3000, radial("gaussian", 1.0)),
    Problem("teacher", teacher, 60_000, 2000, radial("laplacian", 10.0)),
    Problem("clusters", clusters, 60_000, 3000, radial("laplacian", 20.0), n_classes=100),
    Problem("tabular", tabular, 80_000, 2000, radial("laplacian", 5.0)),
    Problem("fashion", fashion, 70_000, 3000, radial("laplacian", 10.0), n_classes=10),
    Problem("blobs", blobs, 60_000, 2000, radial("gaussian", 0.5)),
    Problem("uneven", uneven, 60_000, 2000, radial("matern52", 8.0)),
    Problem("classes", classes, 50_000, 2000, radial("gaussian", 6.0), n_classes=100),
    Problem("network", network, 60_000, 2000, radial("laplacian", 10.0)),
    Problem("harmonics", harmonics, 60_000, 2000, radial("gaussian", 1.0)),
    Problem("heavy", heavy, 60_000, 2000, radial("laplacian", 4.0)),
    Problem("grid", grid, 60_000, 2000, radial("dispersal", 1.0, 0.7)),
    Problem("labels", labels, 50_000, 2000, KernelConfig("ntk_relu"), n_classes=100),
    Problem("narrow", narrow, 60_000, 2000, radial("gaussian", 1.0)),
    Problem("wide", wide, 60_000, 2000, radial("gaussian", 10.0)),
    Problem("cubic", smooth, 60_000, 2000, KernelConfig("polynomial", 1.0)),
    Problem("few", few, 15_500, 2500, radial("matern32", 5.0)),
)


def arguments() -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(item) for item in text.split(",")]

    def known(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(names):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not one of {', '.join(names)}")
        return text.split(",")

    names = [problem.name for problem in PROBLEMS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", default=".bench")
    parser.add_argument("--only", default=names, type=known, help="names of problems")
    parser.add_argument("--epochs", default="1,3", type=lambda text: sorted(integers(text)))
    parser.add_argument("--eigenpro-epochs", default=1.0, type=float)
    parser.add_argument("--seeds", default="0", type=integers)
    parser.add_argument("--threads", type=int, help="torch's; its own choice if not given")
    return parser.parse_args()


if __name__ == "__main__":
    main()
