"""What goes wrong when files of a folder are read, told as damage of that folder."""

from __future__ import annotations

import shlex
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from m3cli.errors import DamageFound

UNREADABLE = (
    *(pa.ArrowException, OSError, ValueError, KeyError, IndexError, EOFError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
)
"what pyarrow and NumPy raise for a file that is not what it was written as"


def name_check(root: Path) -> str:
    """Return what to do about a damaged folder."""
    return f"'m3 check {shlex.quote(str(root))}' lists all damage"


def name_repair(root: Path) -> str:
    """Return what to do about damaged files of a shard."""
    return f"{name_check(root)}, with --repair the next m3 encode makes it again"


@contextmanager
def reading(root: Path, index: int) -> Iterator[None]:
    """Turn the errors of reading a shard's files into DamageFound."""
    try:
        yield
    except UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0]
        raise DamageFound(f"{root}: shard {index} cannot be read: {reason}; {name_repair(root)}") from error
