"""Bytes of sources, decompressed, and their lines; every error names the source.

Standard input can be peeked at (`PeekableStream`) but read only once. A read returns little more than its size, which
bounds memory against compression bombs.

A line ends at its newline or at the end of the stream, and belongs to the shard of its first byte. So the lines of
consecutive shards are the stream, byte for byte. A line is a row unless it is blank or a header. At most
`max_row_bytes` and a block of a line are in memory: longer lines are read in parts.

Records of CSV (RFC 4180) are read in order: a quoted cell may contain line breaks, so no record is found by seeking.
The first record is the header. The separator is a comma, or a semicolon if the header has one and no comma. After a
record that is not CSV, such as one whose quote is never closed, reading goes on at the line after its first one.
"""

from __future__ import annotations

import csv
import gzip
import io
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISDIR
from types import TracebackType
from typing import BinaryIO, Literal, Protocol, cast

import zstandard

from m3cli.corpus.files import list_text_files, version_of
from m3cli.corpus.remote import RemoteFile, is_remote, read_version
from m3cli.corpus.rows import INVALID_CSV, TOO_LONG, Fault, RawRow, Row, fault_decoding, name_cells
from m3cli.errors import CorpusError
from m3cli.paths import close_read
from m3cli.records import Compression, Source

BOM = b"\xef\xbb\xbf"
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
            close_read(self._file)


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
        check_version(source, *read_size_and_mtime(source.path))
    if inode is not None and inode != find_inode(source):
        raise _was_written(source)


def check_version(source: Source, size: int, mtime_ns: int) -> None:
    """Check that a file has the size and date that it was planned with.

    Raises:
        CorpusError: it has not.
    """
    if size != source.size:
        raise CorpusError(
            f"{source.name} changed while it was read: it had {source.size:,} bytes and has {size:,} now; "
            "put it back as it was and run the same command again, or encode it as it is into a new folder"
        )
    if mtime_ns != source.mtime_ns:
        raise _was_written(source)


def _was_written(source: Source) -> CorpusError:
    return CorpusError(
        f"{source.name} changed while it was read: it was written to or replaced after the run began; "
        "run the same command again, which compares it with what is done, or encode it into a new folder"
    )


def open_file(source: Source) -> BinaryIO:
    """Open a file or an object in a bucket; raise OSError or CorpusError."""
    return cast("BinaryIO", RemoteFile(source.path)) if is_remote(source.path) else Path(source.path).open("rb")


def read_size_and_mtime(path: str) -> tuple[int, int]:
    """Return the bytes of a file and when it was written to, in ns; what stands for it of an object or a folder."""
    if is_remote(path):
        return read_version(path)
    status = Path(path).stat()
    return version_of(list_text_files(path)) if S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive bytes of a stream."""

    offset: int
    "of the first byte"
    raw: bytes
    part: Literal["lines", "head", "rest"]
    "'lines': complete lines; 'head': the start of a line that is too long; 'rest': more of that line"
    row: Row | Fault | None = None
    "of CSV, where a block is one record; None: it is blank, or the header"


class LineStream:
    """The lines of a stream that starts at a line's first byte."""

    def __init__(
        self, stream: Readable, *, offset: int, max_row_bytes: int, rows_left: int | None = None, header: bool = False
    ) -> None:
        self.offset = offset
        "of the next line"
        self.rows_left = rows_left
        "remaining rows of the limit; None: no limit"
        self._stream = stream
        self._max_row_bytes = max_row_bytes
        self._header = header
        self._buffer = b""
        self._at = 0

    def has_more(self) -> bool:
        """Return whether there is another line."""
        if self.rows_left == 0:
            return False
        if self._at == len(self._buffer):
            self._buffer, self._at = self._stream.read(BLOCK_BYTES), 0
        return bool(self._buffer)

    def take(self, stop: int) -> Iterator[Block]:
        """Yield the lines that begin before `stop`."""
        while self.offset < stop and self.has_more():
            cut = self._find_cut(stop) or self._extend(stop)
            if cut:
                yield self._advance(cut, "lines")
            else:
                yield from self._take_long_line()

    def _find_cut(self, stop: int) -> int:
        """Return the buffer index of the first line at or after `stop`, or else of the last line; 0: none."""
        newline = self._buffer.find(b"\n", self._at + max(0, stop - 1 - self.offset))
        return (newline if newline >= 0 else self._buffer.rfind(b"\n", self._at)) + 1

    def _extend(self, stop: int) -> int:
        """Read until the buffer's line ends and return the cut; 0 if the line is too long."""
        parts = [self._buffer[self._at :]]
        length = len(parts[0])
        ended = False
        while length <= self._max_row_bytes and not ended:
            parts.append(self._stream.read(BLOCK_BYTES))
            length += len(parts[-1])
            ended = not parts[-1] or b"\n" in parts[-1]
        self._buffer, self._at = b"".join(parts), 0
        at_end = not parts[-1]
        return length if at_end else self._find_cut(stop)

    def _take_long_line(self) -> Iterator[Block]:
        yield self._advance(len(self._buffer), "head")
        more = True
        while more and (block := self._stream.read(BLOCK_BYTES)):
            self._buffer, self._at = block, 0
            newline = block.find(b"\n")
            more = newline < 0
            yield self._advance(len(block) if more else newline + 1, "rest")

    def _advance(self, cut: int, part: Literal["lines", "head", "rest"]) -> Block:
        raw = self._buffer[self._at : cut]
        if self.rows_left is not None and part != "rest":
            raw = self._count_rows(raw, self.rows_left)
        block = Block(offset=self.offset, raw=raw, part=part)
        self._at += len(raw)
        self.offset += len(raw)
        return block

    def _count_rows(self, raw: bytes, rows_left: int) -> bytes:
        """Subtract the rows of `raw` from the limit, and return `raw` up to the last row within it."""
        end = 0
        while rows_left and end < len(raw):
            start, end = end, raw.find(b"\n", end) + 1 or len(raw)
            line = raw[start:end].removesuffix(b"\n")
            row = line if self.offset + start else _first_row(line, header=self._header)
            rows_left -= bool(row and (len(line) > self._max_row_bytes or not row.isspace()))
        self.rows_left = rows_left
        return raw[:end]


def split_rows(
    blocks: Iterable[Block], parse: Callable[[bytes], Row | Fault], *, max_row_bytes: int, header: bool = False
) -> Iterator[RawRow]:
    """Yield each row with its offset and bytes, parsed; with `header` the line at offset 0 is not a row."""
    too_long = Fault(reason=TOO_LONG, detail=f"more than {max_row_bytes:,} bytes")
    for block in blocks:
        offset = block.offset
        if block.part != "lines":
            if block.part == "head" and not (header and offset == 0):
                yield offset, block.raw, too_long
            continue
        for line in block.raw.split(b"\n"):
            row = line if offset else _first_row(line, header=header)
            if len(line) > max_row_bytes:
                if row:
                    yield offset, row, too_long
            elif row and not row.isspace():
                yield offset, row, parse(row)
            offset += len(line) + 1


def _first_row(line: bytes, *, header: bool) -> bytes:
    return b"" if header else line.removeprefix(BOM)


class CsvStream:
    """The records of a stream, with the interface of `LineStream`: a block is one record, parsed."""

    def __init__(self, stream: Readable, *, max_row_bytes: int, rows_left: int | None = None) -> None:
        self.offset = 0
        "of the next record"
        self.rows_left = rows_left
        "remaining rows of the limit; None: no limit"
        self.columns: tuple[str, ...] = ()
        "the header's cells, once it is read"
        self._max_row_bytes = max_row_bytes
        self._blocks = LineStream(stream, offset=0, max_row_bytes=max_row_bytes).take(sys.maxsize)
        self._waiting: deque[Block] = deque()
        "lines that are not parsed yet, and parts of lines that are too long"
        self._taken: list[Block] = []
        "the lines of the record that is being parsed"
        self._fault: Fault | None = None
        "of that record, apart from its quoting"
        self._left = 0
        "bytes that the record may still have"
        self._too_long = Fault(reason=TOO_LONG, detail=f"more than {max_row_bytes:,} bytes")
        self._separator = ","
        csv.field_size_limit(max(csv.field_size_limit(), max_row_bytes))
        self._reader = self._make_reader()

    def has_more(self) -> bool:
        """Return whether there is another record."""
        return self.rows_left != 0 and self._fill()

    def take(self, stop: int) -> Iterator[Block]:
        """Yield the records that begin before `stop`; blank ones and the header have no row."""
        while self.offset < stop and self.has_more():
            if self._waiting[0].part == "lines":
                yield self._advance(*self._read_record())
            else:
                yield self._advance(self._waiting.popleft(), self._too_long)
                while self._fill() and self._waiting[0].part == "rest":
                    yield self._advance(self._waiting.popleft(), None)

    def _fill(self) -> bool:
        """Return whether there are more lines, after reading some if none are waiting."""
        if not self._waiting and (block := next(self._blocks, None)):
            lines = io.BytesIO(block.raw) if block.part == "lines" else (block.raw,)
            self._waiting.extend(Block(offset=-1, raw=line, part=block.part) for line in lines)
        return bool(self._waiting)

    def _read_record(self) -> tuple[Block, Row | Fault | None]:
        self._taken, self._fault, self._left = [], None, self._max_row_bytes
        if not self.columns:
            line = self._waiting[0].raw
            self._separator = ";" if b";" in line and b"," not in line else ","
            self._reader = self._make_reader()
        try:
            row = self._read_cells(next(self._reader))
        except csv.Error as error:
            row = self._fault or Fault(reason=INVALID_CSV, detail=str(error))
            self._waiting.extendleft(reversed(self._taken[1:]))
            del self._taken[1:]
            self._reader = self._make_reader()
        return Block(offset=-1, raw=b"".join(line.raw for line in self._taken), part="lines"), row

    def _make_reader(self) -> Iterator[list[str]]:
        return csv.reader(iter(self._next_line, None), delimiter=self._separator, strict=True)

    def _next_line(self) -> str | None:
        """Return the next line of a record; None: the input ends, or the record becomes too long."""
        if not self._fill():
            self._fault = Fault(reason=INVALID_CSV, detail="its quote is not closed")
            return None
        line = self._waiting[0]
        if self._taken and (line.part != "lines" or len(line.raw) > self._left):
            self._fault = self._too_long
            return None
        self._taken.append(self._waiting.popleft())
        self._left -= len(line.raw)
        try:
            return (line.raw.removeprefix(BOM) if self.offset == 0 and len(self._taken) == 1 else line.raw).decode()
        except UnicodeDecodeError as error:
            self._fault = fault_decoding(error)
            return line.raw.decode(errors="replace")

    def _read_cells(self, cells: list[str]) -> Row | Fault | None:
        """Return a record's row; None: it is blank or the header."""
        if not cells:
            return None
        if self._fault is not None:
            return self._fault
        if self._left < 0:
            return self._too_long
        if not self.columns:
            self.columns = tuple(cells)
            return None
        return name_cells(self.columns, cells)

    def _advance(self, block: Block, row: Row | Fault | None) -> Block:
        if row is not None and self.rows_left is not None:
            self.rows_left -= 1
        found = replace(block, offset=self.offset, row=row)
        self.offset += len(block.raw)
        return found
