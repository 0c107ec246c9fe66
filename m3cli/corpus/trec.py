"""TREC runs, line by line: `query Q0 document rank score tag`, for each query its documents with their scores.

As in trec_eval the order is that of the scores; ranks and tags are not looked at. Cells are split at tabs where a line
has just five of them, so that ids may hold blanks; else at blanks. Every line must be one: a run that is cut off or
mixed up is an error that names the line, never a lower score.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from m3cli.corpus.lines import BOM
from m3cli.corpus.rows import Fault, parse_json_line
from m3cli.corpus.sources import find_sources
from m3cli.corpus.streams import BLOCK_BYTES, ByteStream, PeekableStream
from m3cli.errors import CorpusError, check_reachable, count_noun
from m3cli.records import Judgements, Rankings

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
        check_reachable(path, CorpusError)
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


QUERY_NAMES = ("query-id", "query_id", "qid")
DOCUMENT_NAMES = ("corpus-id", "corpus_id", "docid", "doc_id", "did", "pid")
RELEVANCE_NAMES = ("score", "relevance", "rel", "label")
MAX_RELEVANCE = 1_000_000
"trec_eval counts the documents of each level up to the highest of a query"
_log = logging.getLogger(__name__)
_PASSAGES = {"positive_passages": 1, "negative_passages": 0}
_REMEDY = (
    "expected TREC's 'query 0 document relevance', BEIR's header 'query-id corpus-id score', "
    "or JSON lines with query_id and positive_passages (MLDR)"
)

_Judged = tuple[str, list[tuple[str, int]]]
"a query, and documents with their relevance"
_Parser = Callable[[str], _Judged]


def read_qrels(given: str, *, stdin: PeekableStream | None = None) -> Judgements:
    """Read judgements: for each query its judged documents with their relevance, 0 for not relevant.

    A passage that one row has as positive and as negative is positive; how many there are is a warning.

    Raises:
        CorpusError: a line is no judgement, two judgements of one document differ, or there are none.
    """
    judgements: dict[str, dict[str, int]] = {}
    lines = read_lines(given, stdin=stdin, what="no judgements")
    head = next(lines, None)
    if head is None:
        raise CorpusError(f"{given} holds no judgements; {_REMEDY}")
    number, line = head
    parse, is_header = _choose_parser(given, number, line)
    both: list[tuple[str, str]] = []
    try:
        for number, line in lines if is_header else chain([head], lines):
            query, found = parse(line)
            judged = judgements.setdefault(query, {})
            here: dict[str, int] = {}  # only a row of MLDR has several; what it calls positive comes first
            for document, relevance in found:
                if here.setdefault(document, relevance) != relevance:
                    both.append((document, query))
                    continue
                if judged.setdefault(document, relevance) != relevance:
                    raise CorpusError(
                        f"{given} line {number:,}: document {document[:80]!r} of query {query[:80]!r} has relevance "
                        f"{relevance}, and {judged[document]} in a line before; leave one of them out"
                    )
    except _NoJudgement as fault:
        raise CorpusError(f"{given} line {number:,}: {fault}; {_REMEDY}") from fault
    if not judgements:
        raise CorpusError(f"{given} holds no judgements; {_REMEDY}")
    if both:
        document, query = both[0]
        _log.warning(
            "%s: %s positive and negative at once, counted as positive; the first: %r of query %r",
            *(given, count_noun(len(both), "passage is", "passages are"), document[:80], query[:80]),
        )
    return judgements


class _NoJudgement(Exception):
    """What is wrong with a line."""


def _choose_parser(given: str, number: int, line: str) -> tuple[_Parser, bool]:
    """Return how lines are read, and whether the first is a header."""
    if line.lstrip().startswith("{"):
        return _parse_json, False
    cells = [cell.strip().lower() for cell in split_cells(line, 3)]
    if len(cells) == 3 and cells[0] in QUERY_NAMES and cells[1] in DOCUMENT_NAMES:
        return _parse_three, True
    if len(split_cells(line, 4)) == 4:
        return _parse_four, False
    raise CorpusError(f"{given} line {number:,}: {count_noun(len(cells), 'column')} without a known header; {_REMEDY}")


def _parse_three(line: str) -> _Judged:
    query, document, relevance = _take_cells(line, 3)
    return query, [(document, _read_relevance(relevance))]


def _parse_four(line: str) -> _Judged:
    query, _, document, relevance = _take_cells(line, 4)
    return query, [(document, _read_relevance(relevance))]


def _take_cells(line: str, num_columns: int) -> list[str]:
    cells = split_cells(line, num_columns)
    if len(cells) != num_columns:
        raise _NoJudgement(f"{count_noun(len(cells), 'column')}, not {num_columns}")
    return cells


def _parse_json(line: str) -> _Judged:
    row = parse_json_line(line.encode())
    if isinstance(row, Fault):
        raise _NoJudgement(row.reason)
    query = _format_id(_find(row, QUERY_NAMES))
    if "positive_passages" not in row:
        return query, [(_format_id(_find(row, DOCUMENT_NAMES)), _read_relevance(_find(row, RELEVANCE_NAMES)))]
    judged = []
    for name, relevance in _PASSAGES.items():
        passages = row.get(name) or []
        if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
            raise _NoJudgement(f"{name} is no list of objects")
        judged += [(_format_id(_find(passage, DOCUMENT_NAMES)), relevance) for passage in passages]
    return query, judged


def _find(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    found = next((row[name] for name in names if name in row), None)
    if found is None:
        raise _NoJudgement(f"none of {', '.join(names)}")
    return found


def _format_id(value: Any) -> str:
    if type(value) not in (str, int):
        raise _NoJudgement(f"id {value!r:.40} is neither a string nor an integer")
    return str(value)


def _read_relevance(value: Any) -> int:
    """Read a whole number, which some files spell '1.0'."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.5
    if not number.is_integer():
        raise _NoJudgement(f"relevance {value!r:.40} is no whole number")
    if abs(number) > MAX_RELEVANCE:
        raise _NoJudgement(f"relevance {value!r:.40} is out of reach: at most {MAX_RELEVANCE:,}")
    return int(number)
