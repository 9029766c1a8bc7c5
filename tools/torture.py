"""Fits that are killed, stopped, refused by the disk and robbed of checkpoints end with the model of one left alone.

    python tools/torture.py [--kills 200] [--terms 50] [--full-disks 50] [--damages 300] [--seed 0] [--directory .bench]

Each trial is a run of the real command, on a Zarr and on an HDF5 store by turns, in a process of its own, forked from
one that has loaded the libraries. It is struck, once or more often, and the same command goes on until it is done:

    kill, SIGTERM   half at any moment since the run was locked; half in a save: before one of the operations of
                    `ep3stream.disk` on a checkpoint, or inside its `write`
    disk full       from such an operation on, for a while or for good, nothing can be written
    file limit      the same by RLIMIT_FSIZE: files longer than a part of some file of the run are cut there and refused
    damage          to one or more files of the checkpoints of a stopped run

`lost`: the run could not be finished, or did not go on from its newest sound checkpoint, or this lay behind one that it
had told to be saved. `wrong`: a model of other bytes, a checkpoint half written, a damaged one used or passed over
without a word, or another exit code than the one promised. Ends with 1 unless all runs are `identical`.

A trial is a function of the seed, but for the moment at which a signal meets the process. Results are kept: the same
command goes on where it was stopped, or begins anew if the package has changed. Runs that went wrong are kept, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

# Before torch is loaded: a process with threads should not fork.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import xxhash
from faults import (
    DAMAGES,
    LIMIT_S,
    Command,
    Hung,
    at_point,
    damage,
    fill_disk,
    limit_files,
    strike,
    watch_saves,
)

import ep3stream
import ep3stream.cli.progress
import ep3stream.conversion.convert
import ep3stream.training.fit
from ep3stream.errors import DamagedDataError, Ep3streamError
from ep3stream.reporting.report import compiled
from ep3stream.run.bundle import check_bundle
from ep3stream.run.event_log import read_lines
from ep3stream.run.state import list_checkpoints

SUFFIXES = (".zarr", ".h5")
FIT = [*("--centers", 300, "--model-rank", 30, "--nystrom-samples", 300, "--batch-size", 32)]
FIT += ["--epochs", 1, "--checkpoint-steps", 5, "--validate", "none", "--kernel", "laplacian"]
VERDICTS = ("lost", "wrong", "identical")
Hit = tuple[str, int]  # Where a blow came, and the exit code.
Blow = tuple[str, int, str]  # And what was said.


class Lost(Exception):
    """The run, or work that it had told to be saved."""


class Wrong(Exception):
    """A result, a word or an exit code."""


# --- what the trials of one store have in common ---


@dataclass(frozen=True, slots=True)
class Subject:
    """A store, and the fit on it that was left alone.

    sizes: of the files of its run; n_points: how often it met `watch_saves`; stopped: a run with checkpoints.
    """

    store: Path
    model: dict[str, bytes]
    sizes: list[int]
    working_s: float
    n_points: int
    stopped: Path


def make_subject(directory: Path, suffix: str) -> Subject:
    directory = directory / f"subject{suffix}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    store, run, mark = directory / f"rows{suffix}", directory / "reference", directory / "mark"
    generator = np.random.default_rng(0)
    x = generator.standard_normal((3000, 5), dtype=np.float32)
    np.save(directory / "x.npy", x)
    np.save(directory / "y.npy", np.stack([np.sin(x[:, 0]) + x[:, 1] * x[:, 2], np.cos(x[:, 3])], 1))
    sources = ["--x", directory / "x.npy", "--y", directory / "y.npy", "--segment-bytes", "8KiB"]
    require_code(Command("--quiet", "convert", *sources, store).end(), 0)
    mark.touch()

    def count(where: str) -> None:
        with mark.open("a") as file:
            file.write(".")  # One byte a point.

    began = time.monotonic()
    require_code(fit(store, run, partial(watch_saves, count)).end(), 0)
    working_s, n_points = time.monotonic() - began, mark.stat().st_size
    stopped = directory / "stopped"
    # As the first save begins: two checkpoints, that one and the signal's, however slow the disk is.
    stop = partial(at_point, 1, directory / "stop", partial(strike, signal.SIGTERM))
    require_code(fit(store, stopped, stop).end(), 75)
    sizes = sorted(file.stat().st_size for file in run.rglob("*") if file.is_file())
    return Subject(store, model_of(run), sizes, working_s, n_points, stopped)


def fit(store: Path, run: Path, before: Callable[[], None] = lambda: None) -> Command:
    return Command("--quiet", "fit", store, run, *FIT, before=before)


def require_code(end: tuple[int, str], *codes: int) -> str:
    """What was said in the end; Wrong if the exit code is another than these."""
    code, said = end
    if code not in codes:
        raise Wrong(f"exit code {code}: {said}")
    return said


# --- signals and full disks ---


def at_any_moment(subject: Subject, run: Path, dice: random.Random, number: signal.Signals) -> Blow | None:
    process, lock = fit(subject.store, run), run / "lock"
    held, deadline = b'"pid": %d,' % process.pid, time.monotonic() + LIMIT_S
    while not (lock.exists() and held in lock.read_bytes()) and time.monotonic() < deadline:
        if process.is_over_after(0.001):
            break
    if process.is_over_after(dice.uniform(0, subject.working_s)):
        require_code(process.end(), 0)
        return None
    where = stage_of(run)
    os.kill(process.pid, number)
    code, said = process.end()
    return (where, code, said) if code else None  # It may have ended meanwhile.


def stage_of(run: Path) -> str:
    """What a fit is at."""
    if (run / "model").exists() or (run / ".model.partial").exists():
        return "ending"
    if any((run / "checkpoints").glob(".*")):
        return "saving"
    return "stepping" if (run / "setup").exists() else "set-up"


def in_a_save(subject: Subject, run: Path, dice: random.Random, number: signal.Signals) -> Blow | None:
    return with_fault(subject, run, dice, partial(strike, number))


def with_disk_full(subject: Subject, run: Path, dice: random.Random) -> Blow | None:
    return with_fault(subject, run, dice, partial(fill_disk, dice.choice((1, 3, 10, 10**9))))


def with_file_limit(subject: Subject, run: Path, dice: random.Random) -> Blow | None:
    return with_fault(subject, run, dice, partial(limit_files, dice.randint(0, dice.choice(subject.sizes))))


def with_fault(
    subject: Subject, run: Path, dice: random.Random, happen: Callable[[str], None]
) -> Blow | None:
    mark = run.with_name("mark")
    mark.unlink(missing_ok=True)
    point = dice.randint(1, subject.n_points)
    end = fit(subject.store, run, partial(at_point, point, mark, happen)).end()
    if mark.exists():
        return mark.read_text(), *end
    require_code(end, 0)
    return None


def struck(
    subject: Subject,
    run: Path,
    dice: random.Random,
    blow: Callable[[Subject, Path, random.Random], Blow | None],
    codes: tuple[int, ...],
) -> list[Hit]:
    """Strikes a run up to three times, then lets it end; `codes`: those with which a blow may end."""
    hits: list[Hit] = []
    wanted = dice.choice((1, 1, 1, 2, 2, 3))
    while len(hits) < wanted:
        hit = blow(subject, run, dice)
        if hit is None and hits:
            break
        if hit is None:
            shutil.rmtree(run)  # It ended before the blow came.
            continue
        where, code, said = hit
        hits.append((where, code))
        if code not in codes:
            raise Wrong(f"exit code {code}, struck at {where}: {said}")
        require_kept(run)
    go_on(subject, run, newest_of(run))
    return hits


def require_kept(run: Path) -> None:
    """Lost if a checkpoint that was told to be saved is not there, nor a newer one; Wrong if one is not sound."""
    for _, path in list_checkpoints(run / "checkpoints"):
        try:
            check_bundle(path, "checkpoint")
        except DamagedDataError as error:
            raise Wrong(f"left a checkpoint half written: {error}") from error
    lines = read_lines(run / "metrics.jsonl")
    told = max((line["step"] for line in lines if line.get("event") == "checkpoint"), default=0)
    if newest_of(run) < told:
        raise Lost(f"the checkpoint of step {told} was told to be saved; there is {newest_of(run)}")


def newest_of(run: Path) -> int:
    return max((step for step, _ in list_checkpoints(run / "checkpoints")), default=0)


def go_on(subject: Subject, run: Path, expected: int) -> str:
    """Lets the run end, and compares; Lost unless it goes on from step `expected`. What it said."""
    n_before = len(beginnings(run))
    code, said = fit(subject.store, run).end()
    if code:
        raise Lost(f"cannot go on, exit code {code}: {said}")
    began = beginnings(run)[n_before:]  # Nothing if it was finished.
    if began not in ([], [expected]):
        error = Wrong if began > [expected] else Lost
        raise error(f"went on from step {began}, not from {expected}: {said}")
    if model_of(run) != subject.model:
        raise Wrong(f"the model differs from {subject.store}'s: {said}")
    return said


def beginnings(run: Path) -> list[int]:
    """The steps from which its processes started or resumed."""
    lines = read_lines(run / "metrics.jsonl")
    return [line["step"] for line in lines if line.get("event") in ("start", "resume")]


def model_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "model").glob("*")}


# --- damage ---


def damaged(subject: Subject, run: Path, dice: random.Random) -> list[Hit]:
    """Damages one checkpoint or more of a copied run, which must go on from the newest that is as it was."""
    before = contents(subject.stopped)
    names: list[str] = []
    wanted = dice.choice((1, 1, 1, 1, 2, 4))
    while len(names) < wanted or contents(run) == before:
        if not names:
            shutil.copytree(subject.stopped, run, dirs_exist_ok=True)
        files = [file for file in sorted((run / "checkpoints").glob("*/*")) if file.stat().st_size]
        if len(files) < 2:
            break
        names.append(dice.choice(DAMAGES))
        damage(names[-1], dice, *dice.sample(files, 2))
    paths = [path for _, path in list_checkpoints(run / "checkpoints")]
    sound = [path for path in paths if is_as_it_was(path, subject.stopped / "checkpoints" / path.name)]
    if sound:
        code, passed_over = 0, paths[: paths.index(sound[0])]
        said = go_on(subject, run, int(sound[0].name.removeprefix("step-")))
    else:
        code, passed_over = 3, paths
        said = require_code(fit(subject.store, run).end(), 3)
        shutil.rmtree(run / "checkpoints")
        go_on(subject, run, 0)
    if silent := [path.name for path in passed_over if str(path) not in said]:
        raise Wrong(f"no word about the damage to {silent} in: {said}")
    return [(names[0] if len(names) == 1 else "several", code)]


def is_as_it_was(path: Path, original: Path) -> bool:
    """Byte for byte, or for a reader, who does not see a change of spelling in a manifest."""
    try:
        same = check_bundle(path, "checkpoint") == check_bundle(original, "checkpoint")
    except Ep3streamError:
        return False
    return same and contents(path)["tensors.safetensors"] == contents(original)["tensors.safetensors"]


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


# --- all of them ---

KILL, TERM = signal.SIGKILL, signal.SIGTERM
Trial = Callable[[Subject, Path, random.Random], list[Hit]]


def blows(blow: Callable[..., Blow | None], *codes: int, **options: object) -> Trial:
    """`codes`: the exit codes that a blow may end with."""
    return partial(struck, blow=partial(blow, **options), codes=codes)


# Which option says how many there are, and what one of them is.
KINDS: dict[str, tuple[str, Trial]] = {
    "kill, any moment": ("kills", blows(at_any_moment, -KILL, number=KILL)),
    "kill, in a save": ("kills", blows(in_a_save, -KILL, number=KILL)),
    "SIGTERM, any moment": ("terms", blows(at_any_moment, 75, number=TERM)),
    "SIGTERM, in a save": ("terms", blows(in_a_save, 75, 0, number=TERM)),
    "disk full": ("full_disks", blows(with_disk_full, 2, 0)),
    "file limit": ("full_disks", blows(with_file_limit, 2, 0)),
    "damage": ("damages", damaged),
}


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one trial; `why`, unless it is identical."""

    verdict: str
    why: str
    hits: list[Hit]

    @classmethod
    def of(cls, verdict: str, why: str, hits: list[list[Any]]) -> Result:
        """As JSON gives it back."""
        return cls(verdict, why, [(where, code) for where, code in hits])


def try_one(kind: str, number: int, seed: int, subjects: list[Subject], directory: Path) -> Result:
    """One trial; its run is removed unless something is wrong with it."""
    run = directory / f"{kind.replace(' ', '-').replace(',', '')}-{number}"
    shutil.rmtree(run, ignore_errors=True)
    dice, subject = random.Random(f"{seed}/{kind}/{number}"), subjects[number % len(subjects)]
    try:
        hits = KINDS[kind][1](subject, run, dice)
    except (Hung, Lost, Wrong) as error:
        verdict = "wrong" if isinstance(error, Wrong) else "lost"
        return Result(verdict, f"{run}: {error!r}", [])
    shutil.rmtree(run)
    return Result("identical", "", hits)


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    directory = (options.directory / f"torture-{options.seed}").absolute()
    results = read_results(directory / "results.json")
    compiled("report.html.jinja")  # For all processes that are forked.
    subjects = [make_subject(directory, suffix) for suffix in SUFFIXES]
    verdicts = "".join(f"{verdict:>11}" for verdict in VERDICTS)
    print(f"{'':<21}{'runs':>5}{'blows':>7}{verdicts}   blows by place; by exit code", flush=True)
    all_of_them: list[Result] = []
    for kind, n_trials in numbers(options).items():
        tried = results.setdefault(kind, [])
        while len(tried) < n_trials:
            tried.append(try_one(kind, len(tried), options.seed, subjects, directory))
            write_results(directory / "results.json", results)
        all_of_them += tried[:n_trials]
        hits = [hit for result in tried[:n_trials] for hit in result.hits]
        places, codes = (counted(hit[index] for hit in hits) for index in (0, 1))
        print(f"{row(kind, tried[:n_trials])}   {places}; {codes}", flush=True)
    print(row("all", all_of_them))
    for result in all_of_them:
        if result.verdict != "identical":
            print(f"{result.verdict}: {result.why}")
    return int(any(result.verdict != "identical" for result in all_of_them))


def row(kind: str, results: list[Result]) -> str:
    verdicts = Counter(result.verdict for result in results)
    n_hits = sum(len(result.hits) for result in results)
    return f"{kind:<21}{len(results):>5}{n_hits:>7}" + "".join(f"{verdicts[name]:>11}" for name in VERDICTS)


def counted(values: Iterable[object]) -> str:
    return ", ".join(f"{value} {n}" for value, n in Counter(values).most_common())


def numbers(options: argparse.Namespace) -> dict[str, int]:
    """Trials of each kind; those of one option share its number."""
    by_option: dict[str, list[str]] = defaultdict(list)
    for kind, (option, _) in KINDS.items():
        by_option[option].append(kind)
    return {
        kind: (getattr(options, option) + index) // len(kinds)
        for option, kinds in by_option.items()
        for index, kind in enumerate(kinds)
    }


def read_results(file: Path) -> dict[str, list[Result]]:
    """Those of earlier calls, if the package is the same; else none, and an empty directory."""
    if file.exists() and (content := json.loads(file.read_text()))["package"] == package_digest():
        return {kind: [Result.of(*result) for result in tried] for kind, tried in content["results"].items()}
    shutil.rmtree(file.parent, ignore_errors=True)
    file.parent.mkdir(parents=True)
    return {}


def write_results(file: Path, results: dict[str, list[Result]]) -> None:
    content = {kind: [astuple(result) for result in tried] for kind, tried in results.items()}
    partly = file.with_suffix(".partial")
    partly.write_text(json.dumps({"package": package_digest(), "results": content}))
    partly.replace(file)


@cache
def package_digest() -> str:
    """Of the package's sources, when first asked."""
    sources = sorted(Path(ep3stream.__file__).parent.rglob("*.py"))
    return xxhash.xxh3_128(b"".join(map(Path.read_bytes, sources))).hexdigest()


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", default=200, type=int)
    parser.add_argument("--terms", default=50, type=int)
    parser.add_argument("--full-disks", default=50, type=int)
    parser.add_argument("--damages", default=300, type=int)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--directory", default=Path(".bench"), type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
