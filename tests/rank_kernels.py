"""Kernels that the processes of other devices can import, some of which come to grief there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor


def rational(z: Tensor, x: Tensor) -> Tensor:
    return 1 / (1 + torch.cdist(z, x).square() / 4)


def deadly(z: Tensor, x: Tensor) -> Tensor:
    """Ends the second rank as the system does that has no memory left."""
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return rational(z, x)


def deadly_once(z: Tensor, x: Tensor) -> Tensor:
    """Ends the second rank once it has seen a checkpoint, and leaves it alone ever after."""
    run = Path(os.environ["EP3STREAM_TEST_RUN"])
    mark = run.parent / "killed"
    if os.environ.get("RANK") == "1" and not mark.exists() and list(run.glob("checkpoints/step-*")):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return rational(z, x)


def not_finite_on_one(z: Tensor, x: Tensor) -> Tensor:
    """A kernel that fails for the second rank's centers alone."""
    return rational(z, x) * (torch.nan if os.environ.get("RANK") == "1" else 1.0)


def endless(z: Tensor, x: Tensor) -> Tensor:
    """In the first rank, leaves a mark and then takes a minute for each block."""
    if os.environ.get("RANK") == "0":
        Path(os.environ["EP3STREAM_TEST_RUN"], "begun").touch()
        time.sleep(60)
    return rational(z, x)
