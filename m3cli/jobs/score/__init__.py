"""`m3 score`: scores of pairs, from texts or from encoded folders."""
