"""`ep3stream fit`, and the settings of a fit from a file and from options."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from ep3stream.cli.options import checked, command, disk_path, epochs, number_or, say, store_place
from ep3stream.config import (
    MAX_CONFIG_BYTES,
    FitConfig,
    KernelName,
    Precision,
    Projection,
    Scale,
    StepRule,
    parse_bytes,
    parse_weights,
)
from ep3stream.disk import read_small_file
from ep3stream.errors import ConfigError

# Command-line option -> (table, setting) of the fit's TOML.
FIT_SETTINGS = {
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
    "precision": ("solver", "precision"),
    "projection_passes": ("solver", "projection_passes"),
    "projection_tolerance": ("solver", "projection_tolerance"),
    "memory": ("run", "memory_bytes"),
    "checkpoint_steps": ("run", "checkpoint_steps"),
    "checkpoint_minutes": ("run", "checkpoint_minutes"),
    "devices": ("run", "devices"),
    "max_restarts": ("run", "max_restarts"),
    "seed": ("run", "seed"),
    "dask": ("run", "dask"),
    "read_timeout": ("run", "read_timeout_s"),
    "tensorboard": ("run", "tensorboard"),
    "tensorboard_dir": ("run", "tensorboard"),
}


def add(commands: Any) -> None:
    """Adds `fit` to the command line."""
    fit = command(
        commands,
        "fit",
        _fit,
        "fit a kernel machine to a store; the same command resumes it",
        "ep3stream fit flights.zarr runs/first --centers 10000 --epochs 2 --validate test",
    )
    fit.add_argument("store", type=store_place, metavar="STORE", help="a path, or s3://bucket/key")
    fit.add_argument("run", type=disk_path, metavar="RUN", help="directory of the fit's results")
    add_settings(fit)
    fit.add_argument(
        "--override",
        action="store_true",
        help="go on with changed settings that the set-up does not depend on; recorded in RUN",
    )


def add_settings(fit: argparse.ArgumentParser) -> None:
    """The options of FIT_SETTINGS, and --config."""
    fit.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="settings; options given here come first"
    )
    fit.add_argument("--split", metavar="SPLIT", help="rows to fit; default: train")
    fit.add_argument("--validate", metavar="SPLIT", help="rows to score after each epoch, 50000 at most")
    fit.add_argument(
        "--validate-every", type=epochs, metavar="X", help="epochs between two of them, or a part of one; 1"
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
    fit.add_argument("--bandwidth", type=number_or("median", float), metavar="median|FLOAT")
    fit.add_argument(
        "--shape", type=float, metavar="X", help="of dispersal, default 1.5; of rational_quadratic, 1"
    )
    fit.add_argument("--degree", type=int, metavar="N", help="of the polynomial kernel; default: 3")
    fit.add_argument("--offset", type=float, metavar="X", help="of the polynomial kernel; default: 1")
    fit.add_argument("--depth", type=int, metavar="N", help="layers of the ntk_relu kernels; default: 2")
    fit.add_argument("--bias", type=float, metavar="X", help="of the ntk_relu kernels; default: 1")
    fit.add_argument(
        "--epochs", type=epochs, metavar="X", help="passes over the rows, 0.5 for a half; default: 1"
    )
    fit.add_argument(
        "--class-weights",
        type=checked(_class_weights),
        metavar="balanced|NAME=WEIGHT,...",
        help="what a row of a class counts; default: none, 1 each",
    )
    fit.add_argument(
        "--output-weights",
        type=checked(parse_weights),
        metavar="NAME=WEIGHT,...",
        help="what a target counts against the ridge and in the score that --patience watches; 1",
    )
    fit.add_argument("--batch-size", type=int, metavar="N", help="default: measured")
    fit.add_argument("--projection", choices=get_args(Projection), help="default: nystrom")
    fit.add_argument(
        "--model-rank",
        type=int,
        metavar="N",
        help="eigenpairs of K(Z, Z); default: centers / 4, at most 500, or 1500 where that helps much",
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
        "--precision",
        choices=get_args(Precision),
        help="of inputs, and on GPUs of products; default: float32",
    )
    fit.add_argument(
        "--projection-passes", type=int, metavar="N", help="of eigenpro over the centers, a step; default: 2"
    )
    fit.add_argument(
        "--projection-tolerance", type=float, metavar="FLOAT", help="that ends them sooner; default: 0.001"
    )
    fit.add_argument("--checkpoint-steps", type=int, metavar="N", help="default: only by time")
    fit.add_argument("--checkpoint-minutes", type=float, metavar="N", help="default: 5")
    fit.add_argument("--memory", type=checked(parse_bytes), metavar="BYTES", help="of the fit's arrays; 2GiB")
    fit.add_argument(
        "--devices", type=number_or("auto", int), metavar="auto|N", help="default: all GPUs, or one CPU"
    )
    fit.add_argument(
        "--max-restarts", type=int, metavar="N", help="when the process of a device dies; default: 3"
    )
    fit.add_argument("--seed", type=int, metavar="N", help="default: 0")
    fit.add_argument("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster that reads the store")
    fit.add_argument(
        "--read-timeout",
        type=float,
        metavar="SECONDS",
        help="for a segment, then it is asked for again, twice; 0: for ever; default: 120",
    )
    fit.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        help="curves for TensorBoard in RUN/tensorboard; default: no",
    )
    fit.add_argument("--tensorboard-dir", metavar="DIRECTORY", help="the same, in another directory")


def _fit(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.cli.progress import fit_bar
    from ep3stream.training.fit import fit

    config = fit_config(options, FIT_SETTINGS)
    with fit_bar(console) as show:
        run = fit(options.store, options.run, config, observe=show, override=options.override)
    say(console, f"model in {run / 'model'}, report in {run / 'report.html'}")


def fit_config(options: argparse.Namespace, names: Mapping[str, tuple[str, str]]) -> FitConfig:
    """The settings of --config, with those options put in that were given."""
    config = FitConfig()
    if options.config is not None:
        config = FitConfig.from_toml(_text(options.config), str(options.config))
    settings: dict[str, dict[str, Any]] = {}
    for option, (table, name) in names.items():
        if (value := getattr(options, option)) is not None:
            settings.setdefault(table, {})[name] = value
    return config.with_settings(settings, "command line")


def _text(path: Path) -> str:
    try:
        return read_small_file(path, MAX_CONFIG_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}; correct the path or the file") from error


def _class_weights(text: str) -> str | dict[str, float]:
    return text if text in ("none", "balanced") else parse_weights(text)


def _centers(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text
