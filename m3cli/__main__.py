"""The `m3` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    from m3cli.cli.app import run  # noqa: PLC0415  imported late: `--help` shall be quick
    from m3cli.cli.terminal import leave  # noqa: PLC0415

    leave(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
