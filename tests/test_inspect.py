"""What `inspect` tells of a store, in a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from small_stores import make_store, plain_config
from test_store import REGRESSION, SPEC, _write, _write_rows

import ep3stream
from ep3stream import cli, inspect
from ep3stream.inspection.describe import describe_path, describe_store

CONVERSION = {
    "dropped_rows": 1234,
    "missing": {"a": 7, "b": 0, "c": 20},
    "fills": {"a": 0.5, "c": -1.0},
    "rounding": {"max_relative": 4.8e-4, "worst_column": "d", "n_underflow": 3},
    "codec_sample_ratio": 1.25,
    "options": {"na": "drop", "date": "2026-11-22"},
    "something_new": [1, 2],
}


def words(content) -> str:
    console = Console(width=80, markup=False, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file, console.capture() as capture:
        console.print(describe_store(content))
    return capture.get()


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_a_classification_store_is_told_in_80_plain_columns(tmp_path, format):
    y = np.array([0, 0, 0, 1], np.int32)
    x = np.arange(20, dtype=np.float32).reshape(4, 5)
    _write_rows(tmp_path / "s", format, SPEC, {"train": (np.tile(x, (9, 1)), np.tile(y, 9)), "test": (x, y)})
    text = describe_path(tmp_path / "s")
    assert all(len(line) <= 80 for line in text.splitlines()[1:])
    assert text.isascii()
    assert "\x1b" not in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["train"][:4] == ["train", "36", "90.0%", "3"]
    assert rows["x"] == ["x", "27", "75.0%", "#" * 24]
    assert rows["y"] == ["y", "9", "25.0%", "#" * 8]
    assert rows["z"] == ["z", "0", "0.0%"]
    assert rows["c"] == ["c", "9.5", "5.59", "2", "17", "0"]
    assert rows["size"][:4] == ["size", "960", "bytes", "raw,"]
    for part in ("random, seed 7", "rows.csv", "ep3stream", f"{format}, version"):
        assert part in text
    assert "dropped" not in text


def test_target_statistics_are_told_and_all_of_them_are_in_the_json(tmp_path, capsys):
    rows = _write(tmp_path / "s", "zarr", REGRESSION, train=50, test=9)
    assert cli.main(["inspect", "--json", str(tmp_path / "s")]) == 0
    content = json.loads(capsys.readouterr().out)
    y = rows["test"][1]
    assert content["splits"]["test"]["targets"][1]["max"] == pytest.approx(y[:, 1].max())
    assert content["bytes_raw"] == 59 * 7 * 4
    assert content["shuffle_seed"] == 7
    assert isinstance(content["conversion"], dict)
    assert set(content["features"]) == {"train", "test"}
    assert f"{y[:, 0].std():.4g}" in describe_path(tmp_path / "s")


def test_what_the_conversion_recorded_is_told(tmp_path):
    _write(tmp_path / "s", "zarr", SPEC, train=40)
    text = words({**inspect(tmp_path / "s"), "conversion": CONVERSION})
    for part in (
        "dropped rows    1,234",
        "missing values  a 7, c 20",
        "filled with     a = 0.5, c = -1",
        "max relative 0.00048, worst column d, n underflow 3",
        "compresses 1.25 times",
        "na drop, date 2026-11-22",
        "something new   [1, 2]",
    ):
        assert part in text, text
    assert max(map(len, text.splitlines()[1:])) <= 80


def test_long_hostile_and_many_names_stay_in_80_columns(tmp_path):
    spec = replace(
        REGRESSION,
        n_features=30,
        feature_names=("[red]" * 20, "\x1b[31m\n\udcff", "x" * 20_000, *(f"f{i}" for i in range(27))),
        target_names=("y" * 300, "[/]"),
        source=({"name": "s" * 300, "bytes": 10**13, "digest": "0" * 32, "modified": "2026-11-22"},),
        segment_bytes=30 * 4 * 16,
    )
    _write(tmp_path / "s", "zarr", spec, train=40)
    text = describe_path(tmp_path / "s")
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert "\x1b" not in text
    assert "[red][red]" in text
    assert "?[31m??" in text
    assert "and 10 more (--json)" in text
    assert "10.0 TB" in text
    assert "modified 2026-11-22" in text


def test_a_terminal_gets_styles_and_at_most_80_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    _write(tmp_path / "s", "hdf5", SPEC, train=40)
    text = describe_path(tmp_path / "s", width=200, is_terminal=True)
    assert "\x1b[1m" in text
    assert "\u2588" in text


def test_a_narrow_terminal_gets_narrow_lines(tmp_path):
    _write(tmp_path / "s", "hdf5", SPEC, train=40)
    assert max(map(len, describe_path(tmp_path / "s", width=60).splitlines())) <= 60


def test_the_data_rank_of_a_run_is_told_by_stage(tmp_path):
    store = make_store(tmp_path / "rows.zarr", n_rows=4000)
    ep3stream.fit(store, tmp_path / "run", plain_config(solver={"centers": 400}))
    plan = inspect(tmp_path / "run")["plan"]
    flattened = [stage["n_flattened"] for stage in plan["stages"]]
    assert len(flattened) > 1
    assert flattened == sorted(flattened)
    assert flattened[-1] <= plan["data_rank"] <= plan["model_rank"]
    later = [
        f"{n:,} from row {stage['first_row']:,}" for n, stage in zip(flattened, plan["stages"], strict=True)
    ][1:]
    assert f"data rank     {', '.join([str(flattened[0]), *later])}\n" in describe_path(tmp_path / "run")
    ep3stream.fit(store, tmp_path / "fixed", plain_config(solver={"centers": 400, "data_rank": 7}))
    assert "data rank     7\n" in describe_path(tmp_path / "fixed")
