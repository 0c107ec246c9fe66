"""TREC runs, line by line: `query Q0 document rank score tag`, for each query its documents with their scores.

As in trec_eval the order is that of the scores; ranks and tags are not looked at. Cells are split at tabs where a line
has just five of them, so that ids may hold blanks; else at blanks. Every line must be one: a run that is cut off or
mixed up is an error that names the line, never a lower score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from m3cli.corpus.lines import BOM
from m3cli.corpus.sources import find_sources
from m3cli.corpus.streams import BLOCK_BYTES, ByteStream, PeekableStream
from m3cli.errors import CorpusError, count_noun, refuse_unreachable
from m3cli.records import Rankings

RUN_COLUMNS = ("query_id", "Q0", "doc_id", "rank", "score", "tag")
_RUN_REMEDY = "expected 'query Q0 document rank score tag', as m3 search writes it; make the run again"


def read_run(given: str, *, stdin: PeekableStream | None = None, top_k: int | None = None) -> Rankings:
    """Read a run; the queries are in the order in which they first come.

    Args:
        given: path, also .gz and .zst, or '-' for standard input.
        stdin: standard input, where it is wanted.
        top_k: documents to keep of each query, those of the best scores; None: all. Their order is best first then,
            and of equal scores the one that comes first in the file.

    Raises:
        CorpusError: a line is none of a run, a score is no finite number, a document is there twice, or there is none.
    """
    rankings: dict[str, dict[str, float]] = {}
    for number, line in read_lines(given, stdin=stdin):
        cells = split_run_line(line)
        if len(cells) != len(RUN_COLUMNS):
            raise CorpusError(
                f"{given} line {number:,}: {count_noun(len(cells), 'column')}, not {len(RUN_COLUMNS)}; {_RUN_REMEDY}"
            )
        query, _, document, _, spelt, _ = cells
        try:
            score = float(spelt)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise CorpusError(f"{given} line {number:,}: score {spelt[:40]!r} is no finite number; {_RUN_REMEDY}")
        ranking = rankings.setdefault(query, {})
        if document in ranking:
            raise CorpusError(
                f"{given} line {number:,}: document {document[:80]!r} is there twice for query {query[:80]!r}; "
                "merge the lines first, keeping the best score"
            )
        ranking[document] = score
    if not rankings:
        raise CorpusError(f"{given} holds no line of a run; {_RUN_REMEDY}")
    if top_k is None:
        return rankings
    return {query: dict(sorted(ranking.items(), key=_by_score)[:top_k]) for query, ranking in rankings.items()}


def read_lines(given: str, *, stdin: PeekableStream | None = None, what: str = "no run") -> Iterator[tuple[int, str]]:
    """Yield the lines of a small-rowed text file that are not blank, decompressed, with their numbers from 1.

    `what` is for messages: what an empty file is not.

    Raises:
        CorpusError: it cannot be read, is several files, or is not UTF-8.
    """
    path = Path(given)
    if given != "-":
        refuse_unreachable(path, CorpusError)
    if given != "-" and (path.is_dir() or (path.is_file() and path.stat().st_size == 0)):
        raise CorpusError(
            f"{given} is {'a folder' if path.is_dir() else 'empty'}, {what}; give a file, or '-' for standard input"
        )
    if given == "-" and stdin is not None and not stdin.peek(1):
        raise CorpusError(f"standard input is empty: there is {what} in it; look at what was to write it")
    source, *others = find_sources((given,), input_format="text", stdin=stdin)
    if others:
        raise CorpusError(f"{given} matches {1 + len(others):,} files, {source.name} and others; name one")
    number, rest = 0, b""
    with ByteStream(source, stdin=stdin) as stream:
        while block := stream.read(BLOCK_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                number += 1
                yield from _decode(given, number, line)
    yield from _decode(given, number + 1, rest)


def split_run_line(line: str) -> list[str]:
    """Return the cells of a run's line; there are `RUN_COLUMNS` of them if it is one."""
    return split_cells(line, len(RUN_COLUMNS))


def split_cells(line: str, num_columns: int) -> list[str]:
    """Split at tabs if that gives the right number of cells, else at any blanks."""
    cells = line.strip("\r").split("\t")
    return cells if len(cells) == num_columns else line.split()


def _decode(given: str, number: int, line: bytes) -> Iterator[tuple[int, str]]:
    try:
        text = (line.removeprefix(BOM) if number == 1 else line).decode()
    except UnicodeDecodeError as error:
        raise CorpusError(f"{given} line {number:,}: not UTF-8; convert it with iconv -t UTF-8") from error
    if text and not text.isspace():
        yield number, text


def _by_score(entry: tuple[str, float]) -> float:
    return -entry[1]
