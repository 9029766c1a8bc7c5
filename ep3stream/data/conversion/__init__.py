"""From a source's columns to a store: encoding, shuffle, splits, writing, resume."""
