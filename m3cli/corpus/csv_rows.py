"""Records of CSV (RFC 4180), read in order: a quoted cell may contain line breaks, so no record is found by seeking.

The first record is the header. The separator is a comma, or a semicolon if the header has one and no comma. After a
record that is not CSV, such as one whose quote is never closed, reading goes on at the line after its first one.
"""

from __future__ import annotations

import csv
import io
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from m3cli.corpus.rows import INVALID_CSV, TOO_LONG, Fault, Row, fault_decoding, name_cells
from m3cli.corpus.streams import BOM, Block, LineStream, Readable


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
