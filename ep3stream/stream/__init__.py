"""From a store to batches: the order of the rows, reading ahead, samples, a PyTorch data set."""
