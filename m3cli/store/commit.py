"""Publish files: the only module that fsyncs, renames and deletes files of an output folder.

1. A file outside `_m3/tmp/` is complete and never modified.
2. A file is written in `_m3/tmp/<worker>/`, on the same filesystem, and fsynced through the descriptor that wrote it.
   Then it is renamed, and its folder is fsynced.
3. A shard's done entry is published after its data files, the manifest after all done entries.
4. The name of a new folder is durable before a file is published in it.

Every durable step is a call of `sync_file`, `sync_folder`, `rename` or `remove` through this module, so that a test
can count the steps and stop at each.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from m3cli.errors import OutputError
from m3cli.paths import exists, is_folder, is_stream, open_to_append
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
    errno.EIO: "the disk failed: files written since the last shard are not used; check the disk before you go on",
    errno.ELOOP: "remove the symbolic link, or choose another --out",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENXIO: "nothing reads that pipe: start its reader first, or give the name of a file",
    errno.ENOLCK: "choose an --out on a filesystem with file locks",
    errno.EOPNOTSUPP: "choose an --out on a filesystem with file locks",
}


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into an OutputError that names the path, the reason and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "run the same command again once that is fixed")
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write {error.filename or path}: {reason}; {remedy}") from error


def sync_file(descriptor: int) -> None:
    """Make the bytes of a file durable."""
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
    os.replace(temp, final)  # noqa: TID251 - the only rename


def remove(path: Path) -> None:
    """Delete a file, if it exists."""
    path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create a folder, if it is missing, and make its name durable even if another process created it."""
    with output_errors(folder):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def publish_file(temp: Path, final: Path) -> None:
    """Publish a temporary file that its writer has fsynced."""
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
    """Write a file outside output folders; it has a temporary name until it is complete.

    The target of a symbolic link is replaced, not the link. A device or a pipe is opened and written to; without
    `wait`, a pipe without a reader is an error.
    """
    with output_errors(final):
        stream = is_stream(final)
    if stream:
        with output_errors(final), open_to_append(final, wait=wait) as file:
            yield file
        return
    final = Path(os.path.realpath(final))
    temp = _temp_path(final)
    try:
        with output_errors(final):
            temp.unlink(missing_ok=True)  # of an earlier process with the same pid
            with temp.open("xb") as file:
                yield file
                file.flush()
                sync_file(file.fileno())
        publish_file(temp, final)
    finally:
        with output_errors(temp):
            remove(temp)


def check_writable(out: str | None) -> None:
    """Check before the work starts that `publish_outside` can write a file; None and '-' are standard output.

    Raises:
        OutputError: the folder is missing or read-only, or the name is that of a folder.
    """
    if out is None or out == "-":
        return
    with output_errors(Path(out)):
        if is_stream(out):
            if not os.access(out, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), out)
            return
        final = Path(os.path.realpath(out))
        if not is_folder(final.parent):
            raise OutputError(f"cannot write {out}: there is no folder {final.parent}; make it, or choose another")
        temp = _temp_path(final)
        temp.unlink(missing_ok=True)
        temp.touch(exist_ok=False)  # not through a symbolic link
        remove(temp)


def _temp_path(final: Path) -> Path:
    return final.with_name(f".{final.name}.{os.getpid()}.tmp")


def commit_shard(root: Path, entry: DoneEntry, *, staging: Path) -> None:
    """Publish a shard's files, then its done entry, with which the shard is done."""
    index = entry.shard.index
    names = [record.name for record in entry.files]
    leftover = root / skipped_name(index)
    # An attempt that stopped before its entry may have skipped rows that do not fail now (device memory, for example).
    if skipped_name(index) not in names and exists(leftover):
        with output_errors(leftover):
            remove(leftover)
            sync_folder(leftover.parent)
    for name in names:
        publish_file(staged_path(staging, name), root / name)
    publish_json(entry_document(entry), root / done_name(index), staging=staging)


def remove_files(root: Path, names: Sequence[str]) -> list[str]:
    """Remove files durably; return the names of those that existed."""
    existing = [name for name in names if os.path.lexists(root / name)]
    with output_errors(root):
        for name in existing:
            remove(root / name)
        for folder in sorted({(root / name).parent for name in existing}):
            sync_folder(folder)
    return existing


def staged_path(staging: Path, name: str) -> Path:
    """Return the path of a file until it is published as `name`."""
    return staging / name.replace("/", "--")


PIECE = 1 << 20
"bytes that are hashed and written together, so that they stay in the processor's cache"
WRITEBACK = 32 << 20
"bytes after which the kernel starts to write to the disk"


class StagedFile:
    """Open temporary file, with the methods that pyarrow and zipfile call on a file that cannot seek."""

    def __init__(self, staging: Path, name: str) -> None:
        self.name = name
        self.path = staged_path(staging, name)
        self.closed = False
        self._muted = False
        self._length = 0
        self._handed_over = 0
        self._digest: xxhash.xxh3_128 | None = xxhash.xxh3_128()
        "of the bytes written; None after `overwrite_start`"
        with output_errors(self.path):
            self._file = self.path.open("wb", buffering=0)

    def write(self, data: bytes | memoryview) -> int:
        """Append all of `data`."""
        view = memoryview(data)
        if view.nbytes and not self._muted:  # an empty view cannot be cast
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

    def overwrite_start(self, data: bytes) -> None:
        """Replace the first bytes of the file; `seal` then reads the file again for its hash."""
        if not self._muted:
            with output_errors(self.path):
                os.pwrite(self._file.fileno(), data, 0)
            self._digest = None

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self._length

    def flush(self) -> None:
        """Do nothing: writes are not buffered."""

    def writable(self) -> bool:
        """Return True."""
        return True

    def readable(self) -> bool:
        """Return False."""
        return False

    def seekable(self) -> bool:
        """Return False: bytes are hashed as they are written."""
        return False

    def close(self) -> None:
        """Close the file without `seal`: it is not published."""
        self.closed = True
        self._file.close()

    def seal(self) -> FileRecord:
        """Make the bytes durable; return name, length and hash."""
        with output_errors(self.path):
            sync_file(self._file.fileno())
            self.close()
            digest = self._digest or _hash_file(self.path)
        return FileRecord(name=self.name, length=self._length, xxh3_128=digest.hexdigest())

    def mute(self) -> None:
        """Ignore later writes: a discarded Parquet writer still writes its footer."""
        self._muted = True

    def discard(self) -> None:
        """Close and delete the file; on a lost disk it stays, until the next run clears what is staged."""
        self.mute()
        for step in (self.close, self.path.unlink):
            with suppress(OSError):  # that of the write says more
                step()


def _hash_file(path: Path) -> xxhash.xxh3_128:
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest
