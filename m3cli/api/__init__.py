"""m3 from Python: a model for texts in memory, and a reader of encoded folders."""
