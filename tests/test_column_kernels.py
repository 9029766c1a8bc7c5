"""Kernels on columns: blocks, slopes and the shape of the matrix, against formulas in float64."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import sys

import numpy as np
import pytest
import torch

from ep3stream.errors import ConfigError
from ep3stream.solver import columns
from ep3stream.solver.columns import COLUMN_KERNELS, ColumnKernel
from ep3stream.solver.loops import compiled_loops
from ep3stream.solver.points import Points

POWERS = (0.5, 1.0, 1.5, 2.0)
LOOPS = "ep3stream.solver.compiled_columns"


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def loops(request, monkeypatch):
    """All that is said of blocks is said of compiled loops, and of torch where Numba cannot be imported."""
    if request.param == "torch":
        monkeypatch.setitem(sys.modules, LOOPS, None)
    compiled_loops.cache_clear()
    yield request.param
    compiled_loops.cache_clear()


def kernel_of(
    name: str, d: int, power: float, *, categories: tuple[int, ...] = (), seed: int = 0
) -> ColumnKernel:
    random = torch.Generator().manual_seed(seed)
    metric = 2 * torch.rand(3, d, generator=random) / d
    metric[1] = 0
    metric[1, list(categories)] = 1
    metric[2] *= d
    return ColumnKernel.of(name, metric, power)


def rows_of(n: int, kernel: ColumnKernel, seed: int = 1) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    d = len(kernel.weights)
    x = torch.randn(n, d, generator=random, dtype=torch.float64)
    codes = torch.randint(0, 4, (n, d), generator=random).double()
    return torch.where(kernel.is_category, codes, x)


def oracle(kernel: ColumnKernel, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The formula of the class, column by column, in float64."""
    found = torch.ones(len(z), len(x), dtype=torch.float64)
    for j, (weight, share) in enumerate(zip(kernel.weights.double(), kernel.shares.double(), strict=True)):
        a, b = z[:, j, None].double(), x[:, j].double()
        if kernel.is_category[j]:
            factor = torch.where(a == b, 1.0, torch.exp(-weight))
        else:
            factor = torch.exp(-((weight * (a - b).abs()) ** kernel.power))
        found *= factor if kernel.name == "product" else (1 + share * factor) / (1 + share)
    return found


def block(kernel: ColumnKernel, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return kernel.block(kernel.left(z), kernel.right(x))


SETTINGS = list(itertools.product(COLUMN_KERNELS, POWERS))


@pytest.mark.parametrize(("name", "power"), SETTINGS)
@pytest.mark.parametrize(
    ("d", "categories"), [(1, ()), (1, (0,)), (7, (0, 3)), (25, (23, 24)), (300, (5, 299))]
)
def test_blocks_are_the_formula(name, power, d, categories):
    kernel = kernel_of(name, d, power, categories=categories)
    z, x = rows_of(37, kernel), rows_of(53, kernel, seed=2)
    expected = oracle(kernel, z, x)
    torch.testing.assert_close(block(kernel, z, x), expected, rtol=2e-5, atol=1e-12)
    torch.testing.assert_close(block(kernel, z.float(), x.float()).double(), expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", COLUMN_KERNELS)
def test_columns_without_weight_or_share_have_no_say(name):
    kernel = kernel_of(name, 5, 1.0, categories=(4,))
    kernel.weights[1], kernel.weights[4] = 0, 0
    if name == "anova":
        kernel.shares[2] = 0
    z, x = rows_of(20, kernel), rows_of(30, kernel, seed=2)
    assert len(kernel.used) == (2 if name == "anova" else 3)
    assert kernel.left(x).prepared.shape == (30, len(kernel.used))
    torch.testing.assert_close(block(kernel, z, x), oracle(kernel, z, x), rtol=2e-5, atol=1e-12)
    moved = x.clone()
    moved[:, 1] = 1e6
    assert torch.equal(block(kernel, z, moved), block(kernel, z, x))


@pytest.mark.parametrize("name", COLUMN_KERNELS)
def test_a_kernel_of_no_column_is_one(name):
    kernel = ColumnKernel.of(name, torch.zeros(3, 4))
    assert torch.equal(block(kernel, torch.randn(3, 4), torch.randn(5, 4)), torch.ones(3, 5))


@pytest.mark.parametrize(("name", "power"), SETTINGS)
def test_a_row_is_like_itself(name, power, loops):
    kernel = kernel_of(name, 40, power, categories=(0, 1))
    x = rows_of(64, kernel).float() * 100
    diagonal = block(kernel, x, x).diagonal()
    if loops == "compiled" and power in (1, 2):
        assert torch.equal(diagonal, torch.ones(64))
    torch.testing.assert_close(diagonal, torch.ones(64), rtol=0, atol=2e-6)
    assert torch.equal(kernel.diagonal(x), torch.ones(64))


@pytest.mark.parametrize(("name", "power"), SETTINGS)
def test_the_matrix_is_symmetric_and_positive_semidefinite(name, power, loops):
    kernel = kernel_of(name, 4, power, categories=(1, 3))
    x = rows_of(200, kernel)
    x[100:140] = x[:40]  # Rows that come twice make it singular.
    matrix = block(kernel, x, x)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=0)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-10
    single = block(kernel, x.float(), x.float())
    if loops == "compiled" and power in (1, 2):
        assert torch.equal(single, single.T)
    torch.testing.assert_close(single, single.T, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", COLUMN_KERNELS)
def test_many_anova_columns_of_large_shares_neither_overflow_nor_lose_digits(name):
    metric = torch.stack([torch.full((200,), 0.01), torch.zeros(200), torch.full((200,), 1e4)])
    kernel = ColumnKernel.of(name, metric)
    z, x = rows_of(10, kernel), rows_of(12, kernel, seed=2)
    torch.testing.assert_close(
        block(kernel, z.float(), x.float()).double(), oracle(kernel, z, x), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("name", COLUMN_KERNELS)
@pytest.mark.parametrize(("a", "b"), [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_blocks_of_no_rows(name, a, b):
    kernel = kernel_of(name, 3, 1.0)
    assert block(kernel, torch.zeros(a, 3), torch.zeros(b, 3)).shape == (a, b)


@pytest.mark.parametrize("name", COLUMN_KERNELS)
def test_strips_change_no_bit(name, monkeypatch):
    kernel = kernel_of(name, 6, 1.0, categories=(2,))
    # Of whole vectors: torch computes what is left of a strip otherwise, to the last bit.
    z, x = rows_of(90, kernel).float(), rows_of(64, kernel, seed=2).float()
    whole = block(kernel, z, x)
    for entries in (1, 1000):
        monkeypatch.setattr(columns, "_STRIP_ENTRIES", entries)
        assert torch.equal(block(kernel, z, x), whole)
    left, right = kernel.left(z), kernel.right(x)
    assert torch.equal(kernel.block(left[10:33], right), whole[10:33])
    out = torch.empty(23, 64)
    assert kernel.block(left[10:33], right, out=out) is out
    assert torch.equal(out, whole[10:33])


@pytest.mark.parametrize(("name", "power"), SETTINGS)
def test_slopes_are_finite_differences(name, power):
    kernel = kernel_of(name, 6, power, categories=(1, 4))
    kernel.weights[3] = 0
    z, x = rows_of(30, kernel), rows_of(40, kernel, seed=2)
    sensitivity = torch.randn(30, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = torch.stack(kernel.slopes(z, x, sensitivity * block(kernel, z, x)))
    step = 1e-3
    for row, field in ((0, "weights"), (1, "shares")):
        for j in range(6):
            values = []
            for sign in (1, -1):
                moved = getattr(kernel, field).double().clone()
                moved[j] *= float(np.exp(sign * step))
                # The oracle takes float64 weights, which the kernel's own float32 could not tell apart.
                changed = ColumnKernel(
                    name,
                    moved if field == "weights" else kernel.weights,
                    kernel.is_category,
                    moved if field == "shares" else kernel.shares,
                    power,
                )
                values.append(float((oracle(changed, z, x) * sensitivity).sum()))
            assert float(found[row, j]) == pytest.approx(
                (values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-6
            )


def test_slopes_do_not_depend_on_strips(monkeypatch):
    kernel = kernel_of("anova", 5, 1.0)
    z, x = rows_of(30, kernel), rows_of(40, kernel, seed=2)
    weighted = block(kernel, z, x)
    whole = kernel.slopes(z, x, weighted)
    monkeypatch.setattr(columns, "_STRIP_ENTRIES", 50)
    for mine, theirs in zip(kernel.slopes(z, x, weighted), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", COLUMN_KERNELS)
@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("categories", [(), (1, 4), (0, 1, 2, 3, 4)])
def test_slopes_in_float32_are_those_in_float64_with_any_number_of_threads(name, power, categories, threads):
    kernel = kernel_of(name, 5, power, categories=categories)
    kernel.weights[3] = 0
    z, x = (
        rows_of(603, kernel),
        rows_of(331, kernel, seed=2),
    )  # Loops take strips of 256 rows, and four at a time.
    weighted = torch.randn(603, 331, generator=torch.Generator().manual_seed(3)) * block(kernel, z, x)
    expected = kernel.slopes(z, x, weighted)
    threads(1)
    found = kernel.slopes(z.float(), x.float(), weighted.float())
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-2)
    threads(2)
    if name == "product":  # torch.sum of the whole depends on the number of threads.
        again = kernel.slopes(z.float(), x.float(), weighted.float())
        torch.testing.assert_close(torch.stack(again), torch.stack(found), rtol=1e-5, atol=1e-4)


def test_a_category_that_was_never_seen_differs_from_all():
    kernel = kernel_of("product", 2, 1.0, categories=(1,))
    z = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    unseen = torch.tensor([[0.0, -1.0]])
    torch.testing.assert_close(block(kernel, z, unseen), torch.exp(-kernel.weights[1]).expand(2, 1))


def test_the_metric_holds_all_but_name_and_power():
    kernel = kernel_of("anova", 5, 1.5, categories=(2,))
    again = ColumnKernel.of("anova", kernel.metric, **kernel.parameters)
    assert torch.equal(again.metric, kernel.metric)
    x = rows_of(9, kernel)
    assert torch.equal(block(again, x, x), block(kernel, x, x))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [((0, 1), -1.0, "weights"), ((0, 1), float("nan"), "weights"), ((2, 0), float("inf"), "shares")],
)
def test_numbers_that_make_no_kernel_are_refused(place, value, words):
    metric = torch.ones(3, 4)
    metric[place] = value
    with pytest.raises(ConfigError, match=f"{words} of the product kernel must be finite"):
        ColumnKernel.of("product", metric)


@pytest.mark.parametrize("power", [0.0, -1.0, 2.5, float("nan")])
def test_powers_that_make_no_kernel_are_refused(power):
    with pytest.raises(ConfigError, match="takes one in"):
        ColumnKernel.of("product", torch.ones(3, 4), power)


def test_points_are_prepared_once_for_both_sides():
    kernel = kernel_of("product", 4, 2.0)
    x = rows_of(8, kernel)
    assert isinstance(kernel.left(x), Points)
    assert torch.equal(kernel.left(x).prepared, kernel.right(x).prepared)


@pytest.fixture
def threads(request):
    """torch's number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def large(name: str) -> tuple[ColumnKernel, torch.Tensor, torch.Tensor]:
    """A kernel, and rows of a block that several threads form."""
    kernel = kernel_of(name, 9, 1.0, categories=(2,))
    return kernel, rows_of(700, kernel).float(), rows_of(1000, kernel, seed=2).float()


@pytest.mark.parametrize("name", COLUMN_KERNELS)
def test_neither_threads_nor_the_place_in_a_block_change_a_bit(name, threads, loops):
    if loops == "torch":
        return  # It computes what is left of a vector otherwise, to the last bit.
    kernel, z, x = large(name)
    threads(1)
    whole = block(kernel, z, x)
    for n_threads in (2, 3):
        threads(n_threads)
        assert torch.equal(block(kernel, z, x), whole)
    assert torch.equal(block(kernel, z[3:700:7], x[5:900:13]), whole[3:700:7, 5:900:13])
    assert torch.equal(block(kernel, x, z), whole.T)
    assert torch.equal(block(kernel, z, x[:3]), whole[:, :3])


def _forked(pipe, kernel, left, right):
    pipe.send(kernel.block(left, right).numpy().tobytes())


def test_a_forked_process_has_threads_of_its_own(threads, loops):
    if loops == "torch":
        return  # Its threads hang in a forked process, so that the points below are prepared before.
    threads(2)
    kernel, z, x = large("product")
    left, right = kernel.left(z), kernel.right(x)
    expected = kernel.block(left, right).numpy().tobytes()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_forked, args=(sender, kernel, left, right), daemon=True)
    child.start()
    try:
        assert receiver.poll(60), "the forked process waits for threads of its parent"
        assert receiver.recv() == expected
    finally:
        child.kill()


@pytest.mark.parametrize("name", COLUMN_KERNELS)
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_far_rows_share_nothing_and_no_value_is_too_small_to_be_normal(name, power, loops):
    metric = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    kernel = ColumnKernel.of(name, metric, power)
    x = torch.linspace(0, 200, 2001)[:, None].repeat(1, 3).round(decimals=1)
    x = torch.cat([x, torch.tensor([[1e30, -1e30, 5.0], [3e38, -3e38, 0.0]])])
    found = block(kernel, x, x)
    assert bool(found.isfinite().all())
    assert float(found.max()) == 1
    if name == "product":
        assert int((found == 0).sum()) > 0
    if name == "product" and loops == "compiled":
        assert float(found[found > 0].min()) >= torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("name", COLUMN_KERNELS)
@pytest.mark.parametrize("column", [0, 1])
def test_a_value_that_is_nan_is_not_hidden(name, column):
    kernel = kernel_of(name, 5, 1.0)
    x = rows_of(150, kernel).float()
    x[140, column] = float("nan")
    found = block(kernel, x, x).isnan()
    assert bool(found[140].all())
    assert bool(found[:, 140].all())
    assert int(found.sum()) == 2 * 150 - 1


def test_blocks_may_be_views():
    kernel = kernel_of("anova", 5, 1.0, categories=(1,))
    x = rows_of(40, kernel).float()
    whole, memory = block(kernel, x, x), torch.zeros(40, 100)
    kernel.block(kernel.left(x), kernel.right(x), out=memory[:, 30:70])
    torch.testing.assert_close(memory[:, 30:70], whole, rtol=1e-6, atol=1e-7)
    assert float(memory[:, :30].abs().sum() + memory[:, 70:].abs().sum()) == 0


def test_without_numba_torch_serves_and_this_is_told_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, LOOPS, None)
    compiled_loops.cache_clear()
    kernel = kernel_of("product", 3, 1.0)
    x = rows_of(5, kernel).float()
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(block(kernel, x, x).double(), oracle(kernel, x, x), rtol=2e-4, atol=2e-6)
        block(kernel, x, x)
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "kernels on columns take several times as long"
    ]
