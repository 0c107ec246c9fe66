"""Kills a program at its k-th durable step, the way a power cut would.

    with crash_at(None) as steps:      # counts: steps.log is what the store did, in order
        encode()
    for k in range(len(steps.log)):
        with crash_at(k):              # raises Crash inside `encode`, swallows it here
            encode()
        encode()                       # goes on; now compare folders with `folder_bytes`

What was not durable is lost: a rename (or removal) whose folder was not fsynced since is undone. What would be lost in
a power cut only is asserted at once: a file is renamed as it was fsynced, no done entry and no manifest is published
while a name before it is not durable. After the crash no durable step happens any more, whatever `finally` clauses
try. `Crash` is a BaseException: nothing that catches errors may survive it.

For a real kill of a real process: `python -m tests.crash K encode corpus.jsonl ...` runs `m3` and SIGKILLs it before
its K-th durable step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from m3cli.store import commit

LOCKS_AND_RUN_OF_THE_DAY = ("_m3/lock", "_m3/tmp", "_m3/metrics")


class Crash(BaseException):
    """The machine is off."""


@dataclass
class Steps:
    """The durable steps so far, and what of them would be lost now."""

    stop_before: int | None
    die: Callable[[], None] | None = None
    log: list[tuple[str, str]] = field(default_factory=list)
    dead: bool = False
    synced_files: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    "device and inode -> length and time of the last change when it was fsynced"
    undo: dict[Path, list[Callable[[], Any]]] = field(default_factory=dict)

    def take(self, step: str, subject: str) -> None:
        """Come to a durable step, perhaps the last one."""
        if not self.dead and len(self.log) == self.stop_before:
            self.dead = True
            if self.die:
                self.die()
            self._lose()
        if self.dead:
            raise Crash(f"before {step} {subject}")
        self.log.append((step, subject))

    def _lose(self) -> None:
        for undo in self.undo.values():
            for action in reversed(undo):
                action()

    def sync_file(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        self.take("sync_file", path.name)
        status = os.fstat(descriptor)
        self.synced_files[status.st_dev, status.st_ino] = status.st_size, status.st_mtime_ns

    def sync_folder(self, folder: Path) -> None:
        self.take("sync_folder", folder.name)
        self.undo.pop(folder, None)

    def rename(self, temp: Path, final: Path) -> None:
        self.take("rename", final.name)
        status = temp.stat()
        synced = self.synced_files.get((status.st_dev, status.st_ino))
        assert synced is not None, f"{final} is published without fsync"
        assert synced == (status.st_size, status.st_mtime_ns), f"{final} was written to after its fsync"
        if final.name == "manifest.json" or final.parent.name == "done":
            assert not self.undo, f"{final} is published before {', '.join(map(str, self.undo))} is durable"
        before = final.read_bytes() if final.exists() else None
        os.replace(temp, final)  # noqa: TID251 - stands in for the one place
        self.undo.setdefault(final.parent, []).append(lambda: _restore(final, before))

    def remove(self, path: Path) -> None:
        self.take("remove", path.name)
        before = path.read_bytes()
        path.unlink()
        self.undo.setdefault(path.parent, []).append(lambda: _restore(path, before))


def _restore(path: Path, before: bytes | None) -> None:
    if before is None:
        path.unlink()
    else:
        path.write_bytes(before)


@contextlib.contextmanager
def crash_at(step: int | None, *, die: Callable[[], None] | None = None, writes: bool = False) -> Iterator[Steps]:
    """Crash before the durable step of that number; None only counts. Writes to staged files are steps if asked for."""
    steps = Steps(step, die)
    with contextlib.ExitStack() as stack:
        if writes:
            stack.enter_context(_count_writes(steps))
        for name in ("sync_file", "sync_folder", "rename", "remove"):
            stack.enter_context(mock.patch.object(commit, name, getattr(steps, name)))
        stack.enter_context(mock.patch.object(commit, "sync_file", steps.sync_file))
        stack.enter_context(contextlib.suppress(Crash))
        yield steps


def _count_writes(steps: Steps) -> contextlib.AbstractContextManager[Any]:
    write = commit.StagedFile.write

    def counted(staged: commit.StagedFile, data: Any) -> int:
        if not staged._muted:  # what is given up writes nothing any more
            steps.take("write", staged.name)
        return write(staged, data)

    return mock.patch.object(commit.StagedFile, "write", counted)


def folder_bytes(root: Path) -> dict[str, bytes]:
    """All that two runs of the same corpus must agree on, by name."""
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes() for name, path in sorted(files.items()) if not name.startswith(LOCKS_AND_RUN_OF_THE_DAY)
    }


def main() -> None:
    """Run `m3` and die for real."""
    from m3cli.__main__ import main as m3  # noqa: PLC0415 - only when run as a program

    step, sys.argv[1:] = int(sys.argv[1]), sys.argv[2:]
    with crash_at(step, die=lambda: os.kill(os.getpid(), signal.SIGKILL)):
        m3()


if __name__ == "__main__":
    main()
