"""Publishes files: the only place that fsyncs, renames and deletes what may be believed.

What may be believed, and in what order it comes to be:

1. a file outside `_m3/tmp/` is complete and never modified;
2. a file is written in `_m3/tmp/<worker>/` (same filesystem) and fsynced through the descriptor that wrote it, so that
   no write error can slip between two opens; then renamed; then its folder is fsynced;
3. a shard's data files come first, its done entry after all of them; the manifest comes after all done entries;
4. a new folder's name is made durable before anything is published in it.

Every durable step is one call of `sync_file`, `sync_folder`, `rename` or `remove`, looked up in this module, so that a
test can count them and stop at each. Doing a shard again replaces its files by the same bytes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from m3cli.errors import OutputError
from m3cli.paths import is_stream, open_to_append
from m3cli.records import DoneEntry, FileRecord
from m3cli.store.documents import dumps_with_checksum, entry_document
from m3cli.store.layout import done_name, skipped_name

REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "raise the quota or free some space, and run the same command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), and run the same command again",
    errno.EACCES: "check who may write there, or choose another --out",
    errno.EPERM: "check who may write there, or choose another --out",
    errno.EROFS: "choose an --out on a filesystem that can be written",
    errno.EIO: "the disk failed: nothing written since the last shard is believed; check the disk before going on",
    errno.ELOOP: "take the symbolic link away, or choose another --out",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENXIO: "nothing reads that pipe: start its reader first, or give the name of a file",
    errno.ENOLCK: "choose an --out on a filesystem with file locks",
    errno.EOPNOTSUPP: "choose an --out on a filesystem with file locks",
}


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into an OutputError that names the path, the reason and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "run the same command again once that is fixed")
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write {error.filename or path}: {reason}; {remedy}") from error


def sync_file(descriptor: int) -> None:
    """Make a file's bytes durable."""
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(temp: Path, final: Path) -> None:
    """Give a complete file its name."""
    os.replace(temp, final)  # noqa: TID251 - this is the one place


def remove(path: Path) -> None:
    """Take a file's name away."""
    path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create a folder, if it is missing, and make its name durable whoever created it."""
    with output_errors(folder):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def publish_file(temp: Path, final: Path) -> None:
    """Publish a staged file, which its writer has fsynced."""
    with output_errors(final):
        rename(temp, final)
        sync_folder(final.parent)


def publish_json(document: dict[str, Any], final: Path, *, staging: Path) -> None:
    """Publish a document with its checksum."""
    publish_bytes(dumps_with_checksum(document), final, staging=staging)


def publish_bytes(content: bytes, final: Path, *, staging: Path) -> None:
    """Publish a small file."""
    temp = staging / final.name
    with output_errors(final):
        with temp.open("wb") as file:
            file.write(content)
            file.flush()
            sync_file(file.fileno())
        publish_file(temp, final)


@contextmanager
def publish_outside(final: Path, *, wait: bool = True) -> Iterator[BinaryIO]:
    """Write a file that is in no output folder; it has a temporary name until it is complete.

    A link is followed: what it points to is replaced, not the link. A device or a pipe is written into; without `wait`
    a pipe that nobody reads is an error.
    """
    with output_errors(final):
        stream = is_stream(final)
    if stream:
        with output_errors(final), open_to_append(final, wait=wait) as file:
            yield file
        return
    final = Path(os.path.realpath(final))
    temp = _wait_outside(final)
    try:
        with output_errors(final):
            temp.unlink(missing_ok=True)  # of a dead run with this run's pid
            with temp.open("xb") as file:
                yield file
                file.flush()
                sync_file(file.fileno())
        publish_file(temp, final)
    finally:
        with output_errors(temp):
            remove(temp)


def check_writable(out: str | None) -> None:
    """Raise what `publish_outside` would raise in the end, before hours of work; None and '-' are standard output.

    Raises:
        OutputError: there is no such folder, it cannot be written to, or the name is of a folder or the like.
    """
    if out is None or out == "-":
        return
    with output_errors(Path(out)):
        if is_stream(out):
            if not os.access(out, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), out)
            return
        final = Path(os.path.realpath(out))
        if not final.parent.is_dir():
            raise OutputError(f"cannot write {out}: there is no folder {final.parent}; make it, or choose another")
        temp = _wait_outside(final)
        temp.unlink(missing_ok=True)
        temp.touch(exist_ok=False)  # never through a link that somebody put there
        remove(temp)


def _wait_outside(final: Path) -> Path:
    return final.with_name(f".{final.name}.{os.getpid()}.tmp")


def commit_shard(root: Path, entry: DoneEntry, *, staging: Path) -> None:
    """Publish a shard's staged files, then its done entry. From then on the shard is never done again."""
    index = entry.shard.index
    names = [record.name for record in entry.files]
    leftover = root / skipped_name(index)
    # A try that died before its entry may have listed rows that fail no more (a device short of memory, say).
    if skipped_name(index) not in names and leftover.exists():
        with output_errors(leftover):
            remove(leftover)
            sync_folder(leftover.parent)
    for name in names:
        publish_file(staged_path(staging, name), root / name)
    publish_json(entry_document(entry), root / done_name(index), staging=staging)


def withdraw_files(root: Path, names: Sequence[str]) -> list[str]:
    """Take files away, durably when this returns; return the names of those that were there."""
    there = [name for name in names if os.path.lexists(root / name)]
    with output_errors(root):
        for name in there:
            remove(root / name)
        for folder in sorted({(root / name).parent for name in there}):
            sync_folder(folder)
    return there


def staged_path(staging: Path, name: str) -> Path:
    """Where a file waits until it is published under `name`."""
    return staging / name.replace("/", "--")


PIECE = 1 << 20
"bytes; hashed and written while they are in the processor's cache"
WRITEBACK = 32 << 20
"bytes; handed to the disk together"


class StagedFile:
    """An open temp file. It offers what pyarrow and zipfile ask of a file that cannot seek."""

    def __init__(self, staging: Path, name: str) -> None:
        self.name = name
        self.path = staged_path(staging, name)
        self.closed = False
        self._muted = False
        self._length = 0
        self._handed_over = 0
        self._digest: xxhash.xxh3_128 | None = xxhash.xxh3_128()
        "of what was written; None once that was amended"
        with output_errors(self.path):
            self._file = self.path.open("wb", buffering=0)

    def write(self, data: bytes | memoryview) -> int:
        """Append all of `data`."""
        view = memoryview(data)
        if view.nbytes and not self._muted:  # nothing at all cannot be cast
            view = view.cast("B")
            with output_errors(self.path):
                for start in range(0, len(view), PIECE):
                    self._write_piece(view[start : start + PIECE])
        return view.nbytes

    def _write_piece(self, piece: memoryview) -> None:
        if self._digest is not None:
            self._digest.update(piece)
        self._length += len(piece)
        while piece:
            piece = piece[self._file.write(piece) :]
        if self._length - self._handed_over >= WRITEBACK and hasattr(os, "posix_fadvise"):
            # DONTNEED starts writing dirty pages back without waiting for them.
            span = self._length - self._handed_over
            os.posix_fadvise(self._file.fileno(), self._handed_over, span, os.POSIX_FADV_DONTNEED)
            self._handed_over = self._length

    def amend(self, data: bytes) -> None:
        """Write the file's first bytes anew. What has passed has another hash then: `seal` reads the file again."""
        if not self._muted:
            with output_errors(self.path):
                os.pwrite(self._file.fileno(), data, 0)
            self._digest = None

    def tell(self) -> int:
        """How many bytes were written."""
        return self._length

    def flush(self) -> None:
        """Nothing is held back."""

    def writable(self) -> bool:
        """It is."""
        return True

    def readable(self) -> bool:
        """It is not."""
        return False

    def seekable(self) -> bool:
        """It is not: what has passed is hashed."""
        return False

    def close(self) -> None:
        """Close without publishing; `seal` is what makes the file good."""
        self.closed = True
        self._file.close()

    def seal(self) -> FileRecord:
        """Make the bytes durable and say what they are."""
        with output_errors(self.path):
            sync_file(self._file.fileno())
            self.close()
            digest = self._digest or _hash_file(self.path)
        return FileRecord(name=self.name, length=self._length, xxh3_128=digest.hexdigest())

    def mute(self) -> None:
        """Swallow what is written from here on: a writer that is given up still wants to write its footer."""
        self._muted = True

    def discard(self) -> None:
        """Give the file up."""
        self.mute()
        self.close()
        self.path.unlink(missing_ok=True)


def _hash_file(path: Path) -> xxhash.xxh3_128:
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest
