"""What is done once a run: sizes, centers, weights of rows, the preconditioner; and the set-up on disk."""
