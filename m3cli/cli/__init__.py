"""The command line: flags in, exit code out; nothing is computed here, and nothing slow is imported for `--help`."""
