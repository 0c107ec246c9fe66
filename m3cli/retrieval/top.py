"""The best rows of each query, kept while a corpus streams by: what is above a query's threshold is offered.

Ranks are by score, best first; of equal scores the row that comes first in the corpus. Rows of one key (the chunks of
a document) count once, by the best of them, so a document stands where its best row does. Memory is the lists and about
as much again that waits to be merged into them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Scores = NDArray[np.float32]

_LEAST_WAITING = 1 << 12
"offered rows that are worth a merge: until the first there is no threshold, and each row's id is hashed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """The best rows of some queries; H of them, sorted by query, then best first."""

    query: Rows
    "[H]"
    row: Rows
    "[H] place in the corpus, ascending as the corpus is"
    key: Rows
    "[H] what the row is a part of; once a query"
    score: Scores
    "[H]"

    @property
    def rank(self) -> Rows:
        """[H] place in the query's list, from 0."""
        return number_runs(self.query)


class TopRows:
    """The `limit` best rows of each of Q queries so far."""

    def __init__(self, num_queries: int, *, limit: int, floor: float = -np.inf) -> None:
        self.thresholds: Scores = np.full(num_queries, floor, np.float32)
        "[Q] what a score must be above to matter"
        self._limit = limit
        self._enough = max(num_queries * limit, _LEAST_WAITING)
        self._held: list[tuple[Rows, Rows, Rows, Scores]] = []
        self._waiting = 0

    def offer(self, query: Rows, row: Rows, key: Rows, score: Scores) -> None:
        """Offer rows that come later in the corpus than those before: [H] each."""
        if not len(query):
            return
        self._held.append((query, row, key, score))
        self._waiting += len(query)
        if self._waiting >= self._enough:
            self._merge()

    def finish(self) -> Ranked:
        """Return the lists."""
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
    """Rank rows of several queries, given in any order: [H] each; of each query at most `limit` keys are kept."""
    order = np.lexsort((row, -score, query))
    query, row, key, score = query[order], row[order], key[order], score[order]
    by_key = np.lexsort((key, query))  # stable: the best row of a key comes first
    again = (np.diff(query[by_key], prepend=-1) == 0) & (np.diff(key[by_key], prepend=0) == 0)
    again[:1] = False
    kept = np.ones(len(query), np.bool_)
    kept[by_key[again]] = False
    query, row, key, score = query[kept], row[kept], key[kept], score[kept]
    best = number_runs(query) < limit
    return Ranked(query=query[best], row=row[best], key=key[best], score=score[best])


def number_runs(values: Rows) -> Rows:
    """Return [H] the place of each value in its run of equal ones, from 0."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    lengths = np.diff(starts, append=len(values))
    return np.arange(len(values)) - np.repeat(starts, lengths)
