"""Fashion-MNIST through the command line: accuracy and wall time after one and three epochs.

    python tools/bench_fashion.py [--source /usr/share/datasets/fashion-mnist] [--centers 5000] [--epochs 1,3]

The images are those of Debian's package dataset-fashion-mnist (apt-get install dataset-fashion-mnist), scaled to
0..1; Laplacian kernel, bandwidth 10. `--epochs` takes fractions, for the time to an accuracy. Of the seconds, `fit`
are those of the call of `ep3stream.fit` with its set-up and its reading from the store, `command` those with the
start of the interpreter too, `cpu` the processor's for the call, and `set-up` the part before the first step.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ep3stream.config.parse import parse_number_or_word

NAMES = {"train": "train", "test": "t10k"}
FIT = """
import json, sys, time
from ep3stream import FitConfig, fit
config = FitConfig().with_settings(json.loads(sys.argv[3]), "bench_fashion")
began, used = time.perf_counter(), time.process_time()
fit(sys.argv[1], sys.argv[2], config)
print(json.dumps([time.perf_counter() - began, time.process_time() - used]))
"""


def main() -> None:
    options = arguments()
    directory = Path(options.directory) / "fashion"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for split, prefix in NAMES.items():
        np.save(
            directory / "x.npy",
            read_idx(options.source, f"{prefix}-images-idx3-ubyte.gz").reshape(-1, 784) / 255,
        )
        np.save(
            directory / "y.npy", read_idx(options.source, f"{prefix}-labels-idx1-ubyte.gz").astype(np.int32)
        )
        files = ["--x", directory / "x.npy", "--y", directory / "y.npy"]
        run_ep3stream("convert", *files, directory / f"{split}.{options.format}", "--split", f"{split}=1")
    print(
        f"{'epochs':>6} {'seed':>5} {'accuracy':>9} {'mse':>8} {'command':>8} {'fit':>6} {'cpu':>6} {'set-up':>7}"
    )
    for epochs in options.epochs:
        for seed in options.seeds:
            run = directory / f"run-{epochs}-{seed}"
            settings = {
                "data": {"scale": "none", "validate": "none", "inputs_rank": options.inputs_rank},
                "kernel": {"bandwidth": 10},
                "solver": {"centers": options.centers, "epochs": epochs},
                "run": {"seed": seed},
            }
            began = time.perf_counter()
            call = [directory / f"train.{options.format}", run, json.dumps(settings)]
            fit_s, cpu_s = json.loads(run_python("-c", FIT, *call))
            command_s = time.perf_counter() - began
            setup_s = sum(json.loads((run / "run.json").read_text())["setup"]["elapsed_s"].values())
            scores = json.loads(
                run_ep3stream("evaluate", run, directory / f"test.{options.format}", "--json")
            )
            row = f"{scores['accuracy']:>9.4f} {scores['mse']:>8.5f} {command_s:>8.1f} {fit_s:>6.1f}"
            print(f"{epochs:>6g} {seed:>5} {row} {cpu_s:>6.1f} {setup_s:>7.1f}", flush=True)


def run_ep3stream(*arguments: object) -> str:
    return run_python("-m", "ep3stream", "--quiet", *arguments)


def run_python(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def read_idx(source: str, name: str) -> np.ndarray:
    """An array of bytes in the idx format of the MNIST family: magic, sizes, data."""
    data = gzip.decompress((Path(source) / name).read_bytes())
    shape = np.frombuffer(data, ">u4", data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).astype(np.float32)


def arguments() -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    def numbers(text: str) -> list[float]:
        return [float(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--format", default="zarr", choices=("zarr", "h5"))
    parser.add_argument("--centers", default=5000, type=int)
    parser.add_argument("--epochs", default="1,3", type=numbers)
    parser.add_argument("--inputs-rank", default="auto", type=parse_number_or_word, metavar="auto|full|N")
    parser.add_argument("--seeds", default="0", type=integers)
    parser.add_argument("--directory", default=".bench")
    return parser.parse_args()


if __name__ == "__main__":
    main()
