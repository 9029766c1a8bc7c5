"""Where a fit's centers come from: rows of the split, means of its clusters, a file, or a split of any store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.config import FitConfig
from ep3stream.errors import ConfigError, InputError
from ep3stream.mesh import Mesh
from ep3stream.solver.expected_error import ExpectedError, drawn_by
from ep3stream.solver.input_scaling import InputScaling
from ep3stream.store.columns import code_features, code_values
from ep3stream.store.files import Location, ObjectUrl, location
from ep3stream.store.manifest import SplitInfo
from ep3stream.store.reader import Split, SplitReader, open_store
from ep3stream.stream.order import NO_ROWS, Rows, sample_rows
from ep3stream.values.offsets import shifted

_DRAWN, _CLUSTERS, _ORDER, _CANDIDATES, _CHOICE = 1, 4, 5, 6, 7
_CLUSTERED = "kmeans:"
_ROWS_PER_CLUSTER = 10
_CLUSTER_PASSES = 5
# Of the centers, drawn where a small model errs, each from so many candidates; the others are drawn from all rows.
_BY_ERROR = 0.8
_CANDIDATES_EACH = 4
_READ_AT_ONCE = 100_000


@dataclass(frozen=True, slots=True)
class CenterSource:
    """How many centers a fit will have, known before any is read, and how to get them.

    points: from the input scaling to (p, d), float32 in the units of the data; None if rows are to be drawn.
    """

    n_centers: int
    points: Callable[[InputScaling], Tensor] | None

    @classmethod
    def of(cls, config: FitConfig, reader: SplitReader, automatic: int, held: Rows = NO_ROWS) -> CenterSource:
        """The source that the setting `centers` names; `auto` stands for `automatic` rows. Raises ConfigError.

        held: numbers of rows that are held out, which are neither drawn nor clustered.
        """
        centers = config.solver.centers
        if centers == "auto" or isinstance(centers, int):
            n_centers = automatic if centers == "auto" else int(centers)
            return cls(_fewer_than_rows(n_centers, reader, len(held)), None)
        if centers.startswith(_CLUSTERED):
            n_centers = _n_clusters(centers, reader.info.n_rows - len(held))
            return cls(n_centers, partial(_cluster_means, reader, n_centers, config, held))
        place = location(centers)
        path = place if isinstance(place, ObjectUrl) else Path(centers)
        if isinstance(path, ObjectUrl) or _is_split(path):
            n_centers = _check_split(path, reader)
            return cls(n_centers, partial(_in_own_order, config, partial(_split_points, path, reader)))
        stored = _open_points(path, reader.manifest.n_features)
        return cls(len(stored), partial(_in_own_order, config, partial(_file_points, stored, path, reader)))


def draw_centers(info: SplitInfo, n_centers: int, seed: int, held: Rows = NO_ROWS) -> Rows:
    """Numbers of the rows that become centers, in random order; none of those in `held`."""
    return sample_rows(info, n_centers, seed, _DRAWN, without=held)


def drawn_centers(
    split: Split,
    n_centers: int,
    errors: ExpectedError | None,
    inputs: InputScaling,
    config: FitConfig,
    mesh: Mesh,
    held: Rows,
) -> Rows:
    """As `draw_centers`; where the leader knows the expected errors of a small model, four fifths by these.

    With centers of more than a quarter of the rows there is little to choose from, and they are drawn from all alike.
    The leader reads four candidates a center, one pass over their segments.
    """
    info, seed = split.info, config.run.seed
    drawn = draw_centers(info, n_centers, seed, held)
    n_chosen = int(_BY_ERROR * n_centers)
    uniform = drawn[n_chosen:]
    n_candidates = _CANDIDATES_EACH * n_chosen
    if config.solver.center_sampling == "uniform" or n_candidates > info.n_rows - len(held) - len(uniform):
        return drawn

    def choose() -> list[int] | None:
        if errors is None:
            return None
        taken = np.union1d(uniform, held)
        candidates = np.sort(sample_rows(info, n_candidates, seed, _CANDIDATES, without=taken))
        scaled = inputs.to(mesh.device)
        expected = []
        for some in np.array_split(candidates, -(-n_candidates // _READ_AT_ONCE)):
            x = torch.from_numpy(split.read_rows(some)[0]).float()
            expected.append(errors.at(scaled(x.to(mesh.device))))
        generator = torch.Generator().manual_seed((seed * 8 + _CHOICE) % 2**64)
        chosen: list[int] = candidates[drawn_by(torch.cat(expected), n_chosen, generator).numpy()].tolist()
        return chosen

    chosen = mesh.broadcast_object(choose)
    if chosen is None:
        return drawn
    order = np.random.default_rng((seed, _CHOICE)).permutation(n_centers)
    return np.concatenate([np.array(chosen, np.int64), uniform])[order]


def _fewer_than_rows(n_centers: int, reader: SplitReader, n_held: int) -> int:
    n_rows = reader.info.n_rows - n_held
    if n_rows < 2:
        raise ConfigError(
            f"split {reader.info.name} has a single row, which cannot be center and training row; "
            "give it more rows, or centers as a file"
        )
    if n_centers >= n_rows:
        raise ConfigError(
            f"centers is {n_centers} but the split has {n_rows} rows{_besides(n_held)}, which are not trained on once "
            f"they are centers; use at most {max(1, n_rows // 2)}, or give centers as a file"
        )
    return n_centers


def _besides(n_held: int) -> str:
    return f" besides {n_held} held out" if n_held else ""


def _in_own_order(config: FitConfig, read: Callable[[], Tensor], inputs: InputScaling) -> Tensor:
    """The given points in their order; for `eigenpro` in random order, since its landmarks are the first centers."""
    points = read()
    if config.solver.projection != "eigenpro":
        return points
    order = np.random.default_rng((config.run.seed, _ORDER)).permutation(len(points))
    return points[torch.from_numpy(order)]


def _open_points(path: Path, n_features: int) -> NDArray[Any]:
    """A memory map of the points in an NPY file, (p, d), in the units of the data; ConfigError for another shape."""
    # Few fits read an array, and readers take long to import.
    from ep3stream.formats.arrays import open_array

    try:
        points = open_array(path)
    except InputError as error:
        raise ConfigError(
            f"centers is {str(path)!r}, which is no NPY file of (p, {n_features}) numbers: {error}"
        ) from error
    if points.ndim != 2 or points.shape[1] != n_features or not len(points):
        raise ConfigError(f"centers in {path} have the shape {points.shape}; they must be (p, {n_features})")
    return points


def _file_points(stored: NDArray[Any], path: Path, reader: SplitReader) -> Tensor:
    offsets, mean = reader.manifest.offsets.x, np.array(reader.info.features.mean)
    stored = shifted(stored, offsets_left(stored, offsets, mean))
    with np.errstate(over="ignore"):  # What float32 cannot hold becomes infinite and is refused.
        points = stored.astype(np.float32)
    if not np.isfinite(points).all():
        raise ConfigError(f"centers in {path} hold values that are not finite in float32; remove those rows")
    return torch.from_numpy(points)


def offsets_left(
    points: NDArray[Any], offsets: NDArray[np.float64], mean: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What is to be subtracted from the columns of points, (p, d), to make them rows of a store with offsets, (d,).

    Points may come as the store gives its rows, whose mean is `mean`, (d,), or as values of the user's: a column is
    whatever its median is nearer to.
    """
    left = offsets.copy()
    for column in np.flatnonzero(offsets):
        middle = float(np.median(points[:, column]))
        is_stored = abs(middle - mean[column]) < abs(middle - offsets[column] - mean[column])
        left[column] = 0.0 if is_stored else offsets[column]
    return left


def _is_split(path: Path) -> bool:
    """Whether `path` is STORE/split: its parent is an HDF5 file, or a directory that is a Zarr group."""
    return path.parent.is_file() or (not path.is_file() and (path.parent / "zarr.json").is_file())


def _check_split(path: Location, reader: SplitReader) -> int:
    """The number of rows of that split; ConfigError where it has other features, InputError without such a split."""
    with open_store(path.parent, reader.read_timeout_s) as store:
        theirs, mine = store.manifest, reader.manifest
        if theirs.feature_names != mine.feature_names or code_values(theirs.columns) != code_values(
            mine.columns
        ):
            what = "features" if theirs.feature_names != mine.feature_names else "categories"
            raise ConfigError(
                f"centers is {str(path)!r}, whose {what} are not those of {reader.path}; "
                f"convert it with --like {reader.path}"
            )
        return store.split(path.name).info.n_rows


def _split_points(path: Location, reader: SplitReader) -> Tensor:
    with open_store(path.parent, reader.read_timeout_s) as store:
        points = store.split(path.name)
        x = points.read_rows(np.arange(points.info.n_rows))[0]
        left = reader.manifest.offsets.x - store.manifest.offsets.x
        return torch.from_numpy(shifted(x, left)).float()


def _n_clusters(centers: str, n_rows: int) -> int:
    number = centers.removeprefix(_CLUSTERED)
    if not number.isascii() or not number.isdecimal() or not 1 <= int(number) <= n_rows:
        raise ConfigError(
            f"centers is {centers!r}; write kmeans:N with N a whole number from 1 to the {n_rows} rows there are"
        )
    return int(number)


def _cluster_means(
    reader: SplitReader, n_centers: int, config: FitConfig, held: Rows, inputs: InputScaling
) -> Tensor:
    """Means of clusters of scaled inputs, by mini-batch k-means (Sculley, 2010) on ten rows a cluster or more.

    Of a category that is stored as codes, a center has the most frequent one of its cluster (Huang, 1998); distances
    are those of 0/1 features for every kernel. As many rows as a quarter of the memory holds at most; O(50 p^2 d) time.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise ConfigError(
            f"centers is {config.solver.centers!r}, which needs scikit-learn; "
            "pip install 'ep3stream[kmeans]', or use random rows"
        ) from error
    info, seed = reader.info, config.run.seed
    if not inputs.n_codes:  # A kernel that compares codes.
        inputs = inputs.with_codes(code_features(reader.manifest))
    fit_memory = config.run.memory_bytes // (4 * 3 * 4 * inputs.n_inputs)
    n_left = info.n_rows - len(held)
    n_rows = min(n_left, max(n_centers, min(_ROWS_PER_CLUSTER * n_centers, fit_memory)))
    rows = np.sort(sample_rows(info, n_rows, seed, _CLUSTERS, without=held))
    scaled = inputs(torch.from_numpy(reader.read_rows(rows)[0]).float())
    clusters = MiniBatchKMeans(
        n_centers,
        init="random",
        n_init=1,
        max_iter=_CLUSTER_PASSES,
        batch_size=max(1024, n_centers),
        compute_labels=False,
        random_state=seed % 2**32,
    )
    return inputs.typical_rows(torch.from_numpy(clusters.fit(scaled.numpy()).cluster_centers_).float())
