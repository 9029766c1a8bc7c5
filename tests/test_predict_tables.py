"""`predict` on tables: the model knows its columns, and gives a line for each row."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
import pytest
from small_stores import plain_config

import ep3stream
from ep3stream import InputError, SourceError, cli
from ep3stream.prediction.predict import predict_tables
from ep3stream.store.json_files import signed_bytes, signed_object

CITIES = ["Oslo", "Bergen", "Hamar"]


def write_table(path: Path, seed: int, month: int, target: str | None = None, gaps: bool = True) -> Path:
    """Sales of flats: a date, a category with few gaps, numbers with gaps; `sold` is a class, `days` a number."""
    random = np.random.default_rng(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["when", "city", "price", "rooms", *([target] if target else [])])
        for _ in range(300):
            day = dt.date(2026, month, 1) + dt.timedelta(days=int(random.integers(28)))
            city, price = random.choice(CITIES), float(random.normal())
            rooms = "" if gaps and random.random() < 0.1 else int(random.integers(1, 6))
            value = price + (city == "Oslo")
            cells = {"sold": "yes" if value > 0.3 else "no", "days": f"{value:.4f}", None: ""}
            writer.writerow([day, city, f"{price:.4f}", rooms, *([cells[target]] if target else [])])
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Stores and runs of both tasks and of every way with gaps."""
    folder = tmp_path_factory.mktemp("flats")
    for target, missing in (("sold", "mean"), ("days", "drop"), ("days", "error")):
        name = f"{target}-{missing}"
        source = write_table(folder / f"{name}.csv", 0, 3, target, gaps=missing != "error")
        config = ep3stream.ConvertConfig(target=target, missing=missing)
        ep3stream.convert([source], folder / f"{name}.zarr", config)
        ep3stream.fit(folder / f"{name}.zarr", folder / name, plain_config(solver={"centers": 40}))
    return folder


def predicted(out: Path) -> list[dict[str, str]]:
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("run", ["sold-mean", "days-error"])
def test_a_table_has_the_predictions_of_the_store_made_like_it(made, run, tmp_path):
    target = run.split("-")[0]
    table = write_table(tmp_path / "april.csv", 1, 4, target, gaps=run == "sold-mean")
    config = ep3stream.ConvertConfig(like=made / f"{run}.zarr", shuffle=False)
    ep3stream.convert([table], tmp_path / "april.zarr", config)
    x, _ = ep3stream.open_store(tmp_path / "april.zarr").split("train").read_rows(np.arange(300))
    assert predict_tables(made / run, table, tmp_path / "out.csv") == 300
    found = [row[target] for row in predicted(tmp_path / "out.csv")]
    expected = ep3stream.load(made / run).predict(x)
    if target == "sold":
        assert found == list(expected)
    else:
        assert np.allclose(np.array(found, float), expected, atol=1e-5)


def test_no_target_column_is_needed_and_columns_are_found_by_name(made, tmp_path):
    table = write_table(tmp_path / "april.csv", 1, 4)
    rows = pa_csv.read_csv(table)
    shuffled = rows.select(["rooms", "price", "city", "when"]).append_column("extra", rows["price"])
    pa_parquet.write_table(shuffled, tmp_path / "april.parquet")
    for source in (table, tmp_path / "april.parquet"):
        predict_tables(made / "sold-mean", source, tmp_path / f"{source.name}.csv", scores=True)
    first, second = (predicted(tmp_path / f"april.{kind}.csv") for kind in ("csv", "parquet"))
    assert list(first[0]) == ["no", "yes"]
    assert first == second


def test_the_model_needs_its_store_no_longer(made, tmp_path):
    run = Path(shutil.copytree(made / "sold-mean", tmp_path / "run"))
    table = write_table(tmp_path / "april.csv", 1, 4)
    summary = json.loads((run / "run.json").read_text())
    summary["store"]["path"] = str(tmp_path / "gone.zarr")
    (run / "run.json").write_text(json.dumps(summary))
    assert predict_tables(run, table, tmp_path / "finished.csv") == 300
    shutil.rmtree(run / "model")
    assert predict_tables(run, table, tmp_path / "from-checkpoint.csv") == 300
    assert (tmp_path / "finished.csv").read_bytes() == (tmp_path / "from-checkpoint.csv").read_bytes()


def forget_columns(run: Path) -> None:
    """The run as an earlier version wrote it."""
    manifest = run / "model" / "manifest.json"
    content = signed_object(manifest.read_bytes(), "the test", "")
    del content["description"]["conversion"]
    content.pop("digest", None)
    manifest.write_bytes(signed_bytes(content))


def test_a_run_of_an_earlier_version_asks_the_store_it_names(made, tmp_path):
    run = Path(shutil.copytree(made / "sold-mean", tmp_path / "run"))
    forget_columns(run)
    table = write_table(tmp_path / "april.csv", 1, 4)
    predict_tables(run, table, tmp_path / "old.csv")
    predict_tables(made / "sold-mean", table, tmp_path / "new.csv")
    assert (tmp_path / "old.csv").read_bytes() == (tmp_path / "new.csv").read_bytes()
    summary = json.loads((run / "run.json").read_text())
    summary["store"]["fingerprint"] = "0" * 32
    (run / "run.json").write_text(json.dumps(summary))
    with pytest.raises(InputError, match=r"keeps no record of its columns; convert the file with --like"):
        predict_tables(run, table, tmp_path / "never.csv")


def test_rows_that_the_conversion_would_drop_have_an_empty_line_in_their_place(made, tmp_path):
    table = write_table(tmp_path / "april.csv", 1, 4)
    predict_tables(made / "days-drop", table, tmp_path / "out.csv")
    rooms = [row["rooms"] for row in predicted(table)]
    days = [row["days"] for row in predicted(tmp_path / "out.csv")]
    assert len(days) == 300
    assert [day == "" for day in days] == [room == "" for room in rooms]
    assert "" in days


class Standard:
    """Standard input and output of bytes."""

    def __init__(self, patch, content: bytes) -> None:
        self.out = io.BytesIO()
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        patch.setattr(sys, "stdout", io.TextIOWrapper(self.out, write_through=True))


def test_standard_input_goes_to_standard_output(made, tmp_path, monkeypatch, capfd):
    table = write_table(tmp_path / "april.csv", 1, 4)
    predict_tables(made / "sold-mean", table, tmp_path / "out.csv")
    standard = Standard(monkeypatch, table.read_bytes())
    assert cli.main(["predict", str(made / "sold-mean"), "-", "-"]) == 0
    assert standard.out.getvalue() == (tmp_path / "out.csv").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace("Oslo", "Moss"),
            r"standard input: column 'city', row \d+: 'Moss' is not among",
        ),
        (lambda text: text.replace("price", "prize"), "no column 'price', .*did you mean prize"),
        (lambda text: "", "standard input: is empty"),
    ],
)
def test_what_does_not_match_is_named_and_nothing_is_written(made, tmp_path, monkeypatch, change, message):
    table = write_table(tmp_path / "april.csv", 1, 4)
    standard = Standard(monkeypatch, change(table.read_text()).encode())
    with pytest.raises(SourceError, match=message):
        predict_tables(made / "sold-mean", "-", "-")
    assert standard.out.getvalue() == b""


def test_a_table_without_rows_has_a_header_for_its_predictions(made, tmp_path, monkeypatch):
    header = write_table(tmp_path / "april.csv", 1, 4).read_text().splitlines()[0]
    standard = Standard(monkeypatch, f"{header}\n".encode())
    assert predict_tables(made / "sold-mean", "-", "-") == 0
    assert standard.out.getvalue() == b"sold\n"
    empty = pa_parquet.read_schema(
        write_parquet(tmp_path / "april.parquet", tmp_path / "april.csv")
    ).empty_table()
    pa_parquet.write_table(empty, tmp_path / "april.parquet")
    assert predict_tables(made / "days-error", tmp_path / "april.parquet", tmp_path / "out.csv") == 0
    assert (tmp_path / "out.csv").read_text() == "days\n"
    Standard(monkeypatch, b"when,city,price\n")
    with pytest.raises(SourceError, match="no column 'rooms'"):
        predict_tables(made / "sold-mean", "-", "-")


def write_parquet(path, table):
    pa_parquet.write_table(pa_csv.read_csv(table), path)
    return path


def test_unknown_categories_are_ignored_or_give_an_empty_line_and_the_others_stay_as_they_are(
    made, tmp_path, caplog
):
    known = write_table(tmp_path / "april.csv", 1, 4)
    lines = known.read_text().splitlines(keepends=True)
    new = [line.replace("Oslo", "Moss") for line in lines]
    (tmp_path / "new.csv").write_text("".join(new))
    changed = [a != b for a, b in zip(lines[1:], new[1:], strict=True)]
    found = {}
    for unknown in ("ignore", "drop"):
        out = tmp_path / f"{unknown}.csv"
        assert (
            cli.main(
                [
                    "predict",
                    str(made / "sold-mean"),
                    str(tmp_path / "new.csv"),
                    str(out),
                    "--unknown",
                    unknown,
                ]
            )
            == 0
        )
        found[unknown] = [row["sold"] for row in predicted(out)]
    predict_tables(made / "sold-mean", known, tmp_path / "known.csv")
    before = [row["sold"] for row in predicted(tmp_path / "known.csv")]
    assert [value == "" for value in found["drop"]] == changed
    assert all(value in ("yes", "no") for value in found["ignore"])
    for unknown in found.values():
        assert [v for v, c in zip(unknown, changed, strict=True) if not c] == [
            v for v, c in zip(before, changed, strict=True) if not c
        ]
    assert f"'city' in {sum(changed)} rows ('Moss' {sum(changed)})" in caplog.text


def test_a_table_with_other_names_is_predicted_alike(made, tmp_path):
    table = write_table(tmp_path / "april.csv", 1, 4)
    predict_tables(made / "sold-mean", table, tmp_path / "out.csv")
    (tmp_path / "other.csv").write_text(table.read_text().replace("city", "place").replace("when", "day"))
    predict_tables(
        made / "sold-mean",
        tmp_path / "other.csv",
        tmp_path / "again.csv",
        rename={"place": "city", "day": "when"},
    )
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "out.csv").read_bytes()


def test_a_store_converted_with_unknown_categories_is_scored_with_a_warning(made, tmp_path, caplog):
    table = write_table(tmp_path / "april.csv", 1, 4, "sold")
    table.write_text(table.read_text().replace("Oslo", "Moss"))
    config = ep3stream.ConvertConfig(like=made / "sold-mean.zarr", unknown="ignore")
    ep3stream.convert([table], tmp_path / "april.zarr", config)
    caplog.clear()
    assert ep3stream.evaluate(made / "sold-mean", tmp_path / "april.zarr")["n"] == 300
    assert "values unknown to the model: 'city' in" in caplog.text


def test_a_gap_where_the_conversion_had_none_is_an_error(made, tmp_path):
    table = write_table(tmp_path / "april.csv", 1, 4)
    with pytest.raises(SourceError, match=r"column 'rooms'.*missing"):
        predict_tables(made / "days-error", table, tmp_path / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["april.csv"]


@pytest.mark.parametrize(
    ("rows", "out", "more", "message"),
    [
        ("april.csv", "out.npy", [], "ending in .csv"),
        ("april.csv", "april.csv", [], "exists"),
        ("april.csv", "out.csv", ["--split", "train"], "a table has no splits"),
        ("store.zarr", "out.csv", [], "predictions of a store"),
    ],
)
def test_a_wrong_place_is_refused_in_one_line(made, tmp_path, monkeypatch, capsys, rows, out, more, message):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "april.csv", 1, 4)
    assert cli.main(["predict", str(made / "sold-mean"), rows, out, *more]) == 2
    assert message in capsys.readouterr().err
