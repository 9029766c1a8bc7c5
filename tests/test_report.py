from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ep3stream.errors import InputError
from ep3stream.reporting.curves import MOST_POINTS, axis, thin
from ep3stream.reporting.quantities import duration, number, size
from ep3stream.reporting.records import RunRecords
from ep3stream.reporting.report import write_report

MIB = 1 << 20


def run_json(task: str = "classification", **store: Any) -> dict[str, Any]:
    memory = {"weights, velocity and average": 6e6, "centers": 157e6, "data preconditioner": 38e6}
    memory |= {"model preconditioner": 101e6, "read-ahead": 268e6, "kernel blocks": 41e6}
    n_outputs = 10 if task == "classification" else 1
    names = {
        "target_names": ["label"],
        "class_names": ["T-shirt", "Trouser", "Pullover", "Dress", "Coat"] * 2,
    }
    if task == "regression":
        names = {"target_names": ["arr_delay"], "class_names": None}
    return {
        "format": "ep3stream-run",
        "format_version": 1,
        "created_by": "ep3stream 0.1.0",
        "store": {
            "path": "/data/fashion.zarr",
            "fingerprint": "9f31c6d2a04be718",
            "split": "train",
            "task": task,
        }
        | {"n_rows": 55_000, "n_features": 784, "n_outputs": n_outputs}
        | store,
        **names,
        "plan": {"n_centers": 5000, "batch_size": 2048, "steps_per_epoch": 27, "n_steps": 540}
        | {"kernel": "laplacian", "bandwidth": 10.0, "projection": "nystrom", "data_rank": 200}
        | {"nystrom_samples": 2000, "model_rank": 500, "step_size": 0.31, "momentum": 0.9, "memory": memory},
        "setup": {
            "elapsed_s": {"centers": 0.8, "bandwidth": 0.2, "data preconditioner": 2.9}
            | {"model preconditioner": 3.6, "step size": 1.4},
            "data_eigenvalues": (0.2 * np.arange(1, 202) ** -1.1).tolist(),
            "model_eigenvalues": (800.0 * np.arange(1, 502) ** -1.2).tolist(),
            "mu": 0.46,
            "lambda_max": 3.1,
        },
        "environment": {"device": "cpu", "threads": 2, "torch": "2.13.0", "python": "3.11.9"},
    }


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    wave = 1 + 0.06 * math.sin(1.7 * step)
    record = {"kind": "step", "step": step, "epoch": round(step / 27, 3), "rows": step * 2048}
    record |= {
        "elapsed_s": 0.15 * step,
        "loss": 0.02 + 0.07 / step,
        "batch_loss": (0.02 + 0.07 / step) * wave,
    }
    return (
        record
        | {"rows_per_s": 13_600 * wave, "wait_s": 0.004 * step, "compute_s": 0.14 * step, "step_size": 0.31}
        | changes
    )


def validation_record(step: int, **changes: Any) -> dict[str, Any]:
    record = {
        "kind": "validation",
        "step": step,
        "epoch": step / 27,
        "rows": step * 2048,
        "elapsed_s": 0.15 * step,
    }
    return record | {"split": "valid", "mse": 0.021 + 0.08 / step, "accuracy": 0.878 - 0.3 / step} | changes


def event_record(event: str, step: int, message: str = "") -> dict[str, Any]:
    return {"kind": "event", "event": event, "step": step, "elapsed_s": 0.15 * step, "message": message}


def eventful_metrics() -> Iterator[dict[str, Any]]:
    """A fit that is killed once and diverges once."""
    yield event_record("start", 0, "5,000 centers, 540 steps")
    yield from map(step_record, range(1, 151))
    yield event_record("resume", 135, "from the checkpoint of step 135")
    for step in range(136, 301):
        yield step_record(step)
        if step % 27 == 0:
            yield validation_record(step)
    for step in range(301, 312):
        yield step_record(step, loss=0.02 * 1.4 ** (step - 300), batch_loss=0.02 * 1.6 ** (step - 300))
    yield event_record("rollback", 297, "the loss rose to 0.81; back to step 297 with half the step size")
    for step in range(298, 541):
        yield step_record(step, step_size=0.155)
        if step % 27 == 0:
            yield validation_record(step)
            yield event_record("checkpoint", step)
    yield event_record("finish", 540, "20 epochs")


def write_run(run: Path, about: Any = None, metrics: Any = (), evaluations: Any = ()) -> Path:
    run.mkdir(exist_ok=True)
    if about is not None:
        (run / "run.json").write_text(json.dumps(about))
        (run / "config.toml").write_text(
            '[solver]\ncenters = 5000\nepochs = 20\n\n[kernel]\nname = "laplacian"\n'
        )
    for name, records in (("metrics", metrics), ("evaluations", evaluations)):
        if lines := [json.dumps(record) + "\n" for record in records]:
            (run / f"{name}.jsonl").write_text("".join(lines))
    return run


EVALUATION = {"store": "/data/fashion.zarr", "split": "test", "n": 10_000, "mse": 0.02034, "accuracy": 0.8812}
EVALUATION |= {"top5": 0.9978, "reference": {"name": "ridge", "accuracy": 0.8104}}


def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def heading(html: str) -> str:
    return re.search(r"<h1>(.*?)</h1>", html, re.S)[1]  # type: ignore[index]


def drawn(html: str, name: str) -> list[int]:
    """Numbers of points of each path with this name."""
    return [path.count(",") for path in re.findall(rf'data-name="{name}" d="([^"]*)"', html)]


def test_a_finished_classification_says_its_test_accuracy_first(tmp_path: Path) -> None:
    html = page(write_run(tmp_path, run_json(), eventful_metrics(), [EVALUATION]))
    assert heading(html) == (
        "88.1% of 10,000 test rows are classified correctly by a Laplacian kernel machine with 5,000 centers "
        "fitted to 55,000 rows of fashion.zarr."
    )
    assert '<span class="badge finished">Finished</span>' in html
    assert "ridge: accuracy 81.0%" in html
    assert "ep3stream fit /data/fashion.zarr RUN --config config.toml" in html


def test_a_regression_says_which_share_of_the_variance_it_explains(tmp_path: Path) -> None:
    figures = {
        "store": "flights.h5",
        "split": "test",
        "n": 36_776,
        "mse": 1450.0,
        "rmse": 38.08,
        "r2": 0.2412,
    }
    html = page(write_run(tmp_path, run_json("regression", path="flights.h5"), [step_record(1)], [figures]))
    assert heading(html).startswith("24.1% of the variance of arr_delay in 36,776 test rows is explained by")
    assert "<dt>RMSE</dt><dd>38.1" in html


def test_the_newest_test_evaluation_is_preferred_to_later_ones_on_other_rows(tmp_path: Path) -> None:
    evaluations = [
        EVALUATION | {"accuracy": 0.5},
        EVALUATION,
        EVALUATION | {"split": "train", "accuracy": 0.99},
        EVALUATION | {"store": "other.h5", "accuracy": 0.1},
    ]
    assert heading(page(write_run(tmp_path, run_json(), (), evaluations))).startswith(
        "88.1% of 10,000 test rows"
    )


def test_the_scores_of_the_model_that_was_kept_are_shown_and_how_many_rows_were_held_out(
    tmp_path: Path,
) -> None:
    ending = (
        "finished after 81 steps with the model of step 54, the best of all validations (weighted error 0.02)"
    )
    metrics = [step_record(k) for k in range(1, 82)]
    metrics += [validation_record(k, accuracy=a) for k, a in ((27, 0.5), (54, 0.9), (81, 0.7))]
    about = run_json(validation={"split": "train", "n_held": 6000})
    html = page(write_run(tmp_path, about, [*metrics, event_record("finish", 81, ending)]))
    assert heading(html).startswith("90.0% of validation rows")
    assert "6,000 more rows were held out of the training to be validated on." in html


def test_what_the_fit_has_chosen_itself_is_told(tmp_path: Path) -> None:
    choices = {"kernel": "product", "centers": 12_500, "epochs": 2, "patience": 3, "minutes": 5.0}
    html = page(write_run(tmp_path, run_json() | {"choices": choices}, [step_record(1)]))
    told = (
        "It chose the product kernel by the columns, and 12,500 centers and up to 2 epochs by the 5 minutes it was "
        "given."
    )
    assert told in html
    assert "It chose" not in page(write_run(tmp_path, run_json() | {"choices": {"minutes": []}}))


def test_every_step_of_a_short_fit_is_a_point_of_the_loss_curve(tmp_path: Path) -> None:
    html = page(write_run(tmp_path, run_json(), map(step_record, range(1, 101))))
    assert drawn(html, "running loss") == [100, 100]


def test_a_long_fit_is_thinned_but_keeps_its_spike(tmp_path: Path) -> None:
    metrics = (step_record(k, loss=0.5 if k == 4321 else 0.02) for k in range(1, 6001))
    html = page(write_run(tmp_path, run_json(), metrics))
    assert all(count <= MOST_POINTS for count in drawn(html, "running loss"))
    spike = re.search(r'data-name="running loss" d="([^"]*)"', html)[1]  # type: ignore[index]
    heights = sorted(float(y) for y in re.findall(r",(\d+\.\d)", spike))
    assert heights[0] < 100
    assert heights[1] > 900


def test_steps_taken_back_leave_the_curve_and_are_shown_apart(tmp_path: Path) -> None:
    html = page(write_run(tmp_path, run_json(), eventful_metrics()))
    assert drawn(html, "running loss") == [540, 540]
    assert drawn(html, "taken back") == [15, 14, 15, 14]
    assert drawn(html, "validation") == [15, 15]
    assert (
        len(re.findall(r'class="resume" data-name', html))
        == len(re.findall(r'class="rollback" data-name', html))
        == 2
    )


def test_a_fit_that_stopped_early_says_at_which_step(tmp_path: Path) -> None:
    metrics = [event_record("start", 0), *map(step_record, range(1, 31))]
    html = page(write_run(tmp_path, run_json(), metrics))
    assert "Unfinished at step 30 of 540" in html
    assert "running mean squared error of 0.0223" in heading(html)


def test_a_finished_fit_that_is_resumed_is_unfinished_again(tmp_path: Path) -> None:
    metrics = [step_record(9), event_record("finish", 9), event_record("resume", 9), step_record(10)]
    assert "Unfinished at step 10 of 540" in page(write_run(tmp_path, run_json(), metrics))


@pytest.mark.parametrize(
    ("wait_per_step", "verdict"), [(0.004, "arithmetic is the limit"), (0.09, "reading is the limit")]
)
def test_the_page_says_what_limits_the_fit(tmp_path: Path, wait_per_step: float, verdict: str) -> None:
    metrics = (step_record(k, wait_s=wait_per_step * k) for k in range(1, 50))
    assert verdict in page(write_run(tmp_path, run_json(), metrics))


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_run_json_alone_makes_a_page_without_holes(tmp_path: Path, task: str) -> None:
    html = page(write_run(tmp_path, run_json(task)))
    assert (
        heading(html)
        == "A Laplacian kernel machine with 5,000 centers, set up for 55,000 rows of fashion.zarr."
    )
    assert "No step recorded" in html
    assert not re.search("\\bnan\\b|\\bNone\\b|>\N{EN DASH}<", html)


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>\ud800'
    about = run_json(path=f"/data/{evil}")
    about["class_names"][0] = evil
    html = page(
        write_run(
            tmp_path, about, [step_record(1), event_record(evil, 1, evil)], [EVALUATION | {"split": evil}]
        )
    )
    assert "alert(1)" in html
    assert "<script>alert" not in html
    assert html.count("<script>") == 1


def test_a_line_cut_short_and_lines_of_rubbish_are_skipped(tmp_path: Path) -> None:
    run = write_run(tmp_path, run_json(), map(step_record, range(1, 51)))
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n[1, 2]\nnull\n{"kind": "step"}\n{"kind": "step", "step": 51, "loss": NaN}\n')
        file.write(b'{"kind": "step", "step": 52, "ro')
    assert drawn(page(run), "running loss") == [50, 50]


@pytest.mark.parametrize(
    "about",
    [
        {"store": None, "plan": [], "setup": 3, "environment": "cpu", "target_names": 7},
        {"plan": {"memory": {"a": "b"}, "n_centers": 10**400}, "setup": {"elapsed_s": {"a": None}, "mu": -1}},
        {"setup": {"data_eigenvalues": [0, "x", None, -1], "model_eigenvalues": [1.0, 1.0, 1.0]}},
    ],
)
def test_run_json_of_unexpected_types_does_not_stop_the_page(tmp_path: Path, about: Any) -> None:
    metrics = [
        step_record(1, loss=math.inf),
        validation_record(1, mse=math.nan),
        step_record(2, elapsed_s=None),
    ]
    assert page(write_run(tmp_path, about, metrics, [{"n": "many"}])).endswith("</html>")


def test_a_run_with_settings_only_makes_a_page_and_what_is_no_run_is_refused_and_left_alone(
    tmp_path: Path,
) -> None:
    for name in ("run", "store", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "config.toml").touch()
    (tmp_path / "store" / "manifest.json").touch()
    assert "kernel machine" in page(tmp_path / "run")
    for name, found in (("store", "a store"), ("empty", "an empty directory"), ("absent", "not there")):
        with pytest.raises(InputError, match=f"{name} is no run: it is {found}; give the RUN of a fit"):
            write_report(tmp_path / name)
    assert sorted(file.name for file in tmp_path.rglob("*.html")) == ["report.html"]


def test_the_page_loads_nothing_and_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    run = write_run(tmp_path, run_json(), eventful_metrics(), [EVALUATION])
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert not re.search(rb"https?:|//[a-z]|\bsrc=|\bhref=|@import|url\(", first.split(b"<script>")[0])
    assert sorted(p.name for p in run.iterdir()) == [
        "config.toml", "evaluations.jsonl", "metrics.jsonl", "report.html", "run.json",
    ]  # fmt: skip


def test_a_failed_write_keeps_the_older_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path, run_json())
    before = write_report(run).read_bytes()
    write_run(run, run_json(), [step_record(1)])

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob(".report*"))


@pytest.mark.parametrize(
    ("values", "log", "expected"),
    [
        ([0, 87], False, ["0", "20", "40", "60", "80", "100"]),
        ([0, 0.31], False, ["0.00", "0.05", "0.10", "0.15", "0.20", "0.25", "0.30", "0.35"]),
        ([0.018, 0.12], True, ["0.02", "0.05", "0.1"]),
        ([0.018, 0.04], True, ["0.020", "0.025", "0.030", "0.035", "0.040"]),
        ([0.0195, 0.0222], True, ["0.0195", "0.0200", "0.0205", "0.0210", "0.0215", "0.0220"]),
        ([1.3e-4, 3.4e-4], True, [f"{m}\N{MULTIPLICATION SIGN}10⁻⁴" for m in ("1.5", "2", "3")]),
        ([2e-7, 0.5], True, ["10⁻⁷", "10⁻⁶", "10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "10⁰"]),
    ],
)
def test_ticks_are_round_and_axes_enclose_the_data(
    values: list[float], log: bool, expected: list[str]
) -> None:
    made = axis("y", np.array(values), log=log)
    assert [text for _, text in made.ticks] == expected
    assert made.low <= min(values) < max(values) <= made.high
    assert all(0 <= place <= 100 for place, _ in made.ticks)


@pytest.mark.parametrize(
    "values", [[0.02, 0.02], [0.02, math.nextafter(0.02, 1)], [5e-324, 1.7e308], [1.0, math.inf]]
)
@pytest.mark.parametrize("log", [False, True])
def test_extreme_values_still_have_an_axis(values: list[float], log: bool) -> None:
    made = axis("y", np.array(values), log=log)
    assert len(made.ticks) > 2
    assert np.all(np.isfinite(made.place(np.array(values))))


def test_thinning_keeps_ends_and_extremes_in_order() -> None:
    y = np.sin(np.arange(100_000.0))
    y[777], y[55_555] = 9.0, -9.0
    x_thin, y_thin = thin(np.arange(100_000.0), y, most=100)
    assert len(x_thin) <= 100
    assert (x_thin[0], x_thin[-1], y_thin.max(), y_thin.min()) == (0, 99_999, 9, -9)
    assert np.all(np.diff(x_thin) > 0)


def test_a_very_long_log_is_held_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ep3stream.reporting.records._MOST_STEPS", 64)
    steps = RunRecords.read(write_run(tmp_path, run_json(), map(step_record, range(1, 1001)))).steps
    assert len(steps["step"]) <= 64
    assert np.all(np.diff(steps["step"]) > 0)
    assert steps.last("step") == 1000


def test_quantities_read_as_people_write_them() -> None:
    assert [duration(s) for s in (3.21, 59.7, 245, 11_520, 200_000)] == [
        "3.2 s", "1 min 00 s", "4 min 05 s", "3 h 12 min", "2 d 07 h",
    ]  # fmt: skip
    assert [size(b) for b in (512, 1.5 * MIB, 300 * 1024 * MIB)] == ["512 B", "1.50 MiB", "300 GiB"]
    assert [number(v) for v in (0.02171, 15_204.3, 1.2e-7, -3.0, math.nan)] == [
        "0.0217", "15,204", "1.20 \N{MULTIPLICATION SIGN} 10⁻⁷", "\N{MINUS SIGN}3.00", "\N{EN DASH}",
    ]  # fmt: skip


def diagnosed(**found: Any) -> dict[str, Any]:
    return EVALUATION | {"diagnosis": found}


def test_confusions_are_a_table_of_counts_shaded_by_their_share_of_the_class(tmp_path: Path) -> None:
    confusion = {"classes": ["cat", "dog"], "counts": [[1, 3], [0, 5]]}
    html = page(write_run(tmp_path, run_json(), (), [diagnosed(confusion=confusion)]))
    assert re.findall(r'class="(right|wrong)" style="--share:([\d.]+)%">(\d*)<', html) == [
        ("right", "25.0", "1"), ("wrong", "75.0", "3"), ("wrong", "0.0", ""), ("right", "100.0", "5"),
    ]  # fmt: skip


def test_residuals_and_calibration_are_drawn_and_the_newest_diagnosis_is_kept(tmp_path: Path) -> None:
    quantiles = [-2.0, -1.0, 0.0, 1.0, 2.0]
    residuals = {
        "target": "delay",
        "histogram": {"low": -1.0, "high": 1.0, "counts": [1, 2, 1], "below": 3, "above": 4},
        "bands": [{"rows": 9, "predicted": float(at), "quantiles": quantiles} for at in range(4)],
    }
    evaluations = [diagnosed(residuals=[residuals]), EVALUATION | {"split": "train", "n": 7}]
    html = page(write_run(tmp_path, run_json("regression"), (), evaluations))
    assert drawn(html, "half of the rows") == drawn(html, "nine tenths of the rows") == [8]
    assert drawn(html, "median") == [4]
    assert drawn(html, "rows") == [8]
    assert "rows (7 more lie beyond)" in html
    bins = [{"rows": 9, "confidence": 0.6, "accuracy": 0.7}, {"rows": 9, "confidence": 0.9, "accuracy": 0.8}]
    html = page(write_run(tmp_path, run_json(), (), [diagnosed(calibration=bins)]))
    assert drawn(html, "of rows with this confidence") == [2]


@pytest.mark.parametrize(
    "found",
    [
        {"residuals": 7, "confusion": [], "mistakes": {"a": 1}, "calibration": "x"},
        {"residuals": [None, {"bands": [{"predicted": "x", "quantiles": [1]}], "histogram": {"counts": ["a"]}}]},
        {"residuals": [{"histogram": {"low": 1, "high": 1, "counts": [1]}}]},
        {"residuals": [{"bands": [{"predicted": 1e400, "quantiles": [0, 0, 0, 0, math.nan]}] * 3}]},
        {"confusion": {"classes": ["a", "b"], "counts": [[1], [2, 3]]}},
        {"confusion": {"classes": ["a", "b"], "counts": [[math.inf, "x"], [None, -3]]}, "mistakes": [3, None]},
        {"calibration": [{"confidence": None}, {"accuracy": 3}, 7]},
    ],
)  # fmt: skip
def test_a_diagnosis_of_unexpected_types_does_not_stop_the_page(
    tmp_path: Path, found: dict[str, Any]
) -> None:
    assert page(write_run(tmp_path, run_json(), (), [diagnosed(**found)])).endswith("</html>")


def test_columns_classes_and_the_way_to_the_same_fit_are_told(tmp_path: Path) -> None:
    column = {"name": "km<", "mean": 3.0, "std": 2.0, "min": 0.5, "max": 17.25, "missing": 1569}
    about = run_json() | {"statistics": {"features": [column], "class_counts": [40, 60]}}
    html = page(write_run(tmp_path, about, ()))
    assert re.search(r"<td>km&lt;</td><td>feature</td>(.*\n?){4}.*1,569", html)
    assert "Rows of each class" in html
    assert "# with ep3stream 0.1.0, PyTorch 2.13.0, Python 3.11.9" in html
    assert "# must have the fingerprint 9f31c6d2a04be718" in html


def test_each_stage_is_marked_on_the_spectrum_of_the_data_the_present_one_apart(tmp_path: Path) -> None:
    about = run_json()
    stages = [(0, 11), (4096, 45), (16_384, 120), (10**9, 190)]
    about["plan"]["stages"] = [{"first_row": row, "n_flattened": n, "pace": 1.0} for row, n in stages]
    html = page(write_run(tmp_path, about, map(step_record, range(1, 51))))
    assert html.count('data-name="rank 120"') == 1
    assert html.count('data-name="other stages: 11, 45, 190"') == 3


def test_the_accuracy_of_validations_is_drawn_where_there_is_one(tmp_path: Path) -> None:
    steps = list(map(step_record, range(1, 55)))
    validations = [validation_record(27), validation_record(54)]
    html = page(write_run(tmp_path / "classes", run_json(), [*steps, *validations]))
    assert html.count('aria-label="Validation accuracy against') == 2
    assert 'data-name="accuracy"' in html
    bad = [validation_record(27, accuracy=None), validation_record(54, accuracy="high")]
    for name, told in (("numbers", [validation_record(27, accuracy=None)]), ("meddled", bad)):
        assert "Validation accuracy" not in page(write_run(tmp_path / name, run_json(), [*steps, *told]))
    single = page(write_run(tmp_path / "single", run_json(), [*steps, validation_record(27, accuracy=0.0)]))
    assert "Validation accuracy" in single


def with_column_weights(*worth: tuple[str, Any]) -> dict[str, Any]:
    columns = [{"name": name, "importance": value} for name, value in worth]
    return run_json() | {"column_weights": {"explained": 0.3, "columns": columns}}


def test_the_page_shows_what_each_column_is_worth(tmp_path: Path) -> None:
    html = page(write_run(tmp_path, with_column_weights(("day", 0.3), ("<b>hour", 0.1), ("noise", 0.0))))
    assert "What matters" in html
    text = re.sub(r"<[^>]+>|\s", " ", html)
    assert text.index("75.0%") < text.index("&lt;b&gt;hour") < text.index("25.0%")
    assert "noise" not in text


def test_the_page_shows_what_each_column_is_worth_to_a_metric(tmp_path: Path) -> None:
    columns = [{"name": "hour", "importance": 0.6}, {"name": "day", "importance": 0.2}]
    html = page(write_run(tmp_path, run_json() | {"metric": {"kind": "diagonal", "columns": columns}}))
    assert "What matters" in html
    assert "mean square of its derivative" in html
    assert html.index("75.0%") < html.index("25.0%")


@pytest.mark.parametrize(
    "worth", [(), (("day", None),), (("day", "much"), ("hour", -1.0)), (("day", math.inf),)]
)
def test_columns_worth_nothing_leave_the_section_out(tmp_path: Path, worth: Any) -> None:
    assert "What matters" not in page(write_run(tmp_path, with_column_weights(*worth)))
    assert "What matters" not in page(write_run(tmp_path, run_json() | {"column_weights": [1]}))
