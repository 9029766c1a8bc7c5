from __future__ import annotations

import copy
import json
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep3stream.errors import DamagedDataError, Ep3streamError, InputError
from ep3stream.store.json_files import canonical_json, json_digest
from ep3stream.store.manifest import STORE_FORMAT_VERSION, ColumnStatistics, Manifest, SplitInfo

_STATISTICS = ColumnStatistics((0.5, 1.0), (0.1, 0.0), (0.0, 1.0), (1.0, 1.0), (0, 3))
_SPLIT = SplitInfo("train", 10, 4, 1, ("0" * 32, "1" * 32, "2" * 32), _STATISTICS, None, (4, 5, 1))
MANIFEST = Manifest(
    format_version=STORE_FORMAT_VERSION,
    created_by="ep3stream test",
    task="classification",
    n_features=2,
    n_outputs=3,
    x_dtype="float32",
    y_dtype="int32",
    feature_names=("a", "b"),
    target_names=("label",),
    class_names=("x", "y", "ü"),
    columns={"a": {"kind": "number"}},
    shuffle_seed=None,
    source=({"name": "rows.csv", "bytes": 12, "digest": "ab"},),
    conversion={"dropped_rows": 3},
    codec="none",
    splits={"train": _SPLIT},
)


def _content(manifest: Manifest = MANIFEST) -> dict[str, Any]:
    return json.loads(canonical_json(asdict(manifest)))


def _signed(content: Any) -> bytes:
    return canonical_json({**content, "digest": json_digest(content)})


def test_a_manifest_survives_its_json() -> None:
    assert Manifest.from_json(MANIFEST.to_json(), "here") == MANIFEST


def test_the_fingerprint_follows_the_content() -> None:
    assert MANIFEST.fingerprint == replace(MANIFEST).fingerprint
    assert MANIFEST.fingerprint != replace(MANIFEST, shuffle_seed=1).fingerprint


def test_every_flipped_bit_is_found() -> None:
    data = MANIFEST.to_json()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(DamagedDataError, match="here"):
            Manifest.from_json(bytes(damaged), "here")


def test_every_truncation_is_found() -> None:
    data = MANIFEST.to_json()
    for length in range(len(data)):
        with pytest.raises(DamagedDataError, match="here"):
            Manifest.from_json(data[:length], "here")


def test_a_newer_format_is_named_as_such() -> None:
    with pytest.raises(InputError, match=r"here has store format 4 .* upgrade"):
        Manifest.from_json(_signed({**_content(), "format_version": 4}), "here")


def test_format_1_which_had_no_field_conversion_is_read_and_kept_as_it_was() -> None:
    content = {**_content(), "format_version": 1}
    del content["conversion"]
    manifest = Manifest.from_json(_signed(content), "here")
    assert manifest.conversion == {}
    assert manifest.to_json() == _signed(content)


def test_deep_nesting_is_refused() -> None:
    nested: Any = {}
    for _ in range(40):
        nested = {"a": nested}
    with pytest.raises(DamagedDataError, match="nested deeper than 32"):
        Manifest.from_json(_signed({**_content(), "columns": nested}), "here")


def test_absurd_nesting_is_refused() -> None:
    with pytest.raises(DamagedDataError, match="here"):
        Manifest.from_json(b'{"columns":' + b"[" * 100_000 + b"]" * 100_000 + b',"digest":"0"}', "here")


def test_a_manifest_of_absurd_size_is_refused_unread() -> None:
    with pytest.raises(DamagedDataError, match="at most"):
        Manifest.from_json(b" " * ((64 << 20) + 1), "here")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("task",), "ranking", "task is 'ranking'"),
        (("task",), [], "task is"),
        (("n_features",), 3, "feature_names has 2 names but n_features is 3"),
        (("n_features",), True, "n_features is True"),
        (("n_features",), 2.0, "n_features is 2.0"),
        (("x_dtype",), "float64", "x_dtype"),
        (("y_dtype",), "float32", "y_dtype is float32 but task is classification"),
        (("class_names",), ["x"], "class_names has 1 names"),
        (("class_names",), "xyz", "class_names is 'xyz'"),
        (("splits",), {}, "there is no split"),
        (("splits", "train", "name"), "other", "split 'train'.*'other'"),
        (("splits", "train", "n_rows"), 13, "3 digests for 4 segments"),
        (("splits", "train", "n_rows"), 0, "n_rows is 0"),
        (("splits", "train", "n_rows"), 1 << 70, "n_rows is"),
        (("splits", "train", "segment_rows"), 0, "segment_rows is 0"),
        (("splits", "train", "segment_rows"), 1 << 40, "segment_rows is"),
        (("splits", "train", "segments_per_file"), 4, "segments_per_file is 4"),
        (("splits", "train", "digests"), ["0" * 32, "1" * 32, "../x"], "not 32 hex digits"),
        (("splits", "train", "class_counts"), [4, 5, 2], "class_counts sum to 11"),
        (("splits", "train", "class_counts"), [14, -5, 1], "class_counts must be"),
        (("splits", "train", "class_counts"), None, "needs class_counts"),
        (("splits", "train", "features", "mean"), [0.5], "features.mean has 1 values"),
        (("splits", "train", "features", "std"), [-0.5, 0.0], "features.std is negative"),
        (("splits", "train", "features", "minimum"), [2.0, 1.0], "features.minimum is above"),
        (("splits", "train", "features", "missing"), [0, 11], "features.missing"),
        (("splits", "train", "features", "extra"), 1, "exactly the fields"),
        (("extra",), 1, "exactly the fields"),
    ],
)
def test_a_well_signed_contradiction_is_named(path: tuple[str, ...], value: Any, message: str) -> None:
    content = _content()
    _set(content, path, value)
    with pytest.raises(DamagedDataError, match=f"here.*{message}"):
        Manifest.from_json(_signed(content), "here")


def test_a_split_may_not_lead_out_of_the_store() -> None:
    content = _content()
    content["splits"] = {"../etc": {**content["splits"]["train"], "name": "../etc"}}
    with pytest.raises(DamagedDataError, match="not one a split may have"):
        Manifest.from_json(_signed(content), "here")


def test_infinities_that_json_spells_out_are_refused() -> None:
    data = MANIFEST.to_json().replace(b"[0.5,1.0]", b"[1e999,1.0]")
    with pytest.raises(DamagedDataError, match="here"):
        Manifest.from_json(data, "here")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.data())
def test_a_mutated_and_resigned_manifest_loads_exactly_or_fails_cleanly(data: st.DataObject) -> None:
    content = _content()
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(_paths(content)))
        _set(content, path, data.draw(_JSON | st.integers(0, 20)))
    signed = _signed(content)
    with suppress(Ep3streamError):
        assert Manifest.from_json(signed, "here").to_json() == signed


@settings(max_examples=200)
@given(st.binary(max_size=200) | _JSON.map(canonical_json))
def test_anything_else_is_no_manifest(data: bytes) -> None:
    with pytest.raises(DamagedDataError, match="here"):
        Manifest.from_json(data, "here")


def _paths(value: Any) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(key, *rest) for key, child in items for rest in [(), *_paths(child)]]


def _set(content: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = copy.deepcopy(value)
