"""A run on the disk and on its devices: settings, set-up, checkpoints, records, and the processes that work on it."""
