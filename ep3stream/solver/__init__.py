"""Kernels, preconditioners, projection and the step: knows tensors, never paths."""
