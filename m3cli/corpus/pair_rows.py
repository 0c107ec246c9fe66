"""The rows of a pairs file as they stand, one reader a format; a line that cannot be read is a row with a fault."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from m3cli.config import MAX_ROW_BYTES
from m3cli.corpus.jsonl import parse_json_line
from m3cli.corpus.lines import BOM, LineStream
from m3cli.corpus.pair_source import PairColumns, PairSource
from m3cli.corpus.parquet import name_parquet_faults, open_parquet
from m3cli.corpus.rows import INVALID_UTF8, TOO_LONG, WRONG_COLUMNS, Fault
from m3cli.corpus.streams import ByteStream, PeekableStream
from m3cli.corpus.trec import RUN_COLUMNS, split_run_line
from m3cli.corpus.tsv import split_cells
from m3cli.errors import CorpusError, is_utf8

NO_FIELDS: dict[str, Any] = {}
_PARQUET_ROWS = 1024
"rows of a Parquet file that are decoded together"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRow:
    """A row as it was read."""

    row: dict[str, Any]
    fault: str = ""
    raw: bytes = b""
    batch: Any = None
    "(pyarrow.RecordBatch, row in it), Parquet only"


def read_rows(source: PairSource, columns: PairColumns, *, stdin: PeekableStream | None) -> Iterator[ReadRow]:
    """Yield all rows of a pairs file."""
    if source.format == "parquet":
        yield from _read_parquet(source)
        return
    with ByteStream(source.source, stdin=stdin) as stream:
        if source.format == "csv":
            yield from _read_csv(source, columns, stream)
        else:
            yield from _read_lines(_parser(source, columns), stream, header=columns.header)


def _read_lines(parse: Callable[[bytes], ReadRow], stream: ByteStream, *, header: bool) -> Iterator[ReadRow]:
    lines = LineStream(stream, offset=0, max_row_bytes=MAX_ROW_BYTES)
    first = True
    for block in lines.take(sys.maxsize):
        if block.part == "rest":
            continue
        if block.part == "head":
            if not (first and header):
                yield ReadRow(row=NO_FIELDS, fault=TOO_LONG)
            first = False
            continue
        raw = block.raw.removeprefix(BOM) if block.offset == 0 else block.raw
        for line in raw.split(b"\n"):
            row = line.removesuffix(b"\r")
            if not row:
                continue
            if not (first and header):
                yield parse(row)
            first = False


def _parser(source: PairSource, columns: PairColumns) -> Callable[[bytes], ReadRow]:
    if source.format == "jsonl":
        return _parse_json
    if source.format == "trec":
        return _parse_trec
    names = columns.names
    return lambda line: _parse_cells(line, names)


def _parse_json(line: bytes) -> ReadRow:
    row = parse_json_line(line)
    return ReadRow(row=NO_FIELDS, fault=row.reason) if isinstance(row, Fault) else ReadRow(row=row, raw=line)


def _parse_cells(line: bytes, names: tuple[str, ...]) -> ReadRow:
    try:
        text, fault = line.decode(), ""
    except UnicodeDecodeError:
        text, fault = line.decode(errors="replace"), INVALID_UTF8
    return _name_cells(split_cells(text), names, fault)


def _parse_trec(line: bytes) -> ReadRow:
    return _name_cells(tuple(split_run_line(line.decode(errors="surrogateescape"))), RUN_COLUMNS, "")


def _name_cells(cells: tuple[str, ...], names: tuple[str, ...], fault: str) -> ReadRow:
    if len(cells) != len(names):
        fault = fault or WRONG_COLUMNS
    # Cells beyond the columns stay with the last one, so that nothing of the row is lost.
    kept = cells if len(cells) <= len(names) else (*cells[: len(names) - 1], " ".join(cells[len(names) - 1 :]))
    row = dict(zip(names, (*kept, *[""] * (len(names) - len(kept))), strict=True))
    if not all(map(is_utf8, cells)):
        fault = INVALID_UTF8
        row = {name: cell.encode(errors="surrogateescape").decode(errors="replace") for name, cell in row.items()}
    return ReadRow(row=row, fault=fault)


def _read_csv(source: PairSource, columns: PairColumns, stream: ByteStream) -> Iterator[ReadRow]:
    """Read CSV strictly: where a quote is not closed, or text follows it, rows cannot be told apart any more."""
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(_decode_lines(stream), strict=True)
    first = columns.header
    try:
        for cells in reader:
            if cells and not first:
                yield _name_cells(tuple(cells), columns.names, "")
            first = first and not cells
    except csv.Error as error:
        raise CorpusError(
            f"{source.source.name}, line {reader.line_num}: {error}; mend the quoting, "
            "or convert the file to JSONL or Parquet"
        ) from error


def _decode_lines(stream: ByteStream) -> Iterator[str]:
    rest = b""
    first = True
    while block := stream.read(1 << 20):
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        for line in lines:
            yield (line.removeprefix(BOM) if first else line).decode(errors="surrogateescape") + "\n"
            first = False
        if len(rest) > MAX_ROW_BYTES:
            break  # one line without end: the csv module refuses it for its length
    if rest:
        yield (rest.removeprefix(BOM) if first else rest).decode(errors="surrogateescape")


def _read_parquet(source: PairSource) -> Iterator[ReadRow]:
    with open_parquet(source.source) as file, name_parquet_faults(source.source):
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
            for place, row in enumerate(batch.to_pylist()):
                yield ReadRow(row=row, batch=(batch, place))
