"""The benches of `scripts/bench`: each prints a table and writes JSON with --json."""
