"""Pairs of query and passage, texts or ids, from a file or standard input: every row comes out, in order.

TSV (no quoting), CSV (quoting as Python's csv module has it), JSONL, Parquet, and TREC runs, whose columns are ids.
A row that gives no pair is still a row: it carries the reason in `fault`, one of a few fixed phrases. Wholly blank
lines are no rows. The first line of TSV and CSV is a header only if it names both columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from m3cli.corpus.pair_rows import ReadRow, read_rows
from m3cli.corpus.pair_source import PairColumns, PairSource
from m3cli.corpus.rows import Fault, name_type
from m3cli.corpus.streams import PeekableStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One row of a pairs file."""

    number: int
    "from 1, a header not counted"
    query: str
    "text or id; empty if there is a fault"
    passage: str
    fault: str
    "why the row is no pair, a short fixed phrase; empty if it is one"
    row: dict[str, Any]
    "the input's columns, as far as they could be read"
    raw: bytes
    "the line as it was read, JSONL only"
    batch: Any
    "(pyarrow.RecordBatch, row in it), Parquet only"


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowLimits:
    """How many pairs are worked on together, so that memory is bounded."""

    pairs: int
    text_bytes: int
    "of distinct queries and passages together"
    side_bytes: int
    "of distinct queries or of distinct passages, whichever is less: that side's vectors are held"


def read_pairs(
    source: PairSource, columns: PairColumns, *, ids: bool, stdin: PeekableStream | None = None
) -> Iterator[Pair]:
    """Yield every row of a pairs file; `ids`: the columns are ids, and integers will do.

    Raises:
        CorpusError: the file is damaged, or its quoting cannot be told.
    """
    for number, read in enumerate(read_rows(source, columns, stdin=stdin), start=1):
        yield _make_pair(number, read, columns, ids=ids)


def cut_windows(pairs: Iterable[Pair], limits: WindowLimits) -> Iterator[list[Pair]]:
    """Cut pairs into runs within the limits; one pair that is beyond them is a run of its own."""
    window: list[Pair] = []
    sides: tuple[set[str], set[str]] = (set(), set())
    sizes = [0, 0]
    for pair in pairs:
        window.append(pair)
        for side, text in enumerate((pair.query, pair.passage)):
            if text not in sides[side]:
                sides[side].add(text)
                sizes[side] += len(text.encode())
        if len(window) >= limits.pairs or sum(sizes) >= limits.text_bytes or min(sizes) >= limits.side_bytes:
            yield window
            window, sides, sizes = [], (set(), set()), [0, 0]
    if window:
        yield window


def _make_pair(number: int, read: ReadRow, columns: PairColumns, *, ids: bool) -> Pair:
    sides = {"query": "", "passage": ""}
    fault = read.fault
    if not fault:
        for side, name in (("query", columns.query), ("passage", columns.passage)):
            value = _read_side(read.row, name, side, ids=ids)
            if isinstance(value, Fault):
                fault = value.reason
                break
            sides[side] = value
    if fault:
        sides = dict.fromkeys(sides, "")
    return Pair(number=number, **sides, fault=fault, row=read.row, raw=read.raw, batch=read.batch)


def _read_side(row: dict[str, Any], name: str, side: str, *, ids: bool) -> str | Fault:
    value = row.get(name)
    if ids and type(value) is int:
        return str(value)
    if value is None:
        return Fault(reason=f"no {side}")
    if type(value) is not str:
        return Fault(reason=f"{side} is {name_type(value)}, not a string")
    return value if value and not value.isspace() else Fault(reason=f"empty {side}")
