"""Stores, runs and sources from a stranger cost an error message: no code runs, nothing outside is written or read."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import google_crc32c
import h5py
import numpy as np
import pytest
import torch
from small_stores import PLAIN_OPTIONS, plain_config

import ep3stream
from ep3stream import cli
from ep3stream.config import FitConfig
from ep3stream.errors import DamagedDataError, Ep3streamError, InputError
from ep3stream.mesh import Mesh
from ep3stream.run.bundle import read_bundle, write_bundle
from ep3stream.run.checkpoint import require_shape
from ep3stream.run.event_log import read_lines
from ep3stream.run.setup import Setup
from ep3stream.solver.targets import TargetCode
from ep3stream.store.json_files import signed_bytes, signed_object
from ep3stream.store.reader import open_store
from ep3stream.store.verify import verify_store

ROOT = Path(__file__).parents[1]
SOURCES = {
    str(file.relative_to(ROOT)): ast.parse(file.read_text())
    for folder in ("ep3stream", "tools", "examples")
    for file in sorted((ROOT / folder).rglob("*.py"))
}
MB = 1 << 20


# -- code that could run a stranger's


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{name.name}" for name in node.names)}
    return {".".join(name.split(".")[:depth]) for name in names for depth in (1, 2, 3)}


def unsafe_uses(tree: ast.AST) -> list[str]:
    """What in a module could turn the bytes of a file into code."""
    modules = {
        "pickle",
        "cPickle",
        "cloudpickle",
        "dill",
        "joblib",
        "marshal",
        "shelve",
        "yaml",
        "jsonpickle",
    }
    modules |= {"torch.load", "torch.save", "torch.jit", "torch.package", "numpy.load", "runpy", "imp"}
    found = sorted(imported(tree) & modules)
    for name, call in calls(tree):
        last = name.split(".")[-1]
        if name in ("eval", "exec", "compile", "__import__"):
            found.append(name)
        if name in ("torch.load", "torch.save", "torch.jit.load") or last in ("read_pickle", "unsafe_load"):
            found.append(name)
        if name in ("np.load", "numpy.load") and "allow_pickle=False" not in ast.unparse(call):
            found.append(f"{name} without allow_pickle=False")
        if "allow_pickle=True" in ast.unparse(call):
            found.append(f"{name} with allow_pickle=True")
    return found


def test_nothing_in_the_package_its_tools_or_examples_makes_code_of_a_file():
    assert len(SOURCES) > 100
    found = {name: uses for name, tree in SOURCES.items() if (uses := unsafe_uses(tree))}
    # Some of the benchmark's tables are published as pickles alone: its own unpickler knows nothing but frames
    # (tests/test_bench_tables.py).
    assert {Path(name).name: uses for name, uses in found.items()} == {"table_data.py": ["pickle"]}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from torch import load", "import dill as d", "eval('1')", "np.load(f)",
        "x = np.load(f, allow_pickle=True)", "torch.load(f, weights_only=True)", "import yaml",
        "pandas.read_pickle(f)", "from numpy import load",
    ],
)  # fmt: skip
def test_the_scan_sees_what_it_looks_for(text):
    assert unsafe_uses(ast.parse(text))


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize(
    ("compressor", "filters"),
    [
        ({"id": "pickle", "protocol": 4}, None),
        (None, [{"id": "pickle", "protocol": 4}]),
        ({"id": "zlib", "level": 1}, [{"id": "pickle", "protocol": 4}]),
        (None, [{"id": "shuffle", "elementsize": 1}, {"id": "pickle", "protocol": 4}]),
    ],
)
@pytest.mark.parametrize("dtype", ["<f4", "|O"])
def test_a_zarr_source_with_pickled_chunks_is_not_unpickled(tmp_path, capsys, compressor, filters, dtype):
    payload = pickle.dumps(Touch(tmp_path / "owned"))
    if compressor and compressor["id"] == "zlib":
        payload = zlib.compress(payload)
    for name, shape in (("x", [4, 2]), ("y", [4])):
        folder = tmp_path / "evil.zarr" / name
        folder.mkdir(parents=True)
        metadata = {"zarr_format": 2, "shape": shape, "chunks": shape, "dtype": dtype, "order": "C",
                    "compressor": compressor, "filters": filters, "fill_value": 0}  # fmt: skip
        (folder / ".zarray").write_text(json.dumps(metadata))
        (folder / ".".join("0" * len(shape))).write_bytes(payload)
    (tmp_path / "evil.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
    assert cli.main(["convert", str(tmp_path / "evil.zarr"), str(tmp_path / "out.zarr")]) == 2
    assert not (tmp_path / "owned").exists()


# -- stores


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """plain.zarr, lz4.zarr, rows.h5 and run."""
    made = tmp_path_factory.mktemp("made")
    x = np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32)
    np.savez(made / "rows.npz", x=x, y=np.sin(x[:, 0]))
    for name, codec in (("plain.zarr", "none"), ("lz4.zarr", "lz4"), ("rows.h5", "none")):
        config = ep3stream.ConvertConfig(segment_bytes=4096, memory_bytes=MB, codec=codec)
        ep3stream.convert([made / "rows.npz"], made / name, config)
    settings = {"solver": {"centers": 16, "batch_size": 8}, "run": {"memory_bytes": 64 * MB}}
    ep3stream.fit(made / "plain.zarr", made / "run", plain_config(**settings))
    return made


def copied(source: Path, folder: Path) -> Path:
    copy = shutil.copytree if source.is_dir() else shutil.copy
    return Path(copy(source, folder / source.name))


def read_all(path: Path) -> None:
    with open_store(path) as store:
        reader = store.split("train")
        for index in range(reader.info.n_segments):
            reader.read_segment(index)


@contextmanager
def refused(words: str, error: type[Ep3streamError] = DamagedDataError, limit_bytes: int = 8 * MB):
    """An error with these words, at the cost of no more memory than this."""
    tracemalloc.start()
    try:
        with pytest.raises(error, match=words):
            yield
        assert tracemalloc.get_traced_memory()[1] < limit_bytes
    finally:
        tracemalloc.stop()


def change_json(file: Path, change: Callable[[dict], Any]) -> None:
    content = json.loads(file.read_bytes())
    change(content)
    file.write_text(json.dumps(content))


def resign(file: Path, change: Callable[[dict], Any]) -> None:
    content = signed_object(file.read_bytes(), "test")
    change(content)
    file.write_bytes(signed_bytes(content))


def set_codec(name: str) -> Callable[[dict], Any]:
    return lambda array: array["codecs"].insert(1, {"name": name, "configuration": {}})


def shard(chunk_rows: int) -> Callable[[dict], Any]:
    """Chunks of the array inside of shards of 2^40 chunks."""

    def change(array: dict) -> None:
        index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        inner = {"chunk_shape": [chunk_rows, 3], "codecs": array["codecs"], "index_codecs": index}
        array["codecs"] = [{"name": "sharding_indexed", "configuration": inner}]
        array["chunk_grid"]["configuration"]["chunk_shape"] = [chunk_rows << 40, 3]

    return change


ARRAYS = {
    "a codec of another package": (set_codec("numcodecs.zlib"), "has the codec 'numcodecs.zlib'"),
    "a codec that is a path": (set_codec("../../evil"), "has the codec '../../evil'"),
    "codecs that are no list": (lambda a: a.update(codecs={"x": 1}), "is not a list"),
    "a codec inside of shards": (
        lambda a: (shard(200)(a), set_codec("gzip")(a["codecs"][0]["configuration"])),
        "has the codec 'gzip'",
    ),
    "a storage transformer": (lambda a: a.update(storage_transformers=[{"name": "x"}]), "has the codec 'x'"),
    "a huge shape": (lambda a: a.update(shape=[1 << 60, 3]), "declares"),
    "huge chunks": (
        lambda a: a["chunk_grid"]["configuration"].update(chunk_shape=[1 << 50, 3]),
        "declares",
    ),
    "shards that are none": (shard(200), "declares"),
    "another type": (lambda a: a.update(data_type="float64"), "declares"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_whose_metadata_are_not_ours_is_refused(made, tmp_path, name):
    change, words = ARRAYS[name]
    store = copied(made / "plain.zarr", tmp_path)
    change_json(store / "train" / "x" / "zarr.json", change)
    with refused(words):
        read_all(store)
    with open_store(store) as opened:
        assert any("train/x/zarr.json" in problem for problem in verify_store(opened))


@pytest.mark.parametrize("group", [".", "train"])
def test_metadata_of_arrays_inside_those_of_a_group_are_not_looked_at(made, tmp_path, group):
    store = copied(made / "plain.zarr", tmp_path)
    inline = {"kind": "inline", "must_understand": False, "metadata": {}}
    change_json(store / group / "zarr.json", lambda g: g.update(consolidated_metadata=inline))
    with open_store(store) as opened:
        (problem,) = verify_store(opened)
    assert "consolidated metadata, which are not ours" in problem


@pytest.mark.parametrize("text", ["[" * 60_000, '{"a":' * 10_000, "9" * 60_000, "x" * (1 << 20)])
def test_array_metadata_that_are_deep_or_long_are_refused(made, tmp_path, text):
    store = copied(made / "plain.zarr", tmp_path)
    (store / "train" / "x" / "zarr.json").write_text(text)
    with refused("train, segment 0 cannot be read"):
        read_all(store)


def test_a_chunk_that_would_unpack_to_gigabytes_is_refused(made, tmp_path):
    store = copied(made / "lz4.zarr", tmp_path)
    file = store / "train" / "x" / "c" / "0" / "0"
    data = bytearray(file.read_bytes()[:-4])
    data[4:8] = (2**31 - 17).to_bytes(4, "little")  # of Blosc's header: bytes once unpacked
    file.write_bytes(data + google_crc32c.value(bytes(data)).to_bytes(4, "little"))
    with refused("do not begin a compressed chunk"):
        read_all(store)


@pytest.mark.parametrize("name", ["plain.zarr", "lz4.zarr"])
def test_a_segment_larger_than_its_file_takes_no_memory(made, tmp_path, name):
    def enlarge(manifest: dict) -> None:
        manifest["splits"]["train"].update(n_rows=300_000_000, segment_rows=300_000_000)

    store = copied(made / name, tmp_path)
    resign(store / "manifest.json", enlarge)
    with refused("must have|do not begin"):
        read_all(store)


def test_targets_wider_than_any_segment_are_refused(made, tmp_path):
    def widen(manifest: dict) -> None:
        manifest.update(n_outputs=5000, target_names=[f"t{i}" for i in range(5000)])
        train = manifest["splits"]["train"]
        train.update(n_rows=1 << 22, segment_rows=1 << 22)
        train["targets"] = {name: values * 5000 for name, values in train["targets"].items()}

    store = copied(made / "plain.zarr", tmp_path)
    resign(store / "manifest.json", widen)
    with refused("segments have at most", limit_bytes=64 * MB):
        open_store(store)


@pytest.mark.parametrize("name", ["../train", "/etc", "a/b", "", ".", "..", "x" * 65, "tra\0in"])
def test_a_split_cannot_be_named_out_of_the_store(made, tmp_path, name):
    def rename(manifest: dict) -> None:
        manifest["splits"] = {name: manifest["splits"]["train"] | {"name": name}}

    for source in ("plain.zarr", "rows.h5"):
        store = copied(made / source, tmp_path)
        content = signed_object(manifest_bytes(store), "test")
        rename(content)
        set_manifest(store, signed_bytes(content))
        with refused("not one a split may have"):
            open_store(store)


def manifest_bytes(store: Path) -> bytes:
    if store.is_dir():
        return (store / "manifest.json").read_bytes()
    with h5py.File(store) as file:
        return bytes(file["manifest.json"][:])


def set_manifest(store: Path, data: bytes) -> None:
    if store.is_dir():
        (store / "manifest.json").write_bytes(data)
        return
    with h5py.File(store, "a") as file:
        del file["manifest.json"]
        file.create_dataset("manifest.json", data=np.frombuffer(data, np.uint8), fletcher32=True)


def nested(n: int) -> bytes:
    return b'{"a":' + b"[" * n + b"]" * n + b"}"


JSON = {
    "deep": nested(100_000),
    "deeper than allowed": nested(40),
    "wide": b"[" + b"[]," * 2_000_000 + b"[]]",
    "a number of many digits": b'{"a":' + b"9" * 100_000 + b"}",
    "NaN": b'{"a":NaN}',
    "infinite": b'{"a":1e999}',
    "a name twice": b'{"a":1,"a":1,"digest":""}',
    "no object": b"[]",
    "no text": b"\xff\xfe",
    "empty": b"",
}


@pytest.mark.parametrize("name", JSON)
def test_json_that_is_not_as_we_write_it_is_refused(made, tmp_path, name):
    """At any length up to the bound; a file beyond it is not read."""
    store, run = copied(made / "plain.zarr", tmp_path), copied(made / "run", tmp_path)
    (store / "manifest.json").write_bytes(JSON[name])
    with refused("not what was written|does not describe", limit_bytes=40 * MB):
        open_store(store)
    (run / "model" / "manifest.json").write_bytes(JSON[name])
    with refused("not what was written|does not describe", limit_bytes=40 * MB):
        ep3stream.load(run)


def test_a_manifest_of_gigabytes_is_not_read(made, tmp_path):
    store, run = copied(made / "plain.zarr", tmp_path), copied(made / "run", tmp_path)
    os.truncate(store / "manifest.json", 1 << 30)
    with refused("is larger than"):
        open_store(store)
    os.truncate(run / "model" / "manifest.json", 1 << 30)
    with refused("is larger than"):
        ep3stream.load(run)
    os.truncate(run / "config.toml", 1 << 30)
    with refused("is larger than", InputError):
        ep3stream.fit(made / "plain.zarr", run)
    os.truncate(run / "metrics.jsonl", 1 << 30)
    with refused("is larger than", InputError):
        read_lines(run / "metrics.jsonl")


# -- HDF5


def replace_x(store: Path, make: Callable[[h5py.File], Any]) -> None:
    with h5py.File(store, "a") as file:
        del file["train/x"]
        make(file)


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((200, 3), np.float32)
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (200, 3))
    file.create_virtual_dataset("train/x", layout)


def outside(file: h5py.File) -> None:
    file["train"].create_dataset(
        "x", shape=(200, 3), dtype=np.float32, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
    )


HDF5 = {
    "a link to another file": lambda file: file.__setitem__("train/x", h5py.ExternalLink("other.h5", "x")),
    "a link in the file": lambda file: file.__setitem__("train/x", h5py.SoftLink("/train/y")),
    "a virtual dataset": virtual,
    "rows in another file": outside,
    "another filter": lambda file: file.create_dataset(
        "train/x", data=np.zeros((200, 3), np.float32), chunks=(200, 3), compression="gzip"
    ),
    "a missing dataset": lambda file: None,
    "a group": lambda file: file.create_group("train/x"),
    "another shape": lambda file: file.create_dataset("train/x", data=np.zeros((200, 4), np.float32)),
}


@pytest.mark.parametrize("name", HDF5)
def test_an_hdf5_store_whose_rows_are_not_its_own_chunks_is_refused(made, tmp_path, name):
    store = copied(made / "rows.h5", tmp_path)
    replace_x(store, HDF5[name])
    with refused("train, segment 0 cannot be read"):
        read_all(store)
    with open_store(store) as opened:
        assert verify_store(opened, quick=True)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "gzip"},
        {"chunks": (1 << 28,), "maxshape": (None,), "fletcher32": True},
        {"fletcher32": False},
    ],
)
def test_an_hdf5_manifest_that_could_unpack_or_run_a_filter_is_refused(made, tmp_path, options):
    store = copied(made / "rows.h5", tmp_path)
    data = np.frombuffer(manifest_bytes(store), np.uint8)
    with h5py.File(store, "a") as file:
        del file["manifest.json"]
        file.create_dataset("manifest.json", data=data[:1], **options)
    with refused("manifest.json has chunks"):
        open_store(store)


# -- runs


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def link(file: Path) -> None:
    elsewhere = file.parents[2] / f"elsewhere-{file.name}"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def endless(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", ["tensors.safetensors", "manifest.json"])
@pytest.mark.parametrize("replace", [pipe, link, endless])
def test_a_piece_of_a_model_that_is_no_file_is_not_opened(made, tmp_path, name, replace):
    run = copied(made / "run", tmp_path)
    replace(run / "model" / name)
    with refused("is a link, or not a regular file"):
        ep3stream.load(run)


@pytest.mark.parametrize(
    ("field", "words"),
    [("n_centers", "centers is torch"), ("window_segments", "windows of"), ("batch_size", "batches of")],
)
def test_a_set_up_for_other_rows_is_refused(made, tmp_path, field, words):
    change_plan(made / "run", tmp_path / "setup", field)
    with refused(words), open_store(made / "plain.zarr") as store:
        Setup.load(tmp_path / "setup").order(store.split("train").info, 0)


def test_a_set_up_cannot_ask_for_memory_that_the_fit_was_not_given(made, tmp_path):
    change_plan(made / "run", tmp_path / "setup", "batch_size")
    config = FitConfig.from_toml((made / "run" / "config.toml").read_text(), "test")
    with refused("kernel blocks of"):
        Setup.load(tmp_path / "setup").solver(config, None, Mesh(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("field", ["mu", "step_size"])
def test_a_whole_number_that_torch_cannot_take_is_no_step_and_no_damping(made, tmp_path, field):
    change_plan(made / "run", tmp_path / "setup", field, 1 << 63)
    with refused(f"{field} is 9223372036854775808"):
        Setup.load(tmp_path / "setup")


@pytest.mark.parametrize(
    "field",
    [
        "ridge",
        "momentum",
        "start_ridge",
        "start_rows",
        "group_size",
        "n_directions",
        "n_leading",
        "model_rank",
    ],
)
@pytest.mark.parametrize("value", [{}, "1", None, -1, True])
def test_what_is_no_number_is_no_number_of_a_plan(made, tmp_path, field, value):
    change_plan(made / "run", tmp_path / "setup", field, value)
    with refused(f"{field} is {value!r}"):
        Setup.load(tmp_path / "setup")


def change_plan(run: Path, target: Path, field: str, value: object = 1 << 39) -> None:
    bundle = read_bundle(run / "setup", "set-up")
    bundle.description["plan"][field] = value
    write_bundle(target, "set-up", bundle.tensors, bundle.description)


@pytest.mark.parametrize("name", ["evaluations.jsonl", "metrics.jsonl", "lock", ".config.toml.partial"])
def test_a_link_in_a_run_never_makes_a_fit_or_evaluation_write_elsewhere(made, tmp_path, capsys, name):
    run = copied(made / "run", tmp_path)
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(mine)
    code = cli.main(
        ["fit", str(made / "plain.zarr"), str(run), "--config", str(run / "config.toml"), "--epochs", "2"]
    )
    assert code == 2
    assert f"holds the link '{name}'" in capsys.readouterr().err
    cli.main(["evaluate", str(run), str(made / "plain.zarr")])
    assert mine.read_text() == "precious"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["mine", "run"]


def test_checkpoints_behind_a_link_are_neither_written_nor_removed(made, tmp_path, capsys):
    run = copied(made / "run", tmp_path)
    (run / "checkpoints").rename(tmp_path / "theirs")
    (run / "checkpoints").symlink_to(tmp_path / "theirs")
    before = sorted(tmp_path.rglob("theirs/**/*"))
    code = cli.main(
        ["fit", str(made / "plain.zarr"), str(run), "--config", str(run / "config.toml"), "--epochs", "2"]
    )
    assert code == 2
    assert "holds the link 'checkpoints'" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("theirs/**/*")) == before


def test_markup_in_names_stays_text_in_the_report(made, tmp_path, capsys):
    x = np.random.default_rng(0).standard_normal((60, 1))
    name = "<script>alert(1)</script>"
    text = "\n".join([f"a,{name}", *(f"{v:.4g},{np.sin(v):.4g}" for v in x[:, 0])])
    (tmp_path / "t.csv").write_text(text)
    assert cli.main(["convert", str(tmp_path / "t.csv"), str(tmp_path / "s.zarr"), "--target", name]) == 0
    assert (
        cli.main(["fit", str(tmp_path / "s.zarr"), str(tmp_path / "run"), "--centers", "10", *PLAIN_OPTIONS])
        == 0
    )
    assert name not in (tmp_path / "run" / "report.html").read_text()


def test_a_checkpoint_of_another_width_is_refused_by_name(tmp_path: Path) -> None:
    progress = SimpleNamespace(state=SimpleNamespace(weights=torch.zeros(2, 7)), step=5, best=None)
    one, two = (TargetCode(False, torch.zeros(c), torch.ones(c)) for c in (1, 2))
    require_shape(progress, two, 7, tmp_path)
    require_shape(progress, replace(one, ridge_factors=(1.0, 4.0)), 7, tmp_path)
    with pytest.raises(DamagedDataError, match=r"weights of \(2, 7\) at step 5, not \(1, 7\)"):
        require_shape(progress, one, 7, tmp_path)
    progress.best = SimpleNamespace(weights=torch.zeros(1, 7), ridge=0)
    with pytest.raises(DamagedDataError, match=r"weights of \(1, 7\) at step 5, not \(2, 7\)"):
        require_shape(progress, two, 7, tmp_path)
