"""Paths that a command reads or writes: local or remote, and files, devices or pipes.

A file is replaced by another one of its name. A device or a pipe is written into: a file renamed over `/dev/null` would
take the device's name for all programs of the machine. Folders, block devices and sockets are errors.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from m3cli.errors import OutputError, UsageError

_REMOTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DESCRIPTOR = re.compile(r"/dev/(?:stdin|stdout|stderr|fd/\d+)|/proc/(?:self|\d+)/fd/\d+")
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFBLK: "block device", stat.S_IFSOCK: "socket"}


def check_local(path: str | None, option: str) -> None:
    """Raise UsageError if a path that was typed for an option is an address such as s3://bucket/name."""
    if path is not None and (remote := _REMOTE.match(path)):
        raise UsageError(
            f"{option} {path}: {remote[1]}:// is not on this machine, and m3 reads and writes local files only; give a "
            "local path, and copy the files with another tool"
        )


def exists(path: Path) -> bool:
    """Whether a path is there.

    Raises:
        OSError: the system cannot tell (no permission, a network disk that fails), which Path.exists takes for "no"
            from Python 3.14 on: what is written would be overwritten.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_folder(path: Path) -> bool:
    """Whether a folder is there; raises like `exists`."""
    return exists(path) and path.is_dir()


def is_output_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether a run of m3 has begun to write a folder, whatever its name."""
    return any(os.path.lexists(Path(folder, "_m3", name)) for name in ("run.json", "lock"))


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether a path that is to be written is a device, a pipe, or an open descriptor such as /dev/stdout.

    Raises:
        OutputError: it is something else that is not a file.
    """
    if _DESCRIPTOR.fullmatch(os.fspath(path)):
        return True
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)  # noqa: PTH116  of what a link points to
    except (FileNotFoundError, NotADirectoryError):
        return False
    if kind in _KINDS:
        raise OutputError(f"cannot write {os.fspath(path)}: it is a {_KINDS[kind]}; give the name of a file")
    return kind != stat.S_IFREG


def close_read(file: Any) -> None:
    """Close a file that was read; on a lost disk that fails, and the error of a read says more."""
    with suppress(OSError):
        file.close()


def open_to_append(path: str | os.PathLike[str], *, wait: bool, create: bool = False) -> BinaryIO:
    """Open a stream or a file at its end; without `wait`, a pipe that nobody reads is an OSError."""
    flags = os.O_WRONLY | os.O_APPEND | (0 if wait else os.O_NONBLOCK) | (os.O_CREAT if create else 0)
    return os.fdopen(os.open(path, flags, 0o666), "wb")
