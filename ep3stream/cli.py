"""The command line: `ep3stream convert | fit | evaluate | predict | inspect | verify`.

Exit codes: 0 done; 2 bad usage or input; 3 damaged data; 4 diverged; 75 interrupted, checkpoint saved.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from ep3stream.config import (
    ConvertConfig,
    FitConfig,
    Format,
    KernelName,
    Projection,
    Scale,
    Task,
    XDtype,
    parse_bytes,
    parse_splits,
)
from ep3stream.errors import ConfigError, Ep3streamError
from ep3stream.package import created_by
from ep3stream.run.describe import describe_evaluation, describe_new_store, describe_path
from ep3stream.run.metrics import json_text

_DAMAGED = 3
_LOGGER = logging.getLogger("ep3stream")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. An error is one line on stderr."""
    try:
        options = _parser().parse_args(arguments)
        code = int(options.command(options, _stderr(options.quiet)) or 0)
        sys.stdout.flush()  # A reader that has gone away shows here, where it can be told.
        return code
    except Ep3streamError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, MemoryError) as error:
        return _fail(f"{type(error).__name__}: {error}; free memory or disk space, or correct permissions", 2)
    finally:
        _LOGGER.handlers.clear()


def _fail(message: str, code: int) -> int:
    print("ep3stream:", " ".join(message.split()), file=sys.stderr)
    return code


def _stderr(quiet: bool) -> Console:
    """The console of messages and bars, which log records go to as well; plain lines unless it is a terminal."""
    is_terminal = sys.stderr.isatty()
    # Not left to rich, which takes a file for a terminal when FORCE_COLOR is set.
    console = Console(stderr=True, quiet=quiet, force_terminal=None if is_terminal else False)
    handler: logging.Handler = logging.StreamHandler()
    if is_terminal:
        handler = RichHandler(
            console=console, show_path=False, show_time=False, show_level=False, highlighter=NullHighlighter()
        )
    _LOGGER.setLevel(logging.WARNING if quiet else logging.INFO)
    _LOGGER.addHandler(handler)
    return console


def _convert(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.data.convert import convert
    from ep3stream.run.progress import convert_bar

    *sources, store = options.paths
    config = ConvertConfig(
        **_given(
            options,
            {
                "target": "target",
                "task": "task",
                "split": "splits",
                "format": "format",
                "dtype": "dtype",
                "shuffle": "shuffle",
                "seed": "seed",
                "memory": "memory_bytes",
                "segment_bytes": "segment_bytes",
            },
        )
    )
    with convert_bar(console) as show:
        convert(sources, store, config, x_file=options.x, y_file=options.y, progress=show)
    _say(console, describe_new_store(store))


# Command-line option -> (table, setting) of the fit's TOML.
_FIT_SETTINGS = {
    "split": ("data", "split"),
    "validate": ("data", "validate"),
    "scale": ("data", "scale"),
    "kernel": ("kernel", "name"),
    "bandwidth": ("kernel", "bandwidth"),
    "centers": ("solver", "centers"),
    "projection": ("solver", "projection"),
    "epochs": ("solver", "epochs"),
    "batch_size": ("solver", "batch_size"),
    "model_rank": ("solver", "model_rank"),
    "data_rank": ("solver", "data_rank"),
    "nystrom_samples": ("solver", "nystrom_samples"),
    "memory": ("run", "memory_bytes"),
    "checkpoint_steps": ("run", "checkpoint_steps"),
    "checkpoint_minutes": ("run", "checkpoint_minutes"),
    "devices": ("run", "devices"),
    "seed": ("run", "seed"),
    "dask": ("run", "dask"),
}


def _fit(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.run.fit import fit
    from ep3stream.run.progress import fit_bar

    config = FitConfig()
    if options.config is not None:
        config = FitConfig.from_toml(_text(options.config), str(options.config))
    settings: dict[str, dict[str, Any]] = {}
    for option, (table, name) in _FIT_SETTINGS.items():
        if (value := getattr(options, option)) is not None:
            settings.setdefault(table, {})[name] = value
    config = config.with_settings(settings, "command line")
    with fit_bar(console) as show:
        run = fit(options.store, options.run, config, observe=show)
    _say(console, f"model in {run / 'model'}, report in {run / 'report.html'}")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from error


def _evaluate(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.run.evaluate import evaluate
    from ep3stream.run.report import write_report

    scores = evaluate(options.run, options.store, options.split)
    write_report(options.run)
    print(json_text(scores) if options.json else describe_evaluation(scores))


def _predict(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.run.evaluate import predict

    n_rows = predict(options.run, options.store, options.out, options.split, scores=options.scores)
    _say(console, f"{n_rows} predictions in {options.out}")


def _inspect(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.run.inspect import inspect

    print(json_text(inspect(options.path)) if options.json else describe_path(options.path))


def _verify(options: argparse.Namespace, console: Console) -> int:
    from ep3stream.run.inspect import verify

    problems = verify(options.path)
    if options.json:
        print(json_text({"path": str(options.path), "sound": not problems, "problems": problems}))
    else:
        print("\n".join(problems) or f"{options.path} is sound: every digest is right")
    return _DAMAGED if problems else 0


def _given(options: argparse.Namespace, names: dict[str, str]) -> dict[str, Any]:
    """The options that were given, under the names of their settings."""
    return {name: value for option, name in names.items() if (value := getattr(options, option)) is not None}


def _checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser whose ConfigError argparse shows as a usage error."""

    def parse_or_explain(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_or_explain


def _number_or(word: str, number: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if text == word:
            return text
        try:
            return number(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is neither {word!r} nor a number") from None

    return parse


def _centers(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


class _Parser(argparse.ArgumentParser):
    """One whose errors are raised, to be told in one line like any other."""

    def error(self, message: str) -> NoReturn:
        """Names the command's --help as the remedy."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "ep3stream",
        description="Large kernel machines on data that does not fit in memory.",
        epilog="Exit codes: 0 done, 2 bad usage or input, 3 damaged data, 4 diverged, 75 interrupted and saved.",
    )
    parser.add_argument("--version", action="version", version=created_by())
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_convert(commands)
    _add_fit(commands)
    _add_use(commands)
    return parser


def _add_convert(commands: Any) -> None:
    convert = _command(
        commands,
        "convert",
        _convert,
        "turn CSV, Parquet or NPY files into a store",
        "ep3stream convert flights.csv flights.zarr --target delay --split train=0.9,test=0.1",
    )
    convert.add_argument(
        "paths", nargs="+", type=Path, metavar="SOURCE... STORE", help="the last one is the store to make"
    )
    convert.add_argument("--x", type=Path, metavar="FILE", help="NPY file of the inputs, (n, d)")
    convert.add_argument("--y", type=Path, metavar="FILE", help="NPY file of the targets, (n,) or (n, c)")
    convert.add_argument("--target", metavar="COL", help="column to predict")
    convert.add_argument("--task", choices=get_args(Task), help="default: by the type of the target")
    convert.add_argument(
        "--split", type=_checked(parse_splits), metavar="NAME=FRACTION,...", help="default: train=1"
    )
    convert.add_argument(
        "--format", choices=get_args(Format), help="default: hdf5 for .h5 and .hdf5, else zarr"
    )
    convert.add_argument("--dtype", choices=get_args(XDtype), help="of the stored inputs; default: float32")
    convert.add_argument(
        "--shuffle", action=argparse.BooleanOptionalAction, help="put the rows in random order (default)"
    )
    convert.add_argument("--seed", type=int, metavar="N", help="of splits and shuffle; default: 0")
    convert.add_argument("--memory", type=_checked(parse_bytes), metavar="BYTES", help="default: 1GiB")
    convert.add_argument(
        "--segment-bytes",
        type=_checked(parse_bytes),
        metavar="BYTES",
        help="read and checked together; default: 16MiB",
    )


def _add_fit(commands: Any) -> None:
    fit = _command(
        commands,
        "fit",
        _fit,
        "fit a kernel machine to a store; the same command resumes it",
        "ep3stream fit flights.zarr runs/first --centers 10000 --epochs 2 --validate test",
    )
    fit.add_argument("store", type=Path, metavar="STORE")
    fit.add_argument("run", type=Path, metavar="RUN", help="directory of the fit's results")
    fit.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="settings; options given here come first"
    )
    fit.add_argument("--split", metavar="SPLIT", help="rows to fit; default: train")
    fit.add_argument("--validate", metavar="SPLIT", help="rows to score after each epoch")
    fit.add_argument("--scale", choices=get_args(Scale), help="of the inputs; default: standard")
    fit.add_argument(
        "--centers", type=_centers, metavar="N|FILE", help="rows drawn, or an NPY file of (p, d)"
    )
    fit.add_argument("--kernel", choices=get_args(KernelName), help="default: laplacian")
    fit.add_argument("--bandwidth", type=_number_or("median", float), metavar="median|FLOAT")
    fit.add_argument("--epochs", type=int, metavar="N", help="default: 1")
    fit.add_argument("--batch-size", type=int, metavar="N", help="default: measured")
    fit.add_argument("--projection", choices=get_args(Projection), help="default: nystrom")
    fit.add_argument(
        "--model-rank", type=int, metavar="N", help="eigenpairs of K(Z, Z); default: centers / 8, at most 500"
    )
    fit.add_argument("--data-rank", type=int, metavar="N", help="of the data; default: 2/5 of the model rank")
    fit.add_argument(
        "--nystrom-samples", type=int, metavar="N", help="rows the data's are estimated on; 2000"
    )
    fit.add_argument("--checkpoint-steps", type=int, metavar="N", help="default: only by time")
    fit.add_argument("--checkpoint-minutes", type=float, metavar="N", help="default: 5")
    fit.add_argument(
        "--memory", type=_checked(parse_bytes), metavar="BYTES", help="of the fit's arrays; 2GiB"
    )
    fit.add_argument("--devices", type=_number_or("auto", int), metavar="auto|N")
    fit.add_argument("--seed", type=int, metavar="N", help="default: 0")
    fit.add_argument("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster that reads the store")


def _add_use(commands: Any) -> None:
    evaluate = _command(
        commands,
        "evaluate",
        _evaluate,
        "score a fit on a split",
        "ep3stream evaluate runs/first flights.zarr",
    )
    predict = _command(
        commands,
        "predict",
        _predict,
        "write predictions for every row of a split",
        "ep3stream predict runs/first new.zarr predictions.npy --split train",
    )
    for command in (evaluate, predict):
        command.add_argument("run", type=Path, metavar="RUN")
        command.add_argument("store", type=Path, metavar="STORE")
    predict.add_argument("out", type=Path, metavar="OUT", help=".npy, .h5, or a directory for zarr")
    predict.add_argument("--scores", action="store_true", help="outputs of all classes, not the class")
    for command in (evaluate, predict):
        command.add_argument("--split", default="test", metavar="SPLIT", help="default: test")
    inspect = _command(
        commands, "inspect", _inspect, "tell what a store or a run holds", "ep3stream inspect flights.zarr"
    )
    verify = _command(
        commands,
        "verify",
        _verify,
        "read a store or a run whole and check it",
        "ep3stream verify flights.zarr",
    )
    for command in (inspect, verify):
        command.add_argument("path", type=Path, metavar="PATH")
    for command in (evaluate, inspect, verify):
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace, Console], Any], summary: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=f"Example: {example}"
    )
    parser.set_defaults(command=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
