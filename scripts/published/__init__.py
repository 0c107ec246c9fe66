"""The parts of reproduce_published.py: what was published, and the protocol behind it."""
