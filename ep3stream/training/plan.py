"""The sizes of a fit, from the settings, the data and the memory budget of each device.

What memory a device has, and whether a plan is more than that.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ep3stream.config import MIB, RunConfig, SolverConfig
from ep3stream.errors import ConfigError
from ep3stream.mesh import Mesh
from ep3stream.solver.eigenpro import EigenProProjection
from ep3stream.solver.exact import ExactProjection
from ep3stream.solver.gpu import MAX_FEATURES, factor_width
from ep3stream.solver.tail import LocalTail
from ep3stream.solver.tiles import gpu_tile_bytes
from ep3stream.training.precision import compared_bytes

WIDER_BASIS, BATCHES = "room for a wider basis", "kernel block and batches"
MORE_LANDMARKS = "set-up with more landmarks"
LOCAL_TAIL = "local tail"
_AUTO_CENTERS = 5000
# With a local tail for the rest, and without one.
MODEL_RANK, _RANK_ALONE = 250, 500
# Of kernels on columns, whose blocks cost so little that most of a step would be passes over a basis of 500. Measured
# with 12,500 and 20,000 centers: the same accuracy on land or ocean, R2 lower by .0003 and .0015 on births and flights,
# in a half to four fifths of the time, which more centers use better.
COLUMNS_MODEL_RANK = 200
# Of parts of an epoch, and of epochs. Fashion-MNIST with 5000 centers: the mse is .4% lower after one epoch and .2%
# after three with the larger number, which costs as much as a tenth of an epoch.
_AUTO_LANDMARKS, _MOST_LANDMARKS = 2000, 3000
_AUTO_SAMPLES = 3000
_LEAST_AUTO_SAMPLES = 1000
_WIDEST_RANK = 1500
_WIDEST_SHARE = 8  # of the memory left over
_AUTO_GROUPS = (256, 128)
_TAIL_SHARE = 4  # of the memory left over
_PUBLISHED_SAMPLES = 2000
_ROWS_PER_SAMPLE = 16
_SAMPLES_PER_PAIR = 10
_MAX_BATCH = 4096
_MIN_BATCH = 16
_STREAM_BYTES = 40 * MIB
_FLOAT = 4

# The most work tensors of the size of a tile that a set-up on a GPU has at once.
_GPU_TILES = 8

# Far beyond any model, for the search of the largest that fits.
_MOST_CENTERS = 1 << 40


@dataclass(frozen=True, slots=True)
class ProblemSize:
    """The size of a problem: n rows, d features, c outputs; rows of a segment, bytes of a row.

    is_shuffled: whether neighbouring rows are independent, so that mixing few segments is enough. n_held: how many of
    the rows are held out for validation, so that centers and rows to train on are taken from the others.
    is_validated: whether the fit keeps its best model by validations. n_expanded: how many features more the points of
    the kernel have, where codes of categories become 0/1 features. of_columns: whether the kernel is one on columns.
    Of GPUs, see `on_device`, host_bytes: what rows read ahead may take of the host's memory; None where the device is
    the host. tile_bytes: of a part of a matrix that is worked on at once (`solver/tiles.py`). ridge_factors: R
    multiples of the ridge that are fitted side by side, of which validations choose.
    """

    n_rows: int
    n_features: int
    n_outputs: int
    segment_rows: int
    row_bytes: int
    is_shuffled: bool
    n_held: int = 0
    is_validated: bool = False
    n_expanded: int = 0
    of_columns: bool = False
    host_bytes: int | None = None
    tile_bytes: int = 0
    ridge_factors: tuple[float, ...] = (1.0,)

    @property
    def n_columns(self) -> int:
        """R c, the number of columns of weights."""
        return len(self.ridge_factors) * self.n_outputs

    @property
    def n_left(self) -> int:
        """The number of rows that are not held out."""
        return self.n_rows - self.n_held

    @property
    def n_inputs(self) -> int:
        """D, the number of features of a point."""
        return self.n_features + self.n_expanded


@dataclass(frozen=True, slots=True)
class SizePlan:
    """The sizes that are fixed before the set-up.

    memory: bytes of the fit's arrays on each device, by item. max_batch_size: the largest batch whose kernel block
    fits; the set-up chooses the batch up to it. widest_rank: the largest model rank that the set-up may raise
    model_rank to, where eigenvalues fall fast. group_size: the centers of a group of the local tail, 0 for no tail.
    """

    n_centers: int
    model_rank: int
    widest_rank: int
    data_rank: int
    n_landmarks: int
    nystrom_samples: int
    window_segments: int
    max_batch_size: int
    memory: Mapping[str, int]
    group_size: int = 0

    @classmethod
    def of(
        cls, shape: ProblemSize, config: SolverConfig, n_centers: int, memory_bytes: int, devices: int = 1
    ) -> SizePlan:
        """Ranks and samples within the data, the batch within `memory_bytes` on each of the devices.

        Raises ConfigError when the model does not fit the memory, naming the parts and what would fit, when the
        batch has more rows than there are, or when the rows read ahead exceed what they may take of a GPU's host.
        """
        model_rank, data_rank, n_landmarks, samples = _ranks(shape, config, n_centers)
        window = window_segments(shape, memory_bytes)
        memory = _memory(shape, config, n_centers, window, devices)
        row = _batch_row_bytes(shape, n_centers, devices)
        share = -(-n_centers // devices)
        spare = memory_bytes - sum(memory.values()) - _least_batch(shape, config) * row
        if (more := _more_landmarks(shape, config, n_centers, n_landmarks, spare)) > n_landmarks:
            memory[MORE_LANDMARKS] = _more_landmarks_bytes(more)
            n_landmarks, spare = more, spare - memory[MORE_LANDMARKS]
        group_size = _group_size(config, share, n_centers, spare)
        if group_size and LOCAL_TAIL not in memory:
            memory[LOCAL_TAIL] = LocalTail.cost_bytes(share, group_size)
            spare -= memory[LOCAL_TAIL]
        widest = _widest_rank(shape, config, share, model_rank, n_landmarks, spare)
        if widest > model_rank:
            memory[WIDER_BASIS] = _wider_bytes(share, model_rank, widest)
        if config.batch_size > shape.n_left:
            raise ConfigError(
                f"batch_size is {config.batch_size} but there are only {shape.n_left} rows to train on; "
                f"use at most {shape.n_left}, or 0 to have it chosen"
            )
        host_rows = _require_host_rows(shape, window, _least_batch(shape, config))
        batch = config.batch_size or min(host_rows, (memory_bytes - sum(memory.values())) // row)
        if batch < _least_batch(shape, config) or sum(memory.values()) + batch * row > memory_bytes:
            raise ConfigError(_too_large(shape, config, n_centers, memory_bytes, memory, devices))
        memory[BATCHES] = batch * row
        return cls(
            n_centers, model_rank, widest, data_rank, n_landmarks, samples, window, batch, memory, group_size
        )


def largest_model(shape: ProblemSize, config: SolverConfig, memory_bytes: int, devices: int = 1) -> int:
    """The largest number of centers that fits the memory of each device; 0 where not even one center fits."""
    window = window_segments(shape, memory_bytes)
    return bisect_right(
        range(_MOST_CENTERS),
        memory_bytes,
        key=lambda fewer: _needed(shape, config, fewer + 1, window, devices),
    )


def automatic_centers(shape: ProblemSize) -> int:
    """The number of centers of `auto`: 5000, but at most a fifth of the rows, since centers are not trained on."""
    return max(1, min(_AUTO_CENTERS, shape.n_left // 5))


def window_segments(shape: ProblemSize, memory_bytes: int) -> int:
    """How many segments one window mixes. Two windows are held in memory.

    Two windows take 40 MiB. Where the store itself is not shuffled they take up to a quarter of the memory, or all that
    rows read ahead may take of a GPU's host and three batches leave.
    """
    most = memory_bytes // 4
    if shape.host_bytes is not None:
        most = shape.host_bytes - _host_batch_bytes(shape, min(_MAX_BATCH, shape.n_left))
    budget = _STREAM_BYTES if shape.is_shuffled else max(_STREAM_BYTES, most)
    segment_bytes = min(shape.segment_rows, shape.n_rows) * shape.row_bytes
    n_segments = -(-shape.n_rows // shape.segment_rows)
    return max(1, min(budget // (2 * segment_bytes), n_segments))


def _host_batch_bytes(shape: ProblemSize, batch_size: int) -> int:
    """Bytes of three batches in a GPU's host: in float32, and as they are stored where that is another type."""
    in_float32 = _FLOAT * shape.n_features
    return 3 * batch_size * (shape.row_bytes + (in_float32 if shape.row_bytes < in_float32 else 0))


def host_bytes(shape: ProblemSize, plan: SizePlan) -> int | None:
    """Bytes of all rows read ahead in a GPU's host; None where the device is the host."""
    if shape.host_bytes is None:
        return None
    return _window_bytes(shape, plan.window_segments) + _host_batch_bytes(shape, plan.max_batch_size)


def _window_bytes(shape: ProblemSize, window: int) -> int:
    """Bytes of the two windows of segments."""
    return 2 * window * min(shape.segment_rows, shape.n_rows) * shape.row_bytes


def _require_host_rows(shape: ProblemSize, window: int, least: int) -> int:
    """The rows of the largest batch that fits what rows read ahead may take; ConfigError for less than `least`."""
    most = min(_MAX_BATCH, shape.n_left)
    if shape.host_bytes is None:
        return most
    needed = _window_bytes(shape, window) + _host_batch_bytes(shape, least)
    if needed > shape.host_bytes:
        raise ConfigError(
            f"host_memory is {shape.host_bytes / 1e6:.1f} MB but two windows of {window} segments and three batches of "
            f"{least} rows take {needed / 1e6:.1f} MB of the host; give --host-memory {-(-needed // 10**6)}MB or more, "
            "or convert with a smaller --segment-bytes"
        )
    return min(most, (shape.host_bytes - _window_bytes(shape, window)) // _host_batch_bytes(shape, 1))


def _ranks(shape: ProblemSize, config: SolverConfig, n_centers: int) -> tuple[int, int, int, int]:
    """Model rank, data rank, landmarks and Nystrom samples."""
    if config.projection == "eigenpro":
        return _published_ranks(shape, config, n_centers)
    # Pairs beyond a quarter of the centers are badly estimated, and shrink mu until the measured step crawls.
    if shape.of_columns:
        usual = COLUMNS_MODEL_RANK
    else:
        has_tail = config.projection == "nystrom" and config.tail != "none" and config.used_step == "measured"
        usual = MODEL_RANK if has_tail else _RANK_ALONE
    model_rank = min(config.model_rank or min(usual, max(1, n_centers // 4)), n_centers)
    # A sample costs about as much as a row trained on: of few rows there are fewer.
    chosen = min(_AUTO_SAMPLES, max(_LEAST_AUTO_SAMPLES, shape.n_left // _ROWS_PER_SAMPLE))
    samples = min(config.nystrom_samples or chosen, shape.n_left)
    landmarks = min(config.nystrom_samples or _AUTO_LANDMARKS, _AUTO_LANDMARKS)
    landmarks = max(landmarks, model_rank + model_rank // 4)
    # As many as there are, for the stages to choose from; the published step knows no stages.
    automatic = model_rank if config.used_step == "measured" else max(1, 2 * model_rank // 5)
    data_rank = min(config.data_rank or automatic, samples - 1, model_rank)
    return model_rank, data_rank, min(n_centers, landmarks), samples


def _more_landmarks(
    shape: ProblemSize, config: SolverConfig, n_centers: int, n_landmarks: int, spare_bytes: int
) -> int:
    """Up to 3000 landmarks for whole epochs, if an eighth of `spare_bytes` holds what they take more.

    As many as before where the rank is given, since the pairs of a high one are found in float64.
    """
    if shape.of_columns or config.model_rank or config.projection != "nystrom" or config.used_epochs < 1:
        return n_landmarks
    if 0 < config.nystrom_samples < _MOST_LANDMARKS:
        return n_landmarks
    more = min(n_centers, _MOST_LANDMARKS)
    return more if _more_landmarks_bytes(more) <= spare_bytes // _WIDEST_SHARE else n_landmarks


def _more_landmarks_bytes(n_landmarks: int) -> int:
    """Bytes of the kernel matrix of all landmarks; those in float64 are of the first ones alone."""
    return _FLOAT * n_landmarks**2


def _group_size(config: SolverConfig, share: int, n_centers: int, spare_bytes: int) -> int:
    """The centers of a group of the local tail: as asked for, or the largest that a quarter of the memory holds."""
    if config.projection != "nystrom" or config.tail == "none":
        return 0
    if config.tail != "auto":
        return min(int(config.tail), n_centers)
    sizes = (min(size, n_centers) for size in _AUTO_GROUPS)
    return next((size for size in sizes if _TAIL_SHARE * LocalTail.cost_bytes(share, size) <= spare_bytes), 0)


def _widest_rank(
    shape: ProblemSize, config: SolverConfig, share: int, model_rank: int, n_landmarks: int, spare_bytes: int
) -> int:
    """The largest rank of a basis: up to 1500 and three quarters of the landmarks; the model rank for columns.

    What the wider basis takes is at most an eighth of `spare_bytes`, the memory that is left over.
    """
    if shape.of_columns or config.model_rank or config.projection != "nystrom":
        return model_rank
    wider = range(model_rank, min(_WIDEST_RANK, 3 * n_landmarks // 4))
    cost = lambda rank: _wider_bytes(share, model_rank, rank + 1)  # noqa: E731
    return model_rank + bisect_right(wider, spare_bytes // _WIDEST_SHARE, key=cost)


def _wider_bytes(share: int, model_rank: int, rank: int) -> int:
    """Bytes that a basis of `rank` takes beyond one of the model rank, with its set-up in float64."""
    return _FLOAT * share * (rank - model_rank) + 6 * 8 * (rank**2 - model_rank**2)


def _published_ranks(shape: ProblemSize, config: SolverConfig, n_centers: int) -> tuple[int, int, int, int]:
    """Model rank, data rank, landmarks and samples of EigenPro3.

    The two preconditioners do not depend on one another: each rank is bounded by its own sample alone.
    """
    samples = min(config.nystrom_samples or _PUBLISHED_SAMPLES, shape.n_left)
    # The authors' 500 of 5000. With more pairs of a sample the published steps are known to diverge.
    published = max(1, samples // _SAMPLES_PER_PAIR)
    model_rank = min(config.model_rank or min(max(1, n_centers // 8), published), n_centers)
    n_landmarks = min(n_centers, max(samples, model_rank + model_rank // 4))
    data_rank = min(config.data_rank or published, samples - 1)
    return model_rank, data_rank, n_landmarks, samples


def _memory(
    shape: ProblemSize, config: SolverConfig, n_centers: int, window: int, devices: int
) -> dict[str, int]:
    """Bytes of a fit's arrays on each device, by item, without the batches; the sum grows with the centers.

    Each device holds its share of the centers, scaled and prepared, and during the set-up, if it is the host, all
    centers unscaled.
    """
    rank, data_rank, landmarks, samples = _ranks(shape, config, n_centers)
    share = -(-n_centers // devices)
    largest = max(landmarks, samples)
    tiles = 2 * _FLOAT * min(1024, share) * largest
    if shape.tile_bytes:
        tiles = _GPU_TILES * min(shape.tile_bytes, _FLOAT * share * max(largest, shape.n_inputs))
        tiles += 2 * _FLOAT * (landmarks + samples) * shape.n_inputs
    if _may_be_bf16x3(shape, config):
        tiles = max(tiles, compared_bytes(_point_bytes(shape, config), share, shape.n_columns))
    set_up = tiles + 3 * 8 * landmarks**2
    unscaled = 0 if shape.tile_bytes else _FLOAT * n_centers * shape.n_features
    parts = {
        "centers": unscaled + share * _point_bytes(shape, config),
        "weights, velocity, average, their last good state": 5 * _FLOAT * share * shape.n_columns,
        "copies of these for a checkpoint": 5 * _FLOAT * share * shape.n_columns,
    }
    if shape.host_bytes is None:
        parts["read-ahead"] = _window_bytes(shape, window)
    if shape.is_validated:
        parts["weights of the best model"] = _FLOAT * share * shape.n_outputs
    if config.projection == "exact":
        cost = ExactProjection.cost_bytes(n_centers) + 2 * 8 * n_centers * samples
        return parts | {"exact projection": cost, "set-up of the preconditioner": tiles + 3 * 8 * samples**2}
    if config.projection == "eigenpro":
        cost = EigenProProjection.cost_bytes(share, shape.n_inputs, landmarks, samples, (data_rank, rank))
        return parts | {"EigenPro projection": cost, "set-up of the preconditioners": set_up}
    parts |= {"Nystrom basis": _FLOAT * share * rank, "set-up of the basis": set_up}
    if config.tail not in ("auto", "none"):
        parts[LOCAL_TAIL] = LocalTail.cost_bytes(share, min(int(config.tail), n_centers))
    return parts


def _point_bytes(shape: ProblemSize, config: SolverConfig) -> int:
    """Bytes of a point prepared for kernel blocks, at most: those of radial kernels."""
    on_gpu = shape.tile_bytes > 0
    precision = config.precision
    if precision == "auto":
        precision = "bf16x3" if _may_be_bf16x3(shape, config) else "float32"
    if precision == "float32" and not on_gpu:
        return _FLOAT * (shape.n_inputs + 2)
    width = factor_width(shape.n_inputs, precision)
    in_half = {"bfloat16": 2, "bf16x3": 3 * 2}.get(precision, 0) if on_gpu else 0
    return width * (_FLOAT + in_half)


def _may_be_bf16x3(shape: ProblemSize, config: SolverConfig) -> bool:
    """Whether the set-up may find that precision (`found_precision`)."""
    may_form_blocks = not shape.of_columns and shape.n_inputs > max(MAX_FEATURES.values())
    return config.precision == "auto" and may_form_blocks and shape.tile_bytes > 0


def _batch_row_bytes(shape: ProblemSize, n_centers: int, devices: int) -> int:
    """Bytes of one row of a batch: three copies in the read-ahead, two prepared ones, and its kernel values."""
    expanded = 2 * _FLOAT * shape.n_expanded
    return _FLOAT * -(-n_centers // devices) + 5 * shape.row_bytes + expanded + 4 * _FLOAT * shape.n_columns


def _least_batch(shape: ProblemSize, config: SolverConfig) -> int:
    return config.batch_size or min(_MIN_BATCH, shape.n_left)


def _needed(shape: ProblemSize, config: SolverConfig, n_centers: int, window: int, devices: int) -> int:
    """The least memory of each device, in bytes, with which a fit of so many centers starts."""
    batches = _least_batch(shape, config) * _batch_row_bytes(shape, n_centers, devices)
    return sum(_memory(shape, config, n_centers, window, devices).values()) + batches


def _too_large(
    shape: ProblemSize,
    config: SolverConfig,
    n_centers: int,
    memory_bytes: int,
    memory: Mapping[str, int],
    devices: int,
) -> str:
    window = window_segments(shape, memory_bytes)
    needed = more = _needed(shape, config, n_centers, window, devices)
    enough_mb = 0
    # More memory may buy a longer read-ahead, a quarter of it at most: this settles within a few rounds.
    while more > enough_mb * 10**6:
        enough_mb = -(-more // 10**6)
        more = _needed(shape, config, n_centers, window_segments(shape, enough_mb * 10**6), devices)
    listed = ", ".join(f"{name} {n_bytes / 1e6:.1f} MB" for name, n_bytes in memory.items())
    fits = largest_model(shape, config, memory_bytes, devices)
    place = "take" if devices == 1 else f"take on each of {devices} devices"
    return (
        f"memory is {memory_bytes / 1e6:.1f} MB but {n_centers} centers with batches of "
        f"{_least_batch(shape, config)} {place} {needed / 1e6:.1f} MB ({listed}); give --memory "
        f"{enough_mb}MB or more" + (f", or use at most {fits} centers" if fits else "")
    )


_OF_FREE_MEMORY = 0.8
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def machine_bytes(device: torch.device) -> int:
    """The memory of a GPU; for the CPU the memory of the machine, or of the container this process runs in."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # There is none, or it says `max`.
            limits.append(int(file.read_text()))
    return min(limits)


def memory_budget(asked: int, mesh: Mesh) -> int:
    """Bytes that a fit's arrays may take on each device: `asked`, or on a GPU by default 4/5 of its free memory.

    The least of all devices counts, so that every rank plans the same sizes.
    """
    if mesh.device.type != "cuda" or asked != RunConfig().memory_bytes:
        return asked
    free, _ = torch.cuda.mem_get_info(mesh.device)
    return -mesh.all_reduce_max([-int(_OF_FREE_MEMORY * free)])[0]


def on_device(shape: ProblemSize, run: RunConfig, device: torch.device) -> ProblemSize:
    """The shape, for a fit on this device: what a GPU adds."""
    if device.type != "cuda":
        return shape
    return replace(shape, host_bytes=run.host_memory_bytes, tile_bytes=gpu_tile_bytes(device))


def require_machine(
    shape: ProblemSize, config: SolverConfig, plan: SizePlan, device: torch.device, devices: int = 1
) -> None:
    """ConfigError where the device, or a GPU's host, has less memory than the plan takes, whatever the budgets allow.

    devices: in all, on this machine where they are shares of its CPU.
    """
    if (ahead := host_bytes(shape, plan)) is not None:
        there = machine_bytes(torch.device("cpu"))
        if ahead > there:
            raise ConfigError(
                f"host_memory allows the {ahead / 1e6:.1f} MB that rows read ahead take, but the host has only "
                f"{there / 1e6:.1f} MB; give --host-memory {there // 2 // 10**6}MB"
            )
    there = machine_bytes(device) // (1 if device.type == "cuda" else devices)
    planned = sum(plan.memory.values())
    if planned <= there:
        return
    fits = largest_model(shape, config, there, devices)
    remedy = f"use at most {fits} centers" if fits < plan.n_centers else f"give --memory {there // 10**6}MB"
    raise ConfigError(
        f"memory allows the {planned / 1e6:.1f} MB that {plan.n_centers} centers with batches of up to "
        f"{plan.max_batch_size} take, but a device has only {there / 1e6:.1f} MB here; {remedy}"
    )
