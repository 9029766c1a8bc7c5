"""Real tables: ep3stream out of the box beside what people would use instead.

    python tools/bench_tables.py [--tables flights,places] [--minutes 10] [--only fits] [--docs docs/tables.md]

The tables are those of tools/table_data.py, which makes them at the first call. All methods see the same rows; `test`
is for the scores alone: R2 where a number is predicted, accuracy where a class is.

    ep3stream            `convert` and `fit STORE RUN`, without any option but `--split-file` and those of --fit-options
    ep3stream, N min     `fit STORE RUN --minutes N`; left out with --minutes 0
    estimator            `KernelRegressor()` or `KernelClassifier()` on the frame of train and validation, of which it
                         holds a tenth out itself
    the peers            of tools/table_peers.py: LightGBM, XGBoost, ridge; neighbours and a forest for few columns

Prints a line a method. --json FILE keeps the results: tables and methods of this call replace their older ones, so
that tables can be run one at a time. --docs writes the results of that file into the page; with --tables none that is
all that happens. Seconds are those of training: of ep3stream the command `fit` from its start to its end; of the
others the training alone, on arrays in memory. --clock cpu prints the processor's seconds, which other work on the
machine changes less. Libraries that are not installed are left out: `pip install 'ep3stream[bench]'`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from table_data import DIRECTORY, SPLITS, TABLES, table_files
from table_peers import PEERS, Rows

from ep3stream import KernelClassifier, KernelRegressor

BEGIN, END = "<!-- results: written by tools/bench_tables.py --docs -->", "<!-- end of results -->"


@dataclass(frozen=True, slots=True)
class Result:
    """A method's score on `test`, and what its training took; the note says how large it became, or why it failed."""

    score: float | None
    seconds: float
    cpu_seconds: float
    note: str = ""


@dataclass(slots=True)
class Clock:
    """Seconds since it was made: wall, and the processor's of this process and of those that it started."""

    began: float
    used: float

    @classmethod
    def start(cls) -> Clock:
        """A clock at 0."""
        return cls(time.perf_counter(), processor_seconds())

    def seconds(self) -> tuple[float, float]:
        """Wall and processor seconds since the start."""
        return time.perf_counter() - self.began, processor_seconds() - self.used


def processor_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main() -> int:
    options = arguments()
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    for name in options.tables:
        entry = results.setdefault(name, {"methods": {}})
        files = table_files(name, options.directory)
        rows = Rows.of(files, TABLES[name].target, TABLES[name].task)
        entry |= described(name, rows)
        print(f"{name}: {entry['rows']}; {entry['columns']}; {entry['measure']}", flush=True)
        for method, result in measured(name, files, rows, options):
            entry["methods"][method] = asdict(result)
            print(f"    {method:<20} {text_of(asdict(result), options.clock)}  {result.note}", flush=True)
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.docs:
        write_docs(options.docs, page_table(results, options.clock))
    return 0


def described(name: str, rows: Rows) -> dict[str, str]:
    """What stands beside the scores of a table."""
    n_categories = len(rows.x["train"].select_dtypes("category").columns)
    measure = f"accuracy, {rows.n_classes} classes" if rows.n_classes else "R2"
    return {
        "rows": f"{len(rows.y['train']):,} + {len(rows.y['validation']):,} + {len(rows.y['test']):,}",
        "columns": f"{rows.x['train'].shape[1] - n_categories} numbers, {n_categories} categories",
        "measure": f"{measure} of {TABLES[name].target}",
    }


def measured(
    name: str, files: dict[str, Path], rows: Rows, options: argparse.Namespace
) -> Iterator[tuple[str, Result]]:
    """Every method in turn, and its result."""
    if options.only in (None, "ours", "fits"):
        yield from ours(name, files, options)
    if options.only in (None, "ours", "estimator"):
        yield "estimator", estimator(rows, options.threads)
    if options.only in (None, "peers"):
        for method, train in PEERS.items():
            if result := peer(train, rows, options.threads):
                yield method, result


def ours(name: str, files: dict[str, Path], options: argparse.Namespace) -> Iterator[tuple[str, Result]]:
    """The three commands, by default and with `--minutes`."""
    directory = options.directory / name
    store = directory / "table.zarr"
    shutil.rmtree(store, ignore_errors=True)
    words = ["--target", TABLES[name].target]
    words += [f"--split-file={split}={files[split]}" for split in SPLITS[1:]]
    clock = Clock.start()
    ended = command(options.threads, "convert", files["train"], store, *words)
    if ended.returncode:
        yield "convert", Result(None, *clock.seconds(), note=reason(ended))
        return
    yield "convert", Result(None, *clock.seconds(), note=f"{directory_bytes(store) / 1e6:.1f} MB")
    fits = {"ep3stream": []}
    if options.minutes:
        fits[f"ep3stream, {options.minutes:g} min"] = ["--minutes", f"{options.minutes:g}"]
    for method, extra in fits.items():
        run = directory / method.replace(", ", "-").replace(" ", "-")
        shutil.rmtree(run, ignore_errors=True)
        clock = Clock.start()
        ended = command(options.threads, "fit", store, run, *extra, *options.fit_options)
        seconds = clock.seconds()
        if ended.returncode == 0:
            ended = command(options.threads, "evaluate", run, store, "--split", "test", "--json")
        if ended.returncode:
            yield method, Result(None, *seconds, note=reason(ended))
            continue
        scores = json.loads(ended.stdout)
        yield method, Result(scores.get("accuracy", scores.get("r2")), *seconds)


def estimator(rows: Rows, threads: int) -> Result:
    """A scikit-learn estimator at its defaults."""
    torch.set_num_threads(threads)
    parts = [rows.x[split] for split in SPLITS[:2]]
    made = KernelClassifier(random_state=0) if rows.n_classes else KernelRegressor(random_state=0)
    clock = Clock.start()
    made.fit(pd.concat(parts, ignore_index=True), np.concatenate([rows.y[split] for split in SPLITS[:2]]))
    seconds = clock.seconds()
    return Result(
        rows.score(made.predict(rows.x["test"])), *seconds, note=f"{len(made.model_.centers)} centers"
    )


def command(threads: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """`ep3stream ...` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ep3stream", *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )


def reason(ended: subprocess.CompletedProcess[str]) -> str:
    """The last line of a failed command."""
    return (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]


def directory_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def peer(train: Callable[..., Any], rows: Rows, threads: int) -> Result | None:
    """The result of one of PEERS; None where it is not installed or not for such a table."""
    clock = Clock.start()
    try:
        predict, note = train(rows, threads)
    except ImportError:
        return None
    if predict is None:
        return None
    seconds = clock.seconds()
    return Result(rows.score(predict(rows.x["test"])), *seconds, note=note)


def text_of(result: dict[str, Any] | None, clock: str) -> str:
    """A score and its seconds; `-` where there is none."""
    if result is None:
        return "-"
    score = "" if result["score"] is None else f"{result['score']:.4f} ".replace("0.", ".", 1)
    seconds = result["seconds" if clock == "wall" else "cpu_seconds"]
    return f"{score}({seconds:.0f} s)" if seconds >= 10 else f"{score}({seconds:.1f} s)"


def page_table(results: dict[str, Any], clock: str) -> str:
    """The results as a table of Markdown, the tables in the order of TABLES, with every method that has a result."""
    present = {method for entry in results.values() for method in entry["methods"]}
    timed = sorted(method for method in present if method.startswith("ep3stream, "))
    methods = [name for name in ("convert", "ep3stream", *timed, "estimator", *PEERS) if name in present]
    lines = [
        f"| table | rows | columns | measure | {' | '.join(methods)} |",
        "|---" * (4 + len(methods)) + "|",
    ]
    for name in (name for name in TABLES if name in results):
        entry = results[name]
        cells = [text_of(entry["methods"].get(method), clock) for method in methods]
        known = (name, entry["rows"], entry["columns"], entry["measure"], *cells)
        lines.append(f"| {' | '.join(known)} |")
    return "\n".join(lines)


def write_docs(page: Path, table: str) -> None:
    """Puts the table between the page's two marks. Raises ValueError where the page lacks them."""
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks the lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def table_names(text: str) -> list[str]:
    names = [] if text == "none" else text.split(",")
    if unknown := set(names) - set(TABLES):
        raise argparse.ArgumentTypeError(
            f"no such table: {', '.join(sorted(unknown))}; take of {', '.join(TABLES)}"
        )
    return names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", default=list(TABLES), type=table_names, metavar="NAME,...|none")
    parser.add_argument("--minutes", default=10.0, type=float, help="of the second fit; 0 for none")
    parser.add_argument("--only", choices=("ours", "fits", "estimator", "peers"))
    parser.add_argument("--fit-options", default=[], type=str.split, help="of every fit, in one text")
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--directory", default=DIRECTORY, type=Path)
    parser.add_argument("--json", default=DIRECTORY / "results.json", type=Path)
    parser.add_argument("--docs", type=Path, metavar="PAGE")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
