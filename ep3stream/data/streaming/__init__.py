"""From a store to batches: the order of rows, reading ahead, samples."""
