"""What the script tells the person who waits for it: lines on standard error, and the one error it raises itself."""

import sys


class DemoModelError(Exception):
    """A fault the person can do something about; its text is the one line that is shown."""


def say(line: str) -> None:
    """Print one line of progress on standard error."""
    print(f"make_demo_model: {line}", file=sys.stderr, flush=True)
