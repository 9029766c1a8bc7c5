from __future__ import annotations

import gzip
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ep3stream.errors import DivergedError

TOOLS = Path(__file__).parents[1] / "tools"


def write_idx(path: Path, values: np.ndarray) -> None:
    """Bytes in the idx format of the MNIST family, packed: magic (type, number of axes), sizes, data."""
    sizes = np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()))


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """A folder with the four files of Fashion-MNIST, of few images at random."""
    folder = tmp_path_factory.mktemp("fashion")
    generator = np.random.default_rng(0)
    for prefix, n_rows in (("train", 2500), ("t10k", 500)):
        images = generator.integers(0, 256, (n_rows, 28, 28), np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", generator.integers(0, 10, n_rows, np.uint8))
    return folder


@pytest.fixture
def bench(monkeypatch, fashion):
    """Its problems, of 2000 rows to train on and 100 centers; of Fashion-MNIST, made ones."""
    monkeypatch.syspath_prepend(TOOLS)
    import bench_problems

    monkeypatch.setattr(bench_problems, "FASHION", str(fashion))
    small = [replace(problem, n_rows=2600, n_centers=100) for problem in bench_problems.PROBLEMS]
    monkeypatch.setattr(bench_problems, "PROBLEMS", small)
    monkeypatch.setattr(bench_problems, "TEST_ROWS", 500)
    logger = logging.getLogger("ep3stream")
    level = logger.level
    yield bench_problems
    logger.setLevel(level)
    for name in ("bench_problems", "bench_fashion"):
        sys.modules.pop(name, None)


def test_every_method_is_measured_against_the_dense_solution(bench, monkeypatch, tmp_path, capsys):
    arguments = ["--directory", str(tmp_path), "--only", "sphere", "--epochs", "1,3"]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    bench.main()
    header, *table = (text.split() for text in capsys.readouterr().out.splitlines())
    lines = [dict(zip(header, line, strict=True)) for line in table]
    methods = [(line["method"], line["epochs"]) for line in lines[:-1]]
    assert methods == [
        ("dense", "-"),
        *(("exact", "1.00"), ("nystrom", "1.00"), ("exact", "3.00"), ("nystrom", "3.00")),
        ("eigenpro", "1.00"),
    ]
    assert lines[-1]["method"] == "nystrom"
    excess = [float(line["excess"]) for line in lines]
    assert excess[0] == 0
    # Early stopping may beat the best ridge, but not by much.
    assert all(-0.05 < value < 10 for value in excess[1:5])
    assert excess[3] < excess[1]
    assert [line["ratio"] == "-" for line in lines] == [True, True, False, True, False, True, False]


def test_the_entries_of_all_kernel_blocks_are_counted(bench, tmp_path):
    problem = bench.PROBLEMS[0]
    rows = bench.Rows.of(problem, 0)
    epoch = len(rows.x) * problem.n_centers
    assert bench.dense_run(problem, rows, 0, tmp_path).evaluations == epoch + problem.n_centers**2
    one, three = bench.trained(problem, rows, 0, "nystrom", [1, 3])
    assert one.evaluations > epoch
    assert three.evaluations - one.evaluations == 2 * epoch


def test_nystrom_is_given_as_many_kernel_evaluations_as_eigenpro(bench):
    problem = bench.PROBLEMS[0]
    rows = bench.Rows.of(problem, 0)
    *_, (published, _), (ours, rival) = bench.races(problem, rows, 0, [1], 0.5)
    assert rival == published
    # The odd batch at the end of a part may have its step size measured, on 1024 rows.
    assert -100 <= ours.evaluations - published.evaluations <= 1024 * 100


def test_a_fraction_of_an_epoch_is_that_part_of_the_rows(bench):
    problem = bench.PROBLEMS[0]
    rows = bench.Rows.of(problem, 0)
    half, one, more = (bench.trained(problem, rows, 0, "nystrom", [n])[0] for n in (0.5, 1, 1.5))
    epoch = len(rows.x) * problem.n_centers
    assert more.evaluations - one.evaluations == pytest.approx(epoch / 2, rel=0.1)
    assert half.evaluations < one.evaluations


def test_a_dense_solution_is_found_once(bench, monkeypatch, tmp_path):
    problem = bench.PROBLEMS[0]
    rows = bench.Rows.of(problem, 0)
    first = bench.dense_run(problem, rows, 0, tmp_path)
    monkeypatch.delattr(bench, "RidgePath")
    assert bench.dense_run(problem, rows, 0, tmp_path) == first
    with pytest.raises(NameError):
        bench.dense_run(problem, rows, 1, tmp_path)


def test_a_problem_whose_files_are_not_there_is_skipped(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "FASHION", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "fashion"])
    bench.main()
    assert "fashion   skipped" in capsys.readouterr().out


def test_a_fit_that_diverges_has_no_error_from_there_on(bench, monkeypatch):
    problem = bench.PROBLEMS[0]
    calls = []

    def diverges(model, rows, epochs):
        calls.append(epochs)
        raise DivergedError("the loss blew up")

    monkeypatch.setattr(bench, "train", diverges)
    found = bench.trained(problem, bench.Rows.of(problem, 0), 0, "nystrom", [1, 3])
    assert [math.isnan(run.mse) for run in found] == [True, True]
    assert calls == [1]


def test_the_rows_of_a_problem_are_apart_and_follow_the_seed(bench):
    for problem in bench.PROBLEMS[:-1]:
        rows, again, other = (bench.Rows.of(problem, seed) for seed in (0, 0, 1))
        assert (len(rows.x), len(rows.x_test), len(rows.centers)) == (2000, 500, 100)
        assert torch.equal(rows.x, again.x)
        assert not torch.equal(rows.x, other.x)
        others = torch.cat([rows.x, rows.x_test])
        assert not any((others == center).all(1).any() for center in rows.centers)
