"""Writes what a search found: a TREC run or JSON lines, to standard output or to a file.

A TREC line is `query Q0 document rank score tag`; where an id holds blanks its line has tabs between the columns, which
`m3 eval` reads and which is the best a run can do; one that breaks lines is refused before the first line. Scores have
nine digits, which tell all float32 apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import orjson

from m3cli.errors import UsageError
from m3cli.records import QueryHits
from m3cli.store.commit import publish_beside
from m3cli.store.table import choose_format

RANKING_FORMATS = {".trec": "trec", ".run": "trec", ".txt": "trec", ".jsonl": "jsonl", ".ndjson": "jsonl"}
SNIPPET_LENGTH = 200
"Unicode code points"
_BREAKS = re.compile(r"[\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_BLANK = re.compile(r"\s")


class RankingWriter(Protocol):
    """An open ranking."""

    blanks: int
    "ids that hold blanks, counted as often as they were written"

    def write(self, hits: Sequence[QueryHits]) -> None:
        """Write what was found for all queries."""


def ranking_format(out: str | None, *, typed: str | None = None) -> str:
    """Return trec or jsonl: what was typed, or by a file's ending, or trec for standard output."""
    return typed or choose_format(out, RANKING_FORMATS, stdout="trec")


@contextmanager
def open_ranking(out: str | None, stdout: BinaryIO, *, kind: str, tag: str) -> Iterator[RankingWriter]:
    """Open a ranking, `kind` being trec or jsonl; a file is there when it is whole.

    Raises:
        OutputError: the file cannot be written.
    """
    if out is None or out == "-":
        yield _write_as(kind, stdout, tag)
        stdout.flush()
        return
    with publish_beside(Path(out).absolute()) as file:
        yield _write_as(kind, file, tag)


def _write_as(kind: str, stream: BinaryIO, tag: str) -> RankingWriter:
    return TrecRanking(stream, tag) if kind == "trec" else JsonRanking(stream)


class TrecRanking:
    """A TREC run."""

    def __init__(self, stream: BinaryIO, tag: str) -> None:
        self.blanks = 0
        self._stream, self._tag = stream, tag

    def write(self, hits: Sequence[QueryHits]) -> None:
        """Write all lines, or none.

        Raises:
            UsageError: an id that a line cannot hold.
        """
        for found in hits:
            _refuse_breaks(found)
        for found in hits:
            self._write_query(found)

    def _write_query(self, found: QueryHits) -> None:
        for rank, (name, score) in enumerate(zip(found.ids, found.scores.tolist(), strict=True), start=1):
            blank = bool(_BLANK.search(found.query) or _BLANK.search(name))
            self.blanks += blank
            cells = (found.query, "Q0", name, str(rank), f"{score:.9g}", self._tag)
            line = ("\t" if blank else " ").join(cells) + "\n"
            self._stream.write(line.encode(errors="surrogateescape"))


def _refuse_breaks(found: QueryHits) -> None:
    for what, name in [("query", found.query), *(("document", name) for name in found.ids)] if found.ids else []:
        if _BREAKS.search(name):
            raise UsageError(
                f"the {what} {name[:80]!r}: a TREC run cannot hold ids with tabs or line breaks; write "
                "--out NAME.jsonl, or say --format jsonl"
            )


class JsonRanking:
    """JSON lines, one object a query."""

    blanks = 0

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, hits: Sequence[QueryHits]) -> None:
        """Write an object for each query."""
        for found in hits:
            described = [_describe_hit(found, place) for place in range(len(found.ids))]
            document = {"id": found.query, "query": found.text, "hits": described}
            self._stream.write(orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE))


def _describe_hit(found: QueryHits, place: int) -> dict[str, Any]:
    hit: dict[str, Any] = {
        "id": found.ids[place],
        "rank": place + 1,
        "score": float(found.scores[place]),
        "scores": {name: float(values[place]) for name, values in found.parts.items()},
    }
    known = {"chunk_index": found.chunk_index, "char_start": found.char_start, "char_end": found.char_end}
    hit |= {name: int(values[place]) for name, values in known.items() if values is not None}
    text = found.texts[place]
    if text is not None:
        hit["snippet"] = text[:SNIPPET_LENGTH]
    return hit
