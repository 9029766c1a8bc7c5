"""Stores and sources damaged at random: does `verify` see it, and is damage ever taken for data without a word?

    python tools/bench_damage.py [--trials 500] [--source-trials 500] [--seed 0] [--directory .bench]

Each trial copies one of eight small stores (Zarr plain, lz4 and sharded, HDF5; classes and real targets; two splits of
several segments), damages one of its files, and asks `verify`, `verify --quick`, the public reader (every row,
statistic and name) and the reading path of a fit (samples, and every batch of an epoch) what they make of it. Damage
is detected (exit code 2 or 3), or harmless: no reader sees a difference. Exits with 1 if damage that is visible went
undetected, or if a fit read anything but the rows that were written, or if anything raised what it should not.

Then as many files that are to be converted are damaged, of 27 kinds, and converted: see tools/source_damage.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import source_damage
import torch
import xxhash
from source_damage import SOURCE_OUTCOMES, SOURCES_MUST_BE_ZERO, run_source_trials, source_table

from ep3stream import cli
from ep3stream.conversion.spec import StoreSpec
from ep3stream.conversion.writer import create_store
from ep3stream.errors import Ep3streamError
from ep3stream.store.reader import open_store
from ep3stream.stream.order import RowOrder, sample_rows
from ep3stream.stream.prefetch import BatchStream

FORMATS = ("plain", "lz4", "sharded", "hdf5")
OUTCOMES = ("detected", "harmless", "VISIBLE", "READ BY FIT", "CRASHED")
MUST_BE_ZERO = OUTCOMES[2:]
N_ROWS = {"train": 700, "test": 150}
SEGMENT_BYTES, N_FEATURES = 2048, 6


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    logging.getLogger("ep3stream").setLevel(
        logging.CRITICAL
    )  # What a reader says of a retry is no result here.
    options.directory.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="damage-", dir=options.directory) as directory:
        bad = 0
        if options.trials:
            counts, quick, examples = run_trials(Path(directory), options.trials, options.seed)
            told = [table(counts, quick), *examples]
            bad += report(told, "trials", options.trials, counts, OUTCOMES, MUST_BE_ZERO, began)
        began = time.perf_counter()
        if options.source_trials:
            counts, examples = run_source_trials(Path(directory), options.source_trials, options.seed)
            told, n_trials = [source_table(counts), *examples], counts.total()
            bad += report(
                told, "source trials", n_trials, counts, SOURCE_OUTCOMES, SOURCES_MUST_BE_ZERO, began
            )
    return int(bad > 0)


def report(
    told: list[str],
    what: str,
    n_trials: int,
    counts: Counter,
    outcomes: tuple[str, ...],
    must_be_zero: tuple[str, ...],
    began: float,
) -> int:
    """Prints the lines and a sum of the outcomes; how many there are of those that must not be."""
    total = Counter(outcome for _, _, outcome in counts.elements())
    print("\n".join(told))
    print(
        f"{n_trials} {what} in {time.perf_counter() - began:.0f} s: "
        + ", ".join(f"{total[outcome]} {outcome}" for outcome in outcomes)
    )
    return sum(total[outcome] for outcome in must_be_zero)


def run_trials(directory: Path, n_trials: int, seed: int) -> tuple[Counter, Counter, list[str]]:
    """Counts of (damage, format, outcome), of damage seen by `verify --quick`, and lines about what must not be."""
    stores = {name: make_store(directory / name.replace("/", "-"), name) for name in store_names()}
    sound = {name: (visible(path), fitted(path)) for name, path in stores.items()}
    counts, quick, examples = Counter(), Counter(), []
    for trial in range(n_trials):
        dice = random.Random(f"{seed}/{trial}")
        name = dice.choice(sorted(stores))
        path = directory / f"damaged{stores[name].suffix}"
        kind = dice.choice(sorted(DAMAGE))
        what = damage(dice, kind, stores[name], path)
        outcome = judge(path, *sound[name])
        counts[kind, name.split("/")[0], outcome] += 1
        quick[kind, name.split("/")[0]] += exit_code("verify", "--quick", path) in (2, 3)
        if outcome in MUST_BE_ZERO:
            examples.append(f"trial {trial}: {outcome}: {kind} of {name}: {what}")
    return counts, quick, examples


def damage(dice: random.Random, kind: str, store: Path, path: Path) -> str:
    """Makes `path` a damaged copy of `store`; a swap of equal files, or zeros over zeros, is tried again."""
    while True:
        copy(store, path)
        what = DAMAGE[kind](dice, path)
        if contents(path) != contents(store):
            return what


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def judge(path: Path, sound_rows: str, sound_batches: str) -> str:
    """One of OUTCOMES."""
    code = exit_code("verify", path)
    rows, batches = attempt(visible, path), attempt(fitted, path)
    if code not in (0, 2, 3) or "crash" in (rows, batches):
        return "CRASHED"
    if batches not in (sound_batches, "refused"):
        return "READ BY FIT"
    if code:
        return "detected"
    return "harmless" if (rows, batches) == (sound_rows, sound_batches) else "VISIBLE"


def exit_code(*arguments: object) -> int:
    """Of the command line, -1 where it raised."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return cli.main([str(argument) for argument in arguments])
        except Exception:  # What must not happen is counted, so that the other trials are run.
            return -1


def attempt(read: Callable[[Path], str], path: Path) -> str:
    """What `read` gives, or `refused` by one of the package's errors, or `crash` by another."""
    try:
        return read(path)
    except Ep3streamError:
        return "refused"
    except Exception:  # As above.
        return "crash"


def visible(path: Path) -> str:
    """Digest of all a reader can see: the manifest and every row."""
    digest = xxhash.xxh3_128()
    with open_store(path) as store:
        digest.update(store.manifest.to_json())
        for name, info in store.manifest.splits.items():
            for segment in range(info.n_segments):
                for rows in store.split(name).read_segment(segment):
                    digest.update(rows.tobytes())
    return digest.hexdigest()


def fitted(path: Path) -> str:
    """Digest of what a fit reads: samples of each split by row number, and the batches of one epoch."""
    digest = xxhash.xxh3_128()
    with open_store(path) as store:
        digest.update(
            repr((store.manifest.task, store.manifest.n_features, store.manifest.n_outputs)).encode()
        )
        for name, info in store.manifest.splits.items():
            reader = store.split(name)
            for rows in reader.read_rows(sample_rows(info, 50, 0)):
                digest.update(rows.tobytes())
            order = RowOrder(0, info.n_rows, info.segment_rows, 4, 64, np.empty(0, np.int64))
            with BatchStream(reader, order, 0, order.steps_per_epoch, torch.device("cpu")) as stream:
                for batch in stream:
                    digest.update(batch.x.numpy().tobytes())
                    digest.update(batch.y.numpy().tobytes())
    return digest.hexdigest()


def store_names() -> list[str]:
    return [f"{format}/{task}" for format in FORMATS for task in ("classification", "regression")]


def make_store(path: Path, name: str) -> Path:
    """A store whose inputs lz4 can shrink; `sharded` has three segments a file."""
    layout, task = name.split("/")
    path = path.with_suffix(".h5" if layout == "hdf5" else ".zarr")
    is_regression = task == "regression"
    spec = StoreSpec(
        task=task,
        n_features=N_FEATURES,
        n_outputs=2 if is_regression else 3,
        x_dtype="float32",
        feature_names=tuple(f"x{column}" for column in range(N_FEATURES)),
        target_names=("u", "v") if is_regression else ("label",),
        class_names=None if is_regression else ("low", "middle", "high"),
        columns={},
        shuffle_seed=0,
        source=({"name": "rows.csv", "bytes": 1, "digest": "0" * 32},),
        segment_bytes=SEGMENT_BYTES,
        codec="lz4" if layout == "lz4" else "none",
        expected_rows=3 * 4096 * (SEGMENT_BYTES // (4 * N_FEATURES)) if layout == "sharded" else None,
    )
    generator = np.random.default_rng(0)
    with create_store(path, spec, "hdf5" if layout == "hdf5" else "zarr") as writer:
        for split, n_rows in N_ROWS.items():
            x = generator.normal(size=(n_rows, N_FEATURES)).round(1)
            y = x[:, :2] if is_regression else np.digitize(x[:, 0], (-0.5, 0.5))
            writer.append(split, x, y)
        writer.commit()
    return path


def copy(store: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    if store.is_file():
        shutil.copyfile(store, target)
    else:
        shutil.copytree(store, target)


# Kinds of damage: each changes the store at `path` and says what it did.


def any_file(dice: random.Random, path: Path) -> Path:
    """Data files, metadata and the manifest: each of these three groups equally often."""
    if path.is_file():
        return path
    files = sorted(file for file in path.rglob("*") if file.is_file())
    groups = [
        [file for file in files if file.suffix != ".json"],
        [file for file in files if file.name == "zarr.json"],
        [file for file in files if file.name == "manifest.json"],
    ]
    return dice.choice(dice.choice(groups))


def flip(dice: random.Random, path: Path) -> str:
    file = any_file(dice, path)
    return f"{file}, {source_damage.flip(dice, file)}"


def truncate(dice: random.Random, path: Path) -> str:
    file = any_file(dice, path)
    return f"{file} {source_damage.cut(dice, file)}"


def empty(dice: random.Random, path: Path) -> str:
    file = any_file(dice, path)
    file.write_bytes(b"")
    return str(file)


def delete(dice: random.Random, path: Path) -> str:
    file = any_file(dice, path)
    file.unlink()
    return str(file)


def zeros(dice: random.Random, path: Path) -> str:
    """A range of zeros, as a disk gives for a sector it lost."""
    file = any_file(dice, path)
    return f"{file}, {source_damage.zeros(dice, file)}"


def swap(dice: random.Random, path: Path) -> str:
    """Two files, or two ranges of equal length of the one file."""
    if path.is_file():
        data = bytearray(path.read_bytes())
        length = dice.choice((8, 512, SEGMENT_BYTES))
        one, other = sorted(dice.sample(range(0, len(data) - length, length), 2))
        data[one : one + length], data[other : other + length] = (
            data[other : other + length],
            data[one : one + length],
        )
        path.write_bytes(data)
        return f"{path}, {length} bytes at {one} and {other}"
    names = sorted(file for file in path.rglob("*") if file.is_file())
    one_file = dice.choice(names)
    alike = [f for f in names if f != one_file and f.suffix == one_file.suffix] or [path / "manifest.json"]
    other_file = dice.choice(alike)
    contents = one_file.read_bytes(), other_file.read_bytes()
    other_file.write_bytes(contents[0])
    one_file.write_bytes(contents[1])
    return f"{one_file} and {other_file}"


def add(dice: random.Random, path: Path) -> str:
    """A foreign file beside any of the store's; bytes behind the end of the one file."""
    if path.is_file():
        path.write_bytes(path.read_bytes() + dice.randbytes(dice.randrange(1, 600)))
        return f"bytes behind {path}"
    file = dice.choice(sorted(path.rglob("*")))
    folder = file if file.is_dir() else file.parent
    stranger = folder / dice.choice(("999", "x.partial", ".hidden", "zarr.json.bak"))
    stranger.write_bytes(any_file(dice, path).read_bytes())
    return str(stranger)


DAMAGE = {
    "flip a bit": flip,
    "truncate": truncate,
    "empty": empty,
    "delete": delete,
    "zero a range": zeros,
    "swap two": swap,
    "add": add,
}


def table(counts: Counter, quick: Counter) -> str:
    """Per kind of damage and format: detected + harmless / trials, and how many --quick saw."""
    lines = [f"{'':<14}" + "".join(f"{format:>16}" for format in FORMATS)]
    for kind in sorted(DAMAGE):
        cells = []
        for format in FORMATS:
            detected, harmless = (counts[kind, format, outcome] for outcome in OUTCOMES[:2])
            trials = sum(counts[kind, format, outcome] for outcome in OUTCOMES)
            cells.append(f"{detected}+{harmless}/{trials} ({quick[kind, format]})")
        lines.append(f"{kind:<14}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join([*lines, "detected + harmless / trials (seen by verify --quick)"])


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", default=500, type=int, help="damages to stores")
    parser.add_argument("--source-trials", default=500, type=int, help="damages to sources")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--directory", default=Path(".bench"), type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
