"""Keep two runs out of one folder with `flock`, which the kernel releases when its holder exits.

A plain run holds `_m3/lock` exclusively. A worker holds it shared, and `_m3/lock.I-of-N` exclusively. The content (pid,
host, start time) is for error messages. A lock file is never deleted: a second run could then lock a deleted file.
`_m3/lock.init` is held only while run.json is written.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import orjson

from m3cli.errors import FolderLocked
from m3cli.store.commit import output_errors
from m3cli.store.layout import LOCK_NAME, worker_name

INIT_PATIENCE = 30.0
"seconds; the lock is held while run.json is compared or written, which is quick"
CLEARING_PATIENCE = 2.0
"seconds; another worker holds the lock of one that has died while it deletes its temporary files"
INIT_PAUSE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLock:
    """The lock of a run on its folder."""

    root: Path
    exclusive: bool

    @contextmanager
    def initialising(self, *, patience: float = INIT_PATIENCE) -> Iterator[None]:
        """Exclude other workers: the first one writes run.json, the others read it."""
        path = self.root / f"{LOCK_NAME}.init"
        with _open_lock(path) as descriptor:
            deadline = time.monotonic() + patience
            # flock has no timeout, and alarm signals work in the main thread only.
            while not _take(descriptor, fcntl.LOCK_EX, path=path):
                if time.monotonic() > deadline:
                    raise FolderLocked(
                        f"{self.root} is being set up by another worker for more than {patience:g} s; "
                        "stop it, or wait and run the same command again"
                    )
                time.sleep(INIT_PAUSE)
            yield


@contextmanager
def hold_lock(root: Path, *, worker: int, num_workers: int) -> Iterator[RunLock]:
    """Lock the folder, exclusively or with other workers; raise FolderLocked if it is in use."""
    exclusive = num_workers == 1
    path = root / LOCK_NAME
    with ExitStack() as stack:
        shared = stack.enter_context(_open_lock(path))
        if not _take(shared, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, path=path):
            raise _lock_error(root, path)
        if exclusive:
            stack.enter_context(_write_holder(shared, path=path))
        else:
            os.ftruncate(shared, 0)  # no run holds it exclusively: its content is of a run that has ended
            own_path = root / f"{LOCK_NAME}.{worker_name(worker, num_workers)}"
            own = stack.enter_context(_open_lock(own_path))
            deadline = time.monotonic() + CLEARING_PATIENCE
            while not _take(own, fcntl.LOCK_EX, path=own_path):
                if time.monotonic() > deadline:
                    raise _lock_error(root, own_path)
                time.sleep(INIT_PAUSE)
            stack.enter_context(_write_holder(own, path=own_path))
        yield RunLock(root=root, exclusive=exclusive)


@contextmanager
def hold_if_idle(root: Path, name: str) -> Iterator[bool]:
    """Hold the lock of another worker, if it has ended; yield whether it is held. A worker that starts waits for it."""
    path = root / f"{LOCK_NAME}.{name}"
    with _open_lock(path) as descriptor:
        yield _take(descriptor, fcntl.LOCK_EX, path=path)


@contextmanager
def hold_alone(root: Path, path: Path) -> Iterator[None]:
    """Hold a folder that is not one of m3 encode's, by a lock file in it; raise FolderLocked if it is in use."""
    with _open_lock(path) as descriptor:
        if not _take(descriptor, fcntl.LOCK_EX, path=path):
            raise _lock_error(root, path)
        with _write_holder(descriptor, path=path):
            yield


@contextmanager
def _open_lock(path: Path) -> Iterator[int]:
    with output_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        yield descriptor
    finally:
        with suppress(OSError):  # an rclone mount that cannot rewrite a file says so here; the content is for messages
            os.close(descriptor)


def _take(descriptor: int, kind: int, *, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            return False
        with output_errors(path):
            raise
    return True


@contextmanager
def _write_holder(descriptor: int, *, path: Path) -> Iterator[None]:
    """Write the holder into a lock file, and empty the file at the end."""
    started = datetime.now(tz=timezone.utc).isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
    with output_errors(path):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, orjson.dumps(holder, option=orjson.OPT_APPEND_NEWLINE), 0)
    try:
        yield
    finally:
        with suppress(OSError):  # the content is only for messages
            os.ftruncate(descriptor, 0)


def _lock_error(root: Path, path: Path) -> FolderLocked:
    # Workers write their names into their own locks, not into the shared one.
    locks = [path, *_worker_locks(root)] if path.name == "lock" else [path]
    holders = [holder for holder in map(_read_holder, locks) if _may_be_running(holder)]
    who = "another run"
    if holders:
        who = "pid {pid} on {host}, since {started}".format_map(holders[0])
    worker = path.name.removeprefix("lock").removeprefix(".")
    what = f"{root} is in use" if not worker else f"worker {worker.replace('-of-', '/')} of {root} is already running"
    return FolderLocked(f"{what}: {who}; wait for it, or stop it and run the same command again")


def _worker_locks(root: Path) -> list[Path]:
    return sorted((root / LOCK_NAME).parent.glob("lock.*-of-*"))


def _read_holder(path: Path) -> dict[str, Any]:
    try:
        holder = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):  # empty: no holder yet
        return {}
    return holder if isinstance(holder, dict) and {"pid", "host", "started"} <= holder.keys() else {}


def _may_be_running(holder: dict[str, Any]) -> bool:
    if not holder:
        return False
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:  # killed before it emptied the file
        return False
    except OSError:
        return True
    return True
