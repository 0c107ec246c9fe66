"""Lines of a byte stream with their offsets, cut at shard borders and after the last row of a limit.

A line ends at its newline or at the end of the stream, and belongs to the shard of its first byte. So the lines of
consecutive shards are the stream, byte for byte. A line is a row unless it is blank or a header. At most
`max_row_bytes` and a block of a line are in memory: longer lines are read in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from m3cli.corpus.rows import TOO_LONG, Fault, RawRow, Row
from m3cli.corpus.streams import BLOCK_BYTES, Readable

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive bytes of a stream."""

    offset: int
    "of the first byte"
    raw: bytes
    part: Literal["lines", "head", "rest"]
    "'lines': complete lines; 'head': the start of a line that is too long; 'rest': more of that line"


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
