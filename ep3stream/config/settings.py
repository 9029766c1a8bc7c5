"""Each setting is declared once: as a dataclass field made by `setting`, with its type, default, meaning and limits.

From the field follow the checks (here), the options of the command line (cli/options.py), reading and writing TOML
(config/fit.py), what a resumed fit may change (run/directory.py) and docs/settings.md (tools/settings_table.py).

Own code, because no library fits all of that: importing tyro or jsonargparse takes 0.2 to 0.3 s, as long as `ep3stream
--help` takes as a whole, and their errors have several lines; pydantic (0.15 s, 10 MB) and msgspec check in words of
their own, and make no command line. An error here is one line: the setting, its value, and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ep3stream.config.parse import bytes_text, parse_bytes
from ep3stream.errors import ConfigError

# What may be done with a setting when a fit, or a conversion, is resumed. `fixed`: nothing, the work so far depends on
# the setting. `override`: changed by --override, from the step resumed at. `free`: changed; the result stays the same.
OnResume = Literal["fixed", "override", "free"]


@dataclass(frozen=True, slots=True)
class Limit:
    """A test of a number, and the words for an error that say which numbers pass the test."""

    allows: Callable[[float], bool]
    words: str


def at_least(low: float, words: str = "") -> Limit:
    """Finite numbers from `low` on."""
    return Limit(lambda number: low <= number < math.inf, words or f"at least {low}")


def positive(words: str) -> Limit:
    """Finite numbers above 0."""
    return Limit(lambda number: 0 < number < math.inf, words)


def from_0_below(end: float, words: str) -> Limit:
    """Numbers in [0, end)."""
    return Limit(lambda number: 0 <= number < end, words)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: what its field declares, and what follows from the field's name and annotation.

    kinds: the types of a value, `Sequence` and `Mapping` for those. choices: the values, or for a sequence the items,
    that the annotation names by a Literal; texts beside them are only allowed where `kinds` has `str`.
    The other fields are the arguments of `setting`.
    """

    default: Any
    help: str
    limit: Limit | None
    default_means: str
    option: str | None
    metavar: str
    parse: Callable[[str], Any] | None
    called: str
    unit: str
    on_resume: OnResume
    repeats: bool = False
    name: str = ""
    kinds: frozenset[Any] = frozenset()
    choices: tuple[Any, ...] = ()

    @property
    def default_text(self) -> str:
        """The default as the command line takes it, and in brackets what it stands for; empty for a plain None."""
        default = self.default() if callable(self.default) else self.default
        if isinstance(default, Mapping):
            text = ",".join(f"{name}={value:g}" for name, value in default.items())
        elif isinstance(default, bool):
            text = "yes" if default else "no"
        elif self.parse is parse_bytes:
            text = bytes_text(default)
        else:
            text = "" if default in (None, ()) else str(default).removesuffix(".0")
        return f"{text} ({self.default_means})" if text and self.default_means else text or self.default_means

    def check(self, value: Any) -> None:
        """Raises ConfigError unless `value` is one of the choices or within the limit; types are TOML's affair."""
        if Sequence in self.kinds and value is not None:
            self._check_items(value)
        elif self.choices or self.limit is not None:
            require(self._allows(value), self.refusal(value))

    def refusal(self, value: Any) -> str:
        """The message of the error about a value that is not allowed."""
        allowed = f"choose one of {', '.join(map(str, self.choices))}"
        if self.limit is not None:
            allowed = f"use {self.limit.words}"
        return f"{self.called} is {value!r:.80}{self.unit}; {allowed}"

    def _allows(self, value: Any) -> bool:
        if any(value == choice for choice in self.choices):
            return True
        if value is None or isinstance(value, str | Mapping):
            return any(isinstance(value, kind) for kind in self.kinds)
        # A number. NumPy's are taken too, which are no instances of int.
        return self.limit.allows(value) if self.limit is not None else bool(self.kinds - {NoneType, Mapping})

    def _check_items(self, value: Any) -> None:
        if isinstance(value, str):
            require(str in self.kinds, f"{self.called} is {value!r}; give a list of names")
            return
        require_distinct(self.called, value)
        for item in value if self.choices else ():
            require(item in self.choices, self.refusal(item))


def setting(
    default: Any,
    help: str,
    *,
    limit: Limit | None = None,
    default_means: str = "",
    option: str | None = "",
    metavar: str = "",
    parse: Callable[[str], Any] | None = None,
    called: str = "",
    unit: str = "",
    on_resume: OnResume = "fixed",
    repeats: bool = False,
) -> Any:
    """A dataclass field of a setting; its annotation tells the type, and by Literal the choices.

    default: a value, or a function without arguments that makes one. default_means: what the default stands for.
    help: what the setting is, in words that follow `--option VALUE`; for --help and docs/settings.md.
    limit: which numbers are allowed.
    option: the option without its dashes, unless it is the field's name; None for a setting without an option.
    metavar, parse: how the option's value is called in --help, and the function that reads its text, unless both
    follow from the type. parse raises ConfigError.
    called, unit: what errors call the setting, unless it is the field's name, and what they put behind its value.
    on_resume: whether the same fit or conversion may go on with another value.
    repeats: whether the option may be given again, as one of lists by name is; `parse` then reads one of them.
    """
    declared = Setting(
        default, help, limit, default_means, option, metavar, parse, called, unit, on_resume, repeats
    )
    metadata = {"setting": declared}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@cache
def settings_of(table: type) -> tuple[Setting, ...]:
    """The settings of a dataclass whose fields were made by `setting`, in the order of the fields."""
    hints = get_type_hints(table)
    settings = []
    for item in fields(table):
        declared: Setting = item.metadata["setting"]
        kinds, choices = _parts(hints[item.name])
        settings.append(
            replace(
                declared,
                name=item.name,
                kinds=kinds,
                choices=choices,
                called=declared.called or item.name,
                option=declared.option if declared.option != "" else item.name.replace("_", "-"),
            )
        )
    return tuple(settings)


def _parts(hint: Any) -> tuple[frozenset[Any], tuple[Any, ...]]:
    """The types of an annotation but for its Literals, and the values of these."""
    if get_origin(hint) is Literal:
        return frozenset(), get_args(hint)
    if get_origin(hint) is Mapping:
        return frozenset({Mapping}), ()
    if get_origin(hint) is Sequence:
        return frozenset({Sequence}), _parts(get_args(hint)[0])[1]
    if not get_args(hint):
        return frozenset({hint}), ()
    parts = [_parts(part) for part in get_args(hint)]
    return frozenset(kind for kinds, _ in parts for kind in kinds), tuple(
        choice for _, choices in parts for choice in choices
    )


def check_settings(config: object) -> None:
    """Raises ConfigError for the first setting of the dataclass whose value its field does not allow."""
    table: type = type(config)
    for each in settings_of(table):
        each.check(getattr(config, each.name))


def check_toml_value(table: type, name: str, value: Any, where: str) -> None:
    """Raises ConfigError unless the dataclass `table` has a setting of that name and of the type of the TOML value.

    A whole number will do where a float is asked for. where: file, table and setting, for the error.
    """
    settings = {each.name: each for each in settings_of(table)}
    require(name in settings, f"{where:.400} is not a setting; use one of {', '.join(settings)}")
    allowed = {dict if kind is Mapping else kind for kind in settings[name].kinds - {NoneType}}
    allowed |= {type(choice) for choice in settings[name].choices}
    if float in allowed:
        allowed.add(int)
    require(
        type(value) in allowed,
        f"{where} is {value!r:.80}; it must be {' or '.join(sorted(kind.__name__ for kind in allowed))}",
    )
    require_short_numbers(value, where)
    if isinstance(value, str):
        require(is_unicode(value), f"{where} is {value!r:.400}, which is not UTF-8; use another name")


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_distinct(called: str, names: Sequence[str]) -> None:
    """Raises ConfigError if a name is there twice."""
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    require(twice is None, f"{called} has {twice!r} twice; give each name once")


def require_short_numbers(value: Any, where: str) -> None:
    """Raises ConfigError for an int beyond 64 bits anywhere in a TOML value.

    Before any other check: an error that shows a hexadecimal number of thousands of digits would itself fail.
    """
    if isinstance(value, int):
        require(abs(value) < 1 << 63, f"{where} has more than 64 bits; use a smaller number")
    elif isinstance(value, list):
        for item in value:
            require_short_numbers(item, where)
    elif isinstance(value, dict):
        for name, item in value.items():
            require_short_numbers(item, f"{where}.{name:.80}")


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text: a file name in another encoding reaches Python with lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
