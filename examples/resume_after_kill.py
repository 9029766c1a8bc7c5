"""A fit killed without warning and started again ends with the same bytes as one never stopped.

python examples/resume_after_kill.py [DIRECTORY]
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import ep3stream


def main(directory: Path, n_rows: int = 100_000, n_centers: int = 2000, kernel: str = "auto") -> bool:
    """Whether both models are the same, byte for byte."""
    x = np.random.default_rng(0).standard_normal((n_rows, 8)).astype(np.float32)
    y = np.sin(x[:, 0]) + x[:, 1] * x[:, 2]
    store = directory / "rows.zarr"
    ep3stream.convert((x, y), store)

    fit = [sys.executable, "-m", "ep3stream", "--quiet", "fit", str(store)]
    options = ["--centers", str(n_centers), "--epochs", "2", "--batch-size", "256", "--checkpoint-steps", "5"]
    options += ["--kernel", kernel]
    command = [*fit, str(directory / "struck"), *options]

    process = subprocess.Popen(command)
    while process.poll() is None and not list((directory / "struck" / "checkpoints").glob("step-*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    print(f"killed; exit code {process.wait()}")

    subprocess.run(command, check=True)
    print("the same command again: finished")
    subprocess.run([*fit, str(directory / "whole"), *options], check=True)

    struck, whole = (
        (directory / name / "model" / "tensors.safetensors").read_bytes() for name in ("struck", "whole")
    )
    print(f"the same {len(whole):,} bytes as a fit never stopped: {struck == whole}")
    return struck == whole


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".examples/resume_after_kill"))
