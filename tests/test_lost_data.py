"""What was a store or a run, and cannot be opened any more, ends every command with 3; what never was one, with 2."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from small_stores import PLAIN_OPTIONS, make_store, plain_config

import ep3stream
from ep3stream import cli

SETTINGS = [*PLAIN_OPTIONS, "--centers", "20", "--batch-size", "32"]
CONFIG = plain_config(solver={"centers": 20, "batch_size": 32})
STORES = ("rows.h5", "rows.zarr", "rows")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of each kind, and a run on each."""
    made = tmp_path_factory.mktemp("made")
    for name in STORES:
        ep3stream.fit(make_store(made / name, n_rows=300), made / f"run of {name}", CONFIG)
    return made


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_to_4(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4])


def delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty_directory(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def file_instead(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"")


Damage = Callable[[Path], None]

STORE_DAMAGES: list[tuple[str, str, Damage]] = [
    *(("rows.h5", "", damage) for damage in (empty, zero, cut, cut_to_4)),
    *(("rows.zarr", "", damage) for damage in (empty_directory, file_instead)),
    *((name, "manifest.json", damage) for name in STORES[1:] for damage in (empty, zero, cut, delete)),
]


def exit_codes(commands: dict[str, list[Any]]) -> dict[str, int]:
    return {name: cli.main([str(word) for word in words]) for name, words in commands.items()}


def commands_on(store: Path, run: Path, folder: Path) -> dict[str, list[Any]]:
    return {
        "verify": ["verify", store],
        "verify --quick": ["verify", "--quick", store],
        "inspect": ["inspect", store],
        "inspect --order": ["inspect", "--order", store],
        "fit": ["fit", store, folder / "new", *SETTINGS],
        "fit again": ["fit", store, run, *SETTINGS],
        "evaluate": ["evaluate", run, store],
        "predict": ["predict", run, store, folder / "out.npy"],
        "plan": ["plan", store, *SETTINGS, "--no-measure"],
        "tune": ["tune", store, "--out", folder / "tuned.toml"],
    }


@pytest.mark.parametrize(("name", "piece", "damage"), STORE_DAMAGES)
def test_a_store_that_was_damaged_ends_every_command_with_3_and_is_named(
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    piece: str,
    damage: Damage,
) -> None:
    store = tmp_path / name
    (shutil.copytree if (made / name).is_dir() else shutil.copy)(made / name, store)
    damage(store / piece if piece else store)
    run = Path(shutil.copytree(made / f"run of {name}", tmp_path / "run"))
    for command, words in commands_on(store, run, tmp_path).items():
        assert cli.main([str(word) for word in words]) == 3, command
        said = "".join(capsys.readouterr()).strip().splitlines()[-1]
        assert f"{store}" in said, command
        assert "restore it or convert again" in said, command
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", [empty_directory, file_instead])
def test_what_a_run_names_as_its_store_is_damaged_even_without_a_suffix(
    made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, damage: Damage
) -> None:
    store = make_store(tmp_path / "plain", n_rows=300)
    run = ep3stream.fit(store, tmp_path / "run", CONFIG)
    damage(store)
    on = commands_on(store, run, tmp_path)
    assert exit_codes({name: on[name] for name in ("fit again", "evaluate", "predict")}) == {
        "fit again": 3,
        "evaluate": 3,
        "predict": 3,
    }
    assert f"{store} was the store of {run} and is none any more" in capsys.readouterr().err
    assert exit_codes({name: on[name] for name in ("fit", "inspect")}) == {"fit": 2, "inspect": 2}


def never_a_store(folder: Path) -> dict[str, Path]:
    """Paths at which nothing shows that there was a store."""
    things = {
        "nothing": folder / "none.zarr",
        "a directory": folder / "empty",
        "a file": folder / "notes.txt",
    }
    things["a directory"].mkdir()
    things["a file"].write_text("a")
    import h5py

    things["an HDF5 source"] = folder / "source.h5"
    with h5py.File(things["an HDF5 source"], "w") as file:
        file["x"], file["y"] = np.zeros((5, 2)), np.zeros(5)
    things["a Zarr source"] = folder / "source.zarr"
    group = zarr.open_group(things["a Zarr source"], mode="w")
    for name, shape in (("train/x", (5, 2)), ("train/y", (5,))):
        group.create_array(name, shape=shape, dtype="f4")[:] = 1
    return things


def test_what_never_was_a_store_ends_with_2(tmp_path: Path) -> None:
    for what, path in never_a_store(tmp_path).items():
        commands = {"verify": ["verify", path], "fit": ["fit", path, tmp_path / "run", *SETTINGS]}
        assert exit_codes(commands) == {"verify": 2, "fit": 2}, what


def test_an_unfinished_conversion_is_no_damaged_store(made: Path, tmp_path: Path) -> None:
    work = tmp_path / ".rows.zarr.convert"
    shutil.copytree(made / "rows.zarr", work / "store", ignore=shutil.ignore_patterns("manifest.json"))
    assert exit_codes({"verify": ["verify", work / "store"]}) == {"verify": 2}


# The codes of verify, status, evaluate and another fit.
RUN_DAMAGES: list[tuple[str, Damage, tuple[int, int, int, int]]] = [
    *(("config.toml", damage, (3, 3, 0, 3)) for damage in (empty, zero, cut, delete)),
    *(("run.json", damage, (3, 0, 0, 0)) for damage in (empty, zero, cut)),
    *(("model/manifest.json", damage, (3, 0, 3, 0)) for damage in (empty, zero, cut, delete)),
    *(("model/tensors.safetensors", damage, (3, 0, 3, 0)) for damage in (empty, zero, cut, delete)),
    ("model", empty_directory, (3, 0, 3, 0)),
    ("model", file_instead, (3, 0, 0, 2)),
    *(("setup/manifest.json", damage, (3, 0, 0, 3)) for damage in (empty, zero, cut, delete)),
    *(("setup/tensors.safetensors", damage, (3, 0, 0, 3)) for damage in (empty, zero, cut, delete)),
    *(("setup", damage, (3, 0, 0, 3)) for damage in (empty_directory, file_instead, delete)),
    *(("CHECKPOINT/manifest.json", damage, (3, 0, 0, 3)) for damage in (empty, zero, cut, delete)),
    *(("CHECKPOINT/tensors.safetensors", damage, (3, 0, 0, 3)) for damage in (empty, zero, cut, delete)),
    *(("CHECKPOINT", damage, (3, 0, 0, 3)) for damage in (empty_directory, file_instead)),
    ("checkpoints", file_instead, (3, 0, 0, 2)),
]


@pytest.mark.parametrize(("piece", "damage", "expected"), RUN_DAMAGES)
def test_a_run_that_was_damaged_is_named_by_piece_and_used_by_nobody_who_needs_it(
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    piece: str,
    damage: Damage,
    expected: tuple[int, int, int, int],
) -> None:
    store, run = made / "rows.zarr", tmp_path / "run"
    shutil.copytree(made / "run of rows.zarr", run)
    checkpoint = next((run / "checkpoints").iterdir()).relative_to(run)
    damaged = run / piece.replace("CHECKPOINT", str(checkpoint))
    damage(damaged)
    assert cli.main(["verify", str(run)]) == expected[0]
    said = capsys.readouterr().out
    assert str(damaged) in said
    assert "belongs to another set-up" not in said
    codes = exit_codes(
        {
            "status": ["status", run],
            "evaluate": ["evaluate", run, store],
            "fit": ["fit", store, run, *SETTINGS],
        }
    )
    assert tuple(codes.values()) == expected[1:]
