"""The errors of a command, with the exit code on the class.

    M3Error            1
    |- UsageError      2   invalid or contradictory options
    |- CorpusError     4   the corpus cannot be read as planned
    |- ModelError      5   model missing, misshapen, or out of memory with one single chunk
    |- OutputError     6   disk full, permission, not durable, or damage where a run would write
    |- ForeignFolder  10   the folder belongs to another run
    |- FolderLocked   11   another run is in the folder
    |- DamageFound    12   damage where a folder is read or checked
    |- Stopped        75   stopped with work remaining; the same command resumes
    '- Interrupted   130   Ctrl-C

Codes 0 (done) and 3 (done, but rows were skipped) are not errors. A message names the value and the
remedy in one line; the command line prints it without a traceback. A bad row is data (`records.SkippedRow`), never
an exception.
"""

from __future__ import annotations

import errno
import os
import re
from typing import ClassVar

EXIT_DONE = 0
EXIT_ROWS_SKIPPED = 3
EXIT_INTERRUPTED = 130

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"all but tab and line feed; with those that change the direction of text"


def is_utf8(name: str) -> bool:
    """Return whether a name is UTF-8; other bytes are lone surrogates in it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message, or the error's type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def escape_unprintable(text: str) -> str:
    """Return text that is safe in one line of a terminal or a log: line breaks and control characters are escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def escape_controls(text: str) -> str:
    """Return text that is safe on a terminal: control characters are escaped, tabs and line feeds are kept."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def format_duration(seconds: float | None) -> str:
    """Format a time: '42 s', '5 min', '3 h 20 min', 'unknown time'."""
    if seconds is None:
        return "unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def count_noun(count: int, one: str, many: str | None = None) -> str:
    """Return '1 shard', '2 shards', '1,000 queries'; `many` is `one` with an s unless it is given."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


LOST = (errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNABORTED, errno.EHOSTDOWN)
"of a mount that is away: its files are whole, which EIO does not say"

UNREADABLE_DATE = (ValueError, OverflowError, KeyError)
"what pyarrow raises for a date outside Python's years and for an unknown time zone (KeyError: older versions)"


class M3Error(Exception):
    """Base of all errors that a user can cause."""

    exit_code: ClassVar[int] = 1


class UsageError(M3Error):
    """Invalid or contradictory options."""

    exit_code: ClassVar[int] = 2


class CorpusError(M3Error):
    """The corpus cannot be read as planned."""

    exit_code: ClassVar[int] = 4


class ModelError(M3Error):
    """The model is missing, misshapen, or does not fit one single chunk."""

    exit_code: ClassVar[int] = 5


class ModelTooLarge(ModelError):
    """The weights do not fit memory."""


class OutputError(M3Error):
    """The output cannot be written: disk full, permission, not durable."""

    exit_code: ClassVar[int] = 6


class ForeignFolder(M3Error):
    """The folder belongs to another run."""

    exit_code: ClassVar[int] = 10


class FolderLocked(M3Error):
    """Another run is in the folder."""

    exit_code: ClassVar[int] = 11


class DamageFound(M3Error):
    """A folder that is read or checked is damaged."""

    exit_code: ClassVar[int] = 12


class Stopped(M3Error):
    """Stopped with work remaining: run the same command again."""

    exit_code: ClassVar[int] = 75


class Interrupted(M3Error):
    """Stopped by Ctrl-C."""

    exit_code: ClassVar[int] = EXIT_INTERRUPTED


def check_reachable(path: str | os.PathLike[str], error: type[M3Error]) -> None:
    """Raise an error if the system cannot look at a path (no permission, a name too long); a missing path is not one.

    Raises:
        M3Error: of the class `error`.
    """
    try:
        os.stat(path)  # noqa: PTH116  Path cannot hold every name
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else str(fault)
        raise error(f"{path} cannot be read: {reason}; check its name and who may read it") from fault
