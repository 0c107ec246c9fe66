"""The store room: the only one that knows what an output folder looks like, and how it is written and read."""
