"""`ep3stream tune`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from ep3stream.cli.fit import FIT_SETTINGS, fit_config
from ep3stream.cli.options import checked, command, say, store_place
from ep3stream.config import Scale, parse_bytes, parse_names
from ep3stream.run.text import json_text

_TUNE_SETTINGS = {name: FIT_SETTINGS[name] for name in ("split", "validate", "scale", "memory", "seed")}


def add(commands: Any) -> None:
    """Adds `tune` to the command line."""
    tune = command(
        commands,
        "tune",
        _tune,
        "choose kernel, bandwidth and ridge on a sample; writes settings for `fit --config`",
        "ep3stream tune flights.zarr --validate validation --feature-scale",
    )
    tune.add_argument("store", type=store_place, metavar="STORE", help="a path, or s3://bucket/key")
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
        type=checked(parse_names),
        metavar="NAME,...",
        help="default: laplacian,matern32,matern52,gaussian",
    )
    tune.add_argument(
        "--feature-scale", action="store_true", help="learn a factor for each feature, kept in an NPY file"
    )
    tune.add_argument("--by", choices=("mse", "accuracy"), default="mse", help="default: mse")
    tune.add_argument("--minutes", type=float, default=2.0, metavar="N", help="default: 2")
    tune.add_argument(
        "--centers",
        type=int,
        metavar="N",
        help="of the largest trial, not of the fit; default: as many as take seconds, 2250 at most for most fits",
    )
    tune.add_argument("--memory", type=checked(parse_bytes), metavar="BYTES", help="default: 2GiB")
    tune.add_argument("--seed", type=int, metavar="N", help="of the sample and of the fit; default: 0")
    tune.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _tune(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.tuning.tune import DEFAULT_KERNELS, default_out, describe_tuning, tune

    out = options.out or default_out(options.store)
    result = tune(
        options.store,
        fit_config(options, _TUNE_SETTINGS),
        out=out,
        kernels=options.kernels or DEFAULT_KERNELS,
        by=options.by,
        feature_scale=options.feature_scale,
        minutes=options.minutes,
        n_centers=options.centers,
        force=options.force,
    )
    found = result.as_json() | {"config": str(out)}
    print(json_text(found) if options.json else describe_tuning(found, is_terminal=sys.stdout.isatty()))
    command = shlex.join(["ep3stream", "fit", str(options.store), "RUN", "--config", str(out)])
    say(console, f"settings in {out}: {command}")
