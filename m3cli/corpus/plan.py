"""Shards of the input, planned before any work on them; the same input always has the same shards.

A row of a line format belongs to the k-th shard of its source if its first byte (of the decompressed stream) is in
[k * size, (k + 1) * size). A plain file is planned from its size; a compressed or piped one, or CSV, while it streams.
A Parquet row group, or an Arrow file, is cut into nearly equal ranges of rows, by its bytes of text. Rows after the
limit are ignored. Files of a folder are planned in m3cli.corpus.files.

A sample of a line file consists of all rows that a shard touches, and represents the bytes up to the next sample. So a
row counts by its length, and the result is exact if all shards are sampled. A sample of Parquet represents the rows up
to the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import BinaryIO

from m3cli.config import MAX_ROW_BYTES
from m3cli.corpus.files import cut_files, list_text_files
from m3cli.corpus.parquet import open_columns
from m3cli.corpus.streams import BLOCK_BYTES, ByteStream, LineStream, corpus_errors, open_file
from m3cli.records import COLUMNAR, Fields, Shard, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The shards that are known before sequential sources are read."""

    shards: tuple[Shard, ...]
    "of the first `num_sources` sources"
    num_sources: int
    complete: bool
    "whether `shards` are all shards"
    shard_size: int
    limit: int | None
    rows_left: int | None
    "of the limit, after the first `num_sources` sources"


def plan_shards(
    sources: Sequence[Source],
    *,
    fields: Fields,
    shard_size: int,
    limit: int | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> Plan:
    """Plan the sources before the first sequential one, or all if the limit ends before it."""
    shards: list[Shard] = []
    rows_left = limit
    number = 0
    while number < len(sources) and rows_left != 0 and not sources[number].sequential:
        found, rows_left = plan_source(
            sources[number],
            number=number,
            first_index=len(shards),
            fields=fields,
            shard_size=shard_size,
            rows_left=rows_left,
            max_row_bytes=max_row_bytes,
        )
        shards.extend(found)
        number += 1
    return Plan(
        shards=tuple(shards),
        num_sources=number,
        complete=number == len(sources) or rows_left == 0,
        shard_size=shard_size,
        limit=limit,
        rows_left=rows_left,
    )


def plan_source(
    source: Source,
    *,
    number: int,
    first_index: int,
    fields: Fields,
    shard_size: int,
    rows_left: int | None,
    max_row_bytes: int,
) -> tuple[tuple[Shard, ...], int | None]:
    """Return the shards of a source that is not sequential, and the remaining rows of the limit."""
    if source.format in COLUMNAR:
        pieces, rows_left = _cut_row_groups(source, fields=fields, shard_size=shard_size, rows_left=rows_left)
    elif source.format == "files":
        files = list_text_files(source.path)[:rows_left]
        pieces = [(0, start, stop) for start, stop in cut_files(files, shard_size=shard_size)]
        rows_left = None if rows_left is None else rows_left - len(files)
    else:
        header = source.format == "tsv" and fields.header
        end, rows_left = _find_end(source, rows_left, header=header, max_row_bytes=max_row_bytes)
        pieces = [(-1, start, min(start + shard_size, end)) for start in range(0, end, shard_size)]
    shards = (
        Shard(index=first_index + i, source=number, start=start, stop=stop, row_group=group)
        for i, (group, start, stop) in enumerate(pieces)
    )
    return tuple(shards), rows_left


def _find_end(source: Source, rows_left: int | None, *, header: bool, max_row_bytes: int) -> tuple[int, int | None]:
    """Return the end of the last row within the limit, and the remaining rows of the limit."""
    if rows_left is None:
        return source.size, None
    with ByteStream(source) as stream:
        lines = LineStream(stream, offset=0, max_row_bytes=max_row_bytes, rows_left=rows_left, header=header)
        for _ in lines.take(source.size):
            pass
    return lines.offset, lines.rows_left


def _cut_row_groups(
    source: Source, *, fields: Fields, shard_size: int, rows_left: int | None
) -> tuple[list[tuple[int, int, int]], int | None]:
    """Return (row group, first row, last row + 1) of each shard, and the remaining rows of the limit."""
    pieces = []
    with closing(open_columns(source)) as file:
        for group, rows in enumerate(file.num_rows):
            limit = rows if rows_left is None else min(rows, rows_left)
            count = min(rows, max(1, -(-file.count_text_bytes(group, fields) // shard_size)))
            for i in range(count):
                start, stop = i * rows // count, min((i + 1) * rows // count, limit)
                if start < stop:
                    pieces.append((group, start, stop))
            rows_left = None if rows_left is None else rows_left - limit
    return pieces, rows_left


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Some complete rows."""

    shard: Shard
    factor: float
    "size of the represented input, relative to the sample"


def sample_shards(sources: Sequence[Source], plan: Plan, *, number: int, max_row_bytes: int) -> list[Sample]:
    """Return about `number` shards of each kind, line files and Parquet, extended to complete rows.

    Args:
        sources: files that are not sequential.
        plan: all their shards, in the order of the sources.
        number: all shards if there are no more.
        max_row_bytes: longer rows are skipped.

    Returns:
        the samples, whose shards are numbered from 0.

    Raises:
        CorpusError: a file is missing or cannot be read.
    """
    found: list[Sample] = []
    for in_rows in (False, True):
        kind = [shard for shard in plan.shards if (shard.row_group >= 0) == in_rows]
        ends = list(accumulate((shard.stop - shard.start for shard in kind), initial=0))
        chosen = [len(kind) * i // number for i in range(number)] if len(kind) > number else range(len(kind))
        offsets: list[tuple[int, Shard]] = []
        for index in chosen:
            shard = kind[index]
            if in_rows:
                offsets.append((ends[index], shard))
                continue
            previous = offsets[-1][1] if offsets and offsets[-1][1].source == shard.source else None
            extended = _extend_to_rows(
                sources[shard.source], shard, after=previous.stop if previous else 0, max_row_bytes=max_row_bytes
            )
            if extended is not None:
                offsets.append((ends[index] + extended.start - shard.start, extended))
        found += _weigh(offsets, ends[-1])
    found.sort(key=lambda sample: (sample.shard.source, sample.shard.row_group, sample.shard.start))
    return [replace(sample, shard=replace(sample.shard, index=index)) for index, sample in enumerate(found)]


def _weigh(offsets: list[tuple[int, Shard]], total: int) -> Iterator[Sample]:
    """Yield samples that represent the input from their offset to the next one, the first from 0."""
    begins = [0, *(begin for begin, _ in offsets[1:]), total]
    for (_, shard), (begin, end) in zip(offsets, pairwise(begins), strict=False):  # without samples `begins` has two
        yield Sample(shard=shard, factor=(end - begin) / (shard.stop - shard.start))


def _extend_to_rows(source: Source, shard: Shard, *, after: int, max_row_bytes: int) -> Shard | None:
    """Return a shard extended to complete rows; None: it ends before `after`, or such a row is too long."""
    if shard.stop <= after:
        return None
    with corpus_errors(source), open_file(source) as file:
        start = after if shard.start <= after else _find_start(file, shard.start, max_row_bytes=max_row_bytes)
        stop = _find_stop(file, shard.stop, size=source.size, max_row_bytes=max_row_bytes)
    if start is None or stop is None:
        return None
    return replace(shard, start=max(start, after), stop=stop)


def _find_start(file: BinaryIO, offset: int, *, max_row_bytes: int) -> int | None:
    """Return the start of the row that contains the byte at `offset`."""
    stop = offset
    while stop > 0 and offset - stop <= max_row_bytes:
        start = max(0, stop - BLOCK_BYTES)
        file.seek(start)
        newline = file.read(stop - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        stop = start
    return None if stop else 0


def _find_stop(file: BinaryIO, offset: int, *, size: int, max_row_bytes: int) -> int | None:
    """Return the end of the row that contains the byte before `offset`."""
    start = offset - 1
    file.seek(start)
    while start - offset <= max_row_bytes:
        block = file.read(BLOCK_BYTES)
        newline = block.find(b"\n")
        if newline >= 0 or not block:
            return min(start + newline + 1, size) if block else size
        start += len(block)
    return None
