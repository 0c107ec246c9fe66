"""The first rows of a source, looked at without being consumed: which fields they have, and which hold text.

At most 100 rows: those in the first MiB, and more while none of them can be read; of Parquet the schema. Malformed rows
are passed over, the first is told.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile

from m3cli.config import MAX_ROW_BYTES
from m3cli.corpus.formats import split_endings
from m3cli.corpus.jsonl import parse_json_line
from m3cli.corpus.lines import BOM, LineStream, split_rows
from m3cli.corpus.parquet import is_text, read_parquet_schema
from m3cli.corpus.rows import Fault
from m3cli.corpus.streams import ByteStream, PeekableStream, Readable, read_head
from m3cli.corpus.tsv import split_cells
from m3cli.errors import CorpusError
from m3cli.records import Source

PEEK_ROWS = 100
PEEK_BYTES = 1 << 20
LOOK_BYTES = 1 << 30
"of a file, decompressed, that are looked through for a row that can be read"
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
    if source.format == "jsonl":
        return _peek_json(source, stdin)
    if next(_read_rows(source, stdin), None) is None:
        return None
    names = layout.columns if source.format == "tsv" else ("text",)
    return Peek(source=source, names=names, texts=frozenset(names), fault=None)


def find_tsv_layout(
    source: Source,
    *,
    required: str | None,
    texts: Collection[str],
    others: Collection[str],
    flag: str | None,
    stdin: PeekableStream | None = None,
) -> TsvLayout | None:
    """Tell whether the first line names the fields, and the columns; None if there are no rows.

    It does if `required` is among its cells, or if all its cells look like names, one of `texts` and one of `others`
    among them.

    Raises:
        CorpusError: no row has a tab, and the file is not called TSV; `flag` is what forces a format, if anything does.
    """
    rows: list[bytes | Fault] = []
    rows.extend(islice(_read_rows(source, stdin, enough=lambda: bool(rows)), PEEK_ROWS))
    if not rows:
        return None
    row = rows[0]
    if split_endings(source.path)[0] != ".tsv" and not any(isinstance(each, Fault) or b"\t" in each for each in rows):
        assert not isinstance(row, Fault)
        forcing = f", or name another format with {flag}" if flag else ""
        raise CorpusError(
            f"{source.name} has no tab in its first rows, the first is {row[:60].decode(errors='replace')!r}: "
            f"convert it to TSV or JSONL{forcing}"
        )
    first = read_first_line(source, stdin=stdin)
    named = all(_NAME.fullmatch(cell) for cell in first)
    if required in first or (named and not set(texts).isdisjoint(first) and not set(others).isdisjoint(first)):
        return TsvLayout(columns=first, header=True)
    cells = first if isinstance(row, Fault) else split_cells(row.decode(errors="replace"))
    return TsvLayout(columns=tuple(str(i + 1) for i in range(len(cells))))


def read_first_line(source: Source, *, stdin: PeekableStream | None = None) -> tuple[str, ...]:
    """Return the cells of a TSV's first line."""
    line = read_head(source, PEEK_BYTES, stdin=stdin).removeprefix(BOM).split(b"\n", 1)[0]
    return split_cells(line.decode(errors="replace"))


def _read_rows(
    source: Source, stdin: PeekableStream | None, *, enough: Callable[[], bool] = lambda: False
) -> Iterator[bytes | Fault]:
    """Yield rows, a fault for one that is too long; those after the first MiB only until there are enough."""
    if source.path != "-":
        with ByteStream(source) as stream:
            yield from _split_rows(stream, enough)
        return
    head = read_head(source, PEEK_BYTES, stdin=stdin)
    known = len(head) if len(head) < PEEK_BYTES else head.rfind(b"\n") + 1
    yield from _split_rows(io.BytesIO(head[:known]), enough)
    if known == len(head) < PEEK_BYTES or enough():
        return
    rest = read_head(source, MAX_ROW_BYTES + 1, stdin=stdin)[known:]
    if known + len(rest) > MAX_ROW_BYTES and b"\n" in rest:
        rest = rest[: rest.rfind(b"\n") + 1]
    yield from _split_rows(io.BytesIO(rest), enough)


def _split_rows(stream: Readable, enough: Callable[[], bool]) -> Iterator[bytes | Fault]:
    lines = LineStream(stream, offset=0, max_row_bytes=MAX_ROW_BYTES)
    blocks = takewhile(lambda block: block.offset < LOOK_BYTES, lines.take(LOOK_BYTES))
    rows = split_rows(blocks, lambda row: {"": row}, max_row_bytes=MAX_ROW_BYTES)
    for offset, row, parsed in rows:
        if offset + len(row) > PEEK_BYTES and enough():
            return
        if isinstance(parsed, Fault):
            yield Fault(reason=f"its first row is longer than {MAX_ROW_BYTES:,} bytes")
        else:
            yield row


def _peek_json(source: Source, stdin: PeekableStream | None) -> Peek | None:
    texts: dict[str, bool] = {}
    fault: Fault | None = None
    raw: bytes | Fault | None = None
    for raw in islice(_read_rows(source, stdin, enough=lambda: bool(texts)), PEEK_ROWS):
        row = raw if isinstance(raw, Fault) else parse_json_line(raw)
        if isinstance(row, Fault):
            fault = fault or row
            continue
        for name, value in row.items():
            texts[name] = texts.get(name, False) or isinstance(value, str)
    if raw is None:
        return None
    return Peek(
        source=source,
        names=tuple(texts),
        texts=frozenset(name for name, is_string in texts.items() if is_string),
        fault=fault,
    )
