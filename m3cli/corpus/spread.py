"""Portions of the input that stand for the whole of it: whole rows, at even distances.

A portion of a line file is what a window of it touches, brought to whole rows: of a row that is longer than a window,
all of it. It stands for the bytes up to the next portion. So a row counts by its length however long it is, and where
the windows are all there is, nothing is guessed. Parquet is cut by rows, and a portion stands for the rows up to the
next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from m3cli.corpus.plan import Plan
from m3cli.corpus.streams import BLOCK_BYTES, corpus_errors
from m3cli.records import Shard, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """Some whole rows."""

    shard: Shard
    factor: float
    "how many times as much they stand for"


def spread_portions(sources: Sequence[Source], plan: Plan, *, number: int, max_row_bytes: int) -> list[Portion]:
    """Choose about `number` shards of each kind, line files and Parquet, and bring them to whole rows.

    Args:
        sources: files none of which is sequential.
        plan: all their shards, in the order of the sources.
        number: how many; all, if there are no more.
        max_row_bytes: rows that are longer than this are passed over.

    Returns:
        the portions, numbered from 0.

    Raises:
        CorpusError: a file is gone or cannot be read.
    """
    found: list[Portion] = []
    for in_rows in (False, True):
        kind = [shard for shard in plan.shards if (shard.row_group >= 0) == in_rows]
        ends = list(accumulate((shard.stop - shard.start for shard in kind), initial=0))
        chosen = [len(kind) * place // number for place in range(number)] if len(kind) > number else range(len(kind))
        places: list[tuple[int, Shard]] = []
        for place in chosen:
            shard = kind[place]
            if in_rows:
                places.append((ends[place], shard))
                continue
            before = places[-1][1] if places and places[-1][1].source == shard.source else None
            whole = _take_whole_rows(
                sources[shard.source], shard, after=before.stop if before else 0, max_row_bytes=max_row_bytes
            )
            if whole is not None:
                places.append((ends[place] + whole.start - shard.start, whole))
        found += _weigh(places, ends[-1])
    found.sort(key=lambda portion: (portion.shard.source, portion.shard.row_group, portion.shard.start))
    return [replace(portion, shard=replace(portion.shard, index=index)) for index, portion in enumerate(found)]


def _weigh(places: list[tuple[int, Shard]], total: int) -> Iterator[Portion]:
    """Yield portions that stand for all from where they begin to where the next one begins, the first from 0."""
    begins = [0, *(begin for begin, _ in places[1:]), total]
    for number, (_, shard) in enumerate(places):
        stands_for = begins[number + 1] - begins[number]
        yield Portion(shard=shard, factor=stands_for / (shard.stop - shard.start))


def _take_whole_rows(source: Source, shard: Shard, *, after: int, max_row_bytes: int) -> Shard | None:
    """Return a shard from the row that its first byte is in to the end of the row that its last byte is in.

    None: there is nothing of it after `after`, or such a row is too long.
    """
    if shard.stop <= after:
        return None
    with corpus_errors(source), Path(source.path).open("rb") as file:
        start = after if shard.start <= after else _find_start(file, shard.start, max_row_bytes=max_row_bytes)
        stop = _find_stop(file, shard.stop, size=source.size, max_row_bytes=max_row_bytes)
    if start is None or stop is None:
        return None
    return replace(shard, start=max(start, after), stop=stop)


def _find_start(file: BinaryIO, place: int, *, max_row_bytes: int) -> int | None:
    """Return where the row begins that the byte at `place` is in."""
    stop = place
    while stop > 0 and place - stop <= max_row_bytes:
        start = max(0, stop - BLOCK_BYTES)
        file.seek(start)
        newline = file.read(stop - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        stop = start
    return None if stop else 0


def _find_stop(file: BinaryIO, place: int, *, size: int, max_row_bytes: int) -> int | None:
    """Return where the row ends that the byte before `place` is in."""
    start = place - 1
    file.seek(start)
    while start - place <= max_row_bytes:
        block = file.read(BLOCK_BYTES)
        newline = block.find(b"\n")
        if newline >= 0 or not block:
            return min(start + newline + 1, size) if block else size
        start += len(block)
    return None
