"""Bundles: every kind of damage is named, and a kill at any moment leaves the old one or the new one."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ep3stream.disk import write_file, write_json
from ep3stream.errors import DamagedDataError, InputError
from ep3stream.run import bundle
from ep3stream.run.bundle import BUNDLE_VERSION, find_bundle, read_bundle, write_bundle
from ep3stream.store.json_files import canonical_json, json_digest

OLD = {"weights": torch.arange(6.0).reshape(2, 3), "rows": torch.arange(4)}
NEW = {"weights": torch.ones(3, 3)}


@pytest.fixture
def written(tmp_path) -> Path:
    write_bundle(tmp_path / "model", "model", OLD, {"name": "old"})
    return tmp_path / "model"


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def sign(path: Path, **changes) -> None:
    """Rewrites a manifest with changes and a digest that is right."""
    content = json.loads((path / "manifest.json").read_text())
    del content["digest"]
    content |= changes
    (path / "manifest.json").write_bytes(canonical_json(content | {"digest": json_digest(content)}))


def test_a_bundle_comes_back_as_it_went(written):
    found = read_bundle(written, "model")
    assert_same(found.tensors, OLD)
    assert found.description == {"name": "old"}
    assert sorted(item.name for item in written.iterdir()) == ["manifest.json", "tensors.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_tensor_that_is_dropped_gives_back_its_pages(tmp_path):
    write_bundle(tmp_path / "model", "model", {"large": torch.ones(1000), "small": torch.ones(2)}, {})
    tensors = read_bundle(tmp_path / "model", "model").tensors
    n_maps = Path("/proc/self/maps").read_text().count(str(tmp_path))
    del tensors["large"]
    assert Path("/proc/self/maps").read_text().count(str(tmp_path)) == n_maps - 1
    assert tensors["small"].tolist() == [1, 1]


def test_the_same_content_has_the_same_bytes(written, tmp_path):
    write_bundle(tmp_path / "again", "model", OLD, {"name": "old"})
    for file in written.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_tensors_are_written_as_the_safetensors_library_writes_them(tmp_path):
    tensors = {
        "weights": torch.arange(12.0).reshape(3, 4).T,
        "eigenvalues": torch.arange(3.0, dtype=torch.float64),
        "a scalar": torch.tensor(7),
        "none": torch.zeros(0, dtype=torch.int64),
        "\u03bc": torch.arange(5, dtype=torch.int32),
        "large": torch.arange(3 << 20).float(),
    }
    write_bundle(tmp_path / "model", "model", tensors, {})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    assert (tmp_path / "model/tensors.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_bundle_replaces_the_one_before_and_leaves_nothing_else(written, tmp_path):
    write_bundle(written, "model", NEW, {})
    assert_same(read_bundle(written, "model").tensors, NEW)
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("file", ["tensors.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "longer", "missing", "directory"])
def test_every_damage_is_named_by_its_file(written, file, damage):
    path, data = written / file, (written / file).read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage != "missing":
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"flipped": flipped, "cut": data[:-1], "empty": b"", "longer": data + b"\0"}[damage])
    with pytest.raises(DamagedDataError, match=file):
        read_bundle(written, "model")


def test_a_newer_version_is_no_damage_but_asks_for_an_update(written):
    sign(written, format_version=BUNDLE_VERSION + 1)
    with pytest.raises(
        InputError, match=f"version {BUNDLE_VERSION + 1}, this ep3stream reads up to {BUNDLE_VERSION}; update"
    ):
        read_bundle(written, "model")


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "checkpoint"},
        {"format_version": 0},
        {"format_version": "1"},
        {"format_version": None},
        {"description": []},
        {"tensors": "../../etc/passwd"},
        {"tensors": {}},
        {"tensors": {"bytes": 1 << 62, "digest": "0" * 32}},
        {"tensors": {"bytes": -1, "digest": None}},
        {"tensors": {"bytes": [1], "digest": [2]}},
    ],
)
def test_a_manifest_that_says_something_else_is_refused(written, changes):
    sign(written, **changes)
    with pytest.raises(DamagedDataError, match="model"):
        read_bundle(written, "model")


def test_no_name_in_a_manifest_is_ever_followed(written, tmp_path):
    (tmp_path / "secret.safetensors").write_bytes((written / "tensors.safetensors").read_bytes())
    content = json.loads((written / "manifest.json").read_text())["tensors"]
    (written / "tensors.safetensors").unlink()
    sign(written, tensors=content | {"file": "../secret.safetensors", "path": "../secret.safetensors"})
    with pytest.raises(DamagedDataError, match=r"tensors\.safetensors"):
        read_bundle(written, "model")


@pytest.mark.parametrize(
    "text", [b"[]", b"null", b"{}", b"[" * 100_000, b'{"digest":NaN}', b"\xff", b'{"a":1,"a":1}']
)
def test_a_manifest_that_is_not_ours_is_refused(written, text):
    (written / "manifest.json").write_bytes(text)
    with pytest.raises(DamagedDataError, match=r"manifest\.json"):
        read_bundle(written, "model")


def test_an_enormous_manifest_is_refused_unread(written):
    os.truncate(written / "manifest.json", 1 << 40)
    with pytest.raises(DamagedDataError, match="larger than"):
        read_bundle(written, "model")


def test_tensors_that_lie_about_their_size_are_refused(written):
    header = json.dumps(
        {"weights": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    ).encode()
    data = len(header).to_bytes(8, "little") + header + b"\0" * 16
    (written / "tensors.safetensors").write_bytes(data)
    digest = bundle.file_digest(written / "tensors.safetensors")
    sign(written, tensors={"bytes": len(data), "digest": digest})
    with pytest.raises(DamagedDataError, match=r"tensors\.safetensors cannot be read"):
        read_bundle(written, "model")


def test_on_a_full_disk_the_old_bundle_stays_and_the_error_names_the_need(written):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(InputError, match=r"model cannot be written .* needs 4\.0 MB: free space"):
            write_bundle(written, "model", {"weights": torch.zeros(1_000_000)}, {})
        with pytest.raises(InputError, match="page cannot be written"):
            write_file(written.parent / "page", b"\0" * (1 << 17))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(read_bundle(written, "model").tensors, OLD)
    assert [item.name for item in written.parent.iterdir()] == ["model"]


def test_too_little_free_space_is_told_before_anything_is_written(written, monkeypatch):
    monkeypatch.setattr(bundle.disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(InputError, match=r"No space left on device: 0\.0 MB are free"):
        write_bundle(written, "model", NEW, {})
    assert_same(read_bundle(written, "model").tensors, OLD)


def test_a_file_in_the_way_is_refused_and_kept(tmp_path):
    (tmp_path / "model").write_text("precious")
    with pytest.raises(InputError, match="model cannot be written"):
        write_bundle(tmp_path / "model", "model", NEW, {})
    (tmp_path / "config.toml").mkdir()
    with pytest.raises(InputError, match=r"config\.toml cannot be written"):
        write_json(tmp_path / "config.toml", {})
    assert (tmp_path / "model").read_text() == "precious"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["config.toml", "model"]


class Killed(BaseException):
    """Stands for a kill: nothing catches it, and nothing runs after it."""


class Killer:
    """Raises at the nth operation on files below a directory, by Python's audit events."""

    EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

    def __init__(self) -> None:
        self.left = self.seen = 0
        self.is_armed = False
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if not self.is_armed or event not in self.EVENTS:
            return
        self.seen += 1
        if self.seen == self.left:
            self.is_armed = False
            raise Killed

    def run(self, left: int, work) -> bool:
        """Whether `work` was killed at its operation number `left`."""
        self.left, self.seen, self.is_armed = left, 0, True
        try:
            work()
        except Killed:
            return True
        finally:
            self.is_armed = False
        return False


KILLER = Killer()


@pytest.mark.parametrize("is_new", [True, False])
def test_a_kill_between_any_two_operations_leaves_the_old_or_the_new_bundle(tmp_path, is_new):
    outcomes = []
    for left in range(1, 100):
        place = tmp_path / str(left) / "model"
        if not is_new:
            write_bundle(place, "model", OLD, {})
        was_killed = KILLER.run(left, lambda place=place: write_bundle(place, "model", NEW, {}))
        found = find_bundle(place)
        tensors = {} if found is None else read_bundle(found, "model").tensors
        outcomes.append("none" if not tensors else "new" if len(tensors) == 1 else "old")
        assert_same(tensors, {"none": {}, "new": NEW, "old": OLD}[outcomes[-1]])
        write_bundle(place, "model", NEW, {})  # the next one is not in its way
        assert_same(read_bundle(place, "model").tensors, NEW)
        assert [item.name for item in place.parent.iterdir()] == ["model"]
        if not was_killed:
            break
    assert not was_killed
    assert len(outcomes) > 6
    assert set(outcomes) == {"none" if is_new else "old", "new"}
    assert outcomes == sorted(outcomes, key="new".__eq__)


def test_a_kill_while_a_file_is_replaced_leaves_the_old_or_the_new_one(tmp_path):
    file = tmp_path / "config.toml"
    for left in range(1, 20):
        file.write_bytes(b"old")
        was_killed = KILLER.run(left, lambda: write_file(file, b"new"))
        assert file.read_bytes() in (b"old", b"new")
        if not was_killed:
            break
    assert not was_killed
    assert left > 3
    assert file.read_bytes() == b"new"
