"""Write a table of scores or a ranking to standard output or a file: TSV, JSON lines, Parquet, TREC.

A file has a temporary name until it is complete; after an exception there is no file. TSV has no quoting: a tab or line
break in a cell becomes a blank and is counted. A missing score (NaN) is an empty cell, and null in JSON and Parquet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from m3cli.errors import UsageError
from m3cli.records import QueryHits
from m3cli.store.commit import publish_outside

TABLE_FORMATS = {".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}

Scores = Mapping[str, NDArray[np.float32]]
Row = Mapping[str, Any]
_BLANKS = str.maketrans("\t\n\r", "   ")


class TableWriter(Protocol):
    """An open table."""

    cleaned: int
    "cells in which a tab or line break was replaced"

    def append(self, rows: Sequence[Row], scores: Scores, *, raws: Sequence[bytes], batches: Sequence[Any]) -> None:
        """Append rows and their scores; `raws`: the rows' JSON, `batches`: their Arrow batches, if any."""

    def finish(self) -> None:
        """Write buffered rows."""


def table_format(out: str | None) -> str:
    """Return the table format of a file's suffix; tsv for standard output."""
    return choose_format(out, TABLE_FORMATS, stdout="tsv")


def choose_format(out: str | None, formats: Mapping[str, str], *, stdout: str) -> str:
    """Return the format of a file's suffix, or `stdout` for standard output (None, '-').

    Raises:
        UsageError: the suffix is unknown.
    """
    if out is None or out == "-":
        return stdout
    found = formats.get(Path(out).suffix.lower())
    if found is None:
        raise UsageError(f"--out {out}: its ending tells the format, one of {', '.join(formats)}")
    return found


@contextmanager
def open_table(
    out: str | None, stdout: BinaryIO, *, columns: Sequence[str], schema: Any, score_names: Sequence[str]
) -> Iterator[TableWriter]:
    """Open a table of the input's columns and the scores; `schema` is the input's pyarrow.Schema if it has one.

    Raises:
        UsageError: the suffix is unknown, or a column of the input has the name of a score.
        OutputError: the file cannot be written.
    """
    kind = table_format(out)
    clash = [name for name in columns if name in score_names]
    if clash:
        raise UsageError(
            f"the input has a column {clash[0]!r}, as the scores have: rename it, or leave it out by --modes"
        )
    if out is None or out == "-":
        writer: TableWriter = TsvTable(stdout, columns, score_names)
        yield writer
        writer.finish()
        return
    with publish_outside(Path(out).absolute()) as file:
        if kind == "tsv":
            writer = TsvTable(file, columns, score_names)
        elif kind == "jsonl":
            writer = JsonTable(file, columns, score_names)
        else:
            writer = ParquetTable(file, columns, schema, score_names)
        try:
            yield writer
        finally:  # after an error too: pyarrow's writer must be closed before its file
            writer.finish()


class TsvTable:
    """Tab-separated values with a header."""

    def __init__(self, stream: BinaryIO, columns: Sequence[str], score_names: Sequence[str]) -> None:
        self.cleaned = 0
        self._stream = stream
        self._columns, self._score_names = columns, score_names
        self._write_line([*map(self._clean, columns), *score_names])

    def append(self, rows: Sequence[Row], scores: Scores, *, raws: Sequence[bytes], batches: Sequence[Any]) -> None:  # noqa: ARG002
        """Append rows."""
        cells = [[_number(value) for value in scores[name].tolist()] for name in self._score_names]
        for row, *values in zip(rows, *cells, strict=True):
            self._write_line([*(self._clean(row.get(name)) for name in self._columns), *values])
        self._stream.flush()

    def finish(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def _write_line(self, cells: Sequence[str]) -> None:
        self._stream.write(("\t".join(cells) + "\n").encode(errors="replace"))

    def _clean(self, value: Any) -> str:
        text = _as_text(value) or ""
        clean = text.translate(_BLANKS)
        self.cleaned += clean != text
        return clean


class JsonTable:
    """One JSON object per line; a row read from JSON keeps its bytes, and the scores are appended."""

    def __init__(self, stream: BinaryIO, columns: Sequence[str], score_names: Sequence[str]) -> None:
        self.cleaned = 0
        self._stream = stream
        self._columns, self._score_names = columns, score_names

    def append(self, rows: Sequence[Row], scores: Scores, *, raws: Sequence[bytes], batches: Sequence[Any]) -> None:  # noqa: ARG002
        """Append rows."""
        values = [[_finite(value) for value in scores[name].tolist()] for name in self._score_names]
        for row, raw, *numbers in zip(rows, raws, *values, strict=True):
            self._check_clash(row)
            head = raw.strip() if raw else orjson.dumps(self._plain(row), default=str)
            tail = orjson.dumps(dict(zip(self._score_names, numbers, strict=True)))
            comma = b"," if head[1:-1].strip() else b""
            self._stream.write(head[:-1].rstrip() + comma + tail[1:] + b"\n")
        self._stream.flush()

    def finish(self) -> None:
        """Do nothing: rows are not buffered."""

    def _plain(self, row: Row) -> dict[str, Any]:
        return {name: row.get(name) for name in (row or self._columns)}

    def _check_clash(self, row: Row) -> None:
        for name in self._score_names:
            if name in row:
                raise UsageError(f"a row of the input has a field {name!r}, as the scores have: rename it")


class ParquetTable:
    """Parquet: the columns of a Parquet input keep their types, others are strings; scores are float32."""

    def __init__(self, stream: BinaryIO, columns: Sequence[str], schema: Any, score_names: Sequence[str]) -> None:
        self.cleaned = 0
        self._columns, self._score_names = columns, score_names
        self._typed = schema is not None
        fields = list(schema) if self._typed else [pa.field(name, pa.string()) for name in columns]
        fields += [pa.field(name, pa.float32()) for name in score_names]
        self._schema = pa.schema(fields, metadata=None)
        self._writer = pq.ParquetWriter(stream, self._schema, compression="zstd")

    def append(self, rows: Sequence[Row], scores: Scores, *, raws: Sequence[bytes], batches: Sequence[Any]) -> None:  # noqa: ARG002
        """Append rows."""
        if not rows:
            return
        table = _join_batches(batches) if self._typed else self._from_rows(rows)
        for name in self._score_names:
            table = table.append_column(name, pa.array(scores[name], pa.float32(), from_pandas=True))
        self._writer.write_table(table.cast(self._schema))

    def finish(self) -> None:
        """Write the footer."""
        self._writer.close()

    def _from_rows(self, rows: Sequence[Row]) -> pa.Table:
        columns = {name: pa.array([_as_text(row.get(name)) for row in rows], pa.string()) for name in self._columns}
        return pa.table(columns)


def _join_batches(rows: Sequence[tuple[Any, int]]) -> pa.Table:
    """Build a table of rows (batch, index in it); consecutive rows of a batch are one slice."""
    slices = []
    for _, group in groupby(rows, key=lambda row: id(row[0])):
        batch_rows = list(group)
        batch, first = batch_rows[0]
        slices.append(batch.slice(first, len(batch_rows)))
    return pa.Table.from_batches(slices)


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return orjson.dumps(value, default=str).decode()


def _finite(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None


def _number(value: float) -> str:
    return f"{value:.6f}" if np.isfinite(value) else ""


RANKING_FORMATS = {".trec": "trec", ".run": "trec", ".txt": "trec", ".jsonl": "jsonl", ".ndjson": "jsonl"}
SNIPPET_LENGTH = 200
"Unicode code points"
_BREAKS = re.compile(r"[\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_BLANK = re.compile(r"\s")


class RankingWriter(Protocol):
    """An open ranking."""

    blanks: int
    "written lines with an id that has blanks"

    def write(self, hits: Sequence[QueryHits]) -> None:
        """Write the hits of all queries."""


def ranking_format(out: str | None, *, typed: str | None = None) -> str:
    """Return trec or jsonl: `typed`, or the format of the file's suffix; trec for standard output."""
    return typed or choose_format(out, RANKING_FORMATS, stdout="trec")


@contextmanager
def open_ranking(out: str | None, stdout: BinaryIO, *, kind: str, tag: str) -> Iterator[RankingWriter]:
    """Open a ranking; `kind` is trec or jsonl.

    Raises:
        OutputError: the file cannot be written.
    """
    if out is None or out == "-":
        yield _open_writer(kind, stdout, tag)
        stdout.flush()
        return
    with publish_outside(Path(out).absolute()) as file:
        yield _open_writer(kind, file, tag)


def _open_writer(kind: str, stream: BinaryIO, tag: str) -> RankingWriter:
    return TrecRanking(stream, tag) if kind == "trec" else JsonRanking(stream)


class TrecRanking:
    """A TREC run."""

    def __init__(self, stream: BinaryIO, tag: str) -> None:
        self.blanks = 0
        self._stream, self._tag = stream, tag

    def write(self, hits: Sequence[QueryHits]) -> None:
        """Write all lines.

        Raises:
            UsageError: an id has a tab or line break; nothing is written.
        """
        for found in hits:
            _check_line_breaks(found)
        for found in hits:
            self._write_query(found)

    def _write_query(self, found: QueryHits) -> None:
        for rank, (name, score) in enumerate(zip(found.ids, found.scores.tolist(), strict=True), start=1):
            blank = bool(_BLANK.search(found.query) or _BLANK.search(name))
            self.blanks += blank
            cells = (found.query, "Q0", name, str(rank), f"{score:.9g}", self._tag)
            line = ("\t" if blank else " ").join(cells) + "\n"
            self._stream.write(line.encode(errors="surrogateescape"))


def _check_line_breaks(found: QueryHits) -> None:
    for what, name in [("query", found.query), *(("document", name) for name in found.ids)] if found.ids else []:
        if _BREAKS.search(name):
            raise UsageError(
                f"the {what} {name[:80]!r}: a TREC run cannot hold ids with tabs or line breaks; write "
                "--out NAME.jsonl, or give --format jsonl"
            )


class JsonRanking:
    """JSON lines, one object per query."""

    blanks = 0

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, hits: Sequence[QueryHits]) -> None:
        """Write an object for each query."""
        for found in hits:
            described = [_describe_hit(found, index) for index in range(len(found.ids))]
            document = {"id": found.query, "query": found.text, "hits": described}
            self._stream.write(orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE))


def _describe_hit(found: QueryHits, index: int) -> dict[str, Any]:
    hit: dict[str, Any] = {
        "id": found.ids[index],
        "rank": index + 1,
        "score": float(found.scores[index]),
        "scores": {name: float(values[index]) for name, values in found.parts.items()},
    }
    known = {"chunk_index": found.chunk_index, "char_start": found.char_start, "char_end": found.char_end}
    hit |= {name: int(values[index]) for name, values in known.items() if values is not None}
    text = found.texts[index]
    if text is not None:
        hit["snippet"] = text[:SNIPPET_LENGTH]
    return hit
