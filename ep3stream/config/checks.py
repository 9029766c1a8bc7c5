"""How settings are checked: each refusal names the field, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ep3stream.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """ConfigError unless it holds."""
    if not condition:
        raise ConfigError(message)


def require_distinct(field_name: str, names: Sequence[str]) -> None:
    """No name twice."""
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    require(twice is None, f"{field_name} has {twice!r} twice; give each name once")


def require_choice(field_name: str, value: str, choices: Any) -> None:
    """One of a Literal's."""
    allowed = get_args(choices)
    require(value in allowed, f"{field_name} is {value!r:.80}; choose one of {', '.join(allowed)}")


def require_short_numbers(value: Any, where: str) -> None:
    """Of a hexadecimal number of thousands of digits Python cannot even say in an error what it is."""
    if isinstance(value, int):
        require(abs(value) < 1 << 63, f"{where} has more than 64 bits; use a smaller number")
    elif isinstance(value, list):
        for item in value:
            require_short_numbers(item, where)
    elif isinstance(value, dict):
        for name, item in value.items():
            require_short_numbers(item, f"{where}.{name:.80}")


_type_hints = cache(get_type_hints)


def check_type(table: type, name: str, value: Any, where: str) -> None:
    """A TOML value against the field's annotation; a whole number will do where a float is asked for."""
    hints = _type_hints(table)
    require(name in hints, f"{where:.400} is not a setting; use one of {', '.join(hints)}")
    allowed = _plain_types(hints[name]) - {type(None)}
    if float in allowed:
        allowed |= {int}
    require(
        type(value) in allowed,
        f"{where} is {value!r:.80}; it must be {' or '.join(sorted(kind.__name__ for kind in allowed))}",
    )
    if isinstance(value, int):
        require(abs(value) < 1 << 63, f"{where} has more than 64 bits; use a smaller number")
    if isinstance(value, str):
        require(is_unicode(value), f"{where} is {value!r:.400}, which is not UTF-8; use another name")


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: a file name in another encoding reaches Python with lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _plain_types(hint: Any) -> set[type]:
    if get_origin(hint) is Literal:
        return {type(value) for value in get_args(hint)}
    if get_origin(hint) is Mapping:
        return {dict}
    if get_args(hint):
        return set().union(*(_plain_types(part) for part in get_args(hint)))
    return {hint}
