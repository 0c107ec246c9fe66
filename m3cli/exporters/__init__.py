"""Writes rows in the formats of databases and search engines: a file a target, rows in, bytes or batches out."""
