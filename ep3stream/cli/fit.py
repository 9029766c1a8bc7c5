"""`ep3stream plan`, `fit` and `tune`, which take the settings of a fit, from --config and from options."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from ep3stream.cli.console import say
from ep3stream.cli.options import (
    add_command,
    add_json,
    add_run,
    add_settings,
    add_store,
    checked,
    given_settings,
)
from ep3stream.config import FIT_TABLES, MAX_CONFIG_BYTES, DataConfig, FitConfig, RunConfig, parse_names
from ep3stream.disk import read_small_file
from ep3stream.errors import ConfigError
from ep3stream.run.text import json_text


def add_fit(commands: Any) -> None:
    """Adds `fit` to the command line."""
    parser = add_command(
        commands,
        "fit",
        _fit,
        "fit a kernel machine to a store; the same command resumes it",
        "ep3stream fit flights.zarr runs/first --centers 10000 --epochs 2 --validate test",
    )
    add_store(parser)
    add_run(parser)
    parser.add_argument(
        "--override",
        action="store_true",
        help="go on with changed settings that the set-up does not depend on; recorded in RUN",
    )
    _add_fit_settings(parser)


def _fit(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.cli.progress import fit_bar
    from ep3stream.training.fit import fit

    config = _fit_config(options)
    with fit_bar(console) as show:
        run = fit(options.store, options.run, config, observe=show, override=options.override)
    say(console, f"model in {run / 'model'}, report in {run / 'report.html'}")


def add_plan(commands: Any) -> None:
    """Adds `plan` to the command line."""
    parser = add_command(
        commands,
        "plan",
        _plan,
        "tell what a fit will take before it: memory, bytes read, arithmetic, time, the largest model that fits",
        "ep3stream plan flights.zarr --centers 10000 --epochs 2",
        "ep3stream plan flights.zarr --centers 1000000 --devices 8 --link-gb-per-s 300",
    )
    add_store(parser)
    parser.add_argument(
        "--link-gb-per-s", type=float, metavar="X", help="between two devices, each way; default: not counted"
    )
    parser.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read and compute for a few seconds, to tell times (default)",
    )
    add_json(parser)
    _add_fit_settings(parser)


def _plan(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.planning.forecast import describe_plan, plan

    link = options.link_gb_per_s
    found = plan(
        options.store,
        _fit_config(options),
        link_bytes_per_s=None if link is None else link * 1e9,
        measure=options.measure,
    )
    print(json_text(found.as_json()) if options.json else describe_plan(found))


def add_tune(commands: Any) -> None:
    """Adds `tune` to the command line."""
    parser = add_command(
        commands,
        "tune",
        _tune,
        "choose kernel, bandwidth and ridge by small fits, or keep the default; writes settings for `fit --config`",
        "ep3stream tune flights.zarr --validate validation --minutes 10",
    )
    add_store(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE.toml", help="default: the store's name with .tuned.toml"
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="the fit's other settings")
    validate = "held-out rows; default: some of the split itself"
    add_settings(
        parser,
        DataConfig,
        "data",
        {"split": "rows to choose on; default: train", "validate": validate, "scale": ""},
    )
    parser.add_argument(
        "--kernels",
        type=checked(parse_names),
        metavar="NAME,...",
        help="default: laplacian,matern32,matern52,gaussian,product,anova",
    )
    parser.add_argument("--by", choices=("mse", "accuracy"), default="mse", help="default: mse")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="N", help="default: 5")
    parser.add_argument(
        "--centers",
        type=int,
        metavar="N",
        help="of the largest trial, not of the fit; default: those of the fit, as far as there is time",
    )
    add_settings(
        parser,
        RunConfig,
        "run",
        {"memory_bytes": "", "seed": "of the sample and of the fit; default: 0", "read_timeout_s": ""},
    )
    add_json(parser)


def _tune(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.tuning.tune import default_out, describe_tuning, tune

    out = options.out or default_out(options.store)
    result = tune(
        options.store,
        _fit_config(options),
        out=out,
        kernels=options.kernels or None,
        by=options.by,
        minutes=options.minutes,
        n_centers=options.centers,
        force=options.force,
    )
    found = result.as_json() | {"config": str(out)}
    print(json_text(found) if options.json else describe_tuning(found, is_terminal=sys.stdout.isatty()))
    command = shlex.join(["ep3stream", "fit", str(options.store), "RUN", "--config", str(out)])
    say(console, f"settings in {out}: {command}")


def _add_fit_settings(parser: argparse.ArgumentParser) -> None:
    """Adds --config and the options of all tables of a fit's settings, each table in a group of its own."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="settings; options given here come first"
    )
    for name, table in FIT_TABLES.items():
        group = parser.add_argument_group(f"settings, table [{name}] of FILE.toml")
        add_settings(group, table, name)


def _fit_config(options: argparse.Namespace) -> FitConfig:
    """The settings of --config, with those replaced that were given as options."""
    config = FitConfig()
    if options.config is not None:
        try:
            text = read_small_file(options.config, MAX_CONFIG_BYTES).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"config {options.config} cannot be read: {error}; correct the path or the file"
            ) from error
        config = FitConfig.from_toml(text, str(options.config))
    given = {name: given_settings(options, table, name) for name, table in FIT_TABLES.items()}
    return config.with_settings(given, "command line")
