"""Exact search: scores of queries against every row of a part, and the best rows of each query so far."""
