"""JSON files that contain their own digest, and whose fields are all checked when they are read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar, cast, get_args

import xxhash

from ep3stream.errors import DamagedDataError

_MAX_NESTING = 32

# Of brackets, counted in texts as well: an empty list takes 30 times the memory of its text.
_MAX_CONTAINERS = 1 << 20
_T = TypeVar("_T")


def canonical_json(value: object) -> bytes:
    """The one byte string that stands for `value`; TypeError or ValueError for a value that JSON cannot hold."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def json_digest(value: object) -> str:
    """The xxh3_128 digest of the canonical JSON, in 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(canonical_json(value))


def signed_bytes(content: Mapping[str, Any]) -> bytes:
    """The object with its digest in the field `digest`, in canonical JSON; `signed_object` reads it back."""
    return canonical_json({**content, "digest": json_digest(content)})


def signed_object(data: bytes, origin: str, remedy: str = "restore it or convert again") -> dict[str, Any]:
    """The JSON object in `data` without its field `digest`, which must be right.

    Raises DamagedDataError naming `origin` and ending with `remedy`.
    """
    try:
        if data.count(b"[") + data.count(b"{") > _MAX_CONTAINERS:
            raise ValueError(f"it holds more than {_MAX_CONTAINERS} lists and objects")
        content = json.loads(data.decode("utf-8"))
        _limit_nesting(content)
        if canonical_json(content) != data:
            raise ValueError("it is not in canonical form")
        digest = content.pop("digest")
        actual = json_digest(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedDataError(f"{origin} is not what was written ({error!r:.200}); {remedy}") from error
    if digest != actual:
        raise DamagedDataError(f"{origin} declares digest {digest!r:.50} but has {actual}; {remedy}")
    return cast(dict[str, Any], content)


def _limit_nesting(content: object) -> None:
    level: list[object] = [content]
    for _ in range(_MAX_NESTING):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
    if level:
        raise ValueError(f"nested deeper than {_MAX_NESTING}")


class JsonObject:
    """A JSON object with exactly the fields of the dataclass `kind`.

    Each method returns the value of one field. Raises DamagedDataError, naming `where` and the field that does not fit.
    """

    def __init__(self, value: object, where: str, kind: type[Any]) -> None:
        names = {f.name for f in fields(kind)}
        if not isinstance(value, dict) or set(value) != names:
            raise DamagedDataError(f"{where} must have exactly the fields {', '.join(sorted(names))}")
        self._value = value
        self.where = where

    def _refuse(self, key: str, expected: str) -> DamagedDataError:
        return DamagedDataError(f"{self.where}: {key} is {self._value[key]!r:.60}, which is not {expected}")

    def integer(self, key: str, low: int) -> int:
        """A whole number of at least `low` that fits 64 bits; true and 1.0 are refused."""
        value = self._value[key]
        if type(value) is not int or not low <= value < 1 << 63:
            raise self._refuse(key, f"a whole number of at least {low}")
        return value

    def text(self, key: str) -> str:
        """The text of a field."""
        if not isinstance(self._value[key], str):
            raise self._refuse(key, "a text")
        return cast(str, self._value[key])

    def choice(self, key: str, choices: Any) -> Any:
        """One of the strings of a Literal type."""
        # By equality, because an unhashable value must be refused and not raise.
        if not any(self._value[key] == choice for choice in get_args(choices)):
            raise self._refuse(key, f"one of {', '.join(get_args(choices))}")
        return self._value[key]

    def mapping(self, key: str) -> dict[str, Any]:
        """An object with any fields."""
        if not isinstance(self._value[key], dict):
            raise self._refuse(key, "an object")
        return cast(dict[str, Any], self._value[key])

    def sequence(self, key: str, kind: type[_T]) -> tuple[_T, ...]:
        """A list whose items have exactly this type: a list of float holds no int."""
        value = self._value[key]
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise self._refuse(key, f"a list of {kind.__name__}")
        return tuple(value)

    def optional(self, key: str, read: Callable[[], _T]) -> _T | None:
        """None where the field is null, and otherwise the result of `read`."""
        return None if self._value[key] is None else read()

    def inner(self, key: str, kind: type[Any]) -> JsonObject:
        """An object with the fields of another dataclass."""
        return JsonObject(self._value[key], f"{self.where}: {key}", kind)


def created_by() -> str:
    """`ep3stream 0.1.0`, written into every file made; the version is `unknown` in a source tree not installed."""
    try:
        return f"ep3stream {version('ep3stream')}"
    except PackageNotFoundError:
        return "ep3stream unknown"
