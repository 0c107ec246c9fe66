"""Measures m3 and its peers, each in a process of its own, and writes tables, JSON and a plot of what was found."""
