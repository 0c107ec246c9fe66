"""Decompressed bytes of sources, read or peeked at; every error names the source.

Standard input can be peeked at (`PeekableStream`) but read only once. A read returns little more than its size, which
bounds memory against compression bombs.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, cast

import zstandard

from m3cli.corpus.remote import RemoteFile, is_remote, read_version
from m3cli.errors import CorpusError
from m3cli.records import Compression, Source

BLOCK_BYTES = 1 << 20
"read at once"
# zstd expands 4 bytes to at most 128 KiB (a run-length block), so one piece to at most 128 MiB.
ZSTD_PIECE_BYTES = 4096
ZSTD_MAX_WINDOW = 1 << 31
"`zstd --long=31`, which large public dumps use"


class Readable(Protocol):
    """A source of bytes, in which only an empty read is the end."""

    def read(self, size: int, /) -> bytes:
        """Read up to about `size` bytes."""


class PeekableStream:
    """Standard input, whose first bytes can be peeked at; a process has one such object."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._head = b""
        self._ended = False

    def peek(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end, without consuming them."""
        self._head += self._pull(size - len(self._head))
        return self._head[:size]

    def read(self, size: int, /) -> bytes:
        """Read `size` bytes, fewer only at the end."""
        taken, self._head = self._head[:size], self._head[size:]
        return taken + self._pull(size - len(taken))

    def _pull(self, size: int) -> bytes:
        parts = []
        while size > 0 and not self._ended:
            part = self._stream.read(size)
            self._ended = not part  # a terminal would continue
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class ByteStream:
    """A source opened for reading from its start, decompressed."""

    def __init__(self, source: Source, *, stdin: PeekableStream | None = None) -> None:
        self._source = source
        self._file: BinaryIO | None = None
        raw: Readable
        if source.path == "-":
            assert stdin is not None, "stdin is missing"
            raw = stdin
        else:
            with corpus_errors(source):
                raw = self._file = open_file(source)
        self._bytes = _decompress(raw, source.compression)

    def __enter__(self) -> ByteStream:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; standard input stays open."""
        self.close()

    def read(self, size: int, /) -> bytes:
        """Read about `size` bytes, none only at the end."""
        with corpus_errors(self._source):
            return self._bytes.read(size)

    def seek(self, offset: int) -> None:
        """Go to `offset` of a plain file."""
        assert self._file is not None
        assert not self._source.sequential
        with corpus_errors(self._source):
            self._file.seek(offset)

    def close(self) -> None:
        """Close the file; standard input stays open."""
        if self._file is not None:
            self._file.close()


def read_head(source: Source, size: int, *, stdin: PeekableStream | None = None) -> bytes:
    """Return the first `size` bytes of a source, decompressed, fewer only at the end; consume nothing."""
    if source.path != "-":
        with ByteStream(source) as stream:
            return PeekableStream(stream).peek(size)
    assert stdin is not None, "stdin is missing"
    peek_size = size if source.compression == "none" else max(size, BLOCK_BYTES)
    raw = stdin.peek(peek_size)
    decompressed = _decompress(io.BytesIO(raw), source.compression)
    if len(raw) < peek_size:
        with corpus_errors(source):
            return PeekableStream(decompressed).peek(size)
    head = b""
    # The peeked bytes are cut off, so decompress as much as possible.
    try:
        while len(head) < size and (part := decompressed.read(min(8192, size - len(head)))):
            head += part
    except EOFError:
        pass
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError):
        with corpus_errors(source):
            raise
    return head[:size]


def measure_ratio(source: Source, *, size: int) -> float:
    """Return the decompressed bytes for each byte of a file, measured on its first `size` bytes.

    The result is approximate, except for files of up to `size` bytes.
    """
    with corpus_errors(source), open_file(source) as file:
        decompressed, length = _decompress(file, source.compression), 0
        complete = source.size <= size
        while (complete or file.tell() < size) and (part := decompressed.read(BLOCK_BYTES)):
            length += len(part)
        return length / max(file.tell(), 1)


def find_inode(source: Source) -> int | None:
    """Return the inode, which detects a replaced file; None for standard input and objects in a bucket."""
    if source.path == "-" or is_remote(source.path):
        return None
    with corpus_errors(source):
        return Path(source.path).stat().st_ino


def check_unchanged(source: Source, *, inode: int | None = None) -> None:
    """Check that a file exists and is unchanged since it was planned, and that it has the inode, if not None.

    Raises:
        CorpusError: it is not.
    """
    if source.path == "-":
        return
    with corpus_errors(source):
        size, mtime_ns = read_size_and_mtime(source.path)
    if size != source.size:
        raise CorpusError(
            f"{source.name} changed while it was read: it had {source.size:,} bytes and has {size:,} now; "
            "put it back as it was and run the same command again, or encode it as it is into a new folder"
        )
    if mtime_ns != source.mtime_ns or (inode is not None and inode != find_inode(source)):
        raise CorpusError(
            f"{source.name} changed while it was read: it was written to or replaced after the run began; "
            "run the same command again, which compares it with what is done, or encode it into a new folder"
        )


def open_file(source: Source) -> BinaryIO:
    """Open a file or an object in a bucket; raise OSError or CorpusError."""
    return cast("BinaryIO", RemoteFile(source.path)) if is_remote(source.path) else Path(source.path).open("rb")


def read_size_and_mtime(path: str) -> tuple[int, int]:
    """Return the bytes of a file and when it was written to, in ns; for an object in a bucket what stands for it."""
    if is_remote(path):
        return read_version(path)
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def corpus_errors(source: Source) -> Iterator[None]:
    """Turn errors of reading and decompressing into a CorpusError that names the source and a remedy."""
    try:
        yield
    except FileNotFoundError as error:
        raise CorpusError(f"{source.name} is missing: put it back and run the same command again") from error
    except EOFError as error:
        raise CorpusError(
            f"{source.name} ends in the middle of its {source.compression} data: it was cut off; copy or download it "
            "again, and encode it into another --out, with --since-run to reuse what is done"
        ) from error
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise CorpusError(
            f"{source.name} is corrupt {source.compression} data ({error}): "
            "copy or download it again and run the same command again"
        ) from error
    except OSError as error:
        raise CorpusError(f"{source.name} cannot be read: {error.strerror or error}") from error


class _ZstdReader:
    """Consecutive frames of zstd; a truncated stream raises EOFError, unlike in zstandard's own stream reader."""

    def __init__(self, raw: Readable) -> None:
        self._raw = raw
        self._rest = b""
        self._frame: zstandard.ZstdDecompressionObj | None = None

    def read(self, size: int, /) -> bytes:
        parts: list[bytes] = []
        length = 0
        while length < size:
            piece = self._rest or self._raw.read(ZSTD_PIECE_BYTES)
            if not piece:
                if self._frame is not None:
                    raise EOFError("zstd frame is cut off")
                break
            part = self._decompress(piece)
            parts.append(part)
            length += len(part)
        return b"".join(parts)

    def _decompress(self, piece: bytes) -> bytes:
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW).decompressobj()
        part = self._frame.decompress(piece)
        self._rest = b""
        if self._frame.eof:
            self._rest = self._frame.unused_data
            self._frame = None
        return part


def _decompress(raw: Readable, compression: Compression) -> Readable:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=cast("BinaryIO", raw), mode="rb")
    return _ZstdReader(raw) if compression == "zstd" else raw
