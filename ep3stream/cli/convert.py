"""`ep3stream convert`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from ep3stream.cli.options import RENAME_LIKE, UNKNOWN, checked, command, given, say
from ep3stream.config import (
    Categories,
    Codec,
    ConvertConfig,
    Format,
    Missing,
    Task,
    Unknown,
    XDtype,
    parse_bytes,
    parse_names,
    parse_renames,
    parse_splits,
)
from ep3stream.errors import ConfigError
from ep3stream.store.files import location


def add(commands: Any) -> None:
    """Adds `convert` to the command line."""
    convert = command(
        commands,
        "convert",
        _convert,
        "turn tables or arrays into a store",
        "ep3stream convert flights.csv flights.zarr --target delay --split train=0.9,test=0.1",
        "ep3stream convert months/ 'late/*.parquet' all.zarr --target delay --missing mean --drop id",
        "ep3stream convert april.csv april.zarr --like flights.zarr",
        "ep3stream convert may.csv may.zarr --like flights.zarr --unknown ignore --rename departure=dep_time",
        "ep3stream convert rows.svmlight rows.zarr --features 1000 --index-base 0",
        "ep3stream convert arrays.npz arrays.h5",
        "ep3stream convert --x x.npy --y y.npy rows.zarr --no-shuffle",
        "ep3stream convert rows.npz s3://bucket/rows.zarr",
        "ep3stream convert --x sky.h5:/train/images --y sky.h5:/train/labels sky.zarr",
    )
    convert.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="SOURCE... STORE",
        help="files, directories or patterns of CSV, TSV (also .gz, .zst, .zip), Parquet, Arrow, Feather or svmlight; "
        "or one .npz, HDF5 or Zarr with arrays x and y; the last one is the store to make, a path or s3://bucket/key",
    )
    convert.add_argument(
        "--x",
        type=Path,
        metavar="ARRAY",
        help="the inputs, (n, ...): FILE.npy, FILE.npz:NAME, FILE.h5:/PATH, STORE.zarr/PATH, an idx file",
    )
    convert.add_argument("--y", type=Path, metavar="ARRAY", help="the targets, (n,) or (n, c)")
    convert.add_argument(
        "--features", type=int, metavar="N", help="of svmlight files; default: counted in a first pass"
    )
    convert.add_argument(
        "--index-base", type=int, choices=(0, 1), help="of the first feature of svmlight files; default: 1"
    )
    convert.add_argument(
        "--target",
        type=checked(parse_names),
        metavar="COL,...",
        help="column to predict, or several of numbers",
    )
    convert.add_argument("--task", choices=get_args(Task), help="default: by the type of the target")
    _add_columns(convert)
    convert.add_argument(
        "--split", type=checked(parse_splits), metavar="NAME=FRACTION,...", help="default: train=1"
    )
    convert.add_argument(
        "--format", choices=get_args(Format), help="default: hdf5 for .h5 and .hdf5, else zarr"
    )
    convert.add_argument("--dtype", choices=get_args(XDtype), help="of the stored inputs; default: float32")
    convert.add_argument(
        "--codec",
        choices=get_args(Codec),
        help="of a zarr store; default: auto, which is lz4 where a sample shrinks by a fifth, else none",
    )
    convert.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        help="put the rows in random order; default: yes, but not with --like and one split",
    )
    convert.add_argument("--seed", type=int, metavar="N", help="of splits and shuffle; default: 0")
    convert.add_argument("--memory", type=checked(parse_bytes), metavar="BYTES", help="default: 1GiB")
    convert.add_argument(
        "--segment-bytes",
        type=checked(parse_bytes),
        metavar="BYTES",
        help="read and checked together; default: 16MiB",
    )
    convert.add_argument(
        "--work",
        type=Path,
        metavar="DIRECTORY",
        help="where a store for s3:// is made before it is uploaded; default: here",
    )
    convert.add_argument(
        "--restart", action="store_true", help="begin again what was left unfinished, with other settings too"
    )


def _add_columns(convert: argparse.ArgumentParser) -> None:
    names = checked(parse_names)
    convert.add_argument(
        "--columns", type=names, metavar="COL,...", help="the features, in this order; patterns like px_* too"
    )
    convert.add_argument("--drop", type=names, metavar="COL,...", help="columns to leave out; patterns too")
    convert.add_argument(
        "--rename",
        type=checked(parse_renames),
        metavar="OLD=NEW,...",
        help="in the store; with --like: " + RENAME_LIKE,
    )
    convert.add_argument(
        "--categories", choices=get_args(Categories), help="texts as 0/1 features (default) or whole numbers"
    )
    convert.add_argument(
        "--category", type=names, metavar="COL,...", help="numbers, booleans or dates to treat like texts"
    )
    convert.add_argument(
        "--dates",
        type=names,
        metavar="PART,...",
        help="features of a date: days, month, day, weekday, hour; default: days,month,weekday,hour",
    )
    convert.add_argument(
        "--missing",
        choices=get_args(Missing),
        help="empty cells: an error (default), the mean, or drop the row",
    )
    convert.add_argument(
        "--like", type=Path, metavar="STORE", help="take over that store's columns, mappings and dtype"
    )
    convert.add_argument("--unknown", choices=get_args(Unknown), help="with --like: " + UNKNOWN)


def _convert(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.cli.progress import convert_bar
    from ep3stream.conversion.convert import convert
    from ep3stream.inspection.describe import describe_new_store

    *sources, last = options.paths
    store = location(last)
    if not sources and options.x is None and options.y is None:
        raise ConfigError(f"only {store} was given; name what to convert and then the store to make of it")
    config = ConvertConfig(
        **given(
            options,
            {
                "target": "target",
                "task": "task",
                "columns": "columns",
                "drop": "drop",
                "rename": "rename",
                "categories": "categories",
                "category": "category",
                "dates": "dates",
                "missing": "missing",
                "like": "like",
                "unknown": "unknown",
                "features": "features",
                "index_base": "index_base",
                "split": "splits",
                "format": "format",
                "dtype": "dtype",
                "codec": "codec",
                "shuffle": "shuffle",
                "seed": "seed",
                "memory": "memory_bytes",
                "segment_bytes": "segment_bytes",
            },
        )
    )
    files = {"x_file": options.x, "y_file": options.y}
    try:
        with convert_bar(console) as show:
            convert(
                sources, store, config, **files, restart=options.restart, work=options.work, progress=show
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("run the same command to go on") from None
    say(console, describe_new_store(store))
