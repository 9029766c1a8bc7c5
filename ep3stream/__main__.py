"""`python -m ep3stream`, and the command `ep3stream`: the command line of a process."""

import sys

# Objects made before a search for cycles, 700 by default: imports make many and leave no cycles, and searching them
# is a tenth of the start.
_BEFORE_COLLECTION = 50_000


def main() -> int:
    """Runs the command that the process was started with; returns its exit code.

    From here to the end of the process a SIGTERM to a fit or a conversion waits for its work to begin, or comes too
    late to change the exit code: the signals are held back before rich, numpy and torch are imported, which takes
    seconds.
    """
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    if command in ("fit", "convert"):
        import signal

        # What `hold_signals` does; its module would take another 20 ms.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    import gc

    gc.set_threshold(_BEFORE_COLLECTION)
    from ep3stream.cli import main as run_command

    return run_command()


if __name__ == "__main__":
    sys.exit(main())
