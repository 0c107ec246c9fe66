"""Pairs of documents to pairs of their chunks, and the chunks' scores back to one a pair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m3cli.retrieval.maxsim import Rows, expand_rows
from m3cli.store.lookup import FoundRows


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPairs:
    """Every chunk of a pair's query with every chunk of its passage; C of them, sorted by pair."""

    pair: Rows
    "[C]"
    query: Rows
    "[C] place among the queries' found rows"
    passage: Rows
    "[C] place among the passages' found rows"


def join_chunks(
    queries: FoundRows, query_of: Rows, passages: FoundRows, passage_of: Rows, *, first_only: bool
) -> ChunkPairs:
    """Join the chunks of pairs; a pair one side of which was not found has none.

    Args:
        queries: the rows found for the queries' ids.
        query_of: [P] which of those ids a pair's query is.
        passages: the rows found for the passages' ids.
        passage_of: [P] which of those ids a pair's passage is.
        first_only: take the first chunk of a document only.
    """
    query_rows, query_begins = _group(queries, first_only=first_only)
    passage_rows, passage_begins = _group(passages, first_only=first_only)
    # An id beyond the last one found has no rows.
    many = _count(query_begins, query_of), _count(passage_begins, passage_of)
    take, pair = expand_rows(np.zeros(len(query_of), np.int64), many[0] * many[1])
    width = many[1][pair]
    query = query_begins[query_of[pair]] + take // np.maximum(width, 1)
    passage = passage_begins[passage_of[pair]] + take % np.maximum(width, 1)
    return ChunkPairs(pair=pair, query=query_rows[query], passage=passage_rows[passage])


def _group(found: FoundRows, *, first_only: bool) -> tuple[Rows, Rows]:
    """Return found rows sorted by the id they belong to, and where each id's begin."""
    rows = np.flatnonzero(found.chunk_index <= 0) if first_only else np.arange(len(found.wanted))
    rows = rows[np.argsort(found.wanted[rows], kind="stable")]
    counts = np.bincount(found.wanted[rows]) if len(rows) else np.empty(0, np.int64)
    return rows, np.concatenate(([0], np.cumsum(counts))).astype(np.int64)


def _count(begins: Rows, numbers: Rows) -> Rows:
    counts = np.append(np.diff(begins), 0)
    found: Rows = counts[np.minimum(numbers, len(counts) - 1)]
    return found


def merge_chunks(values: NDArray[np.float32], joined: ChunkPairs, *, num_pairs: int, how: str) -> NDArray[np.float32]:
    """Return [num_pairs] the best or the mean of each pair's chunks; NaN where there are none.

    Each output is merged by itself: the chunk that is best by its dense vector need not be best by the others.
    """
    merged = np.full(num_pairs, np.nan, np.float32)
    if not len(values):
        return merged
    pairs, starts, counts = np.unique(joined.pair, return_index=True, return_counts=True)
    if how == "mean":
        merged[pairs] = np.add.reduceat(values.astype(np.float64), starts) / counts
    else:
        merged[pairs] = np.maximum.reduceat(values, starts)
    return merged
