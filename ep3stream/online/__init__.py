"""`KernelModel`: training on the user's own batches."""
