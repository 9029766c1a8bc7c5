"""What `verify` says of damaged stores and runs, quick or not; random damage as in tools/bench_damage.py."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from test_store import SPEC, _write

import ep3stream
from ep3stream import FitConfig, cli
from ep3stream.errors import DamagedDataError
from ep3stream.inspection.describe import describe_soundness
from ep3stream.run.bundle import read_bundle, write_bundle
from ep3stream.store.json_files import signed_object
from ep3stream.store.reader import open_store

SHARDED = replace(SPEC, expected_rows=16 * 4096 * 3)
CODECS = {
    "plain": SPEC,
    "lz4": replace(SPEC, codec="lz4"),
    "zstd": replace(SPEC, codec="zstd"),
    "sharded": SHARDED,
}


def load_tool(name: str) -> Any:
    path = Path(__file__).parents[1] / "tools" / f"{name}.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # Where a tool finds those that it uses.
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_random_damage_is_detected_or_harmless_and_never_data(tmp_path, capsys):
    bench = load_tool("bench_damage")
    assert (
        bench.main(["--trials", "12", "--source-trials", "0", "--seed", "3", "--directory", str(tmp_path)])
        == 0
    )
    out = capsys.readouterr().out
    assert "12 trials" in out
    assert "0 VISIBLE, 0 READ BY FIT, 0 CRASHED" in out


def test_random_damage_to_a_source_is_refused_or_told_and_never_data_without_a_word(tmp_path, capsys):
    bench = load_tool("bench_damage")
    arguments = ["--trials", "0", "--source-trials", "24", "--seed", "1", "--directory", str(tmp_path)]
    assert bench.main(arguments) == 0
    out = capsys.readouterr().out
    assert "source trials in" in out
    assert "0 SILENT, 0 CRASHED" in out


@pytest.mark.parametrize(
    ("name", "damage", "hidden"),
    [
        ("hdf5 virtual", "delete", "ep3stream.formats.hdf5_arrays._StorageCheck.require_stored"),
        ("hdf5 external", "cut", "ep3stream.formats.hdf5_arrays._StorageCheck.require_stored"),
        ("zarr sharded", "delete", "ep3stream.formats.zarr_arrays._Chunks.require_there"),
    ],
)
def test_the_benchmark_sees_damage_that_a_source_lets_through(name, damage, hidden, tmp_path, monkeypatch):
    load_tool("bench_damage")
    tool = sys.modules["source_damage"]
    monkeypatch.setattr(tool, "SOURCES", {name: tool.SOURCES[name]})
    monkeypatch.setattr(tool, "DAMAGES", {damage: tool.DAMAGES[damage]})
    assert {outcome for _, _, outcome in tool.run_source_trials(tmp_path, 8, 0)[0]} <= {
        "refused",
        "told",
        "same",
    }
    monkeypatch.setattr(hidden, lambda *arguments: None)
    counts, examples = tool.run_source_trials(tmp_path, 8, 0)
    assert counts[damage, name, "SILENT"] > 0
    assert all(name in line for line in examples)


def test_the_benchmark_sees_damage_that_a_reader_lets_through(tmp_path, capsys, monkeypatch):
    bench = load_tool("bench_damage")
    monkeypatch.setattr("ep3stream.store.reader.segment_digest", lambda x, y: "0" * 32)
    monkeypatch.setattr("ep3stream.conversion.writer.segment_digest", lambda x, y: "0" * 32)
    monkeypatch.setattr(bench, "FORMATS", ("hdf5",))
    monkeypatch.setattr(bench, "DAMAGE", {"swap two": bench.swap})
    assert bench.main(["--trials", "30", "--source-trials", "0", "--directory", str(tmp_path)]) == 1
    assert "READ BY FIT: swap two of" in capsys.readouterr().out


# Quick: sizes and presence.


@pytest.mark.parametrize("spec", CODECS.values(), ids=CODECS)
def test_quick_finds_a_sound_store_sound_and_reads_no_row(tmp_path, spec, monkeypatch):
    _write(tmp_path / "s", "zarr", spec, train=300, test=20, tiny=2)
    monkeypatch.setattr("ep3stream.store.zarr_store.ZarrReader.read", None)
    assert ep3stream.verify(tmp_path / "s", quick=True) == []


@pytest.mark.parametrize("spec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("size", [0, 3, 19, -1, 1], ids="{} bytes".format)
def test_quick_names_a_file_of_the_wrong_size(tmp_path, spec, size):
    _write(tmp_path / "s", "zarr", spec, train=300)
    file = tmp_path / "s/train/x/c/1/0"
    data = file.read_bytes()
    file.write_bytes(data[:size] if size != 1 else data + b"\0")
    (problem,) = ep3stream.verify(tmp_path / "s", quick=True)
    assert f"{tmp_path / 's'}: train/x/c/1/0 has {len(file.read_bytes())} bytes" in problem


def test_quick_names_a_chunk_that_a_shard_lacks_and_what_its_index_cannot_mean(tmp_path):
    _write(tmp_path / "s", "zarr", SHARDED, train=300)
    file = tmp_path / "s/train/x/c/1/0"
    data = bytearray(file.read_bytes())
    data[-4 - 2 * 16 : -4 - 16] = b"\xff" * 16
    file.write_bytes(data)
    (problem,) = ep3stream.verify(tmp_path / "s", quick=True)
    assert "train/x/c/1/0 lacks chunk 1" in problem
    data[-4 - 2 * 16 : -4 - 16] = b"\xff" * 15 + b"\x7f"
    file.write_bytes(data)
    (problem,) = ep3stream.verify(tmp_path / "s", quick=True)
    assert "which its index does not account for" in problem


@pytest.mark.parametrize("spec", [SHARDED, replace(SHARDED, codec="lz4")], ids=["plain", "lz4"])
@pytest.mark.parametrize("place", [0, -1])
def test_quick_names_a_shard_whose_chunks_do_not_fill_it(tmp_path, spec, place):
    _write(tmp_path / "s", "zarr", spec, train=300)
    file = tmp_path / "s/train/x/c/1/0"
    data = file.read_bytes()
    index = np.frombuffer(data[-52:-4], "<u8").reshape(3, 2).copy()
    index[place, 0 if place == 0 else 1] += np.uint64(
        5
    )  # An offset past the first byte, or a length too long.
    file.write_bytes(data[:-52] + index.tobytes() + data[-4:])
    (problem,) = ep3stream.verify(tmp_path / "s", quick=True)
    assert "train/x/c/1/0 has" in problem
    assert "which its index does not account for" in problem


@pytest.mark.parametrize("quick", [True, False])
def test_missing_and_foreign_files_and_folders_are_named_once(tmp_path, quick):
    _write(tmp_path / "s", "zarr", SPEC, train=40)
    (tmp_path / "s/train/y/c/1").unlink()
    (tmp_path / "s/train/y/zarr.json.bak").write_text("")
    (tmp_path / "s/valid").mkdir()
    problems = ep3stream.verify(tmp_path / "s", quick=quick)
    assert len(problems) == 3
    for name, what in (
        ("train/y/c/1", "is missing"),
        ("train/y/zarr.json.bak", "belong"),
        ("valid", "belong"),
    ):
        assert [p for p in problems if f"{name} " in p and what in p], problems


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("zarr.json", '"group"', '"array"', "zarr.json is damaged"),
        ("train/zarr.json", "{}", '{"a": 1}', "train/zarr.json has attributes"),
        ("train/x/zarr.json", '"NaN"', "0.0", "train/x/zarr.json has fill_value 0.0; it must be 'NaN'"),
        ("train/y/zarr.json", "40", "41", "train/y/zarr.json has shape"),
        ("train/zarr.json", '"zarr_format"', '"zarr_formau"', "has the unknown key 'zarr_formau'"),
        ("train/x/zarr.json", '"separator"', '"separatos"', "train/x/zarr.json"),
        ("train/y/zarr.json", "crc32c", "crc32x", "train/y/zarr.json is damaged"),
    ],
)
def test_metadata_that_is_not_as_written_is_named(tmp_path, file, old, new, words):
    _write(tmp_path / "s", "zarr", SPEC, train=40)
    text = (tmp_path / "s" / file).read_text()
    assert old in text
    (tmp_path / "s" / file).write_text(text.replace(old, new, 1))
    assert [p for p in ep3stream.verify(tmp_path / "s", quick=True) if words in p]
    assert [p for p in ep3stream.verify(tmp_path / "s") if words in p]


@pytest.mark.parametrize("quick", [True, False])
def test_an_hdf5_file_of_another_size_or_without_a_chunk_is_named(tmp_path, quick):
    _write(tmp_path / "long", "hdf5", SPEC, train=40)
    with (tmp_path / "long").open("ab") as file:
        file.write(b"more")
    size = (tmp_path / "long").stat().st_size
    assert ep3stream.verify(tmp_path / "long", quick=quick) == [
        f"{tmp_path / 'long'}: the file has {size} bytes; it must have {size - 4}"
    ]
    _write(tmp_path / "hole", "hdf5", SPEC, train=40)
    with h5py.File(tmp_path / "hole", "r+") as file:
        file["train/x"].resize(16, axis=0)
        file["train/x"].resize(40, axis=0)
    problems = ep3stream.verify(tmp_path / "hole", quick=quick)
    assert [p for p in problems if "chunk 2 of train/x is missing" in p]


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    _write(tmp_path / "s", "zarr", SPEC, train=40)
    for name in ("train/y/c/1", "train/y/zarr.json"):
        (tmp_path / "s" / name).unlink()
        (tmp_path / "s" / name).mkdir()
    problems = ep3stream.verify(tmp_path / "s", quick=True)
    assert [p.split(": ")[1].split(" is ")[0] for p in problems] == ["train/y/c/1", "train/y/zarr.json"]


# Links lead out of the store: what lies there is nobody's promise.


@pytest.mark.parametrize(
    "name", ["train/x/c/1/0", "train/x/c", "train/y/zarr.json", "train", "manifest.json"]
)
def test_a_symbolic_link_inside_a_store_is_refused(tmp_path, name):
    _write(tmp_path / "s", "zarr", SPEC, train=40)
    (tmp_path / "s" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "s" / name).symlink_to(tmp_path / "elsewhere")
    for quick in (True, False):
        assert [p for p in ep3stream.verify(tmp_path / "s", quick=quick) if f"{name} is" in p or "link" in p]
    with pytest.raises(DamagedDataError, match="link"):
        open_store(tmp_path / "s").split("train").read_rows(np.arange(40))


def test_a_store_may_be_reached_by_a_link(tmp_path):
    for format in ("zarr", "hdf5"):
        _write(tmp_path / format, format, SPEC, train=40)
        (tmp_path / f"link-{format}").symlink_to(tmp_path / format)
        assert ep3stream.verify(tmp_path / f"link-{format}") == []


@pytest.mark.parametrize("name", ["train/x", "train"])
def test_a_link_inside_an_hdf5_store_is_refused(tmp_path, name):
    _write(tmp_path / "s", "hdf5", SPEC, train=40)
    shutil.copyfile(tmp_path / "s", tmp_path / "other")
    with h5py.File(tmp_path / "s", "r+") as file:
        del file[name]
        file[name] = h5py.ExternalLink(str(tmp_path / "other"), name)
    for quick in (True, False):
        assert [p for p in ep3stream.verify(tmp_path / "s", quick=quick) if f"{name} is a link" in p]


# Messages, progress, runs.


def test_a_file_that_does_not_decode_and_both_that_may_be_swapped_are_named(tmp_path):
    _write(tmp_path / "s", "zarr", SPEC, train=48)
    file = tmp_path / "s/train/y/c/1"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    (problem,) = ep3stream.verify(tmp_path / "s")
    assert "split train, segment 1" in problem
    assert "train/y/c/1 does not decode" in problem
    file.write_bytes((tmp_path / "s/train/y/c/0").read_bytes())
    (problem,) = ep3stream.verify(tmp_path / "s")
    assert "segment 1 (train/x/c/1/0, train/y/c/1) has digest" in problem


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_progress_ends_with_all_bytes_of_the_rows(tmp_path, format):
    _write(tmp_path / "s", format, SPEC, train=40, test=17)
    seen: list[Any] = []
    assert ep3stream.verify(tmp_path / "s", progress=seen.append) == []
    assert [now.bytes_read for now in seen] == [384, 408, 792, 1176, 1368]
    assert {now.bytes_total for now in seen} == {57 * (5 * 4 + 4)}
    seen.clear()
    ep3stream.verify(tmp_path / "s", quick=True, progress=seen.append)
    assert seen == []


def test_the_command_prints_a_line_a_piece_and_exits_with_3(tmp_path, capsys):
    _write(tmp_path / "s", "zarr", SPEC, train=40)
    assert cli.main(["verify", str(tmp_path / "s")]) == 0
    assert "is sound: every digest is right (" in capsys.readouterr().out
    assert cli.main(["verify", "--quick", str(tmp_path / "s")]) == 0
    assert "is complete" in capsys.readouterr().out
    for number in (0, 2):
        (tmp_path / f"s/train/x/c/{number}/0").unlink()
    for arguments in (["verify"], ["verify", "--quick"]):
        assert cli.main([*arguments, str(tmp_path / "s")]) == 3
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2
        assert "train/x/c/0/0 is missing" in lines[0]


def test_the_summary_tells_bytes_seconds_and_speed():
    line = describe_soundness(Path("s"), 250_000_000, 2.0)
    assert line == "s is sound: every digest is right (250.0 MB read in 2.0 s, 125.0 MB/s)"


def test_quick_sees_a_cut_or_missing_tensor_file_of_a_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(FitConfig().to_toml())
    write_bundle(run / "setup", "set-up", {"a": torch.arange(5.0)}, {})
    write_bundle(run / "model", "model", {"a": torch.arange(5.0)}, {})
    write_bundle(run / "checkpoints" / f"step-{7:012d}", "checkpoint", {"a": torch.arange(5.0)}, {})
    assert ep3stream.verify(run, quick=True) == []
    tensors = run / "model/tensors.safetensors"
    os.truncate(tensors, 50)
    (problem,) = ep3stream.verify(run, quick=True)
    assert problem.startswith(f"{tensors} has 50 bytes; it must have ")
    tensors.unlink()
    (problem,) = ep3stream.verify(run, quick=True)
    assert problem.startswith(f"{tensors} is missing")
    assert len(ep3stream.verify(run)) == 2  # The checkpoint lacks what a fit needs; its sizes are right.


def test_a_bundle_is_not_to_be_converted_again(tmp_path):
    write_bundle(tmp_path / "b", "model", {"a": torch.zeros(1)}, {})
    (tmp_path / "b/manifest.json").write_bytes(b"{}")
    with pytest.raises(DamagedDataError, match=r"restore it or remove .*b$"):
        read_bundle(tmp_path / "b", "model")
    with pytest.raises(DamagedDataError, match="do this"):
        signed_object(b"{}", "here", "do this")
