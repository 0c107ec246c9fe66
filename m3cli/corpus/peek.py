"""The first rows of a source, looked at without being consumed: which fields they have, and which hold text.

At most 100 rows of at most 1 MiB together, or a first one that is longer by itself; of Parquet the schema. Malformed
rows are passed over, the first is told.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from m3cli.config import MAX_ROW_BYTES
from m3cli.corpus.jsonl import parse_json_line
from m3cli.corpus.lines import BOM
from m3cli.corpus.parquet import is_text, read_parquet_schema
from m3cli.corpus.rows import Fault
from m3cli.corpus.streams import PeekableStream, read_head
from m3cli.corpus.tsv import split_cells
from m3cli.records import Source

PEEK_ROWS = 100
PEEK_BYTES = 1 << 20
_NAME = re.compile(r"[^\W\d][\w .-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peek:
    """The fields that the first rows of a source have."""

    source: Source
    names: tuple[str, ...]
    "as they came; empty if all rows are malformed"
    texts: frozenset[str]
    "those that hold a string somewhere"
    fault: Fault | None
    "of the first malformed row"


@dataclass(frozen=True, slots=True, kw_only=True)
class TsvLayout:
    """The columns of the TSV sources."""

    columns: tuple[str, ...] = ()
    header: bool = False


def peek_source(source: Source, layout: TsvLayout, *, stdin: PeekableStream | None = None) -> Peek | None:
    """Look at the first rows; None if there are none."""
    if source.format == "parquet":
        schema = read_parquet_schema(source)
        texts = frozenset(field.name for field in schema if is_text(field.type))
        return Peek(source=source, names=tuple(schema.names), texts=texts, fault=None)
    lines, cut = _read_lines(source, stdin)
    if source.format == "jsonl":
        fault = Fault(reason=f"its first row is longer than {MAX_ROW_BYTES:,} bytes") if cut and not lines else None
        return _peek_json(source, lines, fault) if lines or fault else None
    names = layout.columns if source.format == "tsv" else ("text",)
    return Peek(source=source, names=names, texts=frozenset(names), fault=None) if lines or cut else None


def find_tsv_layout(
    source: Source,
    *,
    required: str | None,
    texts: Collection[str],
    others: Collection[str],
    stdin: PeekableStream | None = None,
) -> TsvLayout | None:
    """Tell whether the first line names the fields, and the columns; None if there are no rows.

    It does if `required` is among its cells, or if all its cells look like names, one of `texts` and one of `others`
    among them.
    """
    lines, cut = _read_lines(source, stdin)
    if not lines and not cut:
        return None
    first = read_first_line(source, stdin=stdin)
    named = all(_NAME.fullmatch(cell) for cell in first)
    if required in first or (named and not set(texts).isdisjoint(first) and not set(others).isdisjoint(first)):
        return TsvLayout(columns=first, header=True)
    cells = split_cells(lines[0].decode(errors="replace")) if lines else first
    return TsvLayout(columns=tuple(str(i + 1) for i in range(len(cells))))


def read_first_line(source: Source, *, stdin: PeekableStream | None = None) -> tuple[str, ...]:
    """Return the cells of a TSV's first line."""
    line = read_head(source, PEEK_BYTES, stdin=stdin).removeprefix(BOM).split(b"\n", 1)[0]
    return split_cells(line.decode(errors="replace"))


def _read_lines(source: Source, stdin: PeekableStream | None) -> tuple[list[bytes], bool]:
    """Return the first whole rows, and whether the look was cut off in the middle of one."""
    head = read_head(source, PEEK_BYTES, stdin=stdin)
    cut = len(head) == PEEK_BYTES
    if cut and b"\n" not in head:
        head = read_head(source, MAX_ROW_BYTES, stdin=stdin)
        cut = len(head) == MAX_ROW_BYTES
        head = head[: head.find(b"\n") + 1] or head
    lines = head.removeprefix(BOM).split(b"\n")
    if cut:
        lines.pop()
    return [line for line in lines if line.strip()][:PEEK_ROWS], cut


def _peek_json(source: Source, lines: Sequence[bytes], fault: Fault | None) -> Peek:
    texts: dict[str, bool] = {}
    for line in lines:
        row = parse_json_line(line)
        if isinstance(row, Fault):
            fault = fault or row
            continue
        for name, value in row.items():
            texts[name] = texts.get(name, False) or isinstance(value, str)
    return Peek(
        source=source,
        names=tuple(texts),
        texts=frozenset(name for name, is_string in texts.items() if is_string),
        fault=fault,
    )
