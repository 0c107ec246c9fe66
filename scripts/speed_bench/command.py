"""`m3 encode` as users run it: a process of its own, its metrics read from the folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

M3 = (sys.executable, "-m", "m3cli")
FIRST_BATCH = Path(__file__).with_name("first_batch.py")


class EncodeFailed(Exception):
    """The command ended with an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A run of `m3 encode`."""

    wall_seconds: float
    "from process start to exit"
    metrics: dict[str, Any]
    "of _m3/metrics.json; empty where nothing was to be done"
    stderr: str


def encode(
    corpus: Path, out: Path, *flags: str, start: Sequence[str] = M3, environment: dict[str, str] | None = None
) -> Encoded:
    """Run `m3 encode`.

    Raises:
        EncodeFailed: its exit code is not 0.
    """
    began = time.perf_counter()
    done = subprocess.run(
        [*start, "encode", str(corpus), "--out", str(out), "--progress", "none", *flags],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise EncodeFailed(done.stderr.strip())
    metrics = json.loads((out / "_m3" / "metrics.json").read_text(encoding="utf-8"))
    return Encoded(wall_seconds=seconds, metrics=metrics, stderr=done.stderr)


def time_first_batch(corpus: Path, out: Path, *flags: str, environment: dict[str, str]) -> float:
    """Return the seconds from the start of the process of `m3 encode` to its first batch going into the model."""
    start = (sys.executable, str(FIRST_BATCH), repr(time.time()))
    told = encode(corpus, out, *flags, start=start, environment=environment).stderr
    return next(float(line.split()[-1]) for line in told.splitlines() if line.startswith("first batch after"))
