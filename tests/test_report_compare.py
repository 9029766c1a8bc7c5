"""`ep3stream report RUN RUN`: several runs on one page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_report import EVALUATION, eventful_metrics, run_json, write_run
from test_report_browser import CHROMIUM, look

import ep3stream
from ep3stream import InputError, cli
from ep3stream.reporting.compare import MOST_RUNS, write_comparison
from ep3stream.reporting.quantities import DASH


def slower(records: Any) -> list[dict[str, Any]]:
    """The same fit, with twice the loss and a validation."""
    doubled = [r | {"loss": 2 * r["loss"]} if r["kind"] == "step" else r for r in records]
    last = doubled[-2]
    place = {name: last[name] for name in ("step", "epoch", "rows", "elapsed_s") if name in last}
    return [*doubled, {"kind": "validation", **place, "split": "test", "mse": 0.04, "accuracy": 0.8}]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    first = write_run(tmp_path / "first", run_json(), eventful_metrics(), [EVALUATION])
    worse = EVALUATION | {"accuracy": 0.85, "mse": 0.03}
    second = write_run(tmp_path / "second", run_json(), slower(eventful_metrics()), [worse])
    (second / "config.toml").write_text(
        '[solver]\ncenters = 1000\nepochs = 20\n\n[kernel]\nname = "gaussian"\n'
    )
    return [first, second]


def text_of(page: Path) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<(style|script)>.*?</\1>|<[^>]+>", " ", page.read_text(), flags=re.S))


def test_scores_stand_side_by_side_and_the_best_is_named(runs, tmp_path):
    text = text_of(write_comparison(runs, tmp_path / "comparison.html"))
    assert "first is the best of 2 runs: accuracy 88.1%." in text
    assert "accuracy 88.1% 85.0%" in text
    assert "state Finished Finished" in text


def test_what_matters_to_each_run_stands_side_by_side(runs, tmp_path):
    columns = [{"name": name, "importance": value} for name, value in (("day", 3.0), ("hour", 1.0))]
    (runs[1] / "run.json").write_text(json.dumps(run_json() | {"column_weights": {"columns": columns}}))
    text = text_of(write_comparison(runs, tmp_path / "comparison.html"))
    assert f"what matters {DASH} day 75.0%, hour 25.0%" in text


def test_only_the_settings_that_differ_are_listed(runs, tmp_path):
    text = text_of(write_comparison(runs, tmp_path / "comparison.html"))
    assert "solver.centers 5000 1000" in text
    assert "kernel.name laplacian gaussian" in text
    assert "solver.epochs" not in text


def test_every_run_has_its_curve_on_both_axes(runs, tmp_path):
    html = write_comparison(runs, tmp_path / "comparison.html").read_text()
    for place, name in enumerate(("first", "second")):
        assert html.count(f'class="main run-{place}" data-name="{name}"') == 2
    assert html.count('class="point run-1" data-name="second, validation"') == 2


def test_scores_of_different_rows_are_called_that(runs, tmp_path):
    other = EVALUATION | {"split": "holdout", "store": "/data/other.zarr"}
    third = write_run(tmp_path / "third", run_json(), eventful_metrics(), [other])
    text = text_of(write_comparison([*runs, third], tmp_path / "comparison.html"))
    assert "The scores are not of the same rows: 10,000 holdout rows, 10,000 test rows." in text


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path):
    for folder in ("monday", "tuesday"):
        (tmp_path / folder).mkdir()
        write_run(tmp_path / folder / "run", run_json(), eventful_metrics(), [EVALUATION])
    html = write_comparison(
        [tmp_path / f / "run" for f in ("monday", "tuesday")], tmp_path / "c.html"
    ).read_text()
    assert "monday/run" in html
    assert "tuesday/run" in html


def test_nothing_in_a_run_becomes_markup_and_nothing_is_loaded(runs, tmp_path):
    evil = write_run(
        tmp_path / "<b>evil", run_json(), eventful_metrics(), [EVALUATION | {"split": "<script>x"}]
    )
    html = write_comparison([*runs, evil], tmp_path / "comparison.html").read_text()
    assert "<b>evil" not in html
    assert "<script>x" not in html
    assert not re.search(r"""(src|href)=|@import|url\(""", html)


def test_a_run_that_has_not_begun_is_no_obstacle(runs, tmp_path):
    write_run(tmp_path / "empty")
    (tmp_path / "empty" / "config.toml").touch()
    text = text_of(write_comparison([*runs, tmp_path / "empty"], tmp_path / "comparison.html"))
    assert "No step recorded" in text


def test_a_comparison_replaces_a_comparison_and_nothing_else(runs, tmp_path):
    out = write_comparison(runs, tmp_path / "comparison.html")
    first = out.read_bytes()
    assert write_comparison(runs, out).read_bytes() == first
    (tmp_path / "thesis.html").write_text("<title>My thesis</title>")
    with pytest.raises(InputError, match="no comparison of runs"):
        write_comparison(runs, tmp_path / "thesis.html")
    assert (tmp_path / "thesis.html").read_text() == "<title>My thesis</title>"


@pytest.mark.parametrize("number", [1, MOST_RUNS + 1])
def test_one_run_or_too_many_are_refused(runs, tmp_path, number):
    with pytest.raises(InputError, match=f"{number} runs were given"):
        write_comparison([runs[0]] * number, tmp_path / "comparison.html")


def test_the_command_draws_one_or_compares_several(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "first"]) == 0
    assert (tmp_path / "first" / "report.html").exists()
    assert cli.main(["report", "first", "second"]) == 0
    assert (tmp_path / "comparison.html").exists()
    assert cli.main(["report", "first", "--out", "x.html"]) == 2
    assert cli.main(["report", "first", "none"]) == 2
    assert "none is no run: it is not there" in capsys.readouterr().err


def test_it_is_a_public_function(runs, tmp_path):
    assert ep3stream.write_comparison(runs, tmp_path / "comparison.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1100, 500])
def test_in_a_browser_every_curve_is_seen_and_nothing_overflows(runs, tmp_path, width):
    seen = look(write_comparison(runs, tmp_path / "comparison.html"), width)
    assert seen["faults"] == []
    assert [chart["label"] for chart in seen["charts"]] == ["Loss against rows seen"]
    assert seen["charts"][0]["wide"] > 0.25
    assert "first: " in seen["charts"][0]["told"]
    assert seen["page"] <= seen["window"]
