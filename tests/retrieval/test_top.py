"""The best rows against sorting everything: any order of offers in the corpus' order, ties, rows of one key."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from m3cli.retrieval.scores import TopRows, list_best, number_runs


def best_of(scores: np.ndarray, keys: np.ndarray, *, limit: int, threshold: float) -> list[tuple[int, int]]:
    """Rank one query's rows by sorting them: (row, key) of the best row of each key."""
    found: dict[int, int] = {}
    for row in sorted(np.flatnonzero(scores > threshold).tolist(), key=lambda row: (-scores[row], row)):
        found.setdefault(int(keys[row]), row)
    return [(row, key) for key, row in found.items()][:limit]


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 60),
    documents=st.integers(1, 20),
    limit=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    waits=st.booleans(),
    threshold=st.sampled_from([-np.inf, 0.0]),
)
def test_what_is_kept_is_what_sorting_gives(
    seed: int, rows: int, documents: int, limit: int, cuts: list[int], waits: bool, threshold: float
) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(-2, 6, (3, rows)).astype(np.float32)  # few values, so that there are ties
    scores[random.random((3, rows)) < 0.05] = np.nan
    keys = random.integers(-documents, documents, rows)
    top = TopRows(3, limit=limit, threshold=threshold)
    if not waits:
        top._enough = 1
    bounds = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    for first, last in pairwise(bounds):
        query, row = np.nonzero(scores[:, first:last] > top.thresholds[:, None])
        top.offer(query, row + first, keys[row + first], scores[query, row + first])
    ranked = top.finish()
    for number in range(3):
        part = ranked.query == number
        result = list(zip(ranked.row[part].tolist(), ranked.key[part].tolist(), strict=True))
        assert result == best_of(scores[number], keys, limit=limit, threshold=threshold)
        assert np.array_equal(ranked.score[part], scores[number][ranked.row[part]])
    assert ranked.rank.tolist() == number_runs(ranked.query).tolist()


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 200),
    documents=st.integers(1, 100),
    limit=st.integers(1, 12),
    threshold=st.sampled_from([-np.inf, 0.0]),
)
def test_offering_the_best_rows_of_a_query_is_offering_all(
    seed: int, rows: int, documents: int, limit: int, threshold: float
) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(-2, random.integers(2, 50), rows).astype(np.float32)
    keys = random.integers(0, documents, rows)
    best = list_best(scores, keys, limit=limit, threshold=threshold)
    top = TopRows(1, limit=limit, threshold=threshold)
    top.offer(np.zeros(len(best), np.int64), best, keys[best], scores[best])
    ranked = top.finish()
    result = list(zip(ranked.row.tolist(), ranked.key.tolist(), strict=True))
    assert result == best_of(scores, keys, limit=limit, threshold=threshold)


def test_the_best_rows_of_a_query_are_few() -> None:
    scores = np.arange(10_000, dtype=np.float32)
    assert list_best(scores, np.arange(10_000), limit=10, threshold=0.0).tolist() == list(range(9_990, 10_000))


def test_thresholds_rise_once_a_list_is_full() -> None:
    top = TopRows(2, limit=2, threshold=0.0)
    top._enough = 1
    top.offer(np.array([0, 0]), np.array([0, 1]), np.array([0, 1]), np.array([3, 2], np.float32))
    top.offer(np.array([1]), np.array([1]), np.array([1]), np.array([9], np.float32))
    assert top.thresholds.tolist() == [2.0, 0.0]


def test_chunks_of_one_document_take_one_place() -> None:
    top = TopRows(1, limit=2)
    zeros = np.zeros(4, np.int64)
    top.offer(zeros, np.arange(4), np.array([7, 7, 7, 8]), np.array([4, 6, 5, 1], np.float32))
    ranked = top.finish()
    assert (ranked.row.tolist(), ranked.score.tolist()) == ([1, 3], [6.0, 1.0])
