"""`ep3stream evaluate`, `predict` and `export`: what is done with the model of a run."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from rich.console import Console

from ep3stream.cli.console import say
from ep3stream.cli.options import (
    add_command,
    add_json,
    add_read_timeout,
    add_run,
    add_store,
    checked,
    disk_path,
    given_settings,
    number_or,
    store_place,
)
from ep3stream.config import (
    PARTITIONS_HELP,
    RENAME_LIKE_HELP,
    UNKNOWN_HELP,
    RunConfig,
    Unknown,
    parse_renames,
)
from ep3stream.errors import ConfigError
from ep3stream.run.text import json_text
from ep3stream.store.files import Location

_STANDARD = "-"  # Standard input, or output.


def add_evaluate(commands: Any) -> None:
    """Adds `evaluate` to the command line."""
    parser = add_command(
        commands,
        "evaluate",
        _evaluate,
        "score a fit on a split",
        "ep3stream evaluate runs/first flights.zarr",
    )
    add_run(parser)
    add_store(parser)
    _add_split_and_devices(parser)
    add_read_timeout(parser)
    add_json(parser)


def _evaluate(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.inspection.describe import describe_evaluation
    from ep3stream.prediction.evaluate import evaluate
    from ep3stream.reporting.report import write_report

    more = given_settings(options, RunConfig, "run")
    scores = evaluate(options.run, options.store, options.split, devices=options.devices, **more)
    write_report(options.run)
    print(json_text(scores) if options.json else describe_evaluation(scores))


def add_predict(commands: Any) -> None:
    """Adds `predict` to the command line."""
    parser = add_command(
        commands,
        "predict",
        _predict,
        "write predictions for every row of a store's split, or of a table",
        "ep3stream predict runs/first new.zarr predictions.npy --split train",
        "ep3stream predict runs/first april.csv predictions.csv",
        "ep3stream predict runs/first 'months/*.parquet' predictions.csv",
        "ep3stream predict runs/first - -",
        "ep3stream predict runs/first may.csv predictions.csv --unknown ignore --rename departure=dep_time",
    )
    add_run(parser)
    parser.add_argument(
        "rows",
        type=_rows_place,
        nargs="+",
        metavar="ROWS",
        help="a store; tables (CSV, Parquet ...), directories of them or patterns; or - for CSV on standard input",
    )
    parser.add_argument(
        "out",
        type=disk_path,
        metavar="OUT",
        help=".npy, .h5, or a directory for zarr; of a table .csv, or - for standard output",
    )
    parser.add_argument("--scores", action="store_true", help="outputs of all classes, not the class")
    parser.add_argument("--unknown", choices=get_args(Unknown), help=f"{UNKNOWN_HELP}; default: error")
    parser.add_argument("--rename", type=checked(parse_renames), metavar="OLD=NEW,...", help=RENAME_LIKE_HELP)
    parser.add_argument("--partitions", action="store_true", help=PARTITIONS_HELP)
    _add_split_and_devices(parser)
    add_read_timeout(parser)


def _predict(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.prediction.predict import is_table, predict, predict_tables
    from ep3stream.run.directory import RunDirectory

    # First of all, since a table given in the place of the run is no run.
    RunDirectory(options.run.absolute()).require()
    if len(options.rows) > 1 or is_table(options.rows[0]):
        if options.split is not None:
            raise ConfigError(f"split is {options.split}, but a table has no splits; leave it out")
        n_rows = predict_tables(
            options.run,
            options.rows,
            options.out,
            options.scores,
            options.unknown or "error",
            options.rename,
            options.partitions,
        )
    elif given := [name for name in ("unknown", "rename", "partitions") if getattr(options, name)]:
        raise ConfigError(
            f"{given[0]} is for tables, but {options.rows[0]} is a store; give it to `convert --like`"
        )
    elif str(options.out) == _STANDARD or options.out.suffix.lower() == ".csv":
        raise ConfigError(
            f"OUT is {options.out}, but predictions of a store are .npy or a store; choose such a name, or give a table"
        )
    else:
        n_rows = predict(
            options.run,
            options.rows[0],
            options.out,
            options.split,
            scores=options.scores,
            devices=options.devices,
            **given_settings(options, RunConfig, "run"),
        )
    place = "on standard output" if str(options.out) == _STANDARD else f"in {options.out}"
    say(console, f"{n_rows} predictions {place}")


def add_export(commands: Any) -> None:
    """Adds `export` to the command line."""
    parser = add_command(
        commands,
        "export",
        _export,
        "write a model for programs without ep3stream: safetensors, JSON, and a torch.export program",
        "ep3stream export runs/first flights-model",
    )
    add_run(parser)
    parser.add_argument("out", type=disk_path, metavar="OUT", help="directory to make")


def _export(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.prediction.models import export

    say(console, f"model in {export(options.run, options.out)}")


def _add_split_and_devices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", metavar="SPLIT", help="default: test, or the store's only one")
    parser.add_argument(
        "--devices",
        type=number_or("auto", int),
        default=1,
        metavar="auto|N",
        help="that share the centers, as in fit; default: 1",
    )


def _rows_place(text: str) -> Location | str:
    return text if text == _STANDARD else store_place(text)
