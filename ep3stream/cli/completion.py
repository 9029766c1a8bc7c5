"""`ep3stream completion`, the script that makes a shell complete commands, options and file names."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

from rich.console import Console

from ep3stream.cli.options import add_command


def add_completion(commands: Any, parser: argparse.ArgumentParser) -> None:
    """Adds `completion` to the command line, which is that of `parser`."""
    completion = add_command(
        commands,
        "completion",
        partial(_completion, parser),
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
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))


def _completion(parser: argparse.ArgumentParser, options: argparse.Namespace, console: Console) -> None:
    import shtab

    for action in _actions(parser):
        takes_file = any(word in str(action.metavar) for word in ("FILE", "STORE", "ARRAY"))
        if action.choices is None and (takes_file or not action.option_strings):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, options.shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument and option of the parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _actions(each)
