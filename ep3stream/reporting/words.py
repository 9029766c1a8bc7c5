"""The report page in words: quantities as text, and sentences on what was fitted, how well and how fast."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ep3stream.reporting.curves import DASH, MINUS, number
from ep3stream.reporting.records import SECONDS_FIELDS, RunRecords, Table, real, table, texts
from ep3stream.run.clock import bottleneck

Tile = tuple[str, str, str]

"""A headline figure: what it is, its value, a remark."""

_KERNELS = {
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

METRICS = {
    "accuracy": "accuracy",
    "r2": "R²",
    "rmse": "RMSE",
    "mse": "MSE",
    "top5": "top-5 accuracy",
    "auc": "AUC",
}

_SHARES = ("accuracy", "top5")


def duration(seconds: float) -> str:
    """Seconds in the two units that matter: 3.2 s, 41 s, 4 min 05 s, 3 h 12 min, 2 d 03 h."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 10:
        return f"{number(max(seconds, 0.0), 2)} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def size(n_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves at least one: 512 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024:
            return f"{number(n_bytes)} {unit}"
        n_bytes /= 1024
    return f"{number(n_bytes)} TiB"


def count(value: object) -> str:
    """A whole number with its thousands apart, or a dash."""
    return f"{real(value):,.0f}" if math.isfinite(real(value)) else DASH


def share(fraction: float) -> str:
    """A fraction in percent."""
    return f"{100 * fraction:.1f}%".replace("-", MINUS)


def metric(name: str, value: object) -> str:
    """A figure as its metric is read: accuracies in percent, the rest to three digits."""
    return share(real(value)) if name in _SHARES and math.isfinite(real(value)) else number(real(value))


def scored(name: str, value: float) -> str:
    """`accuracy 87.5%`, `R² 0.223`."""
    return f"{METRICS[name]} {metric(name, value)}"


def plural(value: object, noun: str) -> str:
    """`1 center`, `5,000 centers`."""
    return f"{count(value)} {noun}" + ("" if real(value) == 1 else "s")


def store_name(records: RunRecords) -> str:
    """The store's last path component, as people call it."""
    path = str(table(records.run.get("store")).get("path", "")).rstrip("/\\")
    return path.replace("\\", "/").rsplit("/", 1)[-1] or "an unnamed store"


def status(records: RunRecords) -> tuple[str, str]:
    """(badge class, badge text): finished, unfinished at step k, or not started."""
    for event in reversed(records.events):
        if event.get("event") == "finish":
            return "finished", "Finished"
        if event.get("event") in ("start", "resume"):
            break
    step, n_steps = records.steps.last("step"), table(records.run.get("plan")).get("n_steps")
    if not math.isfinite(step):
        return "waiting", "No step recorded"
    of = f" of {count(n_steps)}" if math.isfinite(real(n_steps)) else ""
    return "unfinished", f"Unfinished at step {count(step)}{of}"


def judgement(records: RunRecords) -> tuple[str, Table]:
    """(name of the rows, figures) that tell most: newest test evaluation, any evaluation, validation."""
    tests = [e for e in records.evaluations if e.get("split") == "test"]
    # A model may be tested on other stores too; its own store's test split is_main_process for it.
    own = [e for e in tests if e.get("store") == table(records.run.get("store")).get("path")]
    if evaluations := own or tests or records.evaluations:
        newest = evaluations[-1]
        split = newest.get("split", "evaluated")
        return f"{count(newest.get('n'))} {split} rows" if "n" in newest else f"{split} rows", newest
    if records.validations:
        newest = records.validations[-1]
        return f"validation rows (split {newest.get('split', 'unknown')})", newest
    return "", {}


def headline(records: RunRecords) -> str:
    """One sentence: how well, what was fitted, on what."""
    machine, rows = _machine(records), _fitted_rows(records)
    fitted = f"a {machine} fitted to {rows}"
    unseen, figures = judgement(records)
    if math.isfinite(accuracy := real(figures.get("accuracy"))):
        return f"{share(accuracy)} of {unseen} are classified correctly by {fitted}."
    if (r2 := real(figures.get("r2"))) > 0:
        return f"{share(r2)} of the variance of {_target(records)} in {unseen} is explained by {fitted}."
    for name in ("r2", "rmse", "mse"):
        if math.isfinite(figure := real(figures.get(name))):
            return f"{METRICS[name]} is {number(figure)} on {unseen} for {fitted}."
    if math.isfinite(loss := records.steps.last("loss")):
        return f"A {machine} fitted to {rows} has a running mean squared error of {number(loss)}."
    return f"A {machine}, set up for {rows}."


def _machine(records: RunRecords) -> str:
    plan = table(records.run.get("plan"))
    machine = _KERNELS.get(str(plan.get("kernel")), "kernel machine")
    return f"{machine} with {plural(plan['n_centers'], 'center')}" if "n_centers" in plan else machine


def _fitted_rows(records: RunRecords) -> str:
    store = table(records.run.get("store"))
    counted = f"{plural(store['n_rows'], 'row')} of " if "n_rows" in store else ""
    return counted + store_name(records)


def _target(records: RunRecords) -> str:
    names = texts(records.run.get("target_names"))
    if len(names) == 1:
        return names[0]
    return f"{len(names)} targets" if names else "the target"


def summary(records: RunRecords) -> str:
    """What surrounds the headline: the task, the time taken and what a reference reaches."""
    store, environment = table(records.run.get("store")), table(records.run.get("environment"))
    sentences = []
    if "n_features" in store:
        classes = texts(records.run.get("class_names"))
        aim = f"tells {len(classes)} classes apart" if classes else f"predicts {_target(records)}"
        sentences.append(f"It {aim} from {plural(store['n_features'], 'feature')}.")
    elapsed, epoch = records.steps.last("elapsed_s"), records.steps.last("epoch")
    if math.isfinite(elapsed):
        made = f"made {epoch:.4g} passes over the rows in" if math.isfinite(epoch) else "took"
        where = f" on {environment['device']}" if "device" in environment else ""
        setup = f", after {duration(setup_seconds(records))} of set-up" if setup_seconds(records) else ""
        sentences.append(f"The fit {made} {duration(elapsed)}{where}{setup}.")
    sentences += _early_stop(records)
    sentences += _comparison(judgement(records)[1])
    return " ".join(sentences)


def _early_stop(records: RunRecords) -> list[str]:
    """What the end of a fit with patience says of its model, as a sentence."""
    message = str(records.events[-1].get("message") or "") if records.events else ""
    is_told = status(records)[0] == "finished" and "best of all validations" in message
    return [f"It {message}."] if is_told else []


def _comparison(figures: Table) -> list[str]:
    reference = table(figures.get("reference"))
    known = [
        f"{METRICS[n]} {metric(n, reference[n])}" for n in METRICS if math.isfinite(real(reference.get(n)))
    ]
    return [f"For comparison, {reference.get('name', 'the reference')}: {', '.join(known)}."] if known else []


def setup_seconds(records: RunRecords) -> float:
    """All of the set-up's stages together, in seconds."""
    stages = table(table(records.run.get("setup")).get("elapsed_s"))
    return math.fsum(s for s in map(real, stages.values()) if math.isfinite(s))


def limit(records: RunRecords) -> str:
    """What holds the fit back, in a sentence."""
    return bottleneck({name: records.steps.last(name) for name in SECONDS_FIELDS})


def tiles(records: RunRecords) -> list[Tile]:
    """Headline figures, the most telling first; only those that are known."""
    store, plan, steps = table(records.run.get("store")), table(records.run.get("plan")), records.steps
    memory = [real(v) for v in table(plan.get("memory")).values()]
    elapsed, setup = steps.last("elapsed_s"), setup_seconds(records)
    rate = steps.last("rows") / elapsed if elapsed > 0 else math.nan
    made = [*_figure_tiles(records)]
    candidates: Sequence[tuple[float, Tile]] = (
        (steps.last("loss"), ("running loss", number(steps.last("loss")), "on rows before they are used")),
        (elapsed, ("fit time", duration(elapsed), f"and {duration(setup)} of set-up" if setup else "")),
        (rate, ("rows per second", number(rate), f"{count(steps.last('rows'))} rows in all")),
        (real(plan.get("n_centers")), ("centers", count(plan.get("n_centers")), _bandwidth(plan))),
        (real(store.get("n_rows")), ("rows to fit", count(store.get("n_rows")), str(store.get("split", "")))),
        (real(store.get("n_features")), ("features", count(store.get("n_features")), _outputs(store))),
        (math.fsum(memory) or math.nan, ("memory planned", size(math.fsum(memory)), "")),
        (setup or math.nan, ("set-up time", duration(setup), "")),
    )
    made += [tile for value, tile in candidates if math.isfinite(value)]
    return made[:8]


def _figure_tiles(records: RunRecords) -> list[Tile]:
    unseen, figures = judgement(records)
    known = [n for n in METRICS if math.isfinite(real(figures.get(n)))]
    return [(METRICS[n], metric(n, figures[n]), f"on {unseen}") for n in known[:3]]


def _bandwidth(plan: Table) -> str:
    known = math.isfinite(real(plan.get("bandwidth")))
    return f"bandwidth {number(real(plan['bandwidth']))}" if known else ""


def _outputs(store: Table) -> str:
    return plural(store["n_outputs"], "output") if "n_outputs" in store else ""


def evaluation_table(records: RunRecords) -> tuple[list[str], list[list[str]]]:
    """(column heads, rows) of the newest evaluations, each followed by its reference."""
    shown = records.evaluations[-20:]
    names = [n for n in METRICS if any(math.isfinite(real(e.get(n))) for e in shown)]
    rows = []
    for evaluation in shown:
        where = [
            str(evaluation.get("store", DASH)),
            str(evaluation.get("split", DASH)),
            count(evaluation.get("n")),
        ]
        rows.append(["this model", *where, *(metric(n, evaluation.get(n)) for n in names)])
        if reference := table(evaluation.get("reference")):
            figures = (metric(n, reference.get(n)) for n in names)
            rows.append([str(reference.get("name", "reference")), *where, *figures])
    return ["", "store", "split", "rows", *(METRICS[n] for n in names)], rows
