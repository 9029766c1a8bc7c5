"""Kernel, bandwidth, ridge and feature scales, chosen on a sample."""
