"""Judgements of which document answers which query, in the shapes that benchmarks give them, told apart by content.

    TREC, MIRACL   four columns `query iteration document relevance`, tabs or blanks between them
    BEIR           tab-separated `query document score` under a header such as `query-id corpus-id score`
    MLDR           JSON lines with `query_id` and `positive_passages` (relevance 1), `negative_passages` (0)
    FlagEmbedding  JSON lines `{"qid": ..., "docid": ..., "relevance": ...}`, and the names of BEIR's header

A file that begins with '{' is JSON lines; else the first line tells how many columns there are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import chain
from typing import Any

from m3cli.corpus.jsonl import parse_json_line
from m3cli.corpus.rows import Fault
from m3cli.corpus.streams import PeekableStream
from m3cli.corpus.trec import read_lines, split_cells
from m3cli.errors import CorpusError, count_noun
from m3cli.records import Judgements

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
    query = _spell_id(_find(row, QUERY_NAMES))
    if "positive_passages" not in row:
        return query, [(_spell_id(_find(row, DOCUMENT_NAMES)), _read_relevance(_find(row, RELEVANCE_NAMES)))]
    judged = []
    for name, relevance in _PASSAGES.items():
        passages = row.get(name) or []
        if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
            raise _NoJudgement(f"{name} is no list of objects")
        judged += [(_spell_id(_find(passage, DOCUMENT_NAMES)), relevance) for passage in passages]
    return query, judged


def _find(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    found = next((row[name] for name in names if name in row), None)
    if found is None:
        raise _NoJudgement(f"none of {', '.join(names)}")
    return found


def _spell_id(value: Any) -> str:
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
