"""What tools/torture.py does to fits: commands in processes of their own, faults inside them, damage to files."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from ep3stream import cli, disk
from ep3stream.run.signals import hold_signals

LIMIT_S = 120
DAMAGES = ("flip", "zeros", "cut", "emptied", "deleted", "swapped", "checkpoints swapped")


class Hung(Exception):
    """A command that does not end."""


class Command:
    """A command in a process of its own, in which `before` is called first."""

    def __init__(self, *words: object, before: Callable[[], None] = lambda: None) -> None:
        self._stderr, end = os.pipe()  # Not a file, whose length a trial may limit.
        self.pid = os.fork()
        if self.pid == 0:
            _work([str(word) for word in words], before, end)
        os.close(end)
        self.code: int | None = None

    def is_over_after(self, seconds: float) -> bool:
        """Waits so long, or until it has ended by itself."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                return False
            else:
                time.sleep(0.001)
        return True

    def end(self) -> tuple[int, str]:
        """Waits for the exit code, negative for a signal, and what was said, once; Hung after LIMIT_S."""
        hangs = not self.is_over_after(LIMIT_S)
        if hangs:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        with open(self._stderr, "rb") as pipe:
            said = pipe.read().decode(errors="replace")
        if hangs or self.code is None:
            raise Hung(f"for {LIMIT_S} s: {said}")
        return self.code, said


def _work(words: list[str], before: Callable[[], None], stderr: int) -> NoReturn:
    code = 1
    try:
        os.dup2(stderr, 2)
        before()
        hold_signals(signal.SIGTERM, signal.SIGUSR1)  # As `ep3stream fit` does.
        code = cli.main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def watch_saves(meet: Callable[[str], None]) -> None:
    """`meet` is told of each operation on a checkpoint just before it, and of the middle of each `write`."""

    def watched(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def operate(path: Path, *rest: Any) -> Any:
            if "checkpoints" not in path.parts:
                return operation(path, *rest)
            meet(name)
            return operation(path, *(map(in_pieces, rest) if name == "write" else rest))

        return operate

    def in_pieces(pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Met before the last of them: the file, which keeps no more than 8 KiB back, then holds a part."""
        *first, last = pieces
        yield from first
        meet("in write")
        yield last

    for name in disk.OPERATIONS:
        setattr(disk, name, watched(name, getattr(disk, name)))


def at_point(number: int, mark: Path, happen: Callable[[str], None]) -> None:
    """In the fit's process: lets something happen at the point of that number, whose name is left in `mark`."""
    left = number

    def meet(where: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            mark.write_text(where)
            happen(where)

    watch_saves(meet)


def strike(number: signal.Signals, where: str) -> None:
    os.kill(os.getpid(), number)


def fill_disk(n_refusals: int, where: str) -> None:
    """Of the operations that need room, the next so many are refused, this one included."""
    left = n_refusals

    def refusing(operation: Callable[..., Any]) -> Callable[..., Any]:
        def operate(*arguments: Any) -> Any:
            refuse()
            return operation(*arguments)

        return operate

    def refuse() -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in set(disk.OPERATIONS) - {"remove"}:
        setattr(disk, name, refusing(getattr(disk, name)))
    if where != "remove":  # That one never fails.
        refuse()


def limit_files(n_bytes: int, where: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def damage(kind: str, dice: random.Random, file: Path, other: Path) -> None:
    """Of one of DAMAGES; `other`: a file to swap it with, or in the checkpoint to swap its with."""
    data = bytearray(file.read_bytes())
    place = dice.randrange(len(data))
    if kind == "flip":
        data[place] ^= 1 << dice.randrange(8)
    elif kind == "zeros":
        data[place : place + 512] = bytes(len(data[place : place + 512]))
    elif kind == "cut":
        del data[place:]
    elif kind == "emptied":
        data.clear()
    elif kind == "swapped":
        data, before = bytearray(other.read_bytes()), data
        other.write_bytes(before)
    file.write_bytes(data)
    if kind == "deleted":
        file.unlink()
    elif kind == "checkpoints swapped" and file.parent != other.parent:
        aside = file.parent.with_name("aside")
        file.parent.rename(aside)
        other.parent.rename(file.parent)
        aside.rename(other.parent)
