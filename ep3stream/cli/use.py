"""`ep3stream evaluate`, `predict`, `export`, `inspect` and `verify`."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any, get_args

from rich.console import Console

from ep3stream.cli.options import (
    RENAME_LIKE,
    UNKNOWN,
    checked,
    command,
    disk_path,
    number_or,
    say,
    store_place,
)
from ep3stream.config import Unknown, parse_bytes, parse_renames
from ep3stream.errors import ConfigError
from ep3stream.run.text import json_text
from ep3stream.store.files import Location

_DAMAGED = 3

_STANDARD = "-"  # Input or output.


def add(commands: Any) -> None:
    """Adds `evaluate`, `predict`, `export`, `inspect` and `verify` to the command line."""
    evaluate = command(
        commands,
        "evaluate",
        _evaluate,
        "score a fit on a split",
        "ep3stream evaluate runs/first flights.zarr",
    )
    predict = command(
        commands,
        "predict",
        _predict,
        "write predictions for every row of a store's split, or of a table",
        "ep3stream predict runs/first new.zarr predictions.npy --split train",
        "ep3stream predict runs/first april.csv predictions.csv",
        "ep3stream predict runs/first - -",
        "ep3stream predict runs/first may.csv predictions.csv --unknown ignore --rename departure=dep_time",
    )
    for each in (evaluate, predict):
        each.add_argument("run", type=disk_path, metavar="RUN")
    evaluate.add_argument("store", type=store_place, metavar="STORE", help="a path, or s3://bucket/key")
    predict.add_argument(
        "rows",
        type=_rows_place,
        metavar="ROWS",
        help="a store, a table (CSV, Parquet ...), or - for CSV on standard input",
    )
    predict.add_argument(
        "out",
        type=disk_path,
        metavar="OUT",
        help=".npy, .h5, or a directory for zarr; of a table .csv, or - for standard output",
    )
    predict.add_argument("--scores", action="store_true", help="outputs of all classes, not the class")
    predict.add_argument("--unknown", choices=get_args(Unknown), help=UNKNOWN)
    predict.add_argument("--rename", type=checked(parse_renames), metavar="OLD=NEW,...", help=RENAME_LIKE)
    for each in (evaluate, predict):
        each.add_argument("--split", metavar="SPLIT", help="default: test, or the store's only one")
        each.add_argument(
            "--devices",
            type=number_or("auto", int),
            default=1,
            metavar="auto|N",
            help="that share the centers, as in fit; default: 1",
        )
    export = command(
        commands,
        "export",
        _export,
        "write a model for programs without ep3stream: safetensors, JSON, and a torch.export program",
        "ep3stream export runs/first flights-model",
    )
    export.add_argument("run", type=disk_path, metavar="RUN")
    export.add_argument("out", type=disk_path, metavar="OUT", help="directory to make")
    inspect = command(
        commands,
        "inspect",
        _inspect,
        "tell what a store or a run holds",
        "ep3stream inspect flights.zarr",
        "ep3stream inspect flights.zarr --order --memory 4GiB",
    )
    inspect.add_argument(
        "--order", action="store_true", help="of a store: how far apart a fit's epoch puts neighbouring rows"
    )
    inspect.add_argument(
        "--memory", type=checked(parse_bytes), metavar="BYTES", help="of that fit; default: 2GiB"
    )
    verify = command(
        commands,
        "verify",
        _verify,
        "read a store or a run whole and check it",
        "ep3stream verify flights.zarr",
    )
    for each in (inspect, verify):
        each.add_argument(
            "path",
            type=store_place,
            metavar="PATH",
            help="of a store or a run, or s3://bucket/key of a store",
        )
    verify.add_argument(
        "--quick", action="store_true", help="sizes and presence only: misses changed bytes, reads no row"
    )
    for each in (evaluate, inspect, verify):
        each.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _rows_place(text: str) -> Location | str:
    """A store's place; `-` stays what it is."""
    return text if text == _STANDARD else store_place(text)


def _evaluate(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.inspection.describe import describe_evaluation
    from ep3stream.prediction.evaluate import evaluate
    from ep3stream.reporting.report import write_report

    scores = evaluate(options.run, options.store, options.split, devices=options.devices)
    write_report(options.run)
    print(json_text(scores) if options.json else describe_evaluation(scores))


def _predict(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.prediction.evaluate import predict
    from ep3stream.prediction.tables import is_table, predict_tables
    from ep3stream.run.directory import RunDirectory

    RunDirectory(options.run.absolute()).require()  # First, since it is also what a table given first is not.
    if is_table(options.rows):
        if options.split is not None:
            raise ConfigError(f"split is {options.split}, but a table has no splits; leave it out")
        n_rows = predict_tables(
            options.run, options.rows, options.out, options.scores, options.unknown or "error", options.rename
        )
    elif options.unknown or options.rename:
        raise ConfigError(
            f"{'unknown' if options.unknown else 'rename'} is for tables, but {options.rows} is a store; "
            "give it to `convert --like`"
        )
    elif str(options.out) == _STANDARD or options.out.suffix.lower() == ".csv":
        raise ConfigError(
            f"OUT is {options.out}, but predictions of a store are .npy or a store; choose such a name, or give a table"
        )
    else:
        n_rows = predict(
            options.run,
            options.rows,
            options.out,
            options.split,
            scores=options.scores,
            devices=options.devices,
        )
    place = "on standard output" if str(options.out) == _STANDARD else f"in {options.out}"
    say(console, f"{n_rows} predictions {place}")


def _export(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.prediction.models import export

    say(console, f"model in {export(options.run, options.out)}")


def _inspect(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.inspection.describe import describe_path
    from ep3stream.inspection.inspect import inspect

    if options.order:
        from ep3stream.inspection.inspect import describe_order, order_report

        report = order_report(options.path, options.memory)
        print(json_text(report) if options.json else describe_order(report))
    elif options.json:
        print(json_text(inspect(options.path)))
    else:
        print(describe_path(options.path, width=Console().width, is_terminal=sys.stdout.isatty()))


def _verify(options: argparse.Namespace, console: Console) -> int:
    from ep3stream.cli.progress import verify_bar
    from ep3stream.inspection.describe import describe_soundness
    from ep3stream.inspection.inspect import verify
    from ep3stream.store.verify import VerifyProgress

    read = VerifyProgress(0, 0, 0.0)
    began = time.perf_counter()
    with verify_bar(console) as show:

        def note(now: VerifyProgress) -> None:
            nonlocal read
            read = now
            show(now)

        problems = verify(options.path, quick=options.quick, progress=note)
    elapsed_s = time.perf_counter() - began
    if options.json:
        verdict = {"path": str(options.path), "sound": not problems, "problems": problems}
        cost = {"quick": options.quick, "bytes_read": read.bytes_read, "elapsed_s": elapsed_s}
        print(json_text(verdict | cost))
    else:
        sound = describe_soundness(options.path, None if options.quick else read.bytes_read, elapsed_s)
        print("\n".join(" ".join(problem.split()) for problem in problems) or sound)
    return _DAMAGED if problems else 0
