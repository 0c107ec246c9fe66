"""Samples of the input: complete rows at even distances, each with the factor of the input that it represents.

A sample of a line file consists of all rows that a shard touches, and represents the bytes up to the next sample. So a
row counts by its length, and the result is exact if all shards are sampled. A sample of Parquet represents the rows up
to the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import BinaryIO

from m3cli.corpus.plan import Plan
from m3cli.corpus.streams import BLOCK_BYTES, corpus_errors, open_file
from m3cli.records import Shard, Source


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
