"""What a fit would take on many GPUs, by the model of `run/planning/costs.py` from stated rates: docs/scaling.md.

    python tools/scaling.py [--rows 1e9] [--centers 1e6] [--features 1000] [--outputs 1000] [--devices 1,8,64]
        [--memory 72GB] [--product-tflops 297] [--float32-tflops 40] [--memory-gb-per-s 2300] [--read-gb-per-s 5]
        [--node-link-gb-per-s 300] [--link-gb-per-s 40] [--value-bytes 4]

Every rate is an assumption until `tools/gpu_check.py` has measured it: 60% of what the data sheet of an H100 says of
TF32 (495 TFLOP/s dense) and of float32 (67), 70% of its memory (3350 GB/s), two thirds of NVLink (450 GB/s each way),
80% of a 400 Gbit/s network card a GPU, and a file system that gives each machine of 8 GPUs 5 GB/s. Prints two tables.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ep3stream.config import SolverConfig, parse_bytes
from ep3stream.planning.costs import (
    Rates,
    Sizes,
    compute_seconds_of_step,
    handed_bytes_of_step,
    link_seconds_of_step,
    read_seconds_of_step,
    reduced_bytes_of_step,
    seconds_of_step,
)
from ep3stream.solver.blocks import MOST_IN_FLOAT32
from ep3stream.training.plan import ProblemSize, SizePlan

GPUS_OF_A_MACHINE = 8
SEGMENT_BYTES = 64 << 20
# Of a value of a block unfused: written by the product, read and written by phi, read by both products.
BLOCK_TRAFFIC_BYTES = 5 * 4
# And for either of both products, where these are three of bfloat16, to be split: 26 bytes, less the 4 above.
SPLIT_TRAFFIC_BYTES = 2 * 22
OVERHEAD_S = 1e-3
# Of the basis: those whose rounding is taken out again. A guess: a fifth.
LEADING_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Assumed:
    """Rates of one GPU and of what connects it, in FLOP/s and bytes/s; value_bytes: of a stored feature.

    product: of the distances, in TF32; three products of bfloat16, of kernel values with many outputs, go at twice this
    rate. in_float32: of those with fewer, and of the projection.
    """

    product: float = 297e12
    in_float32: float = 40e12
    memory: float = 2300e9
    read: float = 5e9
    node_link: float = 300e9
    link: float = 40e9
    value_bytes: int = 4

    def rates(self, sizes: Sizes) -> Rates:
        """As `costs.py` takes them."""
        distances_s = 2 * (sizes.n_features + 2) / self.product
        products_s = 4 * sizes.n_outputs / self.in_float32
        if sizes.n_outputs > MOST_IN_FLOAT32:
            products_s = 3 * 4 * sizes.n_outputs / (2 * self.product) + SPLIT_TRAFFIC_BYTES / self.memory
        is_one_machine = sizes.devices <= GPUS_OF_A_MACHINE
        return Rates(
            evaluation_s=distances_s + products_s + BLOCK_TRAFFIC_BYTES / self.memory,
            flop_s=1 / self.in_float32,
            overhead_s=OVERHEAD_S,
            read_bytes_per_s=self.read,
            link_bytes_per_s=self.node_link if is_one_machine else self.link,
            node_link_bytes_per_s=self.node_link,
        )


def sizes_for(
    n: int, p: int, d: int, c: int, devices: int, memory: int, value_bytes: int
) -> tuple[Sizes, SizePlan]:
    """Those that a fit would plan with, for classes of c kinds."""
    row_bytes = value_bytes * d + 4
    shape = ProblemSize(n, d, c, max(1, SEGMENT_BYTES // row_bytes), row_bytes, is_shuffled=True)
    plan = SizePlan.of(shape, SolverConfig(centers=p), p, memory, devices)
    ranks = (plan.data_rank, plan.model_rank, plan.nystrom_samples, plan.n_landmarks)
    return Sizes(n - p, d, c, p, plan.max_batch_size, *ranks, row_bytes, devices=devices), plan


def tables(
    n: int, p: int, d: int, c: int, counts: list[int], memory: int, assumed: Assumed
) -> list[list[str]]:
    """Rows of both tables: memory and bytes; times."""
    sizes_rows, time_rows, alone = [], [], 0.0
    for devices in counts:
        sizes, plan = sizes_for(n, p, d, c, devices, memory, assumed.value_bytes)
        rates = assumed.rates(sizes)
        reduced = reduced_bytes_of_step(sizes, round(LEADING_SHARE * sizes.model_rank))
        ring = 2 * (devices - 1) / devices * reduced
        handed = handed_bytes_of_step(sizes)
        read = sizes.batch_size * sizes.row_bytes
        used = sum(plan.memory.values())
        sizes_rows.append(
            f"| {devices} | {used / 1e9:.1f} GB | {sizes.batch_size} | {ring / 1e6:.1f} MB "
            f"| {handed / 1e6:.1f} MB | {read / 1e6:.1f} MB |"
        )
        step = seconds_of_step(sizes, rates)
        epoch = step * sizes.steps_per_epoch
        alone = alone or epoch * devices
        parts = {
            "arithmetic": compute_seconds_of_step(sizes, rates),
            "links": link_seconds_of_step(sizes, rates),
            "reading": read_seconds_of_step(sizes, rates),
        }
        told = " | ".join(f"{1e3 * seconds:.2f} ms" for seconds in parts.values())
        time_rows.append(
            f"| {devices} | {told} | {1e3 * step:.2f} ms | {_clock(epoch)} | {alone / epoch / devices:.0%} |"
        )
    return [sizes_rows, time_rows]


def _clock(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def text(n: int, p: int, d: int, c: int, counts: list[int], memory: int, assumed: Assumed) -> str:
    """Both tables, in Markdown."""
    sizes_rows, time_rows = tables(n, p, d, c, counts, memory, assumed)
    return "\n".join(
        [
            "| GPUs | memory of each | batch | a link, all-reduces | a link, batch | read by each machine |",
            "|---|---|---|---|---|---|",
            *sizes_rows,
            "",
            "| GPUs | arithmetic | links | reading | step | epoch | of linear |",
            "|---|---|---|---|---|---|---|",
            *time_rows,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"rows": 1e9, "centers": 1e6, "features": 1000, "outputs": 1000}.items():
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--devices", default="1,8,64")
    parser.add_argument("--memory", type=parse_bytes, default=72 * 10**9)
    assumed = Assumed()
    # Of each assumed rate: its option, and the option's unit.
    rates = {
        "product": ("--product-tflops", 1e12),
        "in_float32": ("--float32-tflops", 1e12),
        "memory": ("--memory-gb-per-s", 1e9),
        "read": ("--read-gb-per-s", 1e9),
        "node_link": ("--node-link-gb-per-s", 1e9),
        "link": ("--link-gb-per-s", 1e9),
    }
    for rate, (option, unit) in rates.items():
        parser.add_argument(option, dest=f"rate_{rate}", type=float, default=getattr(assumed, rate) / unit)
    parser.add_argument("--value-bytes", type=int, choices=(2, 4), default=4)
    options = vars(parser.parse_args())
    stated = {rate: options[f"rate_{rate}"] * unit for rate, (_, unit) in rates.items()}
    n, p, d, c = (int(options[name]) for name in ("rows", "centers", "features", "outputs"))
    counts = [int(count) for count in options["devices"].split(",")]
    print(text(n, p, d, c, counts, options["memory"], Assumed(**stated, value_bytes=options["value_bytes"])))


if __name__ == "__main__":
    main()
