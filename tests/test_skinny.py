"""Products of a few vectors with a matrix by compiled loops: against float64, and the same on any number of threads."""

from __future__ import annotations

import time

import pytest
import torch

from ep3stream.solver.blocks import BatchBlock, kernel_times, times_kernel
from ep3stream.solver.columns import ColumnKernel
from ep3stream.solver.skinny import are_few, few_times_transposed, plus_few_times
from ep3stream.threads import in_threads

# Of vectors, rows and columns: one and many, not multiples of what is taken at once, more than a stretch.
SHAPES = [(1, 1, 1), (1, 3, 65), (2, 5, 1030), (4, 64, 1024), (5, 7, 2049), (8, 300, 500), (16, 6, 100)]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("k", "n", "m"), SHAPES)
def test_products_agree_with_float64(k, n, m, threads):
    few, onto, matrix = random(k, n), random(k, m), random(n, m)
    expected = onto.double() - 0.5 * few.double() @ matrix.double()
    found = plus_few_times(onto.clone(), few, matrix, -0.5, by_loops=True)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6 * n**0.5)
    turned = few_times_transposed(onto, matrix, by_loops=True)
    torch.testing.assert_close(turned.double(), onto.double() @ matrix.double().T, rtol=0, atol=3e-6 * m**0.5)


def test_the_loops_are_used_where_they_are_said_to_be(monkeypatch):
    few, matrix = random(4, 20), random(30, 20)
    by_torch = few_times_transposed(few, matrix, by_loops=False)
    assert torch.equal(by_torch, few @ matrix.T)
    assert are_few(few)
    assert not are_few(random(17, 20))
    assert not are_few(few.double())
    monkeypatch.setattr(torch.Tensor, "__matmul__", None)
    torch.testing.assert_close(few_times_transposed(few, matrix, by_loops=True), by_torch)


@pytest.mark.parametrize(
    "as_view", [lambda few: few.T.contiguous().T, lambda few: torch.cat([few, few])[: len(few)]]
)
def test_vectors_may_be_views_and_the_other_operands_do_not_change(as_view, threads):
    few, onto, matrix = random(4, 200), random(4, 300), random(200, 300)
    kept = onto.clone()
    plain = plus_few_times(onto, few, matrix, 1, by_loops=True)
    assert torch.equal(plus_few_times(as_view(onto), as_view(few), matrix, 1, by_loops=True), plain)
    assert torch.equal(onto, kept)
    turned = few_times_transposed(onto, matrix, by_loops=True)
    assert torch.equal(few_times_transposed(as_view(onto), matrix, by_loops=True), turned)


def test_nan_and_infinity_stay_with_their_values(threads):
    few, matrix = random(4, 64), random(64, 2100)
    matrix[3, 5] = torch.nan
    found = plus_few_times(torch.zeros(4, 2100), few, matrix, 1, by_loops=True)
    assert found.isnan().nonzero()[:, 1].unique().tolist() == [5]
    turned = few_times_transposed(random(4, 2100), matrix, by_loops=True)
    assert turned.isnan().nonzero()[:, 1].unique().tolist() == [3]


def points(kernel: ColumnKernel, n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, len(kernel.weights), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["product", "anova"])
@pytest.mark.parametrize(("p", "m"), [(0, 64), (1, 64), (255, 100), (700, 333), (70 * 256, 64)])
def test_products_with_blocks_of_columns_agree_and_form_the_same_block(name, p, m, threads):
    """70 strips: more than there are sums of parts, so that a part has two."""
    kernel = ColumnKernel.of(name, torch.tensor([[1.0, 0.5, 2.0], [0, 0, 0], [1, 1, 0.5]]))
    left, right = kernel.left(points(kernel, p, 0)), kernel.right(points(kernel, m, 1))
    few, residual = random(4, p), random(4, m)
    whole = kernel.block(left, right)
    batch = BatchBlock(kernel, left, right, torch.empty(p * m))
    found = batch.left_times(few)
    assert torch.equal(batch.whole(), whole)
    torch.testing.assert_close(found.double(), few.double() @ whole.double(), rtol=0, atol=3e-6 * p**0.5)
    torch.testing.assert_close(times_kernel(kernel, few, left, right), found, rtol=0, atol=0)
    turned = batch.times(residual)
    torch.testing.assert_close(turned.double(), residual.double() @ whole.double().T, rtol=0, atol=1e-4)
    torch.testing.assert_close(kernel_times(kernel, left, right, residual.T).T, turned, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["product", "anova"])
def test_the_number_of_threads_does_not_change_a_bit(name):
    kernel = ColumnKernel.of(name, torch.tensor([[1.0, 0.5, 2.0], [0, 0, 0], [1, 1, 0.5]]))
    left, right = kernel.left(points(kernel, 5000, 0)), kernel.right(points(kernel, 700, 1))
    few, onto = random(5, 5000), random(5, 700)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            block = BatchBlock(kernel, left, right, torch.empty(5000 * 700))
            first = block.left_times(few)
            found.append(
                (first, block.times(first), plus_few_times(onto, few, block.whole(), 2, by_loops=True))
            )
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_an_error_in_one_thread_waits_for_the_others_and_is_raised():
    done = []

    def work(items: slice) -> None:
        if items.start == 0:
            raise ValueError("mine")
        time.sleep(0.2)
        done.append(items)

    with pytest.raises(ValueError, match="mine"):
        in_threads(work, 3, 3)
    assert done == [slice(1, 2), slice(2, 3)] or done == [slice(2, 3), slice(1, 2)]

    def fails_elsewhere(items: slice) -> None:
        if items.start > 0:
            raise ValueError("theirs")

    with pytest.raises(ValueError, match="theirs"):
        in_threads(fails_elsewhere, 2, 2)


def test_items_are_covered_once_whatever_their_number():
    for n_items, n_threads in [(0, 3), (1, 4), (2, 3), (7, 3), (10, 1)]:
        seen = []
        in_threads(lambda items, seen=seen: seen.extend(range(items.start, items.stop)), n_items, n_threads)
        assert sorted(seen) == list(range(n_items))
