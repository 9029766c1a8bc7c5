"""What the commands share: how a command and its options are added to the command line, and how texts are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from ep3stream.config import RunConfig, Setting, settings_of
from ep3stream.errors import ConfigError
from ep3stream.store.files import Location, ObjectUrl, location

JSON_LOGS = "--json-logs"


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors, which `main` then prints in one line like any other."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError, with --help as the remedy."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace, Console], Any], summary: str, *examples: str
) -> argparse.ArgumentParser:
    """The parser of a new command, which `run` carries out; `run` returns an exit code, or None for 0."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog="\n         ".join(["Example: " + examples[0], *examples[1:]]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Without a default, which would undo a --quiet before the command.
    add_talk(parser, default=argparse.SUPPRESS)
    parser.set_defaults(command=run)
    return parser


def add_talk(parser: argparse.ArgumentParser, default: Any) -> None:
    """Adds the options that say how much a command says, and in which form."""
    parser.add_argument(
        "--quiet", action="store_true", default=default, help="only warnings and errors on stderr"
    )
    parser.add_argument(
        JSON_LOGS,
        action="store_true",
        default=default,
        help="stderr as JSON, one object a line, progress among it",
    )


def add_store(parser: argparse.ArgumentParser) -> None:
    """Adds the argument STORE."""
    parser.add_argument("store", type=store_place, metavar="STORE", help="a path, or s3://bucket/key")


def add_run(parser: argparse.ArgumentParser, help: str = "directory of a fit's results") -> None:
    """Adds the argument RUN."""
    parser.add_argument("run", type=disk_path, metavar="RUN", help=help)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds --json."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_read_timeout(parser: argparse.ArgumentParser) -> None:
    """Adds --read-timeout, the one setting of a fit that other readers of a store share."""
    add_settings(parser, RunConfig, "run", only={"read_timeout_s": ""})


def add_settings(parser: Any, table: type, name: str, only: Mapping[str, str] | None = None) -> None:
    """Adds the options of the settings of a dataclass, of those in `only` where it is given.

    parser: a parser, or a group of its options. name: of the table, for `given_settings`.
    only: name of a setting -> what its option means here; empty: what its field says.
    """
    for setting in settings_of(table):
        if setting.option is None or (only is not None and setting.name not in only):
            continue
        meaning = ((only or {}).get(setting.name) or _meaning(setting)).replace("%", "%%")
        option, key = f"--{setting.option}", f"{name}.{setting.name}"
        if bool in setting.kinds:
            parser.add_argument(option, dest=key, action=argparse.BooleanOptionalAction, help=meaning)
            if str in setting.kinds:
                there = f"{option}-dir"
                parser.add_argument(
                    there,
                    dest=f"{key}.dir",
                    metavar="DIRECTORY",
                    help=f"the same as {option}, in this directory",
                )
        else:
            parser.add_argument(option, dest=key, help=meaning, **_reading(setting))


def given_settings(options: argparse.Namespace, table: type, name: str) -> dict[str, Any]:
    """The settings of the dataclass that were given as options, by name."""
    given = {}
    for setting in settings_of(table):
        for key in (f"{name}.{setting.name}", f"{name}.{setting.name}.dir"):
            if (value := getattr(options, key, None)) is not None:
                given[setting.name] = value
    return given


def _meaning(setting: Setting) -> str:
    return f"{setting.help}; default: {setting.default_text}" if setting.default_text else setting.help


def _reading(setting: Setting) -> dict[str, Any]:
    """How argparse reads the value of the setting's option and shows it in --help."""
    if setting.parse is not None:
        action = {"action": _Gathered} if setting.repeats else {}
        return {"type": checked(setting.parse), "metavar": setting.metavar or "X", **action}
    number = next((kind for kind in (int, float) if kind in setting.kinds), None)
    if number is None and setting.choices:
        return {"choices": setting.choices, "type": type(setting.choices[0])}
    letter = {int: "N", float: "X", None: setting.name.upper()}[number]
    if number is not None and setting.choices:
        (word,) = setting.choices
        return {"type": number_or(word, number), "metavar": setting.metavar or f"{word}|{letter}"}
    return {"type": number or str, "metavar": setting.metavar or letter}


class _Gathered(argparse.Action):
    """Puts together the lists by name of an option that is given several times."""

    def __call__(self, _: object, namespace: argparse.Namespace, values: Any, __: str | None = None) -> None:
        gathered = dict(getattr(namespace, self.dest, None) or {})
        for name, items in values.items():
            gathered[name] = [*gathered.get(name, []), *items]
        setattr(namespace, self.dest, gathered)


def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` as argparse wants it: a ConfigError becomes an error of the option."""

    def parse_or_explain(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_or_explain


def number_or(word: str, number: Callable[[str], Any]) -> Callable[[str], Any]:
    """Reads a number, or the one word that may stand for it."""

    def parse(text: str) -> Any:
        if text == word:
            return text
        try:
            return number(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is neither {word!r} nor a number") from None

    return parse


def store_place(text: str) -> Location:
    """The path of a store, or its URL in a bucket."""
    return checked(location)(text)  # type: ignore[no-any-return]


def disk_path(text: str) -> Path:
    """A path on a disk, where runs and predictions must lie, since they are written piece by piece."""
    if isinstance(checked(location)(text), ObjectUrl):
        raise argparse.ArgumentTypeError(f"{text} is in a bucket, where only stores are kept; give a path")
    return Path(text)


def source_path(text: str) -> Path:
    """A path to read; an empty text, as of a variable of the shell that is not set, is not the current directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a path is empty; name a file")
    return Path(text)
