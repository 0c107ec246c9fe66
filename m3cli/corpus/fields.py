"""Resolve which fields are text, id and title, from the first rows of a source or the schema of Parquet.

At most 100 rows are peeked at, those in the first MiB, and more while none of them can be parsed. Invalid rows are
skipped; an error message names the first of them.
"""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import pyarrow as pa

from m3cli.config import ENCODE_FLAGS, ID_NAMES, MAX_ROW_BYTES, TEXT_NAMES, TITLE_NAMES, FieldFlags
from m3cli.corpus.files import FILE_FIELDS
from m3cli.corpus.parquet import can_be_kept, check_columns, is_text, open_columns, without_views
from m3cli.corpus.rows import Fault, list_fields, parse_json_line, split_cells
from m3cli.corpus.sources import split_endings
from m3cli.corpus.streams import BOM, ByteStream, CsvStream, LineStream, PeekableStream, Readable, read_head, split_rows
from m3cli.errors import CorpusError, UsageError
from m3cli.records import COLUMNAR, Fields, Source, SourceFormat

PEEK_ROWS = 100
PEEK_BYTES = 1 << 20
LOOK_BYTES = 1 << 30
"decompressed bytes in which a valid row is searched"
_NAME = re.compile(r"[^\W\d][\w .-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peek:
    """The fields of a source's first rows."""

    source: Source
    names: tuple[str, ...]
    "in order; empty if all rows are invalid"
    texts: frozenset[str]
    "names with a string in some row"
    fault: Fault | None
    "of the first invalid row"


@dataclass(frozen=True, slots=True, kw_only=True)
class TsvLayout:
    """The columns of the TSV sources."""

    columns: tuple[str, ...] = ()
    header: bool = False


def peek_source(source: Source, layout: TsvLayout, *, stdin: PeekableStream | None = None) -> Peek | None:
    """Return the fields of the first rows; None: there are no rows."""
    if source.format == "csv" or source.format in COLUMNAR:
        schema = read_schema(source, stdin=stdin)
        if schema is None:
            return None
        texts = frozenset(field.name for field in schema if is_text(field.type))
        return Peek(source=source, names=tuple(schema.names), texts=texts, fault=None)
    if source.format == "files":
        return Peek(source=source, names=FILE_FIELDS, texts=frozenset(FILE_FIELDS), fault=None)
    if source.format == "jsonl":
        return _peek_json(source, stdin)
    if next(_read_rows(source, stdin), None) is None:
        return None
    names = layout.columns if source.format == "tsv" else ("text",)
    return Peek(source=source, names=names, texts=frozenset(names), fault=None)


def read_schema(source: Source, *, stdin: PeekableStream | None = None) -> Any:
    """Return the Arrow schema of a file of columns, and of CSV, which has only text; None: CSV without rows."""
    if source.format in COLUMNAR:
        with closing(open_columns(source)) as file:
            return file.schema
    stream = CsvStream(io.BytesIO(read_head(source, PEEK_BYTES, stdin=stdin)), max_row_bytes=PEEK_BYTES)
    for block in stream.take(PEEK_BYTES):
        if stream.columns and block.row is not None:
            return pa.schema([(name, pa.string()) for name in stream.columns])
        if isinstance(block.row, Fault):
            raise CorpusError(
                f"{source.name}: its first row, which should be the header, cannot be read as CSV: "
                f"{_format_fault(block.row)}; correct it"
            )
    return None


def find_tsv_layout(
    source: Source,
    *,
    required: str | None,
    texts: Collection[str],
    others: Collection[str],
    flag: str | None,
    stdin: PeekableStream | None = None,
) -> TsvLayout | None:
    """Return whether the first line is a header, and the columns; None: there are no rows.

    It is a header if it contains `required`, or if all cells look like names, with one of `texts` and of `others`.

    Raises:
        CorpusError: no row has a tab, and the file is not called TSV; `flag` is the option that forces a format.
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
    """Yield rows, a fault for one that is too long; after the first MiB only until there are enough."""
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
        for name, value in list_fields(row):
            texts[name] = texts.get(name, False) or isinstance(value, str)
    if raw is None:
        return None
    return Peek(
        source=source,
        names=tuple(texts),
        texts=frozenset(name for name, is_string in texts.items() if is_string),
        fault=fault,
    )


NAMES_SHOWN = 20


def resolve_fields(
    sources: Sequence[Source],
    *,
    id_field: str | None = None,
    text_field: str | None = None,
    title_field: str | None = None,
    keep_fields: Sequence[str] = (),
    reserved: frozenset[str] = frozenset(),
    flags: FieldFlags = ENCODE_FLAGS,
    stdin: PeekableStream | None = None,
) -> Fields:
    """Return the fields of text, id and title; None: find it, '' for id and title: none.

    Raises:
        UsageError: the names are invalid.
        CorpusError: a field is missing or none is known; `flags` are the names of the options in the message.
    """
    _check_names(text_field, keep_fields, reserved, flags)
    ids = ID_NAMES if id_field is None else (id_field,)
    layout = _find_layout(sources, text_field, (*ids, *TITLE_NAMES), flags, stdin)
    peeks = _peek_formats(sources, layout, stdin)
    counted = len(layout.columns) if peeks[0].source.format == "tsv" and not layout.header else 0
    text = text_field or (_count_text(peeks[0], flags) if counted else _find_text(peeks[0], flags))
    for peek in peeks:
        _check_named([peek], text, flags.text)
    for name in keep_fields:
        _check_named(peeks, name, flags.kept)
    candidates = [name for name in peeks[0].names if name != text]
    fields = Fields(
        text=text,
        id=_resolve(id_field, flags.id, peeks, ("1",) if counted > 1 else ID_NAMES, candidates),
        title=_resolve(
            title_field, flags.title, peeks, ("2",) if counted == 3 and text == "3" else TITLE_NAMES, candidates
        ),
        kept=tuple(keep_fields),
        columns=layout.columns,
        header=layout.header,
    )
    _check_files(sources, fields, flags, stdin)
    return fields


def kept_schema(sources: Sequence[Source], fields: Fields) -> Any:
    """Return the `pyarrow.Schema` of the kept fields: a Parquet column's own type, string from anything else."""
    columns: dict[str, tuple[Any, Source]] = {}
    for source in sources:
        schema = read_schema(source) if source.format in COLUMNAR and fields.kept else None
        for name in fields.kept:
            kind = _kept_type(source, schema, name)
            if kind is None:
                continue
            known, first = columns.setdefault(name, (kind, source))
            if known == kind:
                continue
            if not (is_text(known) and is_text(kind)):
                raise CorpusError(
                    f"kept field {name!r} is {known} in {first.name} and {kind} in {source.name}: "
                    "convert one of them, leave the field out of --keep-fields, or encode the files separately"
                )
            columns[name] = (pa.string(), source)
    return pa.schema([pa.field(name, columns[name][0]) for name in fields.kept])


def _kept_type(source: Source, schema: Any, name: str) -> Any:
    if schema is None:
        return pa.string()
    if name not in schema.names:
        return None
    kind = schema.field(name).type
    if not can_be_kept(kind):
        raise CorpusError(
            f"kept field {name!r} is {kind} in {source.name}, which cannot be copied: "
            "convert it to a plain list, struct or string, or leave the field out of --keep-fields"
        )
    return without_views(kind)


def _check_names(
    text_field: str | None, keep_fields: Sequence[str], reserved: frozenset[str], flags: FieldFlags
) -> None:
    if text_field == "":
        raise UsageError(f"{flags.text} is empty: every row needs a text")
    for i, name in enumerate(keep_fields):
        if not name or name in keep_fields[:i]:
            raise UsageError(f"{flags.kept}: {name!r} is {'named twice' if name else 'no name'}")
        if name in reserved:
            raise UsageError(
                f"{flags.kept}: {name!r} clashes with a column that m3 writes: rename the field in the input"
            )


def _find_layout(
    sources: Sequence[Source],
    text_field: str | None,
    others: tuple[str, ...],
    flags: FieldFlags,
    stdin: PeekableStream | None,
) -> TsvLayout:
    for source in sources:
        if source.format == "tsv":
            texts = TEXT_NAMES if text_field is None else (text_field,)
            layout = find_tsv_layout(
                source, required=text_field, texts=texts, others=others, flag=flags.format, stdin=stdin
            )
            if layout is not None:
                return layout
    return TsvLayout()


def _peek_formats(sources: Sequence[Source], layout: TsvLayout, stdin: PeekableStream | None) -> list[Peek]:
    """Return the first source of each format that has rows; plain text only if there is no other."""
    peeks: dict[SourceFormat, Peek] = {}
    for source in sources:
        if source.format not in peeks:
            peek = peek_source(source, layout, stdin=stdin)
            if peek is not None:
                peeks[source.format] = peek
    if not peeks:
        raise CorpusError(f"{', '.join(source.name for source in sources[:5])}: nothing to encode, there are no rows")
    return [peek for peek in peeks.values() if peek.source.format != "text"] or list(peeks.values())


def _count_text(peek: Peek, flags: FieldFlags) -> str:
    """Return the text column of a TSV without header: the last of at most three."""
    if len(peek.names) > 3:
        raise CorpusError(
            f"{peek.source.name} has {len(peek.names)} columns and no header that names the text: "
            f"name its number, from 1, with {flags.text}"
        )
    return peek.names[-1]


def _find_text(peek: Peek, flags: FieldFlags) -> str:
    found = _first_of(TEXT_NAMES, [name for name in peek.names if name in peek.texts]) or _first_of(
        TEXT_NAMES, peek.names
    )
    if found is not None:
        return found
    if peek.fault is not None and not peek.names:
        forcing = f"name the format with {flags.format}, " if flags.format else ""
        raise CorpusError(
            f"{peek.source.name}: none of the first rows can be read, the first for this: {_format_fault(peek.fault)}; "
            f"correct it, {forcing}or name its text with {flags.text}"
        )
    raise CorpusError(
        f"{peek.source.name} has no field that is known for text; it has {_list_names(peek.names)}: "
        f"name it with {flags.text}{_guess('text', peek.names)}"
    )


def _format_fault(fault: Fault) -> str:
    return f"{fault.reason} ({fault.detail})" if fault.detail else fault.reason


def _resolve(
    name: str | None, flag: str, peeks: Sequence[Peek], names: Sequence[str], candidates: Sequence[str]
) -> str | None:
    if name is None:
        return _first_of(names, candidates)
    if name:
        _check_named(peeks, name, flag)
    return name or None


def _first_of(names: Sequence[str], candidates: Sequence[str]) -> str | None:
    return next((name for name in names if name in candidates), None)


def _check_named(peeks: Sequence[Peek], name: str, flag: str) -> None:
    """Check that a field is in one of the first rows, unless all those are invalid."""
    names = tuple(dict.fromkeys(each for peek in peeks for each in peek.names))
    if names and name not in names:
        raise CorpusError(
            f"{', '.join(peek.source.name for peek in peeks)}: no row has the field {name!r}; "
            f"the first rows have {_list_names(names)}: correct {flag}{_guess(name, names)}"
        )


def _list_names(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (" ..." if len(names) > NAMES_SHOWN else "") or "no fields"


def _guess(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _check_files(sources: Sequence[Source], fields: Fields, flags: FieldFlags, stdin: PeekableStream | None) -> None:
    """Check the columns of each CSV, Parquet and Arrow file, and the header of each TSV."""
    for source in sources:
        if source.format == "csv" or source.format in COLUMNAR:
            if (schema := read_schema(source, stdin=stdin)) is not None:
                check_columns(source, schema, fields, flags)
        elif source.format == "tsv" and fields.header and source.size:
            header = read_first_line(source, stdin=stdin)
            if header != fields.columns:
                raise CorpusError(
                    f"{source.name} does not begin with the header of the other TSV files, "
                    f"{_list_names(fields.columns)}, but with {_list_names(header)}: "
                    "give it that header, or encode it separately"
                )
