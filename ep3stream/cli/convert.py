"""`ep3stream convert`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from ep3stream.cli.console import say
from ep3stream.cli.options import add_command, add_settings, given_settings, source_path
from ep3stream.config import ConvertConfig
from ep3stream.errors import ConfigError, Interrupted
from ep3stream.run.signals import handling
from ep3stream.store.files import location


def add_convert(commands: Any) -> None:
    """Adds `convert` to the command line."""
    parser = add_command(
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
    parser.add_argument(
        "paths",
        nargs="+",
        type=source_path,
        metavar="SOURCE... STORE",
        help="files, directories or patterns of CSV, TSV (also .gz, .zst, .zip), Parquet, Arrow, Feather or svmlight; "
        "or one .npz, HDF5 or Zarr with arrays x and y; the last one is the store to make, a path or s3://bucket/key",
    )
    parser.add_argument(
        "--x",
        type=source_path,
        metavar="ARRAY",
        help="the inputs, (n, ...): FILE.npy, FILE.npz:NAME, FILE.h5:/PATH, STORE.zarr/PATH, an idx file",
    )
    parser.add_argument("--y", type=source_path, metavar="ARRAY", help="the targets, (n,) or (n, c)")
    add_settings(parser, ConvertConfig, "convert")
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIRECTORY",
        help="where a store for s3:// is made before it is uploaded; default: here",
    )
    parser.add_argument(
        "--restart", action="store_true", help="begin again what was left unfinished, with other settings too"
    )


def _convert(options: argparse.Namespace, console: Console) -> None:
    if options.is_own_process:
        _leave_pandas_out()
    from ep3stream.cli.progress import convert_bar
    from ep3stream.conversion.convert import convert
    from ep3stream.inspection.describe import describe_new_store

    *sources, last = options.paths
    store = location(last)
    if not sources and options.x is None and options.y is None:
        raise ConfigError(f"only {store} was given; name what to convert and then the store to make of it")
    config = ConvertConfig(**given_settings(options, ConvertConfig, "convert"))
    files = {"x_file": options.x, "y_file": options.y}
    try:
        with handling(_stop), convert_bar(console) as show:
            convert(
                sources, store, config, **files, restart=options.restart, work=options.work, progress=show
            )
    except KeyboardInterrupt as stop:
        if stop.args == (signal.SIGTERM.name,):
            raise Interrupted("stopped by SIGTERM; run the same command to go on") from None
        raise KeyboardInterrupt("run the same command to go on") from None
    say(console, describe_new_store(store))


def _stop(number: signal.Signals) -> None:
    """Ends the conversion where it is: what was done is kept, as after a kill."""
    if number != signal.SIGUSR1:
        raise KeyboardInterrupt(number.name)


class _NoPandas:
    """A finder of modules that finds no pandas."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        """Raises ModuleNotFoundError for pandas; leaves all other modules to the other finders."""
        if name == "pandas":
            raise ModuleNotFoundError(name)


def _leave_pandas_out() -> None:
    """Lets pyarrow work without pandas in this process, as it does where pandas is not installed.

    The first value that pyarrow makes an array or a scalar of decides: pyarrow then imports pandas, to ask whether the
    value is of pandas, which takes half a second. No value of a file is.
    """
    import pyarrow as pa

    if "pandas" not in sys.modules:
        sys.meta_path.insert(0, _NoPandas)
        try:
            pa.scalar(0)
        finally:
            sys.meta_path.remove(_NoPandas)
