"""The fit as it runs: loop, checkpoints, metrics, launch and report; where data and solver meet."""
