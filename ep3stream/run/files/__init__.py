"""A run on disk: its directory, lock, settings and checkpoints, written all or nothing and read back checked."""
