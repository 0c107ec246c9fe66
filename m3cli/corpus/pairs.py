"""Pairs files: find the format and the columns of query and passage, and read the pairs.

The format follows from the ending, or else from the first bytes. Columns have names, or numbers in TSV and CSV without
a header.
"""

from __future__ import annotations

import csv
import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from m3cli.config import MAX_ROW_BYTES
from m3cli.corpus.parquet import list_rows, open_parquet, parquet_errors, read_parquet_schema
from m3cli.corpus.rows import INVALID_UTF8, TOO_LONG, WRONG_COLUMNS, Fault, name_type, parse_json_line, split_cells
from m3cli.corpus.sources import check_local_input, find_sources, split_endings
from m3cli.corpus.streams import BOM, ByteStream, LineStream, PeekableStream, read_head
from m3cli.corpus.trec import RUN_COLUMNS, split_run_line
from m3cli.errors import CorpusError, UsageError, check_reachable, count_noun, is_utf8
from m3cli.records import Source

PairsFormat = Literal["tsv", "csv", "jsonl", "parquet", "trec"]

QUERY_NAMES = ("query", "question", "q", "sentence1", "sentence_1", "text1", "anchor")
PASSAGE_NAMES = ("passage", "document", "doc", "text", "answer", "p", "sentence2", "sentence_2", "text2", "positive")
QUERY_ID_NAMES = ("query_id", "query-id", "qid", "topic", *QUERY_NAMES)
PASSAGE_ID_NAMES = ("doc_id", "docid", "passage_id", "pid", "corpus_id", "corpus-id", "docno", "id", *PASSAGE_NAMES)

_ENDINGS: dict[str, PairsFormat] = {
    ".tsv": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".trec": "trec",
    ".run": "trec",
}
_PEEK_BYTES = 1 << 20
_PEEK_ROWS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSource:
    """A pairs file."""

    source: Source
    format: PairsFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class PairColumns:
    """The columns of a pairs file."""

    names: tuple[str, ...]
    "all, in order; of JSONL those of the first rows"
    query: str
    passage: str
    header: bool
    "whether the first line is a header; TSV and CSV only"
    schema: Any
    "pyarrow.Schema of a Parquet file, None of others"


def find_pairs(name: str, *, input_format: str = "auto", stdin: PeekableStream | None = None) -> PairSource:
    """Return the file with its format; standard input is only peeked at.

    Raises:
        UsageError: a folder, an address, or a format that is not known.
        CorpusError: a missing or empty file, or one of unknown format.
    """
    if input_format not in ("auto", *get_args(PairsFormat)):
        raise UsageError(f"--input-format {input_format}: it is one of auto, {', '.join(get_args(PairsFormat))}")
    check_local_input(name)
    if name != "-":
        path = Path(name)
        check_reachable(path, CorpusError)
        if path.is_dir():
            raise UsageError(f"{name} is a folder: give one file of pairs, or '-' for standard input")
        if not path.exists():
            raise CorpusError(f"{name}: no such file")
        if path.is_file() and path.stat().st_size == 0:
            raise CorpusError(f"{name} is empty: there are no pairs to score")
    elif stdin is not None and not stdin.peek(1):
        raise CorpusError("standard input is empty: there are no pairs to score")
    known = _ENDINGS.get(split_endings(name)[0]) if input_format == "auto" else input_format
    # For `find_sources` all lines of cells are TSV.
    forced = {"csv": "tsv", "trec": "tsv", None: "auto"}.get(known, known) or "auto"
    if known is None and name != "-" and read_magic(name) != b"PAR1":
        forced = "tsv"
    (source,) = find_sources((name,), input_format=forced, stdin=stdin)
    if known is None:
        known = source.format if source.format == "parquet" else _sniff(source, stdin)
    return PairSource(source=source, format=known)  # type: ignore[arg-type]


def read_magic(path: str) -> bytes:
    """Return the first four bytes of a file, none if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(4)
    except OSError:
        return b""


def _sniff(source: Source, stdin: PeekableStream | None) -> PairsFormat:
    line = _first_lines(source, stdin)[0]
    cells = split_run_line(line.decode(errors="replace"))
    if line.lstrip().startswith(b"{"):
        return "jsonl"
    if len(cells) == len(RUN_COLUMNS) and cells[1] == "Q0":
        return "trec"
    if b"\t" in line:
        return "tsv"
    if b"," in line:
        return "csv"
    raise CorpusError(
        f"{source.name}: its first line has neither tab nor comma and is not JSON: "
        f"name the format with --input-format {'|'.join(get_args(PairsFormat))}"
    )


def resolve_columns(
    pairs: PairSource,
    *,
    query_field: str | None = None,
    passage_field: str | None = None,
    ids: bool = False,
    stdin: PeekableStream | None = None,
) -> PairColumns:
    """Return the columns, with those of query and passage.

    Raises:
        CorpusError: a column is missing, or no column has a known name.
    """
    wanted = (query_field, passage_field)
    known = (QUERY_ID_NAMES, PASSAGE_ID_NAMES) if ids else (QUERY_NAMES, PASSAGE_NAMES)
    if pairs.format == "trec":
        return _choose(pairs, RUN_COLUMNS, wanted, (("query_id",), ("doc_id",)))
    if pairs.format == "parquet":
        schema = read_parquet_schema(pairs.source)
        return _choose(pairs, tuple(schema.names), wanted, known, schema=schema)
    if pairs.format == "jsonl":
        return _choose(pairs, _json_names(pairs.source, stdin), wanted, known)
    return _resolve_cells(pairs, wanted, known, stdin)


def _json_names(source: Source, stdin: PeekableStream | None) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for line in _first_lines(source, stdin):
        row = parse_json_line(line)
        if isinstance(row, dict):
            names.update(dict.fromkeys(row))
    return tuple(names)


def _resolve_cells(
    pairs: PairSource,
    wanted: tuple[str | None, str | None],
    known: tuple[tuple[str, ...], tuple[str, ...]],
    stdin: PeekableStream | None,
) -> PairColumns:
    """Return the columns of TSV or CSV, whose first line may be a header or a row."""
    line = _first_lines(pairs.source, stdin)[0].decode(errors="replace")
    first = split_cells(line) if pairs.format == "tsv" else tuple(next(csv.reader([line]), ()))
    found = [
        name in first if name is not None else any(cell.strip().casefold() in names for cell in first)
        for name, names in zip(wanted, known, strict=True)
    ]
    if all(found):
        return _choose(pairs, first, wanted, known, header=True)
    numbers = [name or str(number) for number, name in enumerate(wanted, start=1)]
    for flag, name in zip(("--query-field", "--passage-field"), numbers, strict=True):
        if not name.isdecimal() or not 1 <= int(name) <= len(first):
            reason = (
                f"no column {name!r} ({flag})" if not name.isdecimal() else f"only {count_noun(len(first), 'column')}"
            )
            raise CorpusError(
                f"{pairs.source.name} has {reason}; its first line is {_show(first)}: a header names both columns, "
                "without one they are numbered from 1"
            )
    if numbers[0] == numbers[1]:
        raise UsageError(
            f"query and passage are both column {numbers[0]}: name two with --query-field, --passage-field"
        )
    names = {numbers[0]: "query", numbers[1]: "passage"}
    columns = tuple(names.get(str(number), str(number)) for number in range(1, len(first) + 1))
    return PairColumns(names=columns, query="query", passage="passage", header=False, schema=None)


def _choose(
    pairs: PairSource,
    names: tuple[str, ...],
    wanted: tuple[str | None, str | None],
    known: tuple[tuple[str, ...], tuple[str, ...]],
    *,
    header: bool = False,
    schema: Any = None,
) -> PairColumns:
    duplicates = [name for index, name in enumerate(names) if name in names[:index]]
    if duplicates:
        raise CorpusError(f"{pairs.source.name} has two columns {duplicates[0]!r}: rename one of them")
    chosen: list[str] = []
    for what, name, candidates in zip(("query", "passage"), wanted, known, strict=True):
        folded = {each.strip().casefold(): each for each in reversed(names) if each not in chosen}
        column = name if name is not None else next((folded[each] for each in candidates if each in folded), None)
        if column is None or column not in names:
            asked = f"no column {name!r}" if name is not None else f"no column that is known for the {what}"
            guess = difflib.get_close_matches(name or what, names, n=1, cutoff=0.5)
            hint = f" (did you mean {guess[0]!r}?)" if guess else ""
            raise CorpusError(
                f"{pairs.source.name} has {asked}; it has {_show(names)}: name it with --{what}-field{hint}"
            )
        chosen.append(column)
    if chosen[0] == chosen[1]:
        raise UsageError(f"query and passage are both {chosen[0]!r}: name two with --query-field and --passage-field")
    return PairColumns(names=names, query=chosen[0], passage=chosen[1], header=header, schema=schema)


def _first_lines(source: Source, stdin: PeekableStream | None) -> list[bytes]:
    head = read_head(source, _PEEK_BYTES, stdin=stdin).removeprefix(BOM)
    lines = head.split(b"\n")
    if len(head) == _PEEK_BYTES and len(lines) > 1:
        lines.pop()
    found = [line.removesuffix(b"\r") for line in lines if line.removesuffix(b"\r")][:_PEEK_ROWS]
    if not found:
        raise CorpusError(f"{source.name} has only blank lines: there are no pairs to score")
    return found


def _show(names: Sequence[str]) -> str:
    return ", ".join(name[:40] for name in names[:20]) + (" ..." if len(names) > 20 else "") or "no fields"


NO_FIELDS: dict[str, Any] = {}
_PARQUET_ROWS = 1024
"rows of Parquet decoded together"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRow:
    """A row of a pairs file."""

    row: dict[str, Any]
    fault: str = ""
    raw: bytes = b""
    batch: Any = None
    "(pyarrow.RecordBatch, index in it), Parquet only"


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
    # Excess cells are joined to the last one, so that no part of the row is lost.
    kept = cells if len(cells) <= len(names) else (*cells[: len(names) - 1], " ".join(cells[len(names) - 1 :]))
    row = dict(zip(names, (*kept, *[""] * (len(names) - len(kept))), strict=True))
    if not all(map(is_utf8, cells)):
        fault = INVALID_UTF8
        row = {name: cell.encode(errors="surrogateescape").decode(errors="replace") for name, cell in row.items()}
    return ReadRow(row=row, fault=fault)


def _read_csv(source: PairSource, columns: PairColumns, stream: ByteStream) -> Iterator[ReadRow]:
    """Read CSV strictly: after an unclosed quote, or text after a quote, rows cannot be separated."""
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
            f"{source.source.name}, line {reader.line_num}: {error}; correct the quoting, "
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
            break  # too long for the csv module, which raises the error
    if rest:
        yield (rest.removeprefix(BOM) if first else rest).decode(errors="surrogateescape")


def _read_parquet(source: PairSource) -> Iterator[ReadRow]:
    with open_parquet(source.source) as file, parquet_errors(source.source):
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
            for index, row in enumerate(list_rows(batch)):
                yield ReadRow(row=row, batch=(batch, index))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One row of a pairs file."""

    number: int
    "from 1, a header not counted"
    query: str
    "text or id; empty with a fault"
    passage: str
    fault: str
    "why the row is invalid, a short fixed phrase; empty: valid"
    row: dict[str, Any]
    "the input's columns that could be read"
    raw: bytes
    "the line, JSONL only"
    batch: Any
    "(pyarrow.RecordBatch, index in it), Parquet only"


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowLimits:
    """Limits of the pairs that are scored together, which bound memory."""

    pairs: int
    text_bytes: int
    "of distinct queries and passages together"
    side_bytes: int
    "of distinct queries or of distinct passages, whichever is less: the vectors of that side are in memory"


def read_pairs(
    source: PairSource, columns: PairColumns, *, ids: bool, stdin: PeekableStream | None = None
) -> Iterator[Pair]:
    """Yield every row of a pairs file; with `ids` the columns are ids, which may be integers.

    Raises:
        CorpusError: the file is corrupt, or its quoting is invalid.
    """
    for number, read in enumerate(read_rows(source, columns, stdin=stdin), start=1):
        yield make_pair(number, read, columns, ids=ids)


def cut_windows(pairs: Iterable[Pair], limits: WindowLimits) -> Iterator[list[Pair]]:
    """Yield lists of pairs within the limits; a pair beyond them is a list of its own."""
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


def make_pair(number: int, read: ReadRow, columns: PairColumns, *, ids: bool) -> Pair:
    """Return a row as a pair, with its fault if it is none."""
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
