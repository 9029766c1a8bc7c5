"""Conversions that are stopped and go on: the store has the same bytes as one made in one go."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep3stream.cli import main
from ep3stream.config import ConvertConfig, Format, Unknown
from ep3stream.conversion import convert as convert_module
from ep3stream.conversion.convert import ConvertProgress, convert
from ep3stream.disk import remove
from ep3stream.errors import DiskError, InputError, SourceError

CONFIG = ConvertConfig(target="y", segment_bytes=4096, memory_bytes=4 * 4096)
N_ROWS = 1500


@pytest.fixture(autouse=True)
def _saved_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "_PROGRESS_EVERY_S", 0.0)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files with numbers, some with an offset, a category that appears late, missing cells and labels."""
    folder = tmp_path_factory.mktemp("in")
    for number in range(2):
        rows = range(number * N_ROWS // 2, (number + 1) * N_ROWS // 2)
        lines = [
            f"{i},{i * 0.37 if i % 7 else ''},{'ab'[i > N_ROWS - 300]},{10**12 + i},{i % 3}" for i in rows
        ]
        (folder / f"{number}.csv").write_text("\n".join(["i,v,kind,t,y", *lines, ""]))
    return folder


@pytest.fixture
def own_table(table: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(table, tmp_path / "in")


@dataclass(frozen=True)
class Whole:
    """What a conversion without a stop makes, and how often it tells of progress while it reads."""

    contents: dict[str, bytes]
    reads: int


@pytest.fixture(scope="module")
def whole(table: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeWhole:
    """The whole conversion of the table by a configuration or its name, made once."""
    made: dict[str, Whole] = {}

    def make(config: str | ConvertConfig) -> Whole:
        config = CONFIGS[config] if isinstance(config, str) else config
        if (key := repr(config)) not in made:
            store, told = tmp_path_factory.mktemp("whole") / "store", list[ConvertProgress]()
            convert([table], store, config, progress=told.append)
            made[key] = Whole(contents(store), sum(1 for progress in told if progress.stage == "read"))
        return made[key]

    return make


MakeWhole = Callable[[str | ConvertConfig], Whole]


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store by its name."""
    if store.is_file():
        return {"": store.read_bytes()}
    files = [file for file in store.rglob("*") if file.is_file()]
    return {file.relative_to(store).as_posix(): file.read_bytes() for file in files}


def stop_after(calls: int) -> Callable[[ConvertProgress], None]:
    """Progress that raises what Ctrl-C raises at this call."""
    left = [calls]

    def count(_: ConvertProgress) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    return count


def convert_with_stops(source: object, store: Path, config: ConvertConfig, stops: list[int]) -> int:
    """How many of the stops came before the end."""
    for number, calls in enumerate(stops):
        try:
            convert(source, store, config, progress=stop_after(calls))
        except KeyboardInterrupt:
            continue
        return number
    convert(source, store, config)
    return len(stops)


CONFIGS = {
    "shuffled": replace(CONFIG, missing="mean", splits={"train": 0.8, "test": 0.2}),
    "in order": replace(CONFIG, missing="drop", shuffle=False),
    "straight": replace(CONFIG, missing="drop", shuffle=False, columns=("i", "v", "t"), task="regression"),
    "hdf5": replace(CONFIG, missing="drop", splits={"train": 0.5, "test": 0.5}, format="hdf5"),
}


@pytest.mark.parametrize("name", CONFIGS)
@settings(
    max_examples=6,
    derandomize=True,
)
@given(stops=st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_a_conversion_stopped_anywhere_ends_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, table: Path, whole: MakeWhole, name: str, stops: list[int]
) -> None:
    directory = tmp_path_factory.mktemp("stores")
    stopped = convert_with_stops([table], directory / "stopped", CONFIGS[name], stops)
    assert stopped or stops[0] == 12
    assert contents(directory / "stopped") == whole(name).contents
    assert [path.name for path in directory.iterdir()] == ["stopped"]


@pytest.mark.parametrize("name", ["shuffled", "straight"])
def test_what_was_done_before_a_stop_is_not_done_again(tmp_path: Path, table: Path, name: str) -> None:
    told: list[ConvertProgress] = []
    with pytest.raises(KeyboardInterrupt):
        convert([table], tmp_path / "store", CONFIGS[name], progress=stop_after(40))
    convert([table], tmp_path / "store", CONFIGS[name], progress=told.append)
    assert told[0].rows > 300


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
@pytest.mark.parametrize("damage", ["rows", "store", "progress.json"])
def test_what_was_damaged_between_two_processes_is_made_again(
    tmp_path: Path, table: Path, whole: MakeWhole, format: Format, damage: str
) -> None:
    config = replace(CONFIGS["shuffled"], format=format)
    with pytest.raises(KeyboardInterrupt):
        convert([table], tmp_path / "store", config, progress=stop_after(whole(config).reads + 3))
    work = tmp_path / ".store.convert" / damage
    for file in [work] if work.is_file() else [file for file in work.rglob("*") if file.is_file()]:
        if file.stat().st_size:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 4
            file.write_bytes(data)
    convert([table], tmp_path / "store", config)
    assert contents(tmp_path / "store") == whole(config).contents


@pytest.mark.parametrize("lost", ["rows", "store", "progress.json", "plan.json"])
def test_what_was_lost_between_two_processes_is_made_again(
    tmp_path: Path, table: Path, whole: MakeWhole, lost: str
) -> None:
    stop = stop_after(whole("shuffled").reads + 3)
    with pytest.raises(KeyboardInterrupt):
        convert([table], tmp_path / "store", CONFIGS["shuffled"], progress=stop)
    remove(tmp_path / ".store.convert" / lost)
    convert([table], tmp_path / "store", CONFIGS["shuffled"])
    assert contents(tmp_path / "store") == whole("shuffled").contents


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "unfinished conversion had seed 0, now it is 1"),
        ({"splits": {"train": 1.0}}, "had splits .*test.*, now it is"),
        ({"dtype": "float16"}, "had dtype 'float32', now it is 'float16'"),
        ({"shuffle": False}, "had shuffle True, now it is False"),
    ],
)
def test_a_changed_option_is_refused_by_name_until_a_restart(
    tmp_path: Path, table: Path, change: dict[str, object], message: str
) -> None:
    config, store = CONFIGS["shuffled"], tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        convert([table], store, config, progress=stop_after(4))
    changed = replace(config, **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        convert([table], store, changed)
    convert([table], store, changed, restart=True)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("unknown", ["ignore", "drop"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stopped_conversion_goes_on_with_unknown_categories_as_it_began(
    tmp_path: Path, table: Path, whole: MakeWhole, unknown: Unknown, shuffle: bool
) -> None:
    convert([table / "0.csv"], tmp_path / "first", replace(CONFIG, missing="mean", task="classification"))
    config = ConvertConfig(
        like=tmp_path / "first", unknown=unknown, shuffle=shuffle, segment_bytes=4096, memory_bytes=4 * 4096
    )
    conversion = json.loads(whole(config).contents["manifest.json"])["conversion"]
    assert conversion["unknown"] == {"kind": {"b": 299}}
    assert conversion.get("dropped_rows", 0) == (299 if unknown == "drop" else 0)
    assert convert_with_stops([table], tmp_path / "stopped", config, [whole(config).reads - 1, 2, 3])
    assert contents(tmp_path / "stopped") == whole(config).contents
    with pytest.raises(KeyboardInterrupt):
        convert([table], tmp_path / "changed", config, progress=stop_after(4))
    other: Unknown = "drop" if unknown == "ignore" else "ignore"
    with pytest.raises(InputError, match=f"had unknown '{unknown}', now it is '{other}'"):
        convert([table], tmp_path / "changed", replace(config, unknown=other))


def test_memory_may_change_and_the_bytes_do_not(tmp_path: Path, table: Path, whole: MakeWhole) -> None:
    config = CONFIGS["shuffled"]
    with pytest.raises(KeyboardInterrupt):
        convert([table], tmp_path / "store", config, progress=stop_after(4))
    convert([table], tmp_path / "store", replace(config, memory_bytes=1 << 20))
    assert contents(tmp_path / "store") == whole(config).contents


def test_a_file_changed_between_two_processes_is_refused_by_name(tmp_path: Path, own_table: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert([own_table], tmp_path / "store", CONFIGS["shuffled"], progress=stop_after(4))
    text = (own_table / "0.csv").read_text()
    (own_table / "0.csv").write_text(text.replace("7,", "8,", 1))
    with pytest.raises(InputError, match=r"0\.csv"):
        convert([own_table], tmp_path / "store", CONFIGS["shuffled"])


def test_a_file_with_a_new_date_and_the_same_bytes_is_accepted(tmp_path: Path, own_table: Path) -> None:
    convert([own_table], tmp_path / "whole", CONFIGS["shuffled"])
    with pytest.raises(KeyboardInterrupt):
        convert([own_table], tmp_path / "store", CONFIGS["shuffled"], progress=stop_after(4))
    os.utime(own_table / "0.csv", (1, 1))
    convert([own_table], tmp_path / "store", CONFIGS["shuffled"])
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_second_conversion_to_the_same_name_is_refused_with_its_holder(tmp_path: Path, table: Path) -> None:
    stages = set()

    def meanwhile(progress: ConvertProgress) -> None:
        if progress.stage not in stages:
            stages.add(progress.stage)
            with pytest.raises(InputError, match=rf"is being made by process {os.getpid()} on"):
                convert([table], tmp_path / "store", CONFIG)

    convert([table], tmp_path / "store", replace(CONFIG, missing="drop"), progress=meanwhile)
    assert stages == {"read", "write", "sync"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_disk_that_fills_up_leaves_what_was_done_for_the_same_call(
    tmp_path: Path, table: Path, whole: MakeWhole, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ep3stream.conversion.spill._write_section", _refuse_after(7))
        patch.setattr("ep3stream.store.zarr_store.ZarrWriter.write", _refuse_after(3))
        patch.setattr("ep3stream.store.hdf5_store.Hdf5Writer.write", _refuse_after(1))
        with pytest.raises(DiskError, match="No space left"):
            convert([table], tmp_path / "store", CONFIGS[name])
    assert not (tmp_path / "store").exists()
    convert([table], tmp_path / "store", CONFIGS[name])
    assert contents(tmp_path / "store") == whole(name).contents


def _refuse_after(calls: int) -> Callable[..., None]:
    """Writes nothing, and in the end says why: what comes before is damaged as well."""
    left = [calls]

    def write(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    return write


def test_a_file_that_zarr_was_writing_when_it_was_killed_does_not_stay(
    tmp_path: Path, table: Path, whole: MakeWhole
) -> None:
    config = CONFIGS["straight"]
    with pytest.raises(KeyboardInterrupt):
        convert([table], tmp_path / "store", config, progress=stop_after(40))
    for folder in ("", "train", "train/x", "train/y/c"):
        (tmp_path / ".store.convert" / "store" / folder / "zarr.0f.partial").write_text("{")
    convert([table], tmp_path / "store", config)
    assert contents(tmp_path / "store") == whole(config).contents


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("is_removing", [False, True])
def test_a_conversion_killed_when_the_store_has_its_place_is_done(
    tmp_path: Path, table: Path, name: str, is_removing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    cut_off = "disk.shutil.rmtree" if is_removing else "conversion.work.ConversionWork.remove"
    with monkeypatch.context() as patch:
        patch.setattr(f"ep3stream.{cut_off}", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert([table], store, CONFIGS[name])
    made = contents(store)
    assert convert([table], store, CONFIGS[name]).splits.keys() == CONFIGS[name].splits.keys()
    assert contents(store) == made
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    with pytest.raises(InputError, match="store exists"):
        convert([table], store, CONFIGS[name])


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_bad_row_after_a_stop_leaves_nothing(tmp_path: Path, own_table: Path) -> None:
    lines = (own_table / "1.csv").read_text().splitlines()
    (own_table / "1.csv").write_text("\n".join([*lines[:-1], "inf,0,a,0,0", ""]))
    config = replace(CONFIG, missing="drop")
    with pytest.raises(KeyboardInterrupt):
        convert([own_table], tmp_path / "store", config, progress=stop_after(3))
    with pytest.raises(SourceError, match=r"1\.csv: column 'i', row 750"):
        convert([own_table], tmp_path / "store", config)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=str
)
def test_a_stopped_process_is_gone_on_with_by_the_same_command(
    tmp_path: Path, table: Path, whole: MakeWhole, number: signal.Signals, code: int
) -> None:
    options = ["--target", "y", "--missing", "drop", "--memory", "16KiB", "--segment-bytes", "4KiB"]
    command = ["--quiet", "convert", str(table), str(tmp_path / "store"), *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "ep3stream", *command], stderr=subprocess.PIPE, text=True
    )
    rows = tmp_path / ".store.convert" / "rows"
    while process.poll() is None and not (rows / "000003.json").exists():
        time.sleep(0.001)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == code
    assert number == signal.SIGKILL or "run the same command to go on" in said
    assert not (tmp_path / "store").exists()
    assert main(command) == 0
    assert contents(tmp_path / "store") == whole(replace(CONFIG, missing="drop")).contents
