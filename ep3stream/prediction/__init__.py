"""Using a model: load, predict, score, export."""
