"""The command line: `ep3stream convert | tune | fit | evaluate | predict | inspect | verify`.

Exit codes: 0 done; 2 bad usage, input or disk; 3 damaged data; 4 diverged; 75 interrupted, checkpoint saved;
130 interrupted at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from ep3stream.config import (
    MAX_CONFIG_BYTES,
    Categories,
    Codec,
    ConvertConfig,
    FitConfig,
    Format,
    KernelName,
    Missing,
    Projection,
    Scale,
    StepRule,
    Task,
    XDtype,
    parse_bytes,
    parse_names,
    parse_renames,
    parse_splits,
    parse_weights,
)
from ep3stream.data.small_files import read_small_file
from ep3stream.data.verify import VerifyProgress
from ep3stream.errors import ConfigError, Ep3streamError
from ep3stream.package import created_by
from ep3stream.run.describe import (
    describe_evaluation,
    describe_new_store,
    describe_path,
    describe_soundness,
)
from ep3stream.run.metrics import json_text

_DAMAGED = 3
_QUIET = "only warnings and errors on stderr"
_LOGGER = logging.getLogger("ep3stream")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. An error is one line on stderr."""
    try:
        options = _parsed(arguments)
        code = int(options.command(options, _stderr(options.quiet)) or 0)
        sys.stdout.flush()  # A reader that has gone away shows here, where it can be told.
        return code
    except Ep3streamError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        return _fail("; ".join(["interrupted", *map(str, error.args)]), 130)
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
    if not sources and options.x is None and options.y is None:
        raise ConfigError(f"only {store} was given; name what to convert and then the store to make of it")
    config = ConvertConfig(
        **_given(
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
            convert(sources, store, config, **files, restart=options.restart, progress=show)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("run the same command to go on") from None
    _say(console, describe_new_store(store))


# Command-line option -> (table, setting) of the fit's TOML.
_FIT_SETTINGS = {
    "split": ("data", "split"),
    "validate": ("data", "validate"),
    "scale": ("data", "scale"),
    "kernel": ("kernel", "name"),
    "bandwidth": ("kernel", "bandwidth"),
    "shape": ("kernel", "shape"),
    "degree": ("kernel", "degree"),
    "offset": ("kernel", "offset"),
    "depth": ("kernel", "depth"),
    "bias": ("kernel", "bias"),
    "centers": ("solver", "centers"),
    "projection": ("solver", "projection"),
    "epochs": ("solver", "epochs"),
    "validate_every": ("solver", "validate_every"),
    "patience": ("solver", "patience"),
    "class_weights": ("solver", "class_weights"),
    "output_weights": ("solver", "output_weights"),
    "batch_size": ("solver", "batch_size"),
    "model_rank": ("solver", "model_rank"),
    "data_rank": ("solver", "data_rank"),
    "nystrom_samples": ("solver", "nystrom_samples"),
    "ridge": ("solver", "ridge"),
    "step": ("solver", "step"),
    "projection_passes": ("solver", "projection_passes"),
    "projection_tolerance": ("solver", "projection_tolerance"),
    "memory": ("run", "memory_bytes"),
    "checkpoint_steps": ("run", "checkpoint_steps"),
    "checkpoint_minutes": ("run", "checkpoint_minutes"),
    "devices": ("run", "devices"),
    "seed": ("run", "seed"),
    "dask": ("run", "dask"),
}

_TUNE_SETTINGS = {name: _FIT_SETTINGS[name] for name in ("split", "validate", "scale", "memory", "seed")}


def _fit(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.run.fit import fit
    from ep3stream.run.progress import fit_bar

    config = _fit_config(options, _FIT_SETTINGS)
    with fit_bar(console) as show:
        run = fit(options.store, options.run, config, observe=show, override=options.override)
    _say(console, f"model in {run / 'model'}, report in {run / 'report.html'}")


def _fit_config(options: argparse.Namespace, names: Mapping[str, tuple[str, str]]) -> FitConfig:
    """The settings of --config, with those options put in that were given."""
    config = FitConfig()
    if options.config is not None:
        config = FitConfig.from_toml(_text(options.config), str(options.config))
    settings: dict[str, dict[str, Any]] = {}
    for option, (table, name) in names.items():
        if (value := getattr(options, option)) is not None:
            settings.setdefault(table, {})[name] = value
    return config.with_settings(settings, "command line")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _text(path: Path) -> str:
    try:
        return read_small_file(path, MAX_CONFIG_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}; correct the path or the file") from error


def _tune(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.run.describe_tune import describe_tuning
    from ep3stream.run.tune import DEFAULT_KERNELS, default_out, tune

    out = options.out or default_out(options.store)
    result = tune(
        options.store,
        _fit_config(options, _TUNE_SETTINGS),
        out=out,
        kernels=options.kernels or DEFAULT_KERNELS,
        by=options.by,
        feature_scale=options.feature_scale,
        minutes=options.minutes,
        force=options.force,
    )
    found = result.as_json() | {"config": str(out)}
    print(json_text(found) if options.json else describe_tuning(found, is_terminal=sys.stdout.isatty()))
    _say(console, f"settings in {out}: ep3stream fit {options.store} RUN --config {out}")


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

    if options.json:
        print(json_text(inspect(options.path)))
    else:
        print(describe_path(options.path, width=Console().width, is_terminal=sys.stdout.isatty()))


def _verify(options: argparse.Namespace, console: Console) -> int:
    from ep3stream.run.inspect import verify
    from ep3stream.run.progress import verify_bar

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


def _epochs(text: str) -> int | float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; write it like 2 or 0.5") from None
    return int(number) if number.is_integer() else number


def _class_weights(text: str) -> str | dict[str, float]:
    return text if text in ("none", "balanced") else parse_weights(text)


def _centers(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


class _Parser(argparse.ArgumentParser):
    """One whose errors are raised, to be told in one line like any other."""

    def error(self, message: str) -> NoReturn:
        """Names the command's --help as the remedy."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if "paths" in options and not any(word.startswith("-") for word in more):
        # argparse takes a list from one place, but the store may well stand behind the options.
        options.paths += map(Path, more)
    elif more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "ep3stream",
        description="Large kernel machines on data that does not fit in memory.",
        epilog="Exit codes: 0 done, 2 bad usage, input or disk, 3 damaged data, 4 diverged, 75 interrupted and saved, "
        "130 interrupted at once.",
    )
    parser.add_argument("--version", action="version", version=created_by())
    parser.add_argument("--quiet", action="store_true", help=_QUIET)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_convert(commands)
    _add_fit(commands)
    _add_tune(commands)
    _add_use(commands)
    return parser


def _add_convert(commands: Any) -> None:
    convert = _command(
        commands,
        "convert",
        _convert,
        "turn tables or arrays into a store",
        "ep3stream convert flights.csv flights.zarr --target delay --split train=0.9,test=0.1",
        "ep3stream convert months/ 'late/*.parquet' all.zarr --target delay --missing mean --drop id",
        "ep3stream convert april.csv april.zarr --like flights.zarr",
        "ep3stream convert rows.svmlight rows.zarr --features 1000 --index-base 0",
        "ep3stream convert arrays.npz arrays.h5",
        "ep3stream convert --x x.npy --y y.npy rows.zarr --no-shuffle",
        "ep3stream convert --x sky.h5:/train/images --y sky.h5:/train/labels sky.zarr",
    )
    convert.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="SOURCE... STORE",
        help="files, directories or patterns of CSV, TSV (also .gz, .zst, .zip), Parquet, Arrow, Feather or svmlight; "
        "or one .npz, HDF5 or Zarr with arrays x and y; the last one is the store to make",
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
        type=_checked(parse_names),
        metavar="COL,...",
        help="column to predict, or several of numbers",
    )
    convert.add_argument("--task", choices=get_args(Task), help="default: by the type of the target")
    _add_columns(convert)
    convert.add_argument(
        "--split", type=_checked(parse_splits), metavar="NAME=FRACTION,...", help="default: train=1"
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
    convert.add_argument(
        "--restart", action="store_true", help="begin again what was left unfinished, with other settings too"
    )


def _add_columns(convert: argparse.ArgumentParser) -> None:
    names = _checked(parse_names)
    convert.add_argument(
        "--columns", type=names, metavar="COL,...", help="the features, in this order; patterns like px_* too"
    )
    convert.add_argument("--drop", type=names, metavar="COL,...", help="columns to leave out; patterns too")
    convert.add_argument("--rename", type=_checked(parse_renames), metavar="OLD=NEW,...", help="in the store")
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
    fit.add_argument("--validate", metavar="SPLIT", help="rows to score after each epoch, 50000 at most")
    fit.add_argument(
        "--validate-every", type=_epochs, metavar="X", help="epochs between two of them, or a part of one; 1"
    )
    fit.add_argument(
        "--patience", type=int, metavar="N", help="stop after N of them without a better model, keep the best"
    )
    fit.add_argument("--scale", choices=get_args(Scale), help="of the inputs; default: standard")
    fit.add_argument(
        "--centers",
        type=_centers,
        metavar="N|kmeans:N|FILE|STORE/SPLIT",
        help="rows drawn, means of clusters, an NPY file of (p, d), or rows of any store; default: auto, 5000 rows",
    )
    fit.add_argument("--kernel", choices=get_args(KernelName), help="default: laplacian")
    fit.add_argument("--bandwidth", type=_number_or("median", float), metavar="median|FLOAT")
    fit.add_argument(
        "--shape", type=float, metavar="X", help="of dispersal, default 1.5; of rational_quadratic, 1"
    )
    fit.add_argument("--degree", type=int, metavar="N", help="of the polynomial kernel; default: 3")
    fit.add_argument("--offset", type=float, metavar="X", help="of the polynomial kernel; default: 1")
    fit.add_argument("--depth", type=int, metavar="N", help="layers of the ntk_relu kernels; default: 2")
    fit.add_argument("--bias", type=float, metavar="X", help="of the ntk_relu kernels; default: 1")
    fit.add_argument(
        "--epochs", type=_epochs, metavar="X", help="passes over the rows, 0.5 for a half; default: 1"
    )
    fit.add_argument(
        "--class-weights",
        type=_checked(_class_weights),
        metavar="balanced|NAME=WEIGHT,...",
        help="what a row of a class counts; default: none, 1 each",
    )
    fit.add_argument(
        "--output-weights",
        type=_checked(parse_weights),
        metavar="NAME=WEIGHT,...",
        help="what a target counts against the ridge and in the score that --patience watches; 1",
    )
    fit.add_argument("--batch-size", type=int, metavar="N", help="default: measured")
    fit.add_argument("--projection", choices=get_args(Projection), help="default: nystrom")
    fit.add_argument(
        "--model-rank", type=int, metavar="N", help="eigenpairs of K(Z, Z); default: centers / 4, at most 500"
    )
    fit.add_argument(
        "--data-rank",
        type=int,
        metavar="N",
        help="of the data, for the whole fit; default: more and more as rows are seen",
    )
    fit.add_argument(
        "--nystrom-samples",
        type=int,
        metavar="N",
        help="rows the data's are estimated on; default: 1000 to 3000",
    )
    fit.add_argument(
        "--ridge", type=float, metavar="LAMBDA", help="of lambda/2 |f|^2 beside the mean loss; default: 0"
    )
    fit.add_argument(
        "--step", choices=get_args(StepRule), help="size of steps and batches; default: by the projection"
    )
    fit.add_argument(
        "--projection-passes", type=int, metavar="N", help="of eigenpro over the centers, a step; default: 2"
    )
    fit.add_argument(
        "--projection-tolerance", type=float, metavar="FLOAT", help="that ends them sooner; default: 0.001"
    )
    fit.add_argument("--checkpoint-steps", type=int, metavar="N", help="default: only by time")
    fit.add_argument("--checkpoint-minutes", type=float, metavar="N", help="default: 5")
    fit.add_argument(
        "--memory", type=_checked(parse_bytes), metavar="BYTES", help="of the fit's arrays; 2GiB"
    )
    fit.add_argument("--devices", type=_number_or("auto", int), metavar="auto|N")
    fit.add_argument("--seed", type=int, metavar="N", help="default: 0")
    fit.add_argument("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster that reads the store")
    fit.add_argument(
        "--override",
        action="store_true",
        help="go on with changed settings that the set-up does not depend on; recorded in RUN",
    )


def _add_tune(commands: Any) -> None:
    tune = _command(
        commands,
        "tune",
        _tune,
        "choose kernel, bandwidth and ridge on a sample; writes settings for `fit --config`",
        "ep3stream tune flights.zarr --validate validation --feature-scale",
    )
    tune.add_argument("store", type=Path, metavar="STORE")
    tune.add_argument(
        "--out", type=Path, metavar="FILE.toml", help="default: the store's name with .tuned.toml"
    )
    tune.add_argument("--force", action="store_true", help="replace the file if it exists")
    tune.add_argument("--config", type=Path, metavar="FILE.toml", help="the fit's other settings")
    tune.add_argument("--split", metavar="SPLIT", help="rows to choose on; default: train")
    tune.add_argument("--validate", metavar="SPLIT", help="held-out rows; default: some of the split itself")
    tune.add_argument("--scale", choices=get_args(Scale), help="of the inputs; default: standard")
    tune.add_argument(
        "--kernels",
        type=_checked(parse_names),
        metavar="NAME,...",
        help="default: laplacian,matern32,matern52,gaussian",
    )
    tune.add_argument(
        "--feature-scale", action="store_true", help="learn a factor for each feature, kept in an NPY file"
    )
    tune.add_argument("--by", choices=("mse", "accuracy"), default="mse", help="default: mse")
    tune.add_argument("--minutes", type=float, default=2.0, metavar="N", help="default: 2")
    tune.add_argument("--memory", type=_checked(parse_bytes), metavar="BYTES", help="default: 2GiB")
    tune.add_argument("--seed", type=int, metavar="N", help="of the sample and of the fit; default: 0")
    tune.add_argument("--json", action="store_true", help="one JSON object on stdout")


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
        command.add_argument("--split", metavar="SPLIT", help="default: test, or the store's only one")
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
    verify.add_argument(
        "--quick", action="store_true", help="sizes and presence only: misses changed bytes, reads no row"
    )
    for command in (evaluate, inspect, verify):
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace, Console], Any], summary: str, *examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog="\n         ".join(["Example: " + examples[0], *examples[1:]]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Without a default of its own, which would undo a --quiet before the command.
    parser.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help=_QUIET)
    parser.set_defaults(command=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
