#!/usr/bin/env python3
"""Print which modules of m3cli a command enters, and which of them one row passes on its way to the disk.

    scripts/trace_modules.py MODEL          MODEL: a checkpoint folder, such as .demo/model

A module is entered when one of its functions is called; what runs at import is not counted. A row's own path is what is
entered between the first read of the corpus and the last commit.
"""

from __future__ import annotations

import os
import sys
import tempfile  # noqa: TID251  a throw-away folder, not an output
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent / "m3cli"
PIPELINE = ("jobs/encode/pipeline.py", "run_pipeline")
"the function whose call is a row's own path"


class Tracer:
    """Modules entered so far, in order, of all threads."""

    def __init__(self) -> None:
        self.modules: dict[str, None] = {}
        self.path: dict[str, None] = {}
        self._in_pipeline = False

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        """Note the module of a function that is called."""
        code = frame.f_code
        if not code.co_filename.startswith(str(PACKAGE)) or code.co_name == "<module>":
            return
        name = Path(code.co_filename).relative_to(PACKAGE).as_posix()
        if (name, code.co_name) == PIPELINE:
            self._in_pipeline = event == "call"
        if event == "call":
            self.modules.setdefault(name)
            if self._in_pipeline:
                self.path.setdefault(name)


def trace(run: Callable[[], object]) -> Tracer:
    """Run something under the tracer."""
    tracer = Tracer()
    threading.setprofile(tracer)
    sys.setprofile(tracer)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return tracer


def main() -> None:
    """Trace `encode`, hybrid `search` and `score` of a few rows."""
    from m3cli.cli.app import run  # noqa: PLC0415  imported before it is traced

    model = str(Path(sys.argv[1]).absolute())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("corpus.jsonl").write_text('{"id": "a", "text": "A red fox."}\n{"id": "b", "text": "Two dogs."}\n')
        Path("pairs.tsv").write_text("query\tpassage\nfox\tA red fox.\n")
        quiet = ["--model", model, "--progress", "none"]
        commands = {
            "encode": ["encode", "corpus.jsonl", *quiet],
            "search": ["search", "corpus.m3", "-q", "fox", "--out", "hits.jsonl", *quiet],
            "score": ["score", "pairs.tsv", "--out", "scores.tsv", *quiet],
        }
        for name, command in commands.items():
            tracer = trace(partial(run, command))
            print(f"m3 {name}: {len(tracer.modules)} modules")
            if tracer.path:
                print(f"one row's own path: {len(tracer.path)} modules: {', '.join(tracer.path)}")


if __name__ == "__main__":
    main()
