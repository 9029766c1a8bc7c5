from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ep3stream.errors import SourceError
from ep3stream.formats import digests
from ep3stream.formats.digests import SourceDigests

BLOCK = 1000


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "DIGEST_BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(digests, "_READ_BYTES", 300)


def write(path: Path, n_bytes: int, seed: int = 0) -> Path:
    path.write_bytes(np.random.default_rng(seed).bytes(n_bytes))
    return path


def expected(data: bytes) -> str:
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)] or [b""]
    return xxhash.xxh3_128_hexdigest(b"".join(xxhash.xxh3_128_digest(block) for block in blocks))


@pytest.mark.parametrize("n_bytes", [0, 1, 999, 1000, 1001, 3000, 3500])
def test_a_digest_is_that_of_the_digests_of_the_blocks(tmp_path: Path, n_bytes: int) -> None:
    file = write(tmp_path / "a.csv", n_bytes)
    (entry,) = SourceDigests([file]).finish()
    assert entry == {"name": "a.csv", "bytes": n_bytes, "digest": expected(file.read_bytes())}


@given(st.lists(st.integers(0, 3500)), st.integers(0, 3500))
def test_steps_and_resuming_anywhere_give_the_same_digest(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], stop: int
) -> None:
    file = write(tmp_path_factory.mktemp("d") / "a.csv", 3500)
    first = SourceDigests([file])
    for step in [*sorted(steps), stop]:
        first.advance(0, step)
    second = SourceDigests([file])
    second.restore(first.state())
    for step in steps:
        second.advance(0, step)
    assert second.finish() == first.finish() == SourceDigests([file]).finish()


def test_a_file_of_another_time_but_the_same_content_is_accepted(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 2500)
    first = SourceDigests([file])
    first.advance(0, 2100)
    os.utime(file, ns=(1, 1))
    SourceDigests([file]).restore(first.state())


@pytest.mark.parametrize("place", [0, 1999])
def test_a_block_done_that_changed_is_named(tmp_path: Path, place: int) -> None:
    file = write(tmp_path / "a.csv", 2500)
    first = SourceDigests([file])
    first.advance(0, 2100)
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(1, 1))
    with pytest.raises(SourceError, match=r"a\.csv: changed since the conversion began \(other content\)"):
        SourceDigests([file]).restore(first.state())


def test_other_sizes_and_other_files_are_named(tmp_path: Path) -> None:
    file, other = write(tmp_path / "a.csv", 2500), write(tmp_path / "b.csv", 10)
    state = SourceDigests([file]).state()
    with pytest.raises(SourceError, match=r"files changed since the conversion began: b\.csv"):
        SourceDigests([file, other]).restore(state)
    write(file, 2501)
    with pytest.raises(SourceError, match=r"a\.csv: changed .*2500 bytes then, 2501 now"):
        SourceDigests([file]).restore(state)


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 2500)
    reader = SourceDigests([file])
    os.utime(file, ns=(1, 1))
    with pytest.raises(SourceError, match="changed while it was read"):
        reader.finish()
    reader = SourceDigests([file])
    write(file, 100)
    with pytest.raises(SourceError, match="became shorter while it was read"):
        reader.finish()


def test_a_directory_is_digested_by_names_and_sizes(tmp_path: Path) -> None:
    store = tmp_path / "x.zarr"
    (store / "c").mkdir(parents=True)
    write(store / "zarr.json", 10)
    write(store / "c" / "0", 100)
    (first,) = SourceDigests([store]).finish()
    assert (first["name"], first["bytes"]) == ("x.zarr", 110)
    (store / "c" / "0").rename(store / "c" / "1")
    (second,) = SourceDigests([store]).finish()
    assert first["names_digest"] != second["names_digest"]


def test_a_source_without_files_has_no_bytes() -> None:
    nothing = SourceDigests([])
    assert (nothing.bytes_total, nothing.state(), nothing.finish()) == (0, [], ())
