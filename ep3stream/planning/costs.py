"""What a fit costs: pure functions of its sizes, and of the rates of a machine.

With n rows, d features, c outputs, p centers, batches of m, ranks q (data) and r (model), s Nystrom samples, r'
landmarks, P passes of EigenPro's projection, and G devices, a step takes, on all devices together,

    kernel evaluations   m p                     nystrom, exact
                         m p + m s + P p^2       eigenpro: K(X_s, X_b), and passes over K(Z, Z)
    FLOPs                2 (d + 2) each, for the distances; 4 m p c for both products; and for the projection
                         4 p r c + 2 r^2 c + 4 p b c    nystrom: U' h, the core, U; a local tail of groups of b
                         4 p^2 c + 4 p q c       exact: two triangular solves
                         2 P p^2 c + 4 (p + s) q c      eigenpro
    all-reduced, bytes   4 c (m + r + 2 l)       nystrom, l <= r its leading columns, whose rounding is taken out;
                                                 8 c b more for each group of the tail that lies on two devices
                         4 c (m + p)             exact: the gradient of all centers
                         4 c (m + q) + 4 P (p (d + 2 + c) + b r c)      eigenpro: centers travel too, in b batches
                         each device sends and receives 2 (G - 1) / G times that (ring)

and, since devices have p / G centers each and rows are read while the step before is computed,

    step_s = max(overhead_s + evaluations evaluation_s / G + FLOPs of the projection flop_s / G + link_s,
                 m row_bytes / read_bytes_per_s)
    link_s = 2 (G - 1) / G all-reduced / link_bytes_per_s + m (4 d + y) / node_link_bytes_per_s + 3 link_latency_s,

0 for one device: the second part is the batch, with y bytes of targets a row, which one rank of a machine reads and
hands to its others.

evaluation_s includes the element-wise part of a kernel and its value's share of both products: it is measured on the
step itself (`pilot.py`), because a formula for it would have to know the caches.
"""

from __future__ import annotations

from dataclasses import dataclass

from ep3stream.config import Projection

_FLOAT = 4
_CENTER_BATCH = 4096  # Of EigenPro's passes, at most.

# By size on a shared switch: NCCL takes some 20 microseconds to begin, gloo on one machine some 100.
LINK_LATENCY_S = 50e-6

# What a product in float64 counts in FLOPs of float32, and what an eigenvalue decomposition of (n, n) in n^3 of them.
_DOUBLE, _EIGEN = 2, 10


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a fit, in the letters of the formulas. n_rows: those of one epoch; row_bytes: of x and y as they are read.

    n_expanded: how many features more the points have than the rows, where codes become 0/1 features; less than 0 with
    leading directions. n_ridges: how many ridges are fitted side by side, each with columns of weights of its own.
    """

    n_rows: int
    n_features: int
    n_outputs: int
    n_centers: int
    batch_size: int
    data_rank: int
    model_rank: int
    nystrom_samples: int
    n_landmarks: int
    row_bytes: int
    projection: Projection = "nystrom"
    passes: int = 1
    devices: int = 1
    n_expanded: int = 0
    group_size: int = 0
    n_ridges: int = 1

    @property
    def n_columns(self) -> int:
        """Columns of weights: c of the formulas."""
        return self.n_ridges * self.n_outputs

    @property
    def n_inputs(self) -> int:
        """The features of a point: d of the formulas, where codes count as their 0/1 features."""
        return self.n_features + self.n_expanded

    @property
    def steps_per_epoch(self) -> int:
        """ceil(n / m)."""
        return -(-self.n_rows // self.batch_size)


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one device: seconds of a kernel evaluation with its products, of a FLOP of the projection, of any step.

    read_bytes_per_s: rows of the store read, checked and decoded by this machine. link_bytes_per_s: between
    two devices, stated rather than measured; None where there is one device. node_link_bytes_per_s: between two of
    one machine; None where it is the same.
    """

    evaluation_s: float
    flop_s: float
    overhead_s: float
    read_bytes_per_s: float
    link_bytes_per_s: float | None = None
    link_latency_s: float = LINK_LATENCY_S
    node_link_bytes_per_s: float | None = None


def evaluations_of_step(sizes: Sizes) -> int:
    """Kernel evaluations of a step, on all devices."""
    block = sizes.batch_size * sizes.n_centers
    if sizes.projection == "eigenpro":
        return block + sizes.batch_size * sizes.nystrom_samples + sizes.passes * sizes.n_centers**2
    return block


def projection_flops(sizes: Sizes) -> int:
    """Of a step, on all devices, without kernel values; with l leading pairs `nystrom` takes 8 p l c more."""
    p, q, r, c = sizes.n_centers, sizes.data_rank, sizes.model_rank, sizes.n_columns
    if sizes.projection == "exact":
        return 4 * p**2 * c + 4 * p * q * c
    if sizes.projection == "eigenpro":
        return 2 * sizes.passes * p**2 * c + 4 * (p + sizes.nystrom_samples) * q * c
    return 4 * p * r * c + 4 * r**2 * c + 4 * p * sizes.group_size * c


def flops_of_step(sizes: Sizes) -> int:
    """All of a step, on all devices, without the element-wise part of kernels."""
    block = sizes.batch_size * sizes.n_centers
    distances = 2 * (sizes.n_inputs + 2) * evaluations_of_step(sizes)
    return distances + 4 * block * sizes.n_columns + projection_flops(sizes)


def reduced_bytes_of_step(sizes: Sizes, n_leading: int | None = None) -> int:
    """What the all-reduces of a step sum over the devices, counted by tests/test_mesh.py; 0 for one device.

    n_leading: l, once it is known; else r, the most it can be. Beside it damped centers and a ridge sum r x c
    floats each, a step that is scored m x c more, and every step some ten whole numbers.
    """
    if sizes.devices == 1:
        return 0
    p, r, c = sizes.n_centers, sizes.model_rank, sizes.n_columns
    if sizes.projection == "exact":
        return _FLOAT * c * (sizes.batch_size + p)
    if sizes.projection == "eigenpro":
        batches = -(-p // _CENTER_BATCH)
        passes = sizes.passes * (p * (sizes.n_inputs + 2 + c) + batches * r * c)
        return _FLOAT * (c * (sizes.batch_size + sizes.data_rank) + passes)
    b = sizes.group_size
    starts = (rank * (p // sizes.devices) + min(rank, p % sizes.devices) for rank in range(1, sizes.devices))
    parted = len({start // b for start in starts if start % b}) if b else 0
    leading = r if n_leading is None else n_leading
    return _FLOAT * c * (sizes.batch_size + r + 2 * leading + 2 * parted * b)


def handed_bytes_of_step(sizes: Sizes) -> int:
    """What the reader of a machine hands to each of its other devices, 0 for one: the batch, x in float32.

    Rows stored in float16 count with one target: what the others would add is not known here.
    """
    if sizes.devices == 1:
        return 0
    return sizes.batch_size * max(sizes.row_bytes, _FLOAT * (sizes.n_features + 1))


def link_seconds_of_step(sizes: Sizes, rates: Rates) -> float:
    """Of ring all-reduces and the batch handed on; 0 for one device, or where no bandwidth was stated."""
    if sizes.devices == 1 or rates.link_bytes_per_s is None:
        return 0.0
    share = 2 * (sizes.devices - 1) / sizes.devices
    reduced_s = share * reduced_bytes_of_step(sizes) / rates.link_bytes_per_s
    handed_s = handed_bytes_of_step(sizes) / (rates.node_link_bytes_per_s or rates.link_bytes_per_s)
    return reduced_s + handed_s + 3 * rates.link_latency_s


def compute_seconds_of_step(sizes: Sizes, rates: Rates) -> float:
    """Of each device, links left out."""
    evaluated = evaluations_of_step(sizes) * rates.evaluation_s
    return rates.overhead_s + (evaluated + projection_flops(sizes) * rates.flop_s) / sizes.devices


def read_seconds_of_step(sizes: Sizes, rates: Rates) -> float:
    """To have its rows in memory."""
    return sizes.batch_size * sizes.row_bytes / rates.read_bytes_per_s


def seconds_of_step(sizes: Sizes, rates: Rates) -> float:
    """Of a step while the rows of the next are read."""
    solved = compute_seconds_of_step(sizes, rates) + link_seconds_of_step(sizes, rates)
    return max(solved, read_seconds_of_step(sizes, rates))


def flops_of_setup(sizes: Sizes) -> float:
    """Of the set-up's preconditioner, a kernel value counting as 2 (d + 2) + 20: for ratios between two sizes.

    Kernel blocks K(L, L), K(Z, L), K(Z, X_s), their products, and the algebra in float64 (`projection.py`,
    `exact.py`, `eigenpro.py`); the parts with p are shared by the devices.
    """
    p, r, s = sizes.n_centers, sizes.model_rank, sizes.nystrom_samples
    landmarks, devices = sizes.n_landmarks, sizes.devices
    value = 2 * (sizes.n_inputs + 2) + 20
    if sizes.projection == "exact":
        return value * p * (p + s) + _DOUBLE * (p**3 / 3 + p**2 * s + p * s * sizes.data_rank)
    blocks = value * (landmarks**2 + p * (landmarks + s) / devices)
    products = 2 * p * r * (landmarks + s) / devices + _DOUBLE * 4 * p * r**2 / devices
    algebra = _DOUBLE * (2 * landmarks**2 * r + r**2 * s + _EIGEN * 2 * r**3)
    b = sizes.group_size
    tail = p * b * (_DOUBLE * (value + 2 * r + b) + 2 * (r + s)) / devices
    return blocks + products + algebra + tail
