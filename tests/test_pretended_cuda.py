"""The GPU path where there is no GPU: the tests of test_gpu.py on a pretended device, and what a step costs on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is installed on no other system than Linux")

TESTS = Path(__file__).parent


# Steps of a few solvers: what each waits for and launches, in a program that lets torch take TF32.
STEPS = """
import json
import ep3stream
import torch
torch.backends.cuda.matmul.allow_tf32 = True
from ep3stream.solver import gpu
from pretended_cuda import CUDA, Counts, counted
from test_gpu import solver_of
found = {}
for name, p, d, precision in (
    ("few features", 500, 8, "float32"), ("many", 2048, 40, "float32"), ("many centers", 16384, 40, "float32"),
    ("tf32", 2048, 40, "tf32"), ("bfloat16", 2048, 40, "bfloat16"), ("bf16x3", 2048, 40, "bf16x3"),
    ("columns", 500, 8, "product"),
    ("callable", 500, 8, "callable"), ("eigenpro", 500, 40, "eigenpro"), ("tf32 by torch", 2048, 40, "tf32"),
):
    if "by torch" in name:
        gpu.GEMM_KINDS = ()
    solver = solver_of(CUDA, p, d, precision)
    state, x = solver.initial_state(), torch.ones(64, d, device=CUDA)
    y = x[:, :3].sin()
    solver.step(state, x, y, 1e-3)
    with counted(Counts()) as counts:
        solver.step(state, x, y, 1e-3, score=True)
    found[name] = dict(counts.waits), dict(counts.launches.most_common())
x = torch.ones(600, 40)
with counted(Counts()) as counts:
    model = ep3stream.KernelModel(x[:80], "laplacian", device="cuda:0", bandwidth=8.0, precision="float32")
    model.fit_epoch([(x[80:], x[80:, 0])])
    model.predict(x[80:])
found["a fit"] = {}, dict(counts.launches)
predictor = model.predictor()
for n_rows in (100, 6000):
    rows = torch.ones(n_rows, 40, device=CUDA)
    with counted(Counts()) as counts:
        predictor.outputs(rows)
    found[f"{n_rows} predictions"] = {}, dict(counts.launches)
assert torch.backends.cuda.matmul.allow_tf32
batch = x[:64].to(CUDA), x[:64, :1].to(CUDA)
model._trainer.train_rows(*batch)
with counted(Counts()) as counts:
    model._trainer.train_rows(*batch)
found["reading losses"] = dict(counts.waits), {}
print(json.dumps(found))
"""


# Fits whose centers, a local tail and GPU-sized tiles take most of the memory: planned bytes and their peak.
PEAKS = """
import json
import numpy as np
import ep3stream
from pretended_cuda import memory
from small_stores import plain_config
rows = np.random.default_rng(0).standard_normal((4000, 600)).astype(np.float32)
ep3stream.convert((rows, rows[:, :2]), "store.zarr", ep3stream.ConvertConfig(splits={"train": 1.0}))
found = {}
for name, solver in (
    ("float32", {"precision": "float32"}), ("bfloat16", {"precision": "bfloat16"}), ("bf16x3", {"precision": "bf16x3"}),
    ("exact", {"projection": "exact", "centers": 1000}),
    ("eigenpro", {"projection": "eigenpro"}),
):
    few = {"centers": 3500, "nystrom_samples": 200, "model_rank": 50, "batch_size": 128, "epochs": 0.2}
    config = plain_config(solver=few | solver)
    planned = sum(ep3stream.plan("store.zarr", config, measure=False).memory.values())
    memory.forget_peak()
    ep3stream.fit("store.zarr", name, config)
    found[name] = memory.peak / planned, memory.live
print(json.dumps(found))
"""


def start(folder: Path, *arguments: str, cwd: Path = TESTS.parent, **pretended: int) -> subprocess.Popen[str]:
    """Starts Python where CUDA devices are pretended, by it and by all Python that it starts.

    pretended: `devices`, how many there are, and `bytes`, the memory of each.
    """
    (folder / "sitecustomize.py").write_text("import pretended_cuda\npretended_cuda.install()\n")
    path = os.pathsep.join(map(str, (folder, TESTS, TESTS.parent)))
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ
        | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        | {f"PRETENDED_{name.upper()}": str(value) for name, value in pretended.items()},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    """What it printed."""
    with process:
        try:
            told = process.communicate(timeout=280)[0]
        finally:
            process.kill()
    assert process.returncode == 0, told
    return told


@pytest.mark.parametrize(
    ("marked", "devices", "n_tests"),
    [
        ("not slow", 1, 28),
        ("not slow", 2, 1),
        pytest.param("slow", 1, 5, marks=pytest.mark.slow),
        pytest.param("slow", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_on_a_pretended_gpu_all_that_is_said_of_gpus_holds(tmp_path, marked, devices, n_tests):
    named = "two_devices" if devices == 2 else "not two_devices"
    chosen = ("-m", f"gpu and {marked}", "-k", named, str(TESTS / "test_gpu.py"))
    pytest_alone = ("-m", "pytest", "-n", "0", "-p", "no:cacheprovider")
    told = finished(start(tmp_path, *pytest_alone, *chosen, devices=devices))
    assert told.splitlines()[0].count(".") >= n_tests, told
    assert "no test was skipped" in told, told


def test_a_step_waits_for_nothing_and_launches_few_kernels(tmp_path):
    found = json.loads(finished(start(tmp_path, "-c", STEPS)).splitlines()[-1])
    (to_read,) = found.pop("reading losses")[0].items()
    assert to_read[0].startswith("tolist at training/trainer.py")
    assert to_read[1] == 1
    assert {name: waits for name, (waits, _) in found.items() if waits} == {}
    # Where torch forms a block in tf32, that product, whose factors TF32 holds exactly; no other one.
    in_tf32 = [(name, each, n) for name, (_, of) in found.items() for each, n in of.items() if "TF32" in each]
    assert in_tf32 == [("tf32 by torch", "mm in TF32", 1)]
    assert found.pop("a fit")[1]["addmm_"]
    assert found.pop("6000 predictions") == found.pop("100 predictions")
    by_one_program = {name for name, (_, of) in found.items() if "radial_gemm" in of}
    assert by_one_program == {"tf32", "bfloat16", "bf16x3"}
    launches = {name: sum(of.values()) for name, (_, of) in found.items()}
    assert launches["many centers"] == launches["many"]
    most = {
        "few features": 86,
        "many": 80,
        "many centers": 80,
        "tf32": 91,
        "tf32 by torch": 92,
        "bfloat16": 92,
        "columns": 80,
        "bf16x3": 110,
    }
    most |= {"callable": 86, "eigenpro": 219}
    assert {name: n for name, n in launches.items() if n > most[name]} == {}, found


def test_a_fit_takes_no_more_memory_of_the_gpu_than_planned(tmp_path):
    found = json.loads(
        finished(start(tmp_path, "-c", PEAKS, cwd=tmp_path, bytes=500 * 10**6)).splitlines()[-1]
    )
    assert {name: peak for name, (peak, _) in found.items() if not 0.4 < peak <= 1} == {}
    assert {name: live for name, (_, live) in found.items() if live} == {}
