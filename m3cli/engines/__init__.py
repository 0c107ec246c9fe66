"""Engines that place the workers of a run on machines."""
