"""The best rows of each query while a corpus is scanned: rows above a query's threshold are offered.

Ranks are by score, best first, equal scores in corpus order. Rows with the same key (the chunks of a document) count
once, by the best of them. Memory holds the lists and about as many offered rows that are not merged yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m3cli.records import concat_ranges

Rows = NDArray[np.int64]
Scores = NDArray[np.float32]

_MIN_WAITING = 1 << 12
"offered rows before a merge; without one there is no threshold, and each row's id is hashed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """The best rows of some queries, H in total, sorted by query, then best first."""

    query: Rows
    "[H]"
    row: Rows
    "[H] position in the corpus"
    key: Rows
    "[H] distinct within a query"
    score: Scores
    "[H]"

    @property
    def rank(self) -> Rows:
        """[H] rank for the query, from 0."""
        return number_runs(self.query)


class TopRows:
    """The `limit` best rows of each of Q queries so far."""

    def __init__(self, num_queries: int, *, limit: int, threshold: float = -np.inf) -> None:
        self.thresholds: Scores = np.full(num_queries, threshold, np.float32)
        "[Q] lower bound of useful scores"
        self._limit = limit
        self._enough = max(num_queries * limit, _MIN_WAITING)
        self._held: list[tuple[Rows, Rows, Rows, Scores]] = []
        self._waiting = 0

    def offer(self, query: Rows, row: Rows, key: Rows, score: Scores) -> None:
        """Offer rows, [H] each, which follow those of earlier calls in the corpus."""
        if not len(query):
            return
        self._held.append((query, row, key, score))
        self._waiting += len(query)
        if self._waiting >= self._enough:
            self._merge()

    def finish(self) -> Ranked:
        """Return the best rows."""
        self._merge()
        query, row, key, score = self._held[0]
        return Ranked(query=query, row=row, key=key, score=score)

    def _merge(self) -> None:
        empty = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        ranked = rank_rows(*map(np.concatenate, zip(empty, *self._held, strict=True)), limit=self._limit)
        last = np.flatnonzero(ranked.rank == self._limit - 1)
        self.thresholds[ranked.query[last]] = ranked.score[last]
        self._held, self._waiting = [(ranked.query, ranked.row, ranked.key, ranked.score)], 0


def rank_rows(query: Rows, row: Rows, key: Rows, score: Scores, *, limit: int) -> Ranked:
    """Rank rows of several queries, [H] each in any order, with at most `limit` keys for each query."""
    order = np.lexsort((row, -score, query))
    query, row, key, score = query[order], row[order], key[order], score[order]
    by_key = np.lexsort((key, query))  # stable: the best row of a key comes first
    repeated = (np.diff(query[by_key], prepend=-1) == 0) & (np.diff(key[by_key], prepend=0) == 0)
    repeated[:1] = False
    kept = np.ones(len(query), np.bool_)
    kept[by_key[repeated]] = False
    query, row, key, score = query[kept], row[kept], key[kept], score[kept]
    best = number_runs(query) < limit
    return Ranked(query=query[best], row=row[best], key=key[best], score=score[best])


def number_runs(values: Rows) -> Rows:
    """Return [H] the number of each value among equal neighbours, from 0."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    lengths = np.diff(starts, append=len(values))
    return concat_ranges(0, lengths)[1]
