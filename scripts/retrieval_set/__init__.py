"""The parts of make_retrieval_set.py: Debian packages, the pages in them, and the BEIR folders made of these."""
