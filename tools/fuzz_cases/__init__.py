"""Known tables in odd but legal files, for tools/fuzz.py."""
