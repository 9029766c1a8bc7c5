"""The fit: its loop, signals, validations, progress bar and summary."""
