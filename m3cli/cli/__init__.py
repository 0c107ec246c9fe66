"""The command line: options in, exit code out. Nothing is computed here, and `--help` imports nothing slow."""
