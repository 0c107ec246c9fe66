"""TREC runs, with lines `query Q0 document rank score tag`, and judgements.

As in trec_eval, scores define the order; ranks and tags are ignored. A line with exactly five tabs is split at tabs, so
that ids may contain blanks, else at blanks. An invalid line is an error that names it, never a lower score.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from m3cli.corpus.rows import Fault, parse_json_line
from m3cli.corpus.sources import find_sources
from m3cli.corpus.streams import BLOCK_BYTES, BOM, ByteStream, PeekableStream
from m3cli.errors import CorpusError, check_reachable, count_noun
from m3cli.records import Judgements, Rankings

RUN_COLUMNS = ("query_id", "Q0", "doc_id", "rank", "score", "tag")
_RUN_REMEDY = "expected 'query Q0 document rank score tag', as m3 search writes it; make the run again"


def read_run(path: str, *, stdin: PeekableStream | None = None, top_k: int | None = None) -> Rankings:
    """Read a run; queries are in the order of their first lines.

    Args:
        path: also .gz and .zst, or '-' for standard input.
        stdin: standard input, if it is the run.
        top_k: number of best documents to keep of each query, best first, equal scores in the file's order; None: all,
            in the file's order.

    Raises:
        CorpusError: a line is invalid, a score is not finite, a document is duplicate, or there is no line.
    """
    rankings: dict[str, dict[str, float]] = {}
    for number, line in read_lines(path, stdin=stdin):
        cells = split_run_line(line)
        if len(cells) != len(RUN_COLUMNS):
            raise CorpusError(
                f"{path} line {number:,}: {count_noun(len(cells), 'column')}, not {len(RUN_COLUMNS)}; {_RUN_REMEDY}"
            )
        query, _, document, _, score_text, _ = cells
        try:
            score = float(score_text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise CorpusError(
                f"{path} line {number:,}: score {score_text[:40]!r} is not a finite number; {_RUN_REMEDY}"
            )
        ranking = rankings.setdefault(query, {})
        if document in ranking:
            raise CorpusError(
                f"{path} line {number:,}: document {document[:80]!r} occurs twice for query {query[:80]!r}; "
                "merge the lines first, keeping the best score"
            )
        ranking[document] = score
    if not rankings:
        raise CorpusError(f"{path} holds no line of a run; {_RUN_REMEDY}")
    if top_k is None:
        return rankings
    return {query: dict(sorted(ranking.items(), key=_by_score)[:top_k]) for query, ranking in rankings.items()}


def read_lines(path: str, *, stdin: PeekableStream | None = None, what: str = "no run") -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file that are not blank, decompressed, with their numbers from 1.

    `what` is for messages: what an empty file does not contain.

    Raises:
        CorpusError: the file cannot be read or is not UTF-8, or there are several.
    """
    if path != "-":
        file = Path(path)
        check_reachable(file, CorpusError)
        if file.is_dir() or (file.is_file() and file.stat().st_size == 0):
            raise CorpusError(
                f"{path} is {'a folder' if file.is_dir() else 'empty'}, {what}; give a file, or '-' for standard input"
            )
    elif stdin is not None and not stdin.peek(1):
        raise CorpusError(f"standard input is empty, {what}; check the command that writes it")
    source, *others = find_sources((path,), input_format="text", stdin=stdin)
    if others:
        raise CorpusError(f"{path} matches {1 + len(others):,} files, {source.name} and others; name one")
    number, rest = 0, b""
    with ByteStream(source, stdin=stdin) as stream:
        while block := stream.read(BLOCK_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                number += 1
                yield from _decode(path, number, line)
    yield from _decode(path, number + 1, rest)


def split_run_line(line: str) -> list[str]:
    """Return the cells of a run's line; a valid one has as many as `RUN_COLUMNS`."""
    return split_cells(line, len(RUN_COLUMNS))


def split_cells(line: str, num_columns: int) -> list[str]:
    """Split at tabs if that gives the right number of cells, else at blanks."""
    cells = line.strip("\r").split("\t")
    return cells if len(cells) == num_columns else line.split()


def _decode(path: str, number: int, line: bytes) -> Iterator[tuple[int, str]]:
    try:
        text = (line.removeprefix(BOM) if number == 1 else line).decode()
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} line {number:,}: not UTF-8; convert it with iconv -t UTF-8") from error
    if text and not text.isspace():
        yield number, text


def _by_score(entry: tuple[str, float]) -> float:
    return -entry[1]


QUERY_NAMES = ("query-id", "query_id", "qid")
DOCUMENT_NAMES = ("corpus-id", "corpus_id", "docid", "doc_id", "did", "pid")
RELEVANCE_NAMES = ("score", "relevance", "rel", "label")
MAX_RELEVANCE = 1_000_000
"trec_eval allocates memory for each level"
_log = logging.getLogger(__name__)
_PASSAGES = {"positive_passages": 1, "negative_passages": 0}
_REMEDY = (
    "expected TREC's 'query 0 document relevance', BEIR's header 'query-id corpus-id score', "
    "or JSON lines with query_id and positive_passages (MLDR)"
)

_Judged = tuple[str, list[tuple[str, int]]]
"a query, and documents with their relevance"
_Parser = Callable[[str], _Judged]


def read_qrels(path: str, *, stdin: PeekableStream | None = None) -> Judgements:
    """Read judgements.

    A passage that a row has as positive and as negative is positive; a warning has their number.

    Raises:
        CorpusError: a line is invalid, two judgements of a document differ, or there is none.
    """
    judgements: dict[str, dict[str, int]] = {}
    lines = read_lines(path, stdin=stdin, what="no judgements")
    head = next(lines, None)
    if head is None:
        raise CorpusError(f"{path} holds no judgements; {_REMEDY}")
    number, line = head
    parse, is_header = _choose_parser(path, number, line)
    both: list[tuple[str, str]] = []
    try:
        for number, line in lines if is_header else chain([head], lines):
            query, found = parse(line)
            judged = judgements.setdefault(query, {})
            of_row: dict[str, int] = {}  # only a row of MLDR has several, positive ones first
            for document, relevance in found:
                if of_row.setdefault(document, relevance) != relevance:
                    both.append((document, query))
                    continue
                if judged.setdefault(document, relevance) != relevance:
                    raise CorpusError(
                        f"{path} line {number:,}: document {document[:80]!r} of query {query[:80]!r} has relevance "
                        f"{relevance}, and {judged[document]} in an earlier line; remove one of them"
                    )
    except _InvalidLine as fault:
        raise CorpusError(f"{path} line {number:,}: {fault}; {_REMEDY}") from fault
    if not judgements:
        raise CorpusError(f"{path} holds no judgements; {_REMEDY}")
    if both:
        document, query = both[0]
        _log.warning(
            "%s: %s positive and negative at once, counted as positive; the first: %r of query %r",
            *(path, count_noun(len(both), "passage is", "passages are"), document[:80], query[:80]),
        )
    return judgements


class _InvalidLine(Exception):
    """Error of a line."""


def _choose_parser(path: str, number: int, line: str) -> tuple[_Parser, bool]:
    """Return the parser of a line, and whether the first line is a header."""
    if line.lstrip().startswith("{"):
        return _parse_json, False
    cells = [cell.strip().lower() for cell in split_cells(line, 3)]
    if len(cells) == 3 and cells[0] in QUERY_NAMES and cells[1] in DOCUMENT_NAMES:
        return _parse_three, True
    if len(split_cells(line, 4)) == 4:
        return _parse_four, False
    raise CorpusError(f"{path} line {number:,}: {count_noun(len(cells), 'column')} without a known header; {_REMEDY}")


def _parse_three(line: str) -> _Judged:
    query, document, relevance = _take_cells(line, 3)
    return query, [(document, _read_relevance(relevance))]


def _parse_four(line: str) -> _Judged:
    query, _, document, relevance = _take_cells(line, 4)
    return query, [(document, _read_relevance(relevance))]


def _take_cells(line: str, num_columns: int) -> list[str]:
    cells = split_cells(line, num_columns)
    if len(cells) != num_columns:
        raise _InvalidLine(f"{count_noun(len(cells), 'column')}, not {num_columns}")
    return cells


def _parse_json(line: str) -> _Judged:
    row = parse_json_line(line.encode())
    if isinstance(row, Fault):
        raise _InvalidLine(row.reason)
    query = _format_id(_find(row, QUERY_NAMES))
    if "positive_passages" not in row:
        return query, [(_format_id(_find(row, DOCUMENT_NAMES)), _read_relevance(_find(row, RELEVANCE_NAMES)))]
    judged = []
    for name, relevance in _PASSAGES.items():
        passages = row.get(name) or []
        if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
            raise _InvalidLine(f"{name} is not a list of objects")
        judged += [(_format_id(_find(passage, DOCUMENT_NAMES)), relevance) for passage in passages]
    return query, judged


def _find(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    found = next((row[name] for name in names if name in row), None)
    if found is None:
        raise _InvalidLine(f"none of {', '.join(names)}")
    return found


def _format_id(value: Any) -> str:
    if type(value) not in (str, int):
        raise _InvalidLine(f"id {value!r:.40} is neither a string nor an integer")
    return str(value)


def _read_relevance(value: Any) -> int:
    """Parse an integer, which some files write as '1.0'."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.5
    if not number.is_integer():
        raise _InvalidLine(f"relevance {value!r:.40} is not an integer")
    if abs(number) > MAX_RELEVANCE:
        raise _InvalidLine(f"relevance {value!r:.40} is too large: at most {MAX_RELEVANCE:,}")
    return int(number)
