"""Shards read in order as documents, holding one shard's text at a time.

Each shard is asked about once, in order, just before it would be read: "read" it, "hash" it (its input is hashed,
nothing is parsed), or "skip" it (a plain file is sought past, a Parquet row group not decoded). A source that can only
be streamed is read through in any case, so there "skip" hashes. The hash of a line shard is that of its bytes, from
its first line's first byte to the first byte of the next shard's first line; blank lines and headers count.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from typing import Any, Literal

import pyarrow as pa
import xxhash

from m3cli.config import MAX_ROW_BYTES
from m3cli.corpus.lines import Block, LineStream, split_rows
from m3cli.corpus.parquet import (
    GroupCursor,
    check_columns,
    hash_table,
    open_parquet,
    parquet_errors,
    split_table,
)
from m3cli.corpus.plan import Plan, plan_source
from m3cli.corpus.rows import Fault, ParsedRows, Row, build_documents, parse_json_line, parse_text_line, parse_tsv_line
from m3cli.corpus.streams import ByteStream, PeekableStream, check_unchanged, find_inode
from m3cli.records import Fields, Shard, ShardText, Source

Action = Literal["read", "hash", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
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
    """Yield the shards that are read or hashed, in order; return how many there are in all, skipped ones included."""
    settings = _Settings(fields=fields, schema=schema, title_sep=title_sep, max_row_bytes=max_row_bytes)
    for number, shards in groupby(plan.shards, key=lambda shard: shard.source):
        yield from _read_planned(sources[number], shards, settings=settings, ask=ask)
    index, rows_left = len(plan.shards), plan.rows_left
    for number in range(plan.num_sources, len(sources)):
        if rows_left == 0:
            break
        if sources[number].sequential:
            stream = _Stream(sources[number], settings=settings, rows_left=rows_left, stdin=stdin)
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
            yield from _read_planned(sources[number], found, settings=settings, ask=ask)
            index += len(found)
    return index


def _read_planned(
    source: Source, shards: Iterable[Shard], *, settings: _Settings, ask: Callable[[Shard], Action]
) -> Iterator[ShardText]:
    inode = find_inode(source)
    opened = (_ParquetFile if source.format == "parquet" else _PlainFile)(source, settings=settings)
    with closing(opened):
        for shard in shards:
            action = ask(shard)
            if action != "skip":
                read = opened.read(shard, parse=action == "read")
                check_unchanged(source, inode=inode)
                yield read


def _read_stream(
    stream: _Stream, number: int, index: int, *, shard_size: int, ask: Callable[[Shard], Action]
) -> Generator[ShardText, None, int]:
    """Read a source that can only be streamed; return the index after its last shard."""
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
    """A source that can only be streamed."""

    def __init__(
        self, source: Source, *, settings: _Settings, rows_left: int | None, stdin: PeekableStream | None
    ) -> None:
        self.source = source
        self._settings = settings
        self._bytes = ByteStream(source, stdin=stdin)
        self.lines = LineStream(
            self._bytes,
            offset=0,
            max_row_bytes=settings.max_row_bytes,
            rows_left=rows_left,
            header=_has_header(source, settings.fields),
        )

    def read(self, shard: Shard, *, parse: bool) -> ShardText:
        return _read_lines(self.lines, shard, self.source, settings=self._settings, parse=parse)

    def close(self) -> None:
        self._bytes.close()


class _PlainFile:
    """A file of lines in which every shard can be sought."""

    def __init__(self, source: Source, *, settings: _Settings) -> None:
        self._source = source
        self._settings = settings
        self._bytes: ByteStream | None = None
        self._lines: LineStream | None = None

    def read(self, shard: Shard, *, parse: bool) -> ShardText:
        if self._lines is None or self._lines.offset < shard.start:
            self._lines = self._seek(shard.start)
        return _read_lines(self._lines, shard, self._source, settings=self._settings, parse=parse)

    def _seek(self, start: int) -> LineStream:
        """Return the lines from the first one that begins at `start` or later."""
        if self._bytes is None:
            self._bytes = ByteStream(self._source)
        before = max(0, start - 1)
        self._bytes.seek(before)
        lines = LineStream(self._bytes, offset=before, max_row_bytes=self._settings.max_row_bytes)
        for _ in lines.take(start):
            pass
        return lines

    def close(self) -> None:
        if self._bytes is not None:
            self._bytes.close()


class _ParquetFile:
    """A Parquet file, each row group decoded at most once."""

    def __init__(self, source: Source, *, settings: _Settings) -> None:
        self._source = source
        self._settings = settings
        self._file: Any = None
        self._cursor: GroupCursor | None = None
        self._group_starts: list[int] = []

    def read(self, shard: Shard, *, parse: bool) -> ShardText:
        table = self._cursor_for(shard).take(shard.start, shard.stop)
        fields = self._settings.fields
        gathered = ParsedRows()
        if parse:
            rows = split_table(
                table,
                first_position=self._group_starts[shard.row_group] + shard.start,
                fields=fields,
                max_row_bytes=self._settings.max_row_bytes,
            )
            gathered = build_documents(rows, source=self._source, fields=fields, title_sep=self._settings.title_sep)
        return _pack(shard, gathered, self._keep(table, gathered.places), hash_table(table))

    def _cursor_for(self, shard: Shard) -> GroupCursor:
        if self._file is None:
            self._file = open_parquet(self._source)
            check_columns(self._source, self._file.schema_arrow, self._settings.fields)
            metadata = self._file.metadata
            sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
            self._group_starts = list(accumulate(sizes, initial=0))
        if self._cursor is None or self._cursor.group != shard.row_group:
            self._cursor = GroupCursor(self._source, self._file, group=shard.row_group, fields=self._settings.fields)
        return self._cursor

    def _keep(self, table: Any, places: list[int]) -> Any:
        schema = self._settings.schema
        if not self._settings.fields.kept:
            return None
        with parquet_errors(self._source):
            taken = table if len(places) == table.num_rows else table.take(pa.array(places, pa.int64()))
            columns = [
                taken.column(field.name).cast(field.type)
                if field.name in taken.column_names
                else pa.nulls(len(places), field.type)
                for field in schema
            ]
            return pa.table(columns, schema=schema)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _read_lines(lines: LineStream, shard: Shard, source: Source, *, settings: _Settings, parse: bool) -> ShardText:
    digest = xxhash.xxh3_128()
    fields = settings.fields
    blocks = _hash_blocks(lines.take(shard.stop), digest)
    gathered = ParsedRows(kept=[[] for _ in fields.kept])
    if parse:
        rows = split_rows(
            blocks,
            _choose_parser(source, fields),
            max_row_bytes=settings.max_row_bytes,
            header=_has_header(source, fields),
        )
        gathered = build_documents(rows, source=source, fields=fields, title_sep=settings.title_sep, kept=fields.kept)
    for _ in blocks:
        pass
    kept = None
    if fields.kept:
        arrays = [pa.array(values, field.type) for values, field in zip(gathered.kept, settings.schema, strict=True)]
        kept = pa.table(arrays, schema=settings.schema)
    return _pack(shard, gathered, kept, digest.hexdigest())


def _hash_blocks(blocks: Iterable[Block], digest: xxhash.xxh3_128) -> Iterator[Block]:
    for block in blocks:
        digest.update(block.raw)
        yield block


def _pack(shard: Shard, gathered: ParsedRows, kept: Any, input_hash: str) -> ShardText:
    return ShardText(
        shard=shard,
        documents=tuple(gathered.documents),
        kept=kept,
        skipped=tuple(gathered.skipped),
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
