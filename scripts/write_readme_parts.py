#!/usr/bin/env python3
"""Writes the parts of README.md that the code itself knows: the table of modules, and what `--help` prints.

    scripts/write_readme_parts.py           write them anew
    scripts/write_readme_parts.py --check   write nothing; exit code 1 if something is no longer true

The parts lie between markers, each alone on its line; the text around them is left as it is::

    <!-- modules -->             ... <!-- /modules -->
    <!-- help: m3 encode -->     ... <!-- /help -->

A module's row is the first line of its docstring. Help is printed in 100 columns without colour.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "m3cli"
HELP_COLUMNS = 100
# typer and rich take these as orders to draw in colour or in another width.
DRAWING = ("CI", "FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "TERMINAL_WIDTH", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
MODULES = re.compile(r"(?<=<!-- modules -->\n).*?(?=<!-- /modules -->)", re.DOTALL)
HELP = re.compile(r"<!-- help: (?P<command>m3[\w -]*?) -->\n.*?<!-- /help -->", re.DOTALL)


class NoMarkers(Exception):
    """README.md has lost its markers."""


def read_first_line(module: Path) -> str:
    """Return the first line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def name_module(path: Path) -> str:
    """Return a module's name below the package; a package is a folder."""
    return path.relative_to(PACKAGE).as_posix().removesuffix("__init__.py")


def write_table(modules: Iterable[Path]) -> str:
    """Return a table with a row a module."""
    rows = [f"| `{name_module(path)}` | {read_first_line(path)} |" for path in modules]
    return "\n".join(["| module | what it is |", "| --- | --- |", *rows])


def write_modules() -> str:
    """Return the table of rooms, and behind a fold the modules inside each room."""
    doors = sorted(PACKAGE.glob("*/__init__.py"))
    top = [path for path in sorted(PACKAGE.glob("*.py")) if path.name != "__init__.py"]
    inside = [path for door in doors for path in sorted(door.parent.rglob("*.py")) if path != door]
    fold = f"<details>\n<summary>Inside the rooms</summary>\n\n{write_table(inside)}\n\n</details>"
    return f"\n{write_table(doors + top)}\n\n{fold}\n\n"


def print_help(command: str) -> str:
    """Return what `COMMAND --help` prints, without the blanks at the ends of its lines."""
    environment = {name: value for name, value in os.environ.items() if name not in DRAWING}
    environment |= {"COLUMNS": str(HELP_COLUMNS), "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "m3cli", *command.split()[1:], "--help"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def write_help(command: str) -> str:
    """Return a help part with its markers."""
    return f"<!-- help: {command} -->\n\n```text\n{print_help(command)}\n```\n\n<!-- /help -->"


def write_parts(readme: str) -> str:
    """Return the README with every part as it must be; one without a table of modules raises NoMarkers."""
    if not MODULES.search(readme):
        raise NoMarkers("README.md has no <!-- modules --> and <!-- /modules -->, each alone on its line")
    readme = MODULES.sub(lambda _: write_modules(), readme)
    return HELP.sub(lambda part: write_help(part["command"]), readme)


def find_help_parts(readme: str) -> list[str]:
    """Return the commands whose help the README shows."""
    return [part["command"] for part in HELP.finditer(readme)]


def main(argv: Sequence[str] | None = None) -> int:
    """Write README.md, or compare it."""
    parser = argparse.ArgumentParser(description="Write the parts of README.md that the code itself knows.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a part is no longer true")
    options = parser.parse_args(argv)
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    try:
        new = write_parts(old)
    except NoMarkers as error:
        print(f"write_readme_parts: {error}", file=sys.stderr)
        return 1
    if new == old:
        print("write_readme_parts: README.md is true as it stands", file=sys.stderr)
    elif options.check:
        print("write_readme_parts: README.md is out of date; run scripts/write_readme_parts.py", file=sys.stderr)
        return 1
    else:
        path.write_text(new, encoding="utf-8")
        print("write_readme_parts: README.md written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
