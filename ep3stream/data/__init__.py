"""Stores of rows: written once, checked on every read, streamed in order."""
