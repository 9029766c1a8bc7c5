"""On a CUDA device: steps as on the CPU, fits of every projection, kernel and precision, several devices.

Where there is no GPU, `test_pretended_cuda.py` runs them on a pretended one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import rank_kernels
import torch
from kernel_problem import generator, points
from small_stores import make_store, plain_config

import ep3stream
from ep3stream.config import KERNEL_DEFAULTS
from ep3stream.errors import ConfigError
from ep3stream.mesh import Mesh
from ep3stream.run.directory import settled_choices
from ep3stream.solver.blocks import BatchBlock, fuses
from ep3stream.solver.columns import COLUMN_KERNELS, ColumnKernel
from ep3stream.solver.eigenpro import build_eigenpro
from ep3stream.solver.kernels import RADIAL_KERNELS, CallableKernel, RadialKernel
from ep3stream.solver.projection import build_nystrom
from ep3stream.solver.step import Solver, SolverState
from ep3stream.solver.tail import Grouping
from ep3stream.solver.targets import TargetCode
from ep3stream.training import set_up
from ep3stream.training.precision import found_precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("fewest_steps"),
]

P, D, M, C = 500, 8, 256, 3


def solver_of(device: torch.device, p: int = P, d: int = D, precision: str = "float32") -> Solver:
    """A solver, everything on `device`. precision: that of a Laplacian kernel, or the kernel `product` or `callable`.

    By Nystrom, or with the precision `eigenpro` by that projection.
    """
    mesh = Mesh(0, 1, device)
    centers = points(p, d, 1, torch.float32).to(device)
    sample = points(400, d, 2, torch.float32).to(device)
    if precision == "product":
        kernel = ColumnKernel.of("product", torch.tensor([[0.2], [0.0], [1.0]]).expand(3, d))
    elif precision == "callable":
        kernel = CallableKernel(rank_kernels.rational).without_waits(device)
    elif precision == "eigenpro":
        kernel = RadialKernel("laplacian", 4.0, torch.zeros(d, device=device))
    else:
        kernel = RadialKernel("laplacian", 4.0, torch.zeros(d, device=device), precision=precision)
    landmarks = centers[:500]
    if precision == "eigenpro":
        projection, _ = build_eigenpro(
            kernel, centers, landmarks, sample, p, (40, 40), (2, 1e-3), mesh, generator()
        )
    else:
        projection, _ = build_nystrom(
            kernel,
            kernel.left(centers),
            kernel.diagonal(centers),
            landmarks,
            sample,
            p,
            100,
            40,
            mesh,
            generator(),
            grouping=Grouping(64, p, lambda numbers: centers[numbers.start : numbers.stop]),
        )
    targets = TargetCode(False, torch.zeros(C, device=device), torch.ones(C, device=device))
    memory = None if fuses(kernel, device, 2 * C) else torch.zeros(p * M, device=device)
    return Solver(kernel, kernel.left(centers), projection, targets, 0.9, 3.0, mesh, memory)


def stepped(device: torch.device, n_steps: int = 5) -> SolverState:
    """The state after a few steps on the same rows."""
    solver = solver_of(device)
    state = solver.initial_state()
    for step in range(n_steps):
        x = points(M, D, 10 + step, torch.float32).to(device)
        solver.step(state, x, x[:, :C].sin(), 1e-3)
    return state


def test_a_step_on_the_gpu_is_the_step_on_the_cpu():
    on_cpu, on_gpu = stepped(torch.device("cpu")), stepped(torch.device("cuda"))
    for name, expected in on_cpu.tensors().items():
        scale = float(expected.abs().max())
        found = on_gpu.tensors()[name].cpu()
        assert torch.allclose(found, expected, rtol=0, atol=1e-4 * scale), name


class Stop(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """By name: few features, many, and numbers beside categories as codes; two targets, but three classes of many."""
    folder = tmp_path_factory.mktemp("stores")
    rng = np.random.default_rng(0)
    for name, d in (("few", 5), ("many", 40), ("columns", 6)):
        x = rng.standard_normal((700, d)).astype(np.float32)
        y = np.stack([np.sin(x[:, 0]) + x[:, 1], np.cos(x[:, 3])], 1)
        settings = {"splits": {"train": 0.8, "test": 0.2}}
        source = (x, np.digitize(y[:, 0], [-0.5, 0.5])) if name == "many" else (x, y)
        if name == "columns":
            frame = pd.DataFrame(x, columns=list("abcdef")).assign(y=y[:, 0])
            frame["f"] = np.where(x[:, 5] > 0, "up", "down")
            source, settings["target"] = frame, "y"
            settings["categories"] = "codes"
        ep3stream.convert(source, folder / name, ep3stream.ConvertConfig(**settings))
    return folder


SMALL = {"centers": 80, "model_rank": 30, "nystrom_samples": 100, "batch_size": 32}


def kill_at_step_12(progress):
    if progress.step >= 12:
        raise Stop


# Every projection and precision once; the others are slow.
FITS = [
    ("few", "nystrom", "float32"),
    ("many", "nystrom", "tf32"),
    ("many", "nystrom", "bfloat16"),
    ("many", "nystrom", "bf16x3"),
    ("columns", "nystrom", "float32"),
    ("many", "exact", "float32"),
    ("few", "eigenpro", "float32"),
    *(
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (
            ("many", "nystrom", "float32"),
            ("few", "nystrom", "tf32"),
            ("few", "nystrom", "bfloat16"),
            ("few", "exact", "float32"),
            ("many", "eigenpro", "float32"),
        )
    ),
]


@pytest.mark.parametrize(("store", "projection", "precision"), FITS)
def test_a_fit_that_was_killed_goes_on(store, projection, precision, stores, tmp_path):
    name = "product" if store == "columns" else "laplacian"
    solver = SMALL | {"projection": projection, "precision": precision, "epochs": 2, "validate_every": 1}
    if projection == "nystrom":
        solver |= {"ridge": 1e-6, "patience": 3}
    config = plain_config(
        solver=solver, run={"checkpoint_steps": 5}, data={"validate": "test"}, kernel={"name": name}
    )
    with pytest.raises(Stop):
        ep3stream.fit(stores / store, tmp_path / "run", config, observe=kill_at_step_12)
    ep3stream.fit(stores / store, tmp_path / "run", config)
    scores = ep3stream.evaluate(tmp_path / "run", stores / store)
    assert scores["accuracy" if store == "many" else "r2"] > 0.1
    ep3stream.predict(tmp_path / "run", stores / store, tmp_path / "predictions.npy")
    assert np.isfinite(np.load(tmp_path / "predictions.npy")).all()


KERNELS = [name for name in KERNEL_DEFAULTS if name not in ("laplacian", "auto")]


@pytest.mark.parametrize("name", [*KERNELS, "callable"])
def test_every_kernel_fits(name, stores, tmp_path):
    function = rank_kernels.rational if name == "callable" else None
    kernel = {} if function else {"kernel": {"name": name}}
    store = "columns" if name in COLUMN_KERNELS else "few"
    config = plain_config(solver=SMALL | {"epochs": 1}, **kernel)
    ep3stream.fit(stores / store, tmp_path / "run", config, kernel=function)
    assert ep3stream.evaluate(tmp_path / "run", stores / store, kernel=function)["r2"] > 0.1


def test_a_callable_that_is_not_finite_on_the_way_is_named(stores, tmp_path):
    steps = []

    def kernel(z, x):
        values = rank_kernels.rational(z, x)
        return values / 0 if steps else values

    config = plain_config(solver=SMALL | {"epochs": 4}, run={"devices": 1})
    with pytest.raises(ConfigError, match="returned a value that is not finite"):
        ep3stream.fit(stores / "few", tmp_path / "run", config, kernel=kernel, observe=steps.append)


@pytest.mark.parametrize("precision", ["bfloat16", "bf16x3"])
@pytest.mark.parametrize("name", RADIAL_KERNELS)
def test_a_torch_that_does_not_multiply_bfloat16_into_float32_takes_tf32(name, precision, monkeypatch):
    gpu = torch.device("cuda")
    kernel = RadialKernel(name, 4.0, torch.zeros(D, device=gpu), precision=precision)
    z, x = (points(50, D, seed, torch.float32).to(gpu) for seed in (1, 2))
    in_half = kernel.block(kernel.left(z), kernel.right(x)).cpu()
    monkeypatch.setattr(torch.ops.aten.mm, "overloads", lambda: ["default", "out"])
    assert kernel.left(z).packed is None
    assert torch.allclose(kernel.block(kernel.left(z), kernel.right(x)).cpu(), in_half, rtol=0, atol=1e-6)


def clock_of(*seconds: float) -> Callable[[], float]:
    """A clock by which the six blocks of each precision that are timed take so many seconds each."""
    ticks = [tick for each in seconds for _ in range(6) for tick in (0.0, each)]
    return iter(ticks).__next__


@pytest.mark.parametrize(
    ("seconds", "found"), [((4.0, 1.0), "bf16x3"), ((1.0, 0.9), "float32"), ((1.0, 2.0), "float32")]
)
def test_auto_takes_three_products_where_the_device_gains_by_them(seconds, found):
    kernel = RadialKernel("laplacian", 6.0, torch.zeros(40, device="cuda"))
    x = points(300, 40, 0, torch.float32).to("cuda")
    assert found_precision("auto", kernel, x, 3, clock=clock_of(*seconds)) == found


def test_auto_takes_no_three_products_of_a_device_that_adds_them_badly(monkeypatch, caplog):
    kernel = RadialKernel("matern32", 6.0, torch.zeros(40, device="cuda"))
    x, exact = points(300, 40, 0, torch.float32).to("cuda"), torch.mm

    def rounded_mm(a, b, **settings):
        found = exact(a, b, **settings)
        return found.mul_(1 + 1e-4) if a.dtype == torch.bfloat16 else found

    monkeypatch.setattr(torch, "mm", rounded_mm)
    assert found_precision("auto", kernel, x, 3, clock=clock_of(4.0, 1.0)) == "float32"
    assert "in bf16x3" in caplog.text
    assert "larger errors" in caplog.text


def test_auto_looks_at_no_block_where_none_is_formed():
    kernel = RadialKernel("laplacian", 4.0, torch.zeros(D, device="cuda"))
    x = points(300, D, 0, torch.float32).to("cuda")
    assert found_precision("auto", kernel, x, 3, clock=clock_of()) == "float32"


def test_what_auto_has_found_is_recorded_and_holds_for_the_fit(stores, monkeypatch):
    split = ep3stream.open_store(stores / "many").split("train")
    config, mesh = plain_config(solver=SMALL | {"precision": "auto"}), Mesh(0, 1, torch.device("cuda"))
    monkeypatch.setattr(
        set_up, "found_precision", lambda *given: found_precision(*given[:5], clock_of(4.0, 1.0))
    )
    setup = set_up.set_up_split(split, config, None, mesh).setup
    assert setup.plan.precision == "bf16x3"
    assert setup.solver(config, None, mesh).kernel.precision == "bf16x3"
    assert config.settled(settled_choices(setup.description)).solver.precision == "bf16x3"


def test_a_state_goes_on_in_the_precision_that_auto_has_found(monkeypatch):
    x = points(600, 40, 1, torch.float32)
    models = []
    for short_s in (1.0, 9.0):
        seconds = clock_of(4.0, short_s)
        monkeypatch.setattr(
            set_up, "found_precision", lambda *given, clock=seconds: found_precision(*given[:5], clock)
        )
        models.append(ep3stream.KernelModel(x[:80], "laplacian", device="cuda", bandwidth=6.0))
        if len(models) == 1:
            models[0].fit((x[80:].numpy(), x[80:, 0].numpy()), epochs=1)
    one, other = models
    assert one.state_dict()["precision"] == "bf16x3"
    other.load_state_dict(one.state_dict())
    assert torch.equal(*(torch.as_tensor(each.predict(x[:10])).cpu() for each in models))


@pytest.mark.parametrize("precision", ["float32", "bf16x3", "tf32", "bfloat16"])
@pytest.mark.parametrize("n_outputs", [3, 300])
def test_products_with_a_block_keep_16_bits(precision, n_outputs):
    gpu = torch.device("cuda")
    kernel = RadialKernel("gaussian", 4.0, torch.zeros(40, device=gpu), precision=precision)
    z, x = (points(n, 40, n, torch.float32).to(gpu) for n in (500, 200))
    block = BatchBlock(kernel, kernel.left(z), kernel.right(x), torch.zeros(500 * 200, device=gpu))
    values = block.whole().double().cpu()
    weights, residual = (points(n_outputs, n, n, torch.float32) for n in (500, 200))
    for found, left, right in (
        (block.left_times(weights.to(gpu)), weights, values),
        (block.times(residual.to(gpu)), residual, values.T),
    ):
        scale = left.double().abs() @ right
        assert ((found.cpu() - left.double() @ right).abs() / scale).max() < 5e-6


def test_a_plan_and_a_fit_with_class_weights(stores, tmp_path):
    assert ep3stream.plan(stores / "few", plain_config(solver=SMALL)).memory
    config = plain_config(solver=SMALL | {"class_weights": "balanced", "epochs": 1})
    ep3stream.fit(stores / "many", tmp_path / "run", config)
    assert ep3stream.evaluate(tmp_path / "run", stores / "many")["accuracy"] > 0.3


def test_a_kernel_model_and_an_estimator_train_and_load():
    x = points(600, 5, 1, torch.float32)
    y = x[:, 0].sin()
    one, other = (
        ep3stream.KernelModel(x[:80], "laplacian", device=device, bandwidth=3.0)
        for device in ("cuda:0", None)
    )
    one.fit_epoch(list(zip(x[80:].split(40), y[80:].split(40), strict=True)))
    one.fit((x[80:].numpy(), y[80:].numpy()), epochs=1)
    other.load_state_dict(one.state_dict())
    mine, theirs = (torch.as_tensor(each.predict(x[:10])).cpu() for each in (one, other))
    assert torch.equal(mine, theirs)
    estimator = ep3stream.KernelRegressor(n_centers=80, epochs=2).fit(x.numpy(), y.numpy())
    assert estimator.score(x.numpy(), y.numpy()) > 0.8


def test_a_fit_ends_with_effects_of_cells_that_its_model_adds(tmp_path):
    random = np.random.default_rng(0)
    first, second = random.integers(8, size=(2, 3000)).astype(np.float32)
    y = np.random.default_rng(1).normal(size=(8, 8))[first.astype(int), second.astype(int)]
    x = np.stack([first, second, random.normal(size=3000)], 1).astype(np.float32)
    splits = ep3stream.ConvertConfig(splits={"train": 0.7, "validation": 0.3})
    ep3stream.convert((x, y.astype(np.float32)), tmp_path / "store.zarr", splits)
    settings = {"kernel": {"name": "product"}, "solver": {"centers": 50, "epochs": 0.5}}
    config = ep3stream.FitConfig().with_settings(settings, "test")
    model = ep3stream.load(ep3stream.fit(tmp_path / "store.zarr", tmp_path / "run", config))
    assert model.effects is not None
    rows = torch.from_numpy(x[:200])
    on_gpu = model.to(torch.device("cuda:0")).outputs(rows.to("cuda:0")).cpu()
    torch.testing.assert_close(on_gpu, model.outputs(rows), rtol=1e-4, atol=1e-4)
    assert ep3stream.evaluate(tmp_path / "run", tmp_path / "store.zarr", "validation")["r2"] > 0.9


def test_a_fit_on_the_gpu_that_was_killed_ends_with_the_same_bytes(tmp_path):
    store = make_store(tmp_path / "smooth.zarr")
    changes = {
        "solver": {"centers": 150, "model_rank": 40, "batch_size": 32, "epochs": 2},
        "run": {"checkpoint_steps": 7},
    }
    config = plain_config(**changes)

    def kill(progress):
        if progress.step >= 24:
            raise Stop

    whole = ep3stream.fit(store, tmp_path / "whole", config)
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "killed", config, observe=kill)
    ep3stream.fit(store, tmp_path / "killed", config)
    for file in (whole / "model").iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / "model" / file.name).read_bytes()
    assert ep3stream.evaluate(whole, store)["r2"] > 0.8


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "projection", ["nystrom", *(pytest.param(p, marks=pytest.mark.slow) for p in ("exact", "eigenpro"))]
)
def test_two_devices_give_the_weights_of_one(projection, tmp_path):
    store = make_store(tmp_path / "smooth.zarr", n_rows=700)
    tail = 16 if projection == "nystrom" else "none"
    config = plain_config(solver=SMALL | {"projection": projection, "tail": tail, "epochs": 1})
    alone, both = (ep3stream.fit(store, tmp_path / str(n), config, devices=n) for n in (1, 2))
    expected, found = (ep3stream.load(run).weights for run in (alone, both))
    assert float((found - expected).norm() / expected.norm()) < 1e-4
