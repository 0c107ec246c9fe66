"""Ends a command early: on SIGTERM, after `--max-runtime`, and with threads that are still busy.

SIGTERM raises Stopped in the main thread. Some packages ignore all errors while they are imported; then the run finds
the request in `stop`. `--max-runtime` first asks the run to end after the shard in hand, and
does as SIGTERM does if that takes too long.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from m3cli import concurrency
from m3cli.jobs.encode.lifecycle import Stop

GRACE = 10.0
"seconds that the shard in hand has after --max-runtime"

stop = Stop()
"of this process"


def catch_sigterm() -> None:
    """Turn SIGTERM into Stopped."""
    stop.reason, stop.at_once = None, False
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the end
    _stop_at_once("stopped by SIGTERM")


def _stop_at_once(reason: str) -> None:
    stop.reason, stop.at_once = reason, True
    stop.check()


@contextmanager
def limit_runtime(seconds: float | None, *, typed: str) -> Iterator[None]:
    """Ask the run inside to end after some seconds, and end it GRACE seconds later."""
    if seconds is None:
        yield
        return

    def on_alarm(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if stop.reason is None:
            stop.reason = f"stopped after --max-runtime {typed}"
            signal.setitimer(signal.ITIMER_REAL, GRACE)
        elif not stop.at_once:
            _stop_at_once(stop.reason)

    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def leave(code: int) -> None:
    """End the process at once, if a model ran.

    Python would free the tokenizer and torch piece by piece, 0.7 s, and wait for a thread in the middle of a batch, or
    crash.
    """
    if "torch" in sys.modules or concurrency.has_live_threads():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
