"""Damaged and hostile inputs by the thousand, and sound tables in odd files: is each refused, or read right?

    python tools/fuzz.py [--inputs 100000] [--tables 20000] [--seed 0] [--only TARGET[:NUMBER]]

Targets of damage: the manifest of a store, the metadata of its arrays, the bundles of a run (set-up, checkpoint,
model), its settings and its metrics. Half of the inputs change bytes; the others change what the bytes mean, and are
signed again so that they get past the digests, as a stranger's would. An input is a function of (seed, target, number):
`--only` repeats one. What loads is used as a fit or a prediction uses it. Ends in one table, and with 1 if anything but
an `Ep3streamError` was raised, took longer than a second, or took more than 2 GiB of memory.

Target `tables` (tools/fuzz_cases/): tables of known rows, drawn by hypothesis, are written in every odd but legal way
as CSV, Parquet, Arrow, arrays, svmlight or objects of Python, and converted; every value of the store is compared. A
value that differs untold is a bug too, as are a refusal of what is fine and anything left half-written. A table is a
function of (seed, number); `--without spaces,gaps` keeps fields of `CsvWay` and its like plain.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import resource
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
import xxhash
from fuzz_cases.tries import fuzz_tables

import ep3stream
from ep3stream.config import ConvertConfig, FitConfig
from ep3stream.errors import Ep3streamError
from ep3stream.mesh import Mesh
from ep3stream.run.bundle import file_digest
from ep3stream.run.checkpoint import load_checkpoint
from ep3stream.run.event_log import read_lines
from ep3stream.run.setup import Setup
from ep3stream.run.state import list_checkpoints
from ep3stream.store.json_files import signed_bytes
from ep3stream.store.manifest import Manifest
from ep3stream.store.reader import open_store

MAX_BYTES, MAX_S = 2 << 30, 1.0
CPU = torch.device("cpu")
Files = dict[str, bytes]

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**30, 0.0, -0.0, 0.5, -1.5, 1e-320, 1e308,
    "", "x", "y", "nan", "inf", "median", "laplacian", "callable", "float32", "int32", "../../x", "/etc/passwd", "a/b",
    "\0", "\ud800", "é☃", "0" * 32, [], {}, [1], [0.5, "a"], {"name": "x"}, {"": None}, [[[[]]]], list(range(50)),
    "a" * 300,
)  # fmt: skip
TOKENS = (
    b"NaN", b"Infinity", b"1e999", b"-1", b"9" * 40, b"9" * 5000, b"0x" + b"f" * 5000, b"[" * 3000, b'{"a":' * 3000,
    b"null", b"true", b'"', b"\\u0000", b"\xff", b"\0", b",", b"}", b"]", b"=", b"\n", b"[x]\n", b"a." * 200, b"'''",
    b"\xef\xbb\xbf",
)  # fmt: skip


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """`data` with one to four bytes or pieces flipped, removed, repeated, replaced, or cut off."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place, length = rng.randrange(len(result) + 1), rng.choice((1, 1, 2, 8, 100))
        kind = rng.randrange(6)
        if kind == 0 and place < len(result):
            result[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del result[place : place + length]
        elif kind == 2:
            result[place:place] = result[place : place + length]
        elif kind == 3:
            result[place : place + rng.choice((0, 1, length))] = rng.choice(TOKENS)
        elif kind == 4:
            result[place : place + length] = rng.randbytes(length)
        elif rng.random() < 0.2:
            del result[place:]
    return bytes(result)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def changed_meaning(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with one to three of its parts replaced, removed, repeated, swapped or made larger."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        there = list(places(value))
        if not there:
            break
        container, key = rng.choice(there)
        kind, old = rng.randrange(8), container[key]
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, list):
            container.insert(key, copy.deepcopy(old))
        elif kind == 1:
            container[rng.choice(("", "x", "name", key * 2 if isinstance(key, str) else "k"))] = old
        elif kind == 2:
            other, place = rng.choice(there)
            if place in other if isinstance(other, dict) else place < len(other):
                container[key] = copy.deepcopy(other[place])
        elif kind == 3 and isinstance(old, int | float):
            container[key] = rng.choice((old + 1, old - 1, -old, old * 2, old * 1000, old / 2, float(old), 0))
        elif kind == 4 and isinstance(old, list | str) and old:
            container[key] = rng.choice((old[:-1], old * 2, old[::-1], old[:1]))
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def signed(content: Any) -> bytes:
    """Signed as a stranger would sign it; as plain JSON where that cannot be."""
    try:
        return signed_bytes(content)
    except (TypeError, ValueError):
        return json.dumps(content).encode("utf-8", "surrogatepass")


def changed_json(rng: random.Random, data: bytes) -> bytes:
    content = json.loads(data)
    content.pop("digest", None)
    return signed(changed_meaning(rng, content))


def changed_tensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header says something else of the same numbers, or whose numbers are others."""
    n_header = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + n_header]), bytearray(data[8 + n_header :])
    if rng.random() < 0.3 and body:
        place = 4 * rng.randrange(len(body) // 4)
        value = rng.choice((np.nan, np.inf, -1.0, 0.0, 1e38, -1e38, 1e-38))
        body[place : place + 4] = np.float32(value).tobytes()
    else:
        for entry in header.values():
            if rng.random() < 0.2 and "dtype" in entry:
                entry["dtype"] = rng.choice(
                    ("F32", "F64", "I64", "U8", "BF16", "F16", "BOOL", "XX", "F8_E5M2")
                )
            if rng.random() < 0.2 and "shape" in entry:
                entry["shape"] = rng.choice(
                    ([], [0], entry["shape"][::-1], [1, *entry["shape"]], [2**62, 4], [-1])
                )
        if rng.random() < 0.5:
            header = changed_meaning(rng, header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    size = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**63, 2**64 - 1))
    return size.to_bytes(8, "little") + text + bytes(body)


def changed_bundle(rng: random.Random, files: Files) -> Files:
    """Its manifest or its tensors changed, and the manifest signed again in four of five."""
    manifest, tensors = files["manifest.json"], files["tensors.safetensors"]
    kind = rng.randrange(4)
    if kind == 0:
        return {"manifest.json": changed_bytes(rng, manifest), "tensors.safetensors": tensors}
    content = json.loads(manifest)
    del content["digest"]
    if kind == 1:
        content = changed_meaning(rng, content)
    elif kind == 2:
        tensors = changed_tensors(rng, tensors)
    else:
        tensors = changed_bytes(rng, tensors)
    if kind != 1 and rng.random() < 0.8:
        content["tensors"] = {"bytes": len(tensors), "digest": xxhash.xxh3_128_hexdigest(tensors)}
    return {"manifest.json": signed(content), "tensors.safetensors": tensors}


def changed_settings(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.5:
        return changed_bytes(rng, data)
    try:
        return tomli_w.dumps(changed_meaning(rng, tomllib.loads(data.decode()))).encode(
            "utf-8", "surrogatepass"
        )
    except (TypeError, ValueError, AttributeError):  # What TOML cannot hold.
        return changed_bytes(rng, data)


def either(rng: random.Random, data: bytes) -> bytes:
    """Bytes or meaning."""
    return changed_bytes(rng, data) if rng.random() < 0.5 else changed_json(rng, data)


@dataclass(frozen=True)
class Target:
    """What is fuzzed: its sound files, below `folder`; how they are changed; what reads and then uses them."""

    folder: Path
    files: Files
    change: Callable[[random.Random, Files], Files]
    use: Callable[[], object]
    weight: int

    @classmethod
    def of_file(
        cls,
        file: Path,
        change: Callable[[random.Random, bytes], bytes],
        use: Callable[[], object],
        weight: int,
    ) -> Target:
        """A single file."""
        name = file.name
        return cls(
            file.parent,
            {name: file.read_bytes()},
            lambda rng, files: {name: change(rng, files[name])},
            use,
            weight,
        )

    @classmethod
    def of_bundle(cls, folder: Path, use: Callable[[], object], weight: int) -> Target:
        """A directory of manifest and tensors."""
        files = {name: (folder / name).read_bytes() for name in ("manifest.json", "tensors.safetensors")}
        return cls(folder, files, changed_bundle, use, weight)

    def try_input(self, rng: random.Random) -> str:
        """The outcome of one input: `loaded`, or the name of the error. Anything else is raised."""
        files = self.change(rng, self.files)
        self._write(files)
        began = time.perf_counter()
        try:
            self.use()
            outcome = "loaded"
        except Ep3streamError as error:
            outcome = type(error).__name__
            if not str(error) or len(str(error)) > 2000:
                raise AssertionError(f"an error of {len(str(error))} letters") from error
        finally:
            self._write(self.files)
        if (elapsed_s := time.perf_counter() - began) > MAX_S:
            raise AssertionError(f"{elapsed_s:.1f} s")
        return outcome

    def _write(self, files: Files) -> None:
        for name, data in files.items():
            (self.folder / name).write_bytes(data)


class Subjects:
    """A small store and a fitted run, and what reads their parts."""

    def __init__(self, directory: Path) -> None:
        self.store, self.run = directory / "s.zarr", directory / "nystrom"
        generator = np.random.default_rng(0)
        x = generator.standard_normal((120, 3)).astype(np.float32)
        np.savez(directory / "rows.npz", x=x, y=np.sin(x[:, 0]))
        convert = ConvertConfig(segment_bytes=4096, memory_bytes=1 << 20, codec="lz4")
        ep3stream.convert([directory / "rows.npz"], self.store, convert)
        sizes = {"centers": 12, "model_rank": 4, "data_rank": 2, "batch_size": 8}
        tables = {"kernel": {"name": "laplacian"}, "solver": sizes | {"epochs": 1}}
        tables["run"] = {"memory_bytes": 16 << 20}
        self.config = FitConfig().with_settings(tables, "fuzz")
        self.configs = {"nystrom": self.config}
        for projection in ("exact", "eigenpro"):
            settings = {"solver": {"projection": projection}}
            self.configs[projection] = self.config.with_settings(settings, "fuzz")
        self.runs = {name: directory / name for name in self.configs}
        for name, config in self.configs.items():
            ep3stream.fit(self.store, self.runs[name], config)
        self.x, self.mesh = x[:16], Mesh.of_this_process(CPU)
        self.reader = open_store(self.store).split("train")
        self.setup_digest = file_digest(self.run / "setup" / "manifest.json")
        self.solver = Setup.load(self.run / "setup").solver(self.config, None, self.mesh)

    def targets(self) -> dict[str, Target]:
        """By name."""
        manifest, train = self.store / "manifest.json", self.store / "train"
        parse = lambda: Manifest.from_json(manifest.read_bytes(), "fuzz")  # noqa: E731
        (_, self.checkpoint), *_ = list_checkpoints(self.run / "checkpoints")
        return {
            "manifest": Target.of_file(manifest, either, parse, 30),
            "store": Target.of_file(manifest, changed_json, self.read_store, 10),
            "array metadata": Target.of_file(train / "x" / "zarr.json", changed_array, self.read_store, 5),
            "chunk": Target.of_file(train / "x" / "c" / "0" / "0", changed_bytes, self.read_store, 5),
            "settings": Target.of_file(self.run / "config.toml", changed_settings, self.read_settings, 20),
            **{
                f"set-up, {name}": Target.of_bundle(run / "setup", partial(self.use_setup, name), 5)
                for name, run in self.runs.items()
            },
            "checkpoint": Target.of_bundle(self.checkpoint, self.use_checkpoint, 10),
            "model": Target.of_bundle(self.run / "model", self.use_model, 10),
            "metrics": Target.of_file(self.run / "metrics.jsonl", changed_bytes, self.read_metrics, 5),
        }

    def read_store(self) -> None:
        """All rows, which must be right if the store loads; what is not in `train` is not looked for."""
        with open_store(self.store) as store:
            reader = store.split("train")
            for index in range(reader.info.n_segments):
                reader.read_segment(index)

    def read_settings(self) -> None:
        """As TOML, and written again as TOML that says the same."""
        text = (self.run / "config.toml").read_text(encoding="utf-8", errors="surrogateescape")
        config = FitConfig.from_toml(text, "fuzz")
        assert FitConfig.from_toml(config.to_toml(), "fuzz") == config

    def use_setup(self, projection: str) -> None:
        """As a resumed fit does: the order of an epoch and a step."""
        setup = Setup.load(self.runs[projection] / "setup")
        order = setup.order(self.reader.info, 0)
        assert len(order.segments(0)) == order.n_segments
        solver = setup.solver(self.configs[projection], None, self.mesh)
        inputs, y = setup.inputs(), torch.zeros(16, 1)
        rows = min(16, setup.plan.batch_size)
        solver.step(solver.initial_state(), inputs(torch.from_numpy(self.x[:rows])), y[:rows], 0.1)

    def use_checkpoint(self) -> None:
        """As a resumed fit does: a step."""
        progress = load_checkpoint(self.checkpoint, self.setup_digest, CPU)
        self.solver.step(progress.state, torch.from_numpy(self.x[:8]), torch.zeros(8, 1), 0.1)

    def use_model(self) -> None:
        """A prediction."""
        assert len(ep3stream.load(self.run).predict(self.x)) == len(self.x)

    def read_metrics(self) -> None:
        """Every line that is a record."""
        read_lines(self.run / "metrics.jsonl")


def changed_array(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.5:
        return changed_bytes(rng, data)
    return json.dumps(changed_meaning(rng, json.loads(data))).encode("utf-8", "surrogatepass")


@contextmanager
def limited_memory() -> Iterator[None]:
    """At most `MAX_BYTES` more than this process has now; beyond that, allocations fail with MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(
    directory: Path, n_inputs: int, seed: int, only: str | None = None
) -> tuple[Counter[Any], list[str]]:
    """(target, outcome) -> how many, and a report of each input that ended in neither of the two ways."""
    subjects = Subjects(directory)
    targets, bugs = subjects.targets(), []
    total = sum(target.weight for target in targets.values())
    counts: Counter[tuple[str, str]] = Counter()
    chosen, _, number = (only or "").partition(":")
    with limited_memory(), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for name, target in targets.items():
            if only is not None and name != chosen:
                continue
            numbers = [int(number)] if number else range(-(-n_inputs * target.weight // total))
            for index in numbers:
                try:
                    outcome = target.try_input(random.Random(f"{seed}:{name}:{index}"))
                except Exception as error:
                    outcome = f"BUG {type(error).__name__}"
                    where = "".join(line[:500] for line in traceback.format_exception(error)[-6:])
                    bugs.append(f"--seed {seed} --only '{name}:{index}'\n{where}")
                counts[name, outcome] += 1
    return counts, bugs


def table(counts: Counter[Any]) -> str:
    """Targets down, outcomes across."""
    outcomes = sorted({outcome for _, outcome in counts})
    names = list(dict.fromkeys(name for name, _ in counts))
    rows = [["target", *outcomes, "inputs"]]
    for name in names:
        row = [counts[name, outcome] for outcome in outcomes]
        rows.append([name, *map(str, row), str(sum(row))])
    rows.append(
        ["all", *(str(sum(counts[name, o] for name in names)) for o in outcomes), str(counts.total())]
    )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables", type=int, default=20_000)
    parser.add_argument("--only", metavar="TARGET[:NUMBER]", help="one target, or one of its inputs")
    parser.add_argument("--without", metavar="FIELD,...", default="", help="ways of tables that stay plain")
    options = parser.parse_args(arguments)
    logging.getLogger("ep3stream").setLevel(logging.CRITICAL)
    only, _, number = (options.only or "").partition(":")
    if only == "tables":
        options.inputs = 0
    numbers = [int(number)] if only == "tables" and number else range(options.tables)
    reasons: Counter[str] = Counter()
    shm = Path("/dev/shm")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=shm if shm.is_dir() else None) as directory:
        counts, bugs = Counter[Any](), list[str]()
        if options.inputs:
            counts, bugs = fuzz(Path(directory), options.inputs, options.seed, options.only)
        if only in ("", "tables"):
            (Path(directory) / "tables").mkdir()
            without = frozenset(filter(None, options.without.split(",")))
            found, wrong, reasons = fuzz_tables(Path(directory) / "tables", numbers, options.seed, without)
            counts, bugs = counts + found, bugs + wrong
    print(table(counts))
    print(f"{counts.total()} inputs in {time.perf_counter() - began:.0f} s, {len(bugs)} bugs")
    print("\n".join(f"{count:6}  {words}" for words, count in reasons.most_common(30)))
    print("\n".join(bugs))
    return 1 if bugs else 0


if __name__ == "__main__":
    sys.exit(main())
