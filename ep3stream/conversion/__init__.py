"""From a source's columns to a store: schema, encoding, shuffle, writing, resuming."""
