"""Shards as documents, read in order, with the text of one shard in memory.

Before each shard `ask` returns an action: "read", "hash" (its input is hashed, not parsed) or "skip" (it is not read).
A sequential source is read in any case, so "skip" hashes there. The hash of a line shard covers all bytes from its
first line to the next shard's first line, with blank lines and headers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import xxhash

from m3cli.config import MAX_ROW_BYTES
from m3cli.corpus.files import list_text_files, parse_file, version_of
from m3cli.corpus.parquet import (
    Columns,
    GroupCursor,
    check_columns,
    hash_table,
    open_columns,
    parquet_errors,
    split_table,
)
from m3cli.corpus.plan import Plan, plan_source
from m3cli.corpus.rows import (
    TOO_LONG,
    Fault,
    ParsedRows,
    RawRow,
    Row,
    build_documents,
    parse_json_line,
    parse_text_line,
    parse_tsv_line,
)
from m3cli.corpus.streams import (
    BLOCK_BYTES,
    Block,
    ByteStream,
    CsvStream,
    LineStream,
    PeekableStream,
    check_unchanged,
    check_version,
    corpus_errors,
    find_inode,
    split_rows,
)
from m3cli.errors import CorpusError
from m3cli.records import COLUMNAR, Fields, Shard, ShardText, Source

Action = Literal["read", "hash", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    fields: Fields
    schema: Any
    title_sep: str
    max_row_bytes: int


def read_shards(
    sources: Sequence[Source],
    *,
    plan: Plan,
    fields: Fields,
    schema: Any,
    title_sep: str = "\n",
    max_row_bytes: int = MAX_ROW_BYTES,
    ask: Callable[[Shard], Action],
    stdin: PeekableStream | None = None,
) -> Generator[ShardText, None, int]:
    """Yield the shards that are read or hashed, in order; return the number of all shards."""
    options = _Options(fields=fields, schema=schema, title_sep=title_sep, max_row_bytes=max_row_bytes)
    for number, shards in groupby(plan.shards, key=lambda shard: shard.source):
        yield from _read_planned(sources[number], shards, options=options, ask=ask)
    index, rows_left = len(plan.shards), plan.rows_left
    for number in range(plan.num_sources, len(sources)):
        if rows_left == 0:
            break
        if sources[number].sequential:
            stream = _Stream(sources[number], options=options, rows_left=rows_left, stdin=stdin)
            index = yield from _read_stream(stream, number, index, shard_size=plan.shard_size, ask=ask)
            rows_left = stream.lines.rows_left
        else:
            found, rows_left = plan_source(
                sources[number],
                number=number,
                first_index=index,
                fields=fields,
                shard_size=plan.shard_size,
                rows_left=rows_left,
                max_row_bytes=max_row_bytes,
            )
            yield from _read_planned(sources[number], found, options=options, ask=ask)
            index += len(found)
    return index


def _read_planned(
    source: Source, shards: Iterable[Shard], *, options: _Options, ask: Callable[[Shard], Action]
) -> Iterator[ShardText]:
    kind = _ColumnFile if source.format in COLUMNAR else _TextFiles if source.format == "files" else _PlainFile
    inode = find_inode(source)
    with closing(kind(source, options=options)) as opened:
        for shard in shards:
            action = ask(shard)
            if action != "skip":
                read = opened.read(shard, parse=action == "read")
                if kind is not _TextFiles:  # which checks the files that it reads
                    check_unchanged(source, inode=inode)
                yield read


def _read_stream(
    stream: _Stream, number: int, index: int, *, shard_size: int, ask: Callable[[Shard], Action]
) -> Generator[ShardText, None, int]:
    """Yield the shards of a sequential source; return the index after its last shard."""
    start, inode = 0, find_inode(stream.source)
    with closing(stream):
        while stream.lines.offset > start or stream.lines.has_more():
            shard = Shard(index=index, source=number, start=start, stop=start + shard_size)
            read = stream.read(shard, parse=ask(shard) == "read")
            check_unchanged(stream.source, inode=inode)
            yield read
            start += shard_size
            index += 1
    return index


class _Stream:
    """A sequential source."""

    def __init__(
        self, source: Source, *, options: _Options, rows_left: int | None, stdin: PeekableStream | None
    ) -> None:
        self.source = source
        self._options = options
        self._bytes = ByteStream(source, stdin=stdin)
        self.lines: LineStream | CsvStream
        if source.format == "csv":
            self.lines = CsvStream(self._bytes, max_row_bytes=options.max_row_bytes, rows_left=rows_left)
        else:
            self.lines = LineStream(
                self._bytes,
                offset=0,
                max_row_bytes=options.max_row_bytes,
                rows_left=rows_left,
                header=_has_header(source, options.fields),
            )

    def read(self, shard: Shard, *, parse: bool) -> ShardText:
        return _read_lines(self.lines, shard, self.source, options=self._options, parse=parse)

    def close(self) -> None:
        self._bytes.close()


class _PlainFile:
    """A plain file of lines, in which shards are found by seeking."""

    def __init__(self, source: Source, *, options: _Options) -> None:
        self._source = source
        self._options = options
        self._bytes: ByteStream | None = None
        self._lines: LineStream | None = None

    def read(self, shard: Shard, *, parse: bool) -> ShardText:
        if self._lines is None or self._lines.offset < shard.start:
            self._lines = self._seek(shard.start)
        return _read_lines(self._lines, shard, self._source, options=self._options, parse=parse)

    def _seek(self, start: int) -> LineStream:
        """Return the lines that start at `start` or later."""
        if self._bytes is None:
            self._bytes = ByteStream(self._source)
        before = max(0, start - 1)
        self._bytes.seek(before)
        lines = LineStream(self._bytes, offset=before, max_row_bytes=self._options.max_row_bytes)
        for _ in lines.take(start):
            pass
        return lines

    def close(self) -> None:
        if self._bytes is not None:
            self._bytes.close()


class _ColumnFile:
    """A Parquet or Arrow file, of which each row group is decoded at most once."""

    def __init__(self, source: Source, *, options: _Options) -> None:
        self._source = source
        self._options = options
        self._file: Columns | None = None
        self._cursor: GroupCursor | None = None
        self._group_starts: list[int] = []

    def read(self, shard: Shard, *, parse: bool) -> ShardText:
        table = self._cursor_for(shard).take(shard.start, shard.stop)
        fields = self._options.fields
        parsed = ParsedRows()
        if parse:
            rows = split_table(
                table,
                first_position=self._group_starts[shard.row_group] + shard.start,
                fields=fields,
                max_row_bytes=self._options.max_row_bytes,
            )
            parsed = build_documents(rows, source=self._source, fields=fields, title_sep=self._options.title_sep)
        return _pack(shard, parsed, self._keep(table, parsed.indices), hash_table(table))

    def _cursor_for(self, shard: Shard) -> GroupCursor:
        if self._file is None:
            self._file = open_columns(self._source)
            check_columns(self._source, self._file.schema, self._options.fields)
            self._group_starts = list(accumulate(self._file.num_rows, initial=0))
        if self._cursor is None or self._cursor.group != shard.row_group:
            self._cursor = GroupCursor(self._source, self._file, group=shard.row_group, fields=self._options.fields)
        return self._cursor

    def _keep(self, table: Any, indices: list[int]) -> Any:
        schema = self._options.schema
        if not self._options.fields.kept:
            return None
        with parquet_errors(self._source):
            rows = table if len(indices) == table.num_rows else table.take(pa.array(indices, pa.int64()))
            columns = [
                rows.column(field.name).cast(field.type)
                if field.name in rows.column_names
                else pa.nulls(len(indices), field.type)
                for field in schema
            ]
            return pa.table(columns, schema=schema)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _TextFiles:
    """A folder of which each text file is a document."""

    def __init__(self, source: Source, *, options: _Options) -> None:
        self._source = source
        self._options = options
        self._files = list_text_files(source.path)
        check_version(source, *version_of(self._files))

    def read(self, shard: Shard, *, parse: bool) -> ShardText:
        digest = xxhash.xxh3_128()
        rows = (self._read_file(number, digest) for number in range(shard.start, shard.stop))
        parsed = _parse_rows(rows if parse else (), self._source, options=self._options)
        for _ in rows:
            pass
        return _pack(shard, parsed, _make_kept(parsed, self._options), digest.hexdigest())

    def _read_file(self, number: int, digest: xxhash.xxh3_128) -> RawRow:
        found, most = self._files[number], self._options.max_row_bytes
        digest.update(f"{found.path}\0{found.size}\0".encode())
        with corpus_errors(self._source), Path(self._source.path, found.path).open("rb") as file:
            raw = file.read(most + 1)
            digest.update(raw)
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
            status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (found.size, found.mtime_ns):
            raise CorpusError(f"{found.path} changed while {self._source.name} was read: run the same command again")
        too_long = Fault(reason=TOO_LONG, detail=f"{found.path}: {found.size:,} bytes")
        return number, raw, too_long if len(raw) > most else parse_file(found.path, raw)

    def close(self) -> None:
        """Close nothing: each file is closed once it is read."""


def _parse_rows(rows: Iterable[RawRow], source: Source, *, options: _Options) -> ParsedRows:
    """Return the documents of rows that are not of columns, with the kept fields as text."""
    fields = options.fields
    return build_documents(rows, source=source, fields=fields, title_sep=options.title_sep, kept=fields.kept)


def _make_kept(parsed: ParsedRows, options: _Options) -> Any:
    """Return the kept fields of rows that are not of columns, as a table; None: there are none."""
    if not options.fields.kept:
        return None
    arrays = [pa.array(values, field.type) for values, field in zip(parsed.kept, options.schema, strict=True)]
    return pa.table(arrays, schema=options.schema)


def _read_lines(
    lines: LineStream | CsvStream, shard: Shard, source: Source, *, options: _Options, parse: bool
) -> ShardText:
    digest = xxhash.xxh3_128()
    fields = options.fields
    blocks = _hash_blocks(lines.take(shard.stop), digest)
    rows: Iterator[RawRow]
    if source.format == "csv":
        rows = ((block.offset, block.raw, block.row) for block in blocks if block.row is not None)
    else:
        rows = split_rows(
            blocks,
            _choose_parser(source, fields),
            max_row_bytes=options.max_row_bytes,
            header=_has_header(source, fields),
        )
    parsed = _parse_rows(rows if parse else (), source, options=options)
    for _ in blocks:
        pass
    return _pack(shard, parsed, _make_kept(parsed, options), digest.hexdigest())


def _hash_blocks(blocks: Iterable[Block], digest: xxhash.xxh3_128) -> Iterator[Block]:
    for block in blocks:
        digest.update(block.raw)
        yield block


def _pack(shard: Shard, parsed: ParsedRows, kept: Any, input_hash: str) -> ShardText:
    return ShardText(
        shard=shard,
        documents=tuple(parsed.documents),
        kept=kept,
        skipped=tuple(parsed.skipped),
        input_hash=input_hash,
    )


def _choose_parser(source: Source, fields: Fields) -> Callable[[bytes], Row | Fault]:
    if source.format == "tsv":
        return partial(parse_tsv_line, columns=fields.columns)
    if source.format == "text":
        return partial(parse_text_line, text_field=fields.text)
    return parse_json_line


def _has_header(source: Source, fields: Fields) -> bool:
    return source.format == "tsv" and fields.header
