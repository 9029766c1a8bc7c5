"""`ep3stream status` and `completion`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import shtab
from rich.console import Console

from ep3stream.cli.options import command, disk_path
from ep3stream.run.text import json_text

_SHELLS = ("bash", "zsh", "fish")


def add(commands: Any, parser: argparse.ArgumentParser) -> None:
    """Adds both to the command line of `parser`."""
    status = command(
        commands,
        "status",
        _status,
        "tell from any shell how a fit is doing: step, loss, time to go, last checkpoint",
        "ep3stream status runs/first",
    )
    status.add_argument("run", type=disk_path, metavar="RUN")
    status.add_argument("--json", action="store_true", help="one JSON object on stdout")
    completion = command(
        commands,
        "completion",
        _completion(parser),
        "print what makes a shell complete commands, options and file names",
        "ep3stream completion bash",
        "ep3stream completion zsh",
        "ep3stream completion fish",
    )
    completion.description = (
        "bash: ep3stream completion bash > ~/.local/share/bash-completion/completions/ep3stream; "
        "zsh: ep3stream completion zsh > a directory of $fpath, as _ep3stream; "
        "fish: ep3stream completion fish > ~/.config/fish/completions/ep3stream.fish"
    )
    completion.add_argument("shell", choices=_SHELLS)


def _status(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.inspection.status import describe_status, status

    now = status(options.run)
    print(json_text(now) if options.json else describe_status(now))


def _completion(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace, Console], None]:
    def run(options: argparse.Namespace, console: Console) -> None:
        for action in _actions(parser):
            if action.choices is None and (not action.option_strings or _takes_file(action)):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, options.shell))

    return run


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _actions(each)


def _takes_file(action: argparse.Action) -> bool:
    return any(word in str(action.metavar) for word in ("FILE", "STORE", "ARRAY"))
