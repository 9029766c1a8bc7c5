"""`ep3stream plan`."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from ep3stream.cli.fit import FIT_SETTINGS, add_settings, fit_config
from ep3stream.cli.options import command, store_place
from ep3stream.run.text import json_text


def add(commands: Any) -> None:
    """Adds `plan` to the command line."""
    plan = command(
        commands,
        "plan",
        _plan,
        "tell what a fit will take before it: memory, bytes read, arithmetic, time, the largest model that fits",
        "ep3stream plan flights.zarr --centers 10000 --epochs 2",
        "ep3stream plan flights.zarr --centers 1000000 --devices 8 --link-gb-per-s 300",
    )
    plan.add_argument("store", type=store_place, metavar="STORE", help="a path, or s3://bucket/key")
    add_settings(plan)
    plan.add_argument(
        "--link-gb-per-s", type=float, metavar="X", help="between two devices, each way; default: not counted"
    )
    plan.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read and compute for a few seconds, to tell times (default)",
    )
    plan.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _plan(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.planning.forecast import describe_plan, plan

    link = options.link_gb_per_s
    found = plan(
        options.store,
        fit_config(options, FIT_SETTINGS),
        link_bytes_per_s=None if link is None else link * 1e9,
        measure=options.measure,
    )
    print(json_text(found.as_json()) if options.json else describe_plan(found))
