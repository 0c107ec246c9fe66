#!/usr/bin/env python3
"""Record a real run of `m3` in a terminal as an SVG: the README's picture.

    scripts/record_picture.py [OUT.svg]      after scripts/demo

The commands run in a pseudo-terminal of 100 columns; what they print, colours included, goes to rich, which draws it.
Of a progress bar only its last state is kept, as a terminal would show it.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from contextlib import suppress
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 100
COMMANDS = (
    "m3 encode corpus.jsonl --model model",
    "m3 encode corpus.jsonl",
    "m3 info corpus.m3",
)


def record(command: str, folder: Path) -> str:
    """Run a command in a pseudo-terminal and return what it printed."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, COLUMNS))
    process = subprocess.Popen(command.split(), cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    printed: list[bytes] = []
    with suppress(OSError):  # a pseudo-terminal whose other end is closed gives EIO, not an empty read
        while data := os.read(ours, 4096):
            printed.append(data)
    os.close(ours)
    process.wait()
    return b"".join(printed).decode()


def settle_lines(printed: str) -> str:
    """Return the text as it stands on the screen at the end: of a line drawn over itself, its last state."""
    # Cursor movements of the bar; colours (which end in m) stay.
    printed = re.sub(r"\x1b\[\d*[A-HJKST]", "", printed).replace("\r\n", "\n")
    settled = []
    for line in printed.split("\n"):
        states = [state for state in line.split("\r") if state.strip()]
        settled.append(states[-1].rstrip() if states else "")
    return "\n".join(settled).strip("\n")


def main() -> None:
    """Record the commands one after the other and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "scripts" / "pictures" / "encode.svg")
    out: Path = parser.parse_args().out
    demo = ROOT / ".demo"
    stage = demo / "picture"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    (stage / "model").symlink_to(demo / "model")
    (stage / "corpus.jsonl").symlink_to(demo / "corpus.jsonl")
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ.update(TERM="xterm-256color", HF_HUB_OFFLINE="1")
    os.environ.pop("M3_MODEL", None)
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    for command in COMMANDS:
        console.print(Text(f"$ {command}", style="bold green"))
        console.print(Text.from_ansi(settle_lines(record(command, stage))), soft_wrap=True)
        console.print()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(console.export_svg(title="m3"), encoding="utf-8")
    sys.stderr.write(f"record_picture: {out} is written\n")
    shutil.rmtree(stage)


if __name__ == "__main__":
    main()
