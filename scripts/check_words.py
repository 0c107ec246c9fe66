#!/usr/bin/env python3
"""Find words that the project's documents and code avoid, also inside identifiers; exit code 1 if there are any.

    scripts/check_words.py [FILE...]

scripts/words_allowed.txt lists exceptions, one per line, with a reason after "  # ": strings that are removed from a
line before it is searched.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKED = ("*.md", "pyproject.toml", "m3cli/**/*.md", "m3cli/**/*.py", "scripts/**/*", "tests/**/*.py")
ENDINGS = ("", ".md", ".py", ".toml", ".txt")
ANYWHERE = r"settl(?:e|ing)|adopt|spell|spelt|anew|refuse_"
WORDS = (
    r"mend(?:s|ed|ing)?|beside|lanes?|rooms?|floors?|doors?|house"
    r"|at hand|(?:is|are) no (?!longer)|as they (?:lie|come|stand)|those of which"
)
BANNED = re.compile(rf"{ANYWHERE}|(?<![a-z])(?:{WORDS})(?![a-z])", re.IGNORECASE)


def find_words(path: Path, allowed: list[str]) -> Iterator[str]:
    """Yield a line for each banned word of a file."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        rest = line
        for exception in allowed:
            rest = rest.replace(exception, "")
        yield from (f"{path.relative_to(ROOT)}:{number}: '{found.group().strip()}'" for found in BANNED.finditer(rest))


def main() -> int:
    """Print what is found and return the exit code."""
    listed = (ROOT / "scripts" / "words_allowed.txt").read_text(encoding="utf-8").splitlines()
    allowed = [line.partition("  # ")[0] for line in listed if line and not line.startswith("#")]
    paths = [Path(name).resolve() for name in sys.argv[1:]] or [path for each in CHECKED for path in ROOT.glob(each)]
    own = {"check_words.py", "words_allowed.txt"}
    texts = [path for path in sorted(paths) if path.is_file() and path.suffix in ENDINGS and path.name not in own]
    found = [line for path in texts for line in find_words(path, allowed)]
    print("\n".join(found) or f"{len(texts)} files have no word that is avoided")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
