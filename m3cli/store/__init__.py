"""The output folder: how it is written, read, checked and repaired."""
