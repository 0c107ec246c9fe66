"""Scoring and exact search over vectors, wherever they come from: the model of this run or a folder."""
