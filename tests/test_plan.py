"""The sizes of a fit, and what a plan that does not fit the memory says."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep3stream.config import RunConfig, SolverConfig, parse_bytes
from ep3stream.errors import ConfigError
from ep3stream.mesh import Mesh
from ep3stream.training import plan as machine
from ep3stream.training.plan import (
    ProblemSize,
    SizePlan,
    automatic_centers,
    memory_budget,
    on_device,
    require_machine,
)

SHAPE = ProblemSize(1_000_000, 20, 1, 4096, 84, True)
MB = 10**6


def test_a_plan_stays_within_its_memory_and_says_what_takes_it():
    plan = SizePlan.of(SHAPE, SolverConfig(), 5000, 1000 * MB)
    assert sum(plan.memory.values()) <= 1000 * MB
    assert plan.memory["Nystrom basis"] == 4 * 5000 * plan.model_rank
    assert all(n_bytes > 0 for n_bytes in plan.memory.values())
    assert plan.max_batch_size == 4096


def test_validations_cost_one_more_copy_of_the_weights():
    shapes = (SHAPE, replace(SHAPE, is_validated=True))
    plain, validated = (SizePlan.of(shape, SolverConfig(), 5000, 1000 * MB).memory for shape in shapes)
    assert validated == {**plain, "weights of the best model": 4 * 5000}


def test_the_largest_batch_is_the_one_that_still_fits():
    tight = SizePlan.of(SHAPE, SolverConfig(), 50_000, 500 * MB)
    row = tight.memory["kernel block and batches"] // tight.max_batch_size
    assert 16 <= tight.max_batch_size < 4096
    assert 500 * MB - row < sum(tight.memory.values()) <= 500 * MB


def test_ranks_and_samples_are_clipped_to_a_small_problem():
    plan = SizePlan.of(
        replace(SHAPE, n_rows=50, segment_rows=50), SolverConfig(model_rank=500), 10, 1000 * MB
    )
    assert (plan.model_rank, plan.n_landmarks, plan.nystrom_samples, plan.max_batch_size) == (10, 10, 50, 50)
    assert plan.data_rank == 10


def test_an_asked_for_batch_is_taken_or_refused_but_never_shrunk():
    assert SizePlan.of(SHAPE, SolverConfig(batch_size=100), 5000, 1000 * MB).max_batch_size == 100
    with pytest.raises(ConfigError, match="5000 centers with batches of 100000 take"):
        SizePlan.of(SHAPE, SolverConfig(batch_size=100_000), 5000, 1000 * MB)
    with pytest.raises(
        ConfigError, match=r"batch_size is 2000000 but there are only 1000000 rows .* at most 1000000"
    ):
        SizePlan.of(SHAPE, SolverConfig(batch_size=2_000_000), 5000, 1000 * MB)


def remedies(error: ConfigError) -> tuple[int, int | None]:
    memory = re.search(r"give --memory (\w+) or more", str(error))
    centers = re.search(r"at most (\d+) centers", str(error))
    assert memory is not None
    return parse_bytes(memory[1]), int(centers[1]) if centers else None


@pytest.mark.parametrize("projection", ["nystrom", "exact", "eigenpro"])
@pytest.mark.parametrize("is_shuffled", [True, False])
@settings(max_examples=40)
@given(
    n_centers=st.integers(2_000, 200_000),
    n_features=st.integers(1, 2000),
    memory=st.integers(1, 2000),
    batch_size=st.sampled_from([0, 1, 500]),
)
def test_the_memory_and_the_centers_that_an_error_names_do_fit(
    projection, is_shuffled, n_centers, n_features, memory, batch_size
):
    shape = replace(SHAPE, n_features=n_features, row_bytes=4 * n_features + 4, is_shuffled=is_shuffled)
    config = SolverConfig(projection=projection, batch_size=batch_size)
    try:
        SizePlan.of(shape, config, n_centers, memory * MB)
    except ConfigError as error:
        enough, fewer = remedies(error)
        SizePlan.of(shape, config, n_centers, enough)
        if fewer is not None:
            SizePlan.of(shape, config, fewer, memory * MB)
        with pytest.raises(ConfigError):
            SizePlan.of(shape, config, (fewer or 0) + 1, memory * MB)


def test_a_memory_error_names_what_there_is_what_is_needed_and_by_what():
    with pytest.raises(ConfigError) as raised:
        SizePlan.of(SHAPE, SolverConfig(), 1_000_000, 1000 * MB)
    message = str(raised.value)
    assert message.startswith("memory is 1000.0 MB but 1000000 centers with batches of 16 take")
    assert "Nystrom basis 1000.0 MB" in message


def test_memory_that_holds_no_center_at_all_suggests_none():
    with pytest.raises(ConfigError) as raised:
        SizePlan.of(SHAPE, SolverConfig(), 1000, 1)
    assert remedies(raised.value)[1] is None


@pytest.mark.parametrize(("n_rows", "n_centers"), [(1, 1), (10, 2), (1000, 200), (10**9, 5000)])
def test_automatic_centers_leave_most_rows_to_train_on(n_rows, n_centers):
    assert automatic_centers(replace(SHAPE, n_rows=n_rows)) == n_centers


def test_a_wider_basis_has_an_eighth_of_the_memory_left_over_and_none_where_the_rank_is_given():
    roomy, tight = (SizePlan.of(SHAPE, SolverConfig(), 5000, memory * MB) for memory in (4000, 400))
    assert roomy.widest_rank == 1500
    assert roomy.memory["room for a wider basis"] <= 4000 * MB / 8
    assert 500 <= tight.widest_rank < 1500
    assert SizePlan.of(SHAPE, SolverConfig(model_rank=300), 5000, 4000 * MB).widest_rank == 300
    assert SizePlan.of(SHAPE, SolverConfig(projection="exact"), 5000, 4000 * MB).widest_rank == 500


def test_whole_epochs_have_more_landmarks_in_an_eighth_of_the_memory_left_over():
    part, whole = SolverConfig(epochs=0.5), SolverConfig()
    roomy, tight = (SizePlan.of(SHAPE, whole, 5000, memory * MB) for memory in (4000, 350))
    assert (roomy.n_landmarks, tight.n_landmarks) == (3000, 2000)
    assert roomy.memory["set-up with more landmarks"] == 4 * 3000**2
    assert "set-up with more landmarks" not in tight.memory
    assert SizePlan.of(SHAPE, part, 5000, 4000 * MB).n_landmarks == 2000
    assert SizePlan.of(SHAPE, replace(whole, model_rank=300), 5000, 4000 * MB).n_landmarks == 2000
    assert SizePlan.of(SHAPE, replace(whole, nystrom_samples=1000), 5000, 4000 * MB).n_landmarks == 1000
    assert SizePlan.of(SHAPE, whole, 2500, 4000 * MB).n_landmarks == 2500
    assert SizePlan.of(replace(SHAPE, of_columns=True), whole, 5000, 4000 * MB).n_landmarks == 2000


def test_on_a_gpu_the_default_memory_is_four_fifths_of_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * 10**9, 80 * 10**9))
    gpu, cpu = (Mesh(0, 1, torch.device(kind)) for kind in ("cuda", "cpu"))
    assert memory_budget(RunConfig().memory_bytes, gpu) == 56 * 10**9
    assert memory_budget(10**9, gpu) == 10**9
    assert memory_budget(RunConfig().memory_bytes, cpu) == RunConfig().memory_bytes


ON_GPU = replace(SHAPE, n_rows=10**8, is_shuffled=False, host_bytes=1000 * MB)


@pytest.mark.parametrize("gpu_bytes", [10**9, 10**12])
def test_rows_read_ahead_are_bounded_by_the_host_of_a_gpu_and_not_by_the_gpu(gpu_bytes):
    plan = SizePlan.of(ON_GPU, SolverConfig(), 5000, gpu_bytes)
    two_windows = 2 * plan.window_segments * 4096 * 84
    assert 0.9 * 1000 * MB < two_windows + 3 * plan.max_batch_size * 84 <= 1000 * MB
    assert "read-ahead" not in plan.memory
    on_cpu = SizePlan.of(replace(ON_GPU, host_bytes=None), SolverConfig(), 5000, 10**9)
    assert on_cpu.memory["read-ahead"] == 2 * on_cpu.window_segments * 4096 * 84 <= 10**9 / 4
    shuffled = SizePlan.of(replace(ON_GPU, is_shuffled=True), SolverConfig(), 5000, gpu_bytes)
    assert 2 * shuffled.window_segments * 4096 * 84 <= 40 * 2**20


def test_a_budget_of_the_host_bounds_the_batch_and_an_error_names_one_that_is_enough():
    wide = replace(ON_GPU, n_features=20_000, row_bytes=40_004, host_bytes=2 * 4096 * 40_004 + 10**7)
    assert SizePlan.of(wide, SolverConfig(), 5000, 10**12).max_batch_size == 10**7 // (3 * 120_004)
    with pytest.raises(
        ConfigError, match=r"host_memory is 3\d\d\.\d MB but two windows of 1 segments"
    ) as raised:
        SizePlan.of(wide, SolverConfig(batch_size=500), 5000, 10**12)
    enough = re.search(r"give --host-memory (\w+) or more", str(raised.value))
    again = replace(wide, host_bytes=parse_bytes(enough[1]))
    assert SizePlan.of(again, SolverConfig(batch_size=500), 5000, 10**12).max_batch_size == 500


def test_a_host_with_less_memory_than_rows_read_ahead_take_is_told(monkeypatch):
    plan = SizePlan.of(ON_GPU, SolverConfig(), 5000, 10**12)
    gpu = torch.device("cuda")
    monkeypatch.setattr(machine, "machine_bytes", lambda device: 10**13 if device == gpu else 800 * MB)
    with pytest.raises(ConfigError, match=r"host has only 800\.0 MB; give --host-memory 400MB"):
        require_machine(ON_GPU, SolverConfig(), plan, gpu)
    less = replace(ON_GPU, host_bytes=400 * MB)
    require_machine(less, SolverConfig(), SizePlan.of(less, SolverConfig(), 5000, 10**12), gpu)


def test_the_host_has_a_budget_of_its_own_with_a_gpu_only(monkeypatch):
    monkeypatch.setattr(machine, "gpu_tile_bytes", lambda device: 7 * MB)
    run = RunConfig(host_memory_bytes=5 * MB)
    on_gpu = on_device(SHAPE, run, torch.device("cuda"))
    assert (on_gpu.host_bytes, on_gpu.tile_bytes) == (5 * MB, 7 * MB)
    assert on_device(SHAPE, run, torch.device("cpu")) == SHAPE


def test_on_a_gpu_centers_count_as_its_products_take_them():
    """784 features and the norms after each 46 of them; in bfloat16 a copy, in bf16x3 one of three times the width."""
    wide = replace(SHAPE, n_features=784, host_bytes=1000 * MB, tile_bytes=MB)
    width = 784 + 2 * 17 + 6
    bytes_of = {"float32": 4 * 824, "tf32": 4 * width, "bfloat16": 6 * width, "bf16x3": 10 * 824}
    for precision, of_a_center in bytes_of.items():
        plan = SizePlan.of(wide, SolverConfig(precision=precision), 100_000, 10**11)
        assert plan.memory["centers"] == 100_000 * of_a_center
    on_cpu = SizePlan.of(replace(wide, host_bytes=None, tile_bytes=0), SolverConfig(), 100_000, 10**11)
    assert on_cpu.memory["centers"] == 4 * 100_000 * (784 + 786)
