"""Choosing kernel, bandwidth, ridge and feature scales on a sample."""
