"""Whole commands: their output, their errors in one line, and their exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_stores import PLAIN_OPTIONS, make_store, smooth_rows

from ep3stream import cli
from ep3stream.run.state import list_checkpoints
from ep3stream.store.reader import open_store

FIT = [*PLAIN_OPTIONS, "--centers", "60", "--model-rank", "30", "--batch-size", "32", "--epochs", "2"]


def write_csv(file: Path, n_rows: int = 800) -> Path:
    x, y = smooth_rows(n_rows)
    columns = [*(f"x{i}" for i in range(5)), "kind", "delay"]
    rows = [
        ",".join([*(f"{v:.6g}" for v in row), "ab"[int(target > 10)], f"{target:.6g}"])
        for row, target in zip(x, y[:, 0], strict=True)
    ]
    file.write_text("\n".join([",".join(columns), *rows]) + "\n")
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """flights.csv, its store, and a fit on it."""
    folder = tmp_path_factory.mktemp("cli")
    write_csv(folder / "flights.csv")
    store = str(folder / "flights.zarr")
    assert cli.main(["convert", str(folder / "flights.csv"), store, "--target", "delay",
                     "--split", "train=0.8,test=0.2"]) == 0  # fmt: skip
    assert cli.main(["fit", store, str(folder / "run"), *FIT, "--validate", "test"]) == 0
    return folder


@pytest.fixture
def run_cli(capsys):
    """Runs a command; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def assert_one_line_error(result: tuple[int, str, str], code: int, words: str) -> None:
    assert result[0] == code, result
    assert result[1] == ""
    assert result[2].startswith("ep3stream: ")
    assert result[2].count("\n") == 1
    assert words in result[2]


def test_evaluate_prints_scores_as_one_json_object_and_nothing_else(folder, run_cli):
    code, out, _ = run_cli("evaluate", folder / "run", folder / "flights.zarr", "--json")
    scores = json.loads(out)
    assert code == 0
    assert set(scores) == {"n", "mse", "rmse", "r2"}
    assert scores["r2"] > 0.7
    assert (folder / "run" / "report.html").exists()


def test_a_score_that_is_undefined_is_null_in_json(run_cli, tmp_path):
    """With a single yes, which this seed puts into train, the other split has one class alone, which has no auc."""
    rows = [f"{row[0]:.6g},{row[1]:.6g},{'no' if i else 'yes'}" for i, row in enumerate(smooth_rows(300)[0])]
    (tmp_path / "votes.csv").write_text("\n".join(["a,b,vote", *rows]) + "\n")
    store, run = tmp_path / "votes.zarr", tmp_path / "run"
    split = ["--split", "train=0.8,test=0.2", "--seed", "1"]
    assert run_cli("convert", tmp_path / "votes.csv", store, "--target", "vote", *split)[0] == 0
    assert run_cli("fit", store, run, *FIT)[0] == 0
    printed = [run_cli("evaluate", run, store, "--json", "--split", name)[1] for name in ("train", "test")]
    scores = [json.loads(text) for text in printed]
    assert all(set(found) == {"n", "mse", "accuracy", "top5", "auc"} for found in scores)
    assert [found["auc"] is None for found in scores].count(True) == 1
    assert "NaN" not in "".join(printed)


def test_evaluate_for_people_has_one_score_a_line(folder, run_cli):
    code, out, _ = run_cli("evaluate", folder / "run", folder / "flights.zarr", "--split", "train")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["n", "mse", "rmse", "r2"]


def test_a_later_file_is_converted_like_the_first_and_its_only_split_is_used(folder, run_cli, tmp_path):
    later = folder / "later.zarr"
    command = ("convert", folder / "flights.csv", later, "--like", folder / "flights.zarr", "--no-shuffle")
    assert run_cli(*command)[0] == 0
    code, out, _ = run_cli("evaluate", folder / "run", later, "--json")
    assert code == 0
    assert json.loads(out)["n"] == open_store(later).manifest.splits["train"].n_rows
    assert run_cli("predict", folder / "run", later, tmp_path / "later.npy")[0] == 0


def test_predict_writes_one_prediction_a_row(folder, run_cli, tmp_path):
    code, out, err = run_cli("predict", folder / "run", folder / "flights.zarr", tmp_path / "out.npy")
    predictions = np.load(tmp_path / "out.npy")
    assert code == 0
    assert out == ""
    assert f"{len(predictions)} predictions in" in err
    assert predictions.dtype == np.float32
    again = run_cli("predict", folder / "run", folder / "flights.zarr", tmp_path / "out.npy")
    assert_one_line_error(again, 2, "exists; remove it or choose another name")


def test_inspect_tells_a_store_as_json_and_in_80_columns(folder, run_cli):
    code, out, _ = run_cli("inspect", folder / "flights.zarr", "--json")
    content = json.loads(out)
    assert code == 0
    assert (content["what"], content["task"]) == ("store", "regression")
    assert sum(split["rows"] for split in content["splits"].values()) == 800
    code, out, _ = run_cli("inspect", folder / "flights.zarr")
    assert code == 0
    assert [line for line in out.splitlines()[1:] if len(line) > 80] == []
    assert "features in train" in out


def test_inspect_tells_a_run_as_json_and_in_80_columns(folder, run_cli):
    content = json.loads(run_cli("inspect", folder / "run", "--json")[1])
    assert (content["what"], content["finished"]) == ("run", True)
    assert content["plan"]["n_centers"] == 60
    assert content["store"]["path"] == str(folder / "flights.zarr")
    out = run_cli("inspect", folder / "run")[1]
    long = [line for line in out.splitlines() if len(line) > 80 and str(folder) not in line]
    assert long == []
    assert "finished" in out


def test_inspect_of_a_run_that_was_meddled_with_still_prints_json(folder, run_cli, tmp_path):
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "loss": NaN}\n[1]\n"x"\n{"kind": "st')
    (tmp_path / "run.json").write_text("[" * 100_000)
    code, out, _ = run_cli("inspect", tmp_path, "--json")
    assert code == 0
    assert "NaN" not in out
    assert json.loads(out)["last_step"] == {"kind": "step", "loss": None}
    assert run_cli("inspect", tmp_path)[0] == 0


def test_verify_finds_a_sound_store_and_run_sound(folder, run_cli):
    for path in (folder / "flights.zarr", folder / "run"):
        code, out, err = run_cli("verify", path, "--json")
        verdict = json.loads(out)
        assert (code, err) == (0, "")
        assert (verdict["path"], verdict["sound"], verdict["problems"]) == (str(path), True, [])
        assert verdict["bytes_read"] > 0
        assert "is sound" in run_cli("verify", path)[1]


def test_verify_of_a_damaged_store_names_the_segment_and_exits_with_3(run_cli, tmp_path):
    store = make_store(tmp_path / "small.zarr", n_rows=100)
    chunk = next(file for file in sorted((store / "train" / "x").rglob("c/**/*")) if file.is_file())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    code, out, err = run_cli("verify", store, "--json")
    verdict = json.loads(out)
    assert (code, verdict["sound"], err) == (3, False, "")
    assert "segment 0" in verdict["problems"][0]
    assert run_cli("verify", store)[0] == 3
    assert_one_line_error(
        run_cli("fit", store, tmp_path / "run", *PLAIN_OPTIONS, "--centers", 10), 3, "segment"
    )


def test_verify_of_a_damaged_run_names_the_piece(folder, run_cli, tmp_path):
    import shutil

    shutil.copytree(folder / "run", tmp_path / "run")
    manifest = tmp_path / "run" / "setup" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    code, out, _ = run_cli("verify", tmp_path / "run")
    assert code == 3
    assert "setup/manifest.json" in out
    assert "belongs to another set-up" not in out  # The checkpoints are sound.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], "invalid choice: 'bogus'"),
        (["fit", "only-a-store"], "required: RUN; see ep3stream fit --help"),
        (["fit", "{store}", "{new}", "--kernel", "sinc"], "--kernel: invalid choice: 'sinc'"),
        (["fit", "{store}", "{new}", "--bandwidth", "wide"], "'wide' is neither 'median' nor a number"),
        (["fit", "{store}", "{new}", "--bandwidth", "-1"], "bandwidth is -1.0"),
        (["fit", "{store}", "{new}", "--degree", "2"], "the auto kernel does not have; leave it out"),
        (["fit", "{store}", "{new}", "--epochs", "0"], "epochs is 0; use a positive number, like 2 or 0.5"),
        (["fit", "{store}", "{new}", "--memory", "lots"], "'lots' is not a number of bytes"),
        (["fit", "{store}", "{new}", "--devices", "0"], "devices is 0; use at least 1"),
        (["fit", "{store}", "{new}", "--split", "dev"], "no split 'dev'; it has test, train"),
        (["fit", "{store}", "{new}", "--validate", "dev"], "no split 'dev'"),
        (["fit", "{store}", "{new}", "--config", "{missing}"], "cannot be read"),
        (["fit", "{store}", "{new}", "--config", "{sinc}"], "kernel is 'sinc'; choose one of"),
        (["fit", "{missing}", "{new}"], "does not exist"),
        (["evaluate", "{run}", "{store}", "--split", "dev"], "no split 'dev'; it has test, train"),
        (["evaluate", "{missing}", "{store}"], "missing is no run: it is not there; give the RUN of a fit"),
        (["evaluate", "{run}", "{store}", "--json", "--split", "dev"], "no split 'dev'"),
        (["predict", "{run}", "{store}", "{missing}/deep/out.npy"], "cannot be written"),
        (["inspect", "{missing}"], "does not exist"),
        (["inspect", "{missing}", "--json"], "does not exist"),
        (["verify", "{missing}"], "does not exist"),
        (["verify", "{folder}"], "not a finished store"),
        (
            ["convert", "{folder}/flights.csv"],
            "flights.csv was given; name what to convert and then the store",
        ),
        (["convert", "{missing}", "{new}", "--target", "delay"], "missing"),
        (["convert", "{folder}/flights.csv", "{new}", "--target", "deley"], "deley"),
        (["convert", "{folder}/flights.csv", "{new}", "--target", "delay", "--split", "a=2"], "fraction 2"),
    ],
)
def test_bad_usage_and_input_is_one_line_and_exit_code_2_and_leaves_nothing(
    folder, run_cli, tmp_path, arguments, words
):
    (tmp_path / "sinc.toml").write_text('[kernel]\nname = "sinc"\n')
    places = {
        "store": folder / "flights.zarr",
        "run": folder / "run",
        "folder": folder,
        "new": tmp_path / "new",
        "missing": tmp_path / "missing",
        "sinc": tmp_path / "sinc.toml",
    }
    result = run_cli(*(argument.format(**places) for argument in arguments))
    assert_one_line_error(result, 2, words)
    assert [item.name for item in tmp_path.iterdir()] == ["sinc.toml"]


def test_no_command_at_all_prints_the_help(run_cli):
    code, out, err = run_cli()
    assert (code, err) == (0, "")
    assert out == cli._parser().format_help()


# What takes a run, and what takes a store, each told what it was given instead.
OF_RUNS = ["status {}", "evaluate {} {store}", "predict {} {store} {new}.npy", "report {}", "report {run} {}",
           "export {} {new}"]  # fmt: skip
OF_STORES = ["fit {} {new}", "plan {}", "tune {}", "evaluate {run} {}", "predict {run} {} {new}.npy",
             "convert {folder}/flights.csv {new} --like {}"]  # fmt: skip
OF_BOTH = ["inspect {}", "verify {}"]
WRONG_RUNS = {
    "{missing}": "missing is no run: it is not there; give the RUN of a fit",
    "{folder}/flights.csv": "flights.csv is no run: it is a file; give the RUN of a fit",
    "{empty}": "empty is no run: it is an empty directory; give the RUN of a fit",
    "{store}": "flights.zarr is no run: it is a store; give the RUN of a fit",
    "{folder}": "is no run: it is a directory of other things; give the RUN of a fit",
}
WRONG_STORES = {
    "{missing}": "missing does not exist; convert the data first or correct the path",
    "{text}": "text is a file, but no store; turn it into one: ep3stream convert FILE STORE",
    "{empty}": "empty is an empty directory, not a store; convert the data first or correct the path",
    "{run}": "run is the RUN of a fit, not a store; give the store that `ep3stream convert` made",
}


@pytest.mark.parametrize(
    ("command", "place", "words"),
    [
        *((command, place, words) for command in OF_RUNS for place, words in WRONG_RUNS.items()),
        *((command, place, words) for command in OF_STORES for place, words in WRONG_STORES.items()),
        *(
            (command, place, words)
            for command in OF_BOTH
            for place, words in WRONG_STORES.items()
            if place != "{run}"
        ),
    ],
)
def test_what_is_no_run_or_no_store_is_told_by_what_it_is_and_left_alone(
    folder, run_cli, tmp_path, command, place, words
):
    places = {"store": folder / "flights.zarr", "run": folder / "run", "folder": folder} | {
        name: tmp_path / name for name in ("new", "missing", "empty", "text")
    }
    places["empty"].mkdir()
    places["text"].write_text("hello")
    result = run_cli(*command.format(place.format(**places), **places).split())
    assert_one_line_error(result, 2, words)
    assert sorted(item.name for item in tmp_path.rglob("*")) == ["empty", "text"]


@pytest.mark.parametrize(
    ("heavy", "commands"),
    [
        (
            "torch zarr h5py pyarrow",
            ["--help", "fit --help", "--version", "", "fit --sinc", "completion bash", "status {run}"],
        ),
        ("torch zarr pyarrow", ["report {run}"]),
        ("torch", ["inspect {store}"]),
    ],
)
def test_commands_that_compute_nothing_do_not_wait_for_torch(folder, tmp_path, heavy, commands):
    """Two seconds at each start of a shell, or each look at a fit."""
    run = shutil.copytree(folder / "run", tmp_path / "run")
    code = (
        "import sys\nfrom ep3stream import cli\ntry:\n    cli.main(sys.argv[2:])\nexcept SystemExit:\n    pass\n"
        "assert not set(sys.argv[1].split()) & set(sys.modules), sys.argv"
    )
    for command in commands:
        arguments = command.format(run=run, store=folder / "flights.zarr").split()
        words = [sys.executable, "-c", code, heavy, *arguments]
        subprocess.run(words, check=True, capture_output=True, timeout=250)


def test_a_conversion_does_not_wait_for_what_it_does_not_use(folder, tmp_path):
    """Pyarrow imports pandas at the first value that it makes an array of: half a second."""
    code = (
        "import sys\nfrom ep3stream import cli\nassert cli.main() == 0\n"
        "assert not {'pandas', 'torch', 'shtab', 'h5py'} & set(sys.modules)\nimport pandas"
    )
    words = [
        sys.executable,
        "-c",
        code,
        "convert",
        folder / "flights.csv",
        tmp_path / "s",
        "--target",
        "delay",
    ]
    subprocess.run(words, check=True, capture_output=True, timeout=250)


def test_a_fit_and_its_prediction_do_not_wait_for_what_they_do_not_use(folder, tmp_path):
    """Pandas and Numba take half a second each."""
    code = (
        "import sys\nfrom ep3stream import cli\nstore, run, out = sys.argv[1:]\n"
        "fit = ['fit', store, run, '--kernel', 'laplacian', '--bandwidth', '3', '--centers', '40', '--epochs', '1']\n"
        "for command in [fit, ['evaluate', run, store], ['predict', run, store, out]]:\n"
        "    assert cli.main(command) == 0\n"
        "assert not {'pandas', 'numba', 'sklearn', 'scipy', 'h5py'} & set(sys.modules)\nimport pandas, numba"
    )
    words = [
        sys.executable,
        "-c",
        code,
        folder / "flights.zarr",
        tmp_path / "run",
        tmp_path / "predictions.npy",
    ]
    done = subprocess.run(words, capture_output=True, timeout=250, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "wrong", [["--centers", "100000"], ["--memory", "100KB"], ["--centers", "/no/file.npy"]]
)
def test_after_an_error_in_the_set_up_the_corrected_command_works_on_the_same_run(
    folder, run_cli, tmp_path, wrong
):
    failed = run_cli("fit", folder / "flights.zarr", tmp_path / "run", *FIT, *wrong)
    assert failed[0] == 2
    assert failed[2].splitlines()[-1].startswith(("ep3stream: centers is", "ep3stream: memory is"))
    assert run_cli("fit", folder / "flights.zarr", tmp_path / "run", *FIT)[0] == 0


def test_the_same_command_on_a_finished_run_changes_nothing_and_another_setting_is_refused(folder, run_cli):
    model = (folder / "run" / "model" / "tensors.safetensors").read_bytes()
    command = ["fit", folder / "flights.zarr", folder / "run", *FIT, "--validate", "test"]
    assert run_cli(*command)[0] == 0
    assert (folder / "run" / "model" / "tensors.safetensors").read_bytes() == model
    assert_one_line_error(run_cli(*command, "--seed", 1), 2, "run.seed was 0 and is now 1")


def test_options_come_before_the_settings_of_a_file(folder, run_cli, tmp_path):
    (tmp_path / "fit.toml").write_text("[solver]\ncenters = 70\nmodel_rank = 20\n[kernel]\nbandwidth = 3\n")
    command = ["fit", folder / "flights.zarr", tmp_path / "run", "--config", tmp_path / "fit.toml"]
    assert run_cli(*command, "--centers", 50, "--kernel", "gaussian")[0] == 0
    plan = json.loads(run_cli("inspect", tmp_path / "run", "--json")[1])["plan"]
    assert (plan["n_centers"], plan["model_rank"], plan["kernel"], plan["bandwidth"]) == (
        50,
        20,
        "gaussian",
        3.0,
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("rational_quadratic --bandwidth 2 --shape 0.5", {"bandwidth": 2.0, "shape": 0.5}),
        ("polynomial --bandwidth 4 --degree 2 --offset 3", {"bandwidth": 4.0, "degree": 2, "offset": 3.0}),
        ("ntk_relu --depth 3 --bias 0.5", {"bandwidth": None, "depth": 3, "bias": 0.5}),
    ],
)
def test_the_options_of_a_kernel_reach_its_fit(folder, run_cli, tmp_path, options, expected):
    command = ["fit", folder / "flights.zarr", tmp_path / "run", *FIT, "--kernel", *options.split()]
    assert run_cli(*command)[0] == 0
    plan = json.loads(run_cli("inspect", tmp_path / "run", "--json")[1])["plan"]
    assert {name: plan[name] for name in expected} == expected


def test_inputs_too_large_for_float32_are_refused_by_their_size(run_cli, tmp_path):
    x, y = smooth_rows(300)
    np.save(tmp_path / "x.npy", x * np.float32(1e30))
    np.save(tmp_path / "y.npy", y)
    store = tmp_path / "huge.zarr"
    assert run_cli("convert", store, "--x", tmp_path / "x.npy", "--y", tmp_path / "y.npy")[0] == 0
    code, _, err = run_cli("fit", store, tmp_path / "run", *FIT, "--scale", "none", "--bandwidth", 1)
    assert code == 2
    assert "not finite in float32; use --scale auto" in err.splitlines()[-1]
    assert run_cli("fit", store, tmp_path / "run", *FIT, "--seed", 2**63 - 1)[0] == 0


def test_stderr_that_is_no_terminal_gets_plain_lines_and_no_bar(folder, run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, err = run_cli("fit", folder / "flights.zarr", tmp_path / "run", *FIT)
    assert (code, out) == (0, "")
    assert "\x1b" not in err
    assert "rows/s" not in err
    assert "\r" not in err
    assert err.splitlines()[-1].startswith("model in ")


def test_quiet_says_nothing_at_all(folder, run_cli, tmp_path):
    command = ["--quiet", "fit", folder / "flights.zarr", tmp_path / "run", *FIT]
    assert run_cli(*command) == (0, "", "")


def test_quiet_may_stand_behind_the_command_too(folder, run_cli, tmp_path):
    command = ["convert", folder / "flights.csv", tmp_path / "store", "--target", "delay"]
    assert "store: regression" in run_cli(*command)[2]
    for first, last in (([], ["--quiet"]), (["--quiet"], [])):
        assert run_cli(*first, *command[:2], tmp_path / f"store{len(first)}", *command[3:], *last) == (
            0,
            "",
            "",
        )


def test_the_store_may_stand_behind_the_options(folder, run_cli, tmp_path):
    options = ["--target", "delay"]
    assert run_cli("convert", folder / "flights.csv", *options, tmp_path / "a.zarr")[0] == 0
    assert run_cli("convert", *options, folder / "flights.csv", tmp_path / "b.h5")[0] == 0
    wrong = run_cli("convert", folder / "flights.csv", *options, tmp_path / "c.zarr", "--colums", "a")
    assert_one_line_error(wrong, 2, "unrecognized arguments")
    assert_one_line_error(run_cli("inspect", tmp_path / "a.zarr", "more"), 2, "unrecognized arguments: more")


@pytest.mark.parametrize(
    "source",
    [["rows.npz"], ["rows.h5"], ["--x", "rows.h5:/x", "--y", "rows.npz:y"], ["made.zarr/train"]],
)
def test_arrays_are_converted_by_the_name_of_their_file(run_cli, tmp_path, monkeypatch, source):
    import h5py

    monkeypatch.chdir(tmp_path)
    x, y = smooth_rows(50)
    np.savez("rows.npz", x=x, y=y)
    with h5py.File("rows.h5", "w") as file:
        file["x"], file["y"] = x, y
    assert run_cli("convert", "rows.npz", "made.zarr", "--no-shuffle")[0] == 0
    assert run_cli("convert", *source, "new.zarr", "--no-shuffle")[0] == 0
    with open_store("new.zarr") as store:
        for read, given in zip(store.split("train").read_segment(0), (x, y), strict=True):
            np.testing.assert_array_equal(read, given)


def test_svmlight_takes_its_number_of_features_and_first_index(run_cli, tmp_path):
    (tmp_path / "t.svmlight").write_text("1 0:2 3:4\n-1 1:5\n")
    command = ["convert", tmp_path / "t.svmlight", tmp_path / "t.zarr", "--task", "classification"]
    assert run_cli(*command, "--features", 6, "--index-base", 0)[0] == 0
    assert json.loads(run_cli("inspect", tmp_path / "t.zarr", "--json")[1])["n_features"] == 6


def test_an_interrupted_conversion_says_how_to_go_on_and_another_begins_again_by_restart(
    folder, run_cli, tmp_path, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    command = ["convert", folder / "flights.csv", tmp_path / "store", "--target", "delay"]
    with monkeypatch.context() as patch:
        patch.setattr("ep3stream.conversion.shuffle.RowSorter.finish", interrupt)
        stopped = run_cli(*command)
    assert stopped == (130, "", "ep3stream: interrupted; run the same command to go on\n")
    assert_one_line_error(
        run_cli(*command, "--seed", 1), 2, "had seed 0, now it is 1; give what it had, or --restart"
    )
    assert run_cli(*command, "--seed", 1, "--restart")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("command", ["convert", "fit", "evaluate", "predict", "inspect", "verify"])
def test_the_help_of_each_command_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main([command, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert raised.value.code == 0
    assert f"Example: ep3stream {command} " in out


def test_the_examples_of_the_help_are_commands_that_parse():
    parser = cli._parser()
    (commands,) = (action.choices for action in parser._actions if action.choices)
    for name, command in commands.items():
        for example in command.epilog.removeprefix("Example: ").splitlines():
            program, *words = example.split()
            assert program == "ep3stream"
            assert parser.parse_args(words).command is commands[name].get_default("command")


def start(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "ep3stream", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_sigterm_saves_a_checkpoint_and_exits_with_75_and_the_same_command_goes_on(folder, tmp_path, run_cli):
    command = ["fit", folder / "flights.zarr", tmp_path / "run", *FIT, "--epochs", 100_000]
    process = start(*command, "--checkpoint-steps", 500)
    deadline = time.monotonic() + 200
    while not list_checkpoints(tmp_path / "run" / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=250)
    assert process.returncode == 75
    assert err.splitlines()[-1].startswith("ep3stream: SIGTERM: stopped at step")
    assert json.loads(run_cli("inspect", tmp_path / "run", "--json")[1])["finished"] is False
    assert run_cli("evaluate", tmp_path / "run", folder / "flights.zarr", "--json")[0] == 0


def test_a_reader_that_has_gone_away_is_no_traceback(folder):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "ep3stream", "inspect", str(folder / "flights.zarr")]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=250)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
