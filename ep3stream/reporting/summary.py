"""The top of the report in words: what was fitted, how well, how fast; headline figures and the evaluations."""

from __future__ import annotations

import math
import re

from ep3stream.reporting.quantities import DASH, count, duration, number, percent, plural, size
from ep3stream.reporting.records import SECONDS_FIELDS, RunRecords
from ep3stream.reporting.run_json import Record, as_float, as_record
from ep3stream.run.bottleneck import bottleneck

Tile = tuple[str, str, str]
"""A headline figure: its label, its value, a remark."""

METRICS = {
    "accuracy": "accuracy",
    "r2": "R²",
    "rmse": "RMSE",
    "mse": "MSE",
    "top5": "top-5 accuracy",
    "auc": "AUC",
}

_IN_PERCENT = ("accuracy", "top5")

_MACHINES = {
    "laplacian": "Laplacian kernel machine",
    "gaussian": "Gaussian kernel machine",
    "matern32": "Matérn 3/2 kernel machine",
    "matern52": "Matérn 5/2 kernel machine",
    "dispersal": "dispersal kernel machine",
    "rational_quadratic": "rational quadratic kernel machine",
    "polynomial": "polynomial kernel machine",
    "ntk_relu": "ReLU neural-tangent kernel machine",
    "ntk_relu_unit_sphere": "ReLU neural-tangent kernel machine on the unit sphere",
    "callable": "kernel machine with a kernel of its own",
}

_MOST_TILES = 8
_MOST_EVALUATIONS = 20


def metric_text(name: str, value: object) -> str:
    """A score as it is usually read: accuracies in percent, the others to three digits."""
    score = as_float(value)
    return percent(score) if name in _IN_PERCENT and math.isfinite(score) else number(score)


def metric_names(*scores: Record) -> list[str]:
    """The keys of METRICS for which at least one of `scores` has a number."""
    return [name for name in METRICS if any(math.isfinite(as_float(each.get(name))) for each in scores)]


def store_name(records: RunRecords) -> str:
    """The last component of the store's path."""
    path = str(records.store.get("path", "")).rstrip("/\\")
    return path.replace("\\", "/").rsplit("/", 1)[-1] or "an unnamed store"


def status(records: RunRecords) -> tuple[str, str]:
    """(class of the badge, its text): finished, unfinished at some step, or without a step."""
    for event in reversed(records.events):
        if event.get("event") == "finish":
            return "finished", "Finished"
        if event.get("event") in ("start", "resume"):
            break
    step, n_steps = records.steps.last("step"), as_float(records.plan.n_steps)
    if not math.isfinite(step):
        return "waiting", "No step recorded"
    of_all = f" of {count(n_steps)}" if math.isfinite(n_steps) else ""
    return "unfinished", f"Unfinished at step {count(step)}{of_all}"


def headline_scores(records: RunRecords) -> tuple[str, Record]:
    """(name of the rows, scores on them) to lead with; ("", {}) if nothing was scored.

    The newest evaluation on a test split, of the fitted store if there is one; else the newest evaluation, else the
    validation of the model that was kept.
    """
    tests = [e for e in records.evaluations if e.get("split") == "test"]
    on_own_store = [e for e in tests if e.get("store") == records.store.get("path")]
    if evaluations := on_own_store or tests or records.evaluations:
        newest = evaluations[-1]
        split = newest.get("split", "evaluated")
        return f"{count(newest.get('n'))} {split} rows" if "n" in newest else f"{split} rows", newest
    if records.validations:
        kept = re.search(r"with the model of step (\d+)", last_message(records))
        steps = [as_float(each["step"]) for each in records.validations]
        at = steps.index(float(kept[1])) if kept is not None and float(kept[1]) in steps else -1
        own = records.validations[at]
        return f"validation rows (split {own.get('split', 'unknown')})", own
    return "", {}


def headline(records: RunRecords) -> str:
    """One sentence: how well the model does, what was fitted, on what."""
    plan, store = records.plan, records.store
    machine = _MACHINES.get(plan.kernel, "kernel machine")
    if plan.n_centers is not None:
        machine += f" with {plural(plan.n_centers, 'center')}"
    rows = (f"{plural(store['n_rows'], 'row')} of " if "n_rows" in store else "") + store_name(records)
    fitted = f"a {machine} fitted to {rows}"
    rows_name, scores = headline_scores(records)
    if math.isfinite(accuracy := as_float(scores.get("accuracy"))):
        return f"{percent(accuracy)} of {rows_name} are classified correctly by {fitted}."
    if (r2 := as_float(scores.get("r2"))) > 0:
        return f"{percent(r2)} of the variance of {_target(records)} in {rows_name} is explained by {fitted}."
    for name in ("r2", "rmse", "mse"):
        if math.isfinite(score := as_float(scores.get(name))):
            return f"{METRICS[name]} is {number(score)} on {rows_name} for {fitted}."
    if math.isfinite(loss := records.steps.last("loss")):
        return f"A {machine} fitted to {rows} has a running mean squared error of {number(loss)}."
    return f"A {machine}, set up for {rows}."


def last_message(records: RunRecords) -> str:
    """The message of the last event; empty where there is none."""
    return str(records.events[-1].get("message") or "") if records.events else ""


def _target(records: RunRecords) -> str:
    names = records.target_names
    if len(names) == 1:
        return names[0]
    return f"{len(names)} targets" if names else "the target"


def summary(records: RunRecords) -> str:
    """The sentences below the headline: the task, the time, the early stop if any, and the reference's scores."""
    sentences = []
    if "n_features" in records.store:
        classes = records.class_names
        task = f"tells {len(classes)} classes apart" if classes else f"predicts {_target(records)}"
        sentences.append(f"It {task} from {plural(records.store['n_features'], 'feature')}.")
    elapsed, epoch = records.steps.last("elapsed_s"), records.steps.last("epoch")
    if math.isfinite(elapsed):
        made = f"made {epoch:.4g} passes over the rows in" if math.isfinite(epoch) else "took"
        where = f" on {records.environment['device']}" if "device" in records.environment else ""
        setup = f", after {duration(records.setup_s)} of set-up" if records.setup_s else ""
        sentences.append(f"The fit {made} {duration(elapsed)}{where}{setup}.")
    if chosen := _chosen(records):
        sentences.append(chosen)
    message = last_message(records)
    if status(records)[0] == "finished" and "best of all validations" in message:
        sentences.append(f"It {message}.")
    if (n_held := as_float(as_record(records.store.get("validation")).get("n_held"))) > 0:
        sentences.append(f"{count(n_held)} more rows were held out of the training to be validated on.")
    reference = as_record(headline_scores(records)[1].get("reference"))
    if names := metric_names(reference):
        scores = ", ".join(f"{METRICS[name]} {metric_text(name, reference[name])}" for name in names)
        sentences.append(f"For comparison, {reference.get('name', 'the reference')}: {scores}.")
    return " ".join(sentences)


def _chosen(records: RunRecords) -> str:
    """What the fit has chosen itself, in a sentence; empty where everything was given."""
    choices = as_record(records.summary.get("choices"))
    minutes = as_float(choices.get("minutes"))
    parts = []
    if isinstance(choices.get("kernel"), str):
        parts.append(f"the {choices['kernel']} kernel by the columns")
    sizes = []
    if math.isfinite(centers := as_float(choices.get("centers"))):
        sizes.append(plural(centers, "center"))
    if math.isfinite(epochs := as_float(choices.get("epochs"))):
        sizes.append(f"up to {epochs:g} epoch" + ("" if epochs == 1 else "s"))
    if sizes and math.isfinite(minutes):
        parts.append(f"{' and '.join(sizes)} by the {minutes:g} minutes it was given")
    return f"It chose {', and '.join(parts)}." if parts else ""


def limit(records: RunRecords) -> str:
    """A sentence on what limits the speed of the fit."""
    return bottleneck({name: records.steps.last(name) for name in SECONDS_FIELDS})


def tiles(records: RunRecords) -> list[Tile]:
    """The headline figures that are known, the most important first, at most eight."""
    store, plan, steps, setup_s = records.store, records.plan, records.steps, records.setup_s
    rows_name, scores = headline_scores(records)
    score_tiles = [
        (METRICS[name], metric_text(name, scores[name]), f"on {rows_name}")
        for name in metric_names(scores)[:3]
    ]
    loss, elapsed, rate = steps.last("loss"), steps.last("elapsed_s"), steps.rows_per_s()
    memory, n_rows, n_features = math.fsum(plan.memory.values()), store.get("n_rows"), store.get("n_features")
    setup = f"and {duration(setup_s)} of set-up" if setup_s else ""
    bandwidth = "" if plan.bandwidth is None else f"bandwidth {number(as_float(plan.bandwidth))}"
    outputs = plural(store["n_outputs"], "output") if "n_outputs" in store else ""
    others = (
        (loss, "running loss", number(loss), "on rows before they are used"),
        (elapsed, "fit time", duration(elapsed), setup),
        (rate, "rows per second", number(rate), f"{count(steps.last('rows'))} rows in all"),
        (as_float(plan.n_centers), "centers", count(plan.n_centers), bandwidth),
        (as_float(n_rows), "rows to fit", count(n_rows), str(store.get("split", ""))),
        (as_float(n_features), "features", count(n_features), outputs),
        (memory or math.nan, "memory planned", size(memory), ""),
        (setup_s or math.nan, "set-up time", duration(setup_s), ""),
    )
    known = [(label, text, remark) for value, label, text, remark in others if math.isfinite(value)]
    return [*score_tiles, *known][:_MOST_TILES]


def evaluation_table(records: RunRecords) -> tuple[list[str], list[list[str]]]:
    """(column heads, rows) of the newest evaluations, each followed by its reference if it has one."""
    shown = records.evaluations[-_MOST_EVALUATIONS:]
    names = metric_names(*shown)
    rows = []
    for evaluation in shown:
        where = [str(evaluation.get("store", DASH)), str(evaluation.get("split", DASH))]
        where.append(count(evaluation.get("n")))
        rows.append(["this model", *where, *(metric_text(name, evaluation.get(name)) for name in names)])
        if reference := as_record(evaluation.get("reference")):
            scores = (metric_text(name, reference.get(name)) for name in names)
            rows.append([str(reference.get("name", "reference")), *where, *scores])
    return ["", "store", "split", "rows", *(METRICS[name] for name in names)], rows
