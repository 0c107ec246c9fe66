"""Scores of pairs, search of all rows by dense, sparse and ColBERT vectors or BM25, and measures of rankings."""

"""Scores of pairs, search of all rows by dense, sparse and ColBERT vectors or BM25, and measures of rankings."""
