"""The standard streams of a command, and what ends it early: SIGTERM, `--max-runtime`, threads that are still busy.

Results go to stdout, everything else to stderr. On a terminal the control characters of ids and texts are escaped; in a
file or a pipe the bytes stay as they are. With `--progress json` every line on stderr is a JSON object.

SIGTERM raises Stopped in the main thread. Some packages ignore all errors while they are imported; then the run finds
the request in `stop`. `--max-runtime` first asks the run to end after the shard in hand, and does as SIGTERM does if
that takes too long.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from m3cli import concurrency
from m3cli.config import ProgressMode
from m3cli.errors import EXIT_INTERRUPTED, LOST, M3Error, OutputError, escape_controls, escape_unprintable
from m3cli.jobs.encode.lifecycle import Stop

if TYPE_CHECKING:
    from m3cli.corpus.streams import PeekableStream
    from m3cli.progress import Progress


_log = logging.getLogger(__name__)


def prepare_streams() -> None:
    """Open closed streams (`>&-`) on the null device, or the next file opened would take their place.

    A stream that is not UTF-8 gets escapes for the characters that it cannot hold.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  to the end
        elif mode == "w" and (stream.encoding or "").lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="backslashreplace")


def open_stdin(inputs: Sequence[str]) -> PeekableStream | None:
    """Open standard input if it is among the inputs."""
    if "-" not in inputs:
        return None
    from m3cli.corpus.streams import PeekableStream  # noqa: PLC0415  pyarrow, not for --help

    if sys.stdin.isatty():
        _log.warning("standard input is read from this terminal: type one row per line, end with Ctrl-D")
    # Python's own buffer would read on after the end of what is typed on a terminal.
    return PeekableStream(getattr(sys.stdin.buffer, "raw", sys.stdin.buffer))


def open_results(progress: Progress | None = None) -> BinaryIO:
    """Return standard output for results; on a terminal they are escaped, and a bar is cleared before them."""
    sys.stdout.flush()
    return cast("BinaryIO", _TerminalResults(progress)) if sys.stdout.isatty() else sys.stdout.buffer


class _TerminalResults:
    """Standard output that is a terminal."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._terminal = progress, sys.stdout

    def write(self, data: bytes) -> int:
        if self._progress is not None:
            self._progress.clear_bar()
        self._terminal.write(escape_controls(data.decode(errors="backslashreplace")))
        return len(data)

    def writelines(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._terminal.flush()


def print_json(document: Any) -> None:
    """Print a document as indented JSON."""
    import orjson  # noqa: PLC0415  not for --help

    option = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE
    open_results().write(orjson.dumps(document, option=option))


@contextmanager
def show_run(mode: ProgressMode, *, note: str = "") -> Iterator[Progress]:
    """Show a run in the form of `--progress`, with its warnings; an error is written to its log file too.

    `note` is shown on a terminal at once, before slow imports.
    """
    from m3cli.progress import Progress  # noqa: PLC0415  tqdm and rich, not for --help

    progress = Progress(mode)
    if note:
        progress.note(note)
    logger, handler = logging.getLogger("m3cli"), _ToProgress(progress)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield progress
    except (KeyboardInterrupt, Exception) as error:
        progress.log_end(*describe_end(error))
        raise
    finally:
        progress.clear_note()
        logger.removeHandler(handler)
        logger.propagate = True


class _ToProgress(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.say(record.getMessage())


class OneLine(logging.Formatter):
    """Formats a warning like the messages of a command."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        return f"m3: {escape_unprintable(record.getMessage())}"


def describe_end(error: BaseException) -> tuple[str, int]:
    """Return the words and the exit code of an error that ends a command."""
    if isinstance(error, M3Error):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT_INTERRUPTED
    if isinstance(error, OSError) and error.errno in (errno.EIO, *LOST):
        words = f"{error.filename or 'a disk'} cannot be reached: {error.strerror}"
        return f"{words}; run the same command again once it is back", OutputError.exit_code
    words = textwrap.shorten(str(error), 300, placeholder="[...]")
    return f"internal error: {type(error).__name__}{words and f': {words}'}; run again with --debug", M3Error.exit_code


def tell_end(text: str, code: int, arguments: Sequence[str]) -> None:
    """Print an error in one line, as JSON with `--progress json`."""
    if "--progress=json" in arguments or ("--progress", "json") in pairwise(arguments):
        sys.stderr.write(json.dumps({"event": "error", "text": text, "exit_code": code}) + "\n")
    else:
        sys.stderr.write(f"m3: {escape_unprintable(text)}\n")


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
