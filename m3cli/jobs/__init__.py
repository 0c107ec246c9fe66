"""One job a command: the only rooms that know the order of the others."""
