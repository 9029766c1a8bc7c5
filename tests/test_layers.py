"""Which module may import what, and what no module may do, read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import ep3stream

ROOT = Path(ep3stream.__file__).parent
MODULES = {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in sorted(ROOT.rglob("*.py"))}
# The rooms that know rows and never kernels.
ROWS = ("store", "stream", "formats", "conversion")
DATA_MAY_IMPORT = {
    "numpy",
    "obstore", "torch", "zarr", "h5py", "numcodecs", "google_crc32c", "pyarrow", "dask", "distributed", "xxhash",
    "ep3stream",
}  # fmt: skip


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported, `from a import b` as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def attributes(tree: ast.AST) -> Iterator[str]:
    """Dotted chains such as np.load, torch.distributed.all_reduce."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


@cache
def names(tree: ast.AST) -> frozenset[str]:
    """All that a module imports, and all dotted chains in it."""
    return frozenset([*imports(tree), *attributes(tree)])


def uses(tree: ast.AST, prefix: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for name in names(tree))


def in_room(room: str) -> dict[str, ast.AST]:
    return {name: tree for name, tree in MODULES.items() if name.startswith(f"{room}/")}


def test_the_rooms_are_where_they_are_looked_for():
    assert {
        "cli/__init__.py",
        "mesh/mesh.py",
        "store/reader.py",
        "solver/step.py",
        "training/trainer.py",
    } <= MODULES.keys()


def test_only_the_mesh_knows_torch_distributed():
    knowing = [name for name, tree in MODULES.items() if uses(tree, "torch.distributed")]
    assert knowing
    assert all(name.startswith("mesh/") for name in knowing), knowing


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        *((room, ("ep3stream.solver", "ep3stream.run", "ep3stream.mesh", "ep3stream.cli")) for room in ROWS),
        (
            "solver",
            (*(f"ep3stream.{room}" for room in ROWS), "ep3stream.run", "ep3stream.cli", "pathlib", "os"),
        ),
        ("training", ("ep3stream.cli",)),
    ],
)
def test_a_room_knows_nothing_of_the_rooms_above_and_beside_it(room, forbidden):
    guilty = [
        (name, prefix) for name, tree in in_room(room).items() for prefix in forbidden if uses(tree, prefix)
    ]
    assert guilty == []


def test_the_data_room_needs_only_what_stores_and_streams_need():
    import sys

    allowed = DATA_MAY_IMPORT | set(sys.stdlib_module_names)
    found = {
        imported.split(".")[0]
        for room in ROWS
        for tree in in_room(room).values()
        for imported in imports(tree)
    }
    assert found <= allowed


def test_only_the_files_in_buckets_know_what_talks_to_buckets():
    assert [name for name, tree in MODULES.items() if uses(tree, "obstore")] == ["store/object_files.py"]


def test_nothing_is_ever_unpickled():
    for name, tree in MODULES.items():
        for forbidden in ("pickle", "cloudpickle", "joblib", "dill", "torch.load", "torch.save"):
            assert not uses(tree, forbidden), f"{name} uses {forbidden}"


def test_every_numpy_file_is_read_without_pickles():
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
                assert "allow_pickle=False" in ast.unparse(node), f"{name}:{node.lineno}"
        assert not uses(tree, "numpy.load"), f"{name} hides np.load"


def test_only_the_command_line_prints_and_sets_up_logging():
    for name, tree in MODULES.items():
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        if not name.startswith("cli/"):
            assert not calls & {"print", "logging.basicConfig"}, name
