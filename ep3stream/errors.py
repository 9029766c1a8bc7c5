"""Everything ep3stream raises on purpose, and the exit code each one ends the command line with.

Ep3streamError
├── InputError (also ValueError)       2   a setting, an argument or a source file is wrong
│   ├── ConfigError                        a setting: names field, value, limit and remedy
│   ├── SourceError                        a file to convert: names file, row or column and remedy
│   └── DiskError                          the disk refuses to take more; what was done stays, to go on
├── DamagedDataError                   3   a store, checkpoint or model failed its checks; it was not used
├── DivergedError                      4   the fit blew up and could not be saved by smaller steps
├── RankError                          5   a process of a fit on several devices died, or did not answer in time
└── Interrupted                       75   a signal arrived; the checkpoint was saved first

A second SIGINT is Python's own KeyboardInterrupt, 130: nothing more was saved.
"""

from __future__ import annotations


class Ep3streamError(Exception):
    """Root of the tree; catch it to catch everything raised here on purpose."""

    exit_code = 1
    # The rank that raised the error, where this is a copy of an error of another rank, which tells of it there.
    from_rank: int | None = None


class InputError(Ep3streamError, ValueError):
    """The caller can fix this: a wrong argument, setting or file."""

    exit_code = 2


class ConfigError(InputError):
    """A setting is out of range or contradicts another one."""


class SourceError(InputError):
    """A file given to `convert` cannot be turned into rows."""


class DiskError(InputError):
    """The disk refused to write; free space or correct permissions, and the same call goes on."""


class DamagedDataError(Ep3streamError):
    """Stored bytes do not match what their manifest declares."""

    exit_code = 3


class DivergedError(Ep3streamError):
    """The loss blew up after every allowed cut of the step size."""

    exit_code = 4


class RankError(Ep3streamError):
    """A rank died or fell silent, and restarts did not help; the run directory holds the checkpoints so far."""

    exit_code = 5


class Interrupted(Ep3streamError):
    """SIGTERM or SIGINT arrived; the run directory holds a checkpoint to resume from."""

    exit_code = 75
