"""Source formats: files, archives and Python objects, read as batches of rows."""
