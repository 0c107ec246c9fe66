"""The parts of make_long_set.py: the pages of a handbook, and the long documents and queries made of them."""
