"""The fit: plan, set-up, trainer, validation, checkpoints."""
