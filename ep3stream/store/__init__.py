"""Stores of rows on disk or in a bucket: manifest, checks, Zarr and HDF5. Knows rows, never kernels."""
