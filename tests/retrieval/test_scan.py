"""Each kernel against plain numpy over small random rows, in blocks of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.records import Embeddings, LexicalWeights, TokenMatrices
from m3cli.retrieval import scan as kernels
from m3cli.retrieval.scan import cut_rows, open_scan
from m3cli.retrieval.scores import score_colbert

DIM, VOCABULARY = 8, 20


def make_embeddings(seed: int, rows: int, dtype: Any = np.float16, *, least: int = 1) -> Embeddings:
    random = np.random.default_rng(seed)
    weights = (random.random((rows, VOCABULARY)) < 0.3) * (random.random((rows, VOCABULARY)) + 0.01)
    lengths = random.integers(least, 6, rows)
    return Embeddings(
        rows=np.arange(rows),
        dense_vecs=random.standard_normal((rows, DIM)).astype(dtype),
        lexical_weights=LexicalWeights(
            indptr=np.concatenate(([0], np.cumsum((weights > 0).sum(axis=1)))).astype(np.int64),
            indices=np.nonzero(weights)[1].astype(np.uint32),
            values=weights[weights > 0].astype(np.float32),
        ),
        colbert_vecs=TokenMatrices(
            indptr=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
            vectors=random.standard_normal((int(lengths.sum()), DIM)).astype(dtype),
        ),
    )


def dense_of(weights: LexicalWeights) -> np.ndarray:
    table = np.zeros((len(weights.indptr) - 1, VOCABULARY))
    for row in range(len(table)):
        run = slice(weights.indptr[row], weights.indptr[row + 1])
        table[row, weights.indices[run]] = weights.values[run]
    return table


def naive(output: str, queries: Any, passages: Any) -> Any:
    """Scores [Q, R] in float64, one pair after the other."""
    if output == "dense":
        return queries.dense_vecs.astype(float) @ passages.dense_vecs.astype(float).T
    if output == "sparse":
        return dense_of(queries.lexical_weights) @ dense_of(passages.lexical_weights).T
    sides = [
        [each.vectors[first:last].astype(float) for first, last in zip(each.indptr, each.indptr[1:], strict=False)]
        for each in (queries.colbert_vecs, passages.colbert_vecs)
    ]
    return np.array([[(q @ p.T).max(axis=1).mean() for p in sides[1]] for q in sides[0]]).reshape(
        len(sides[0]), len(sides[1])
    )


def scan_all(output: Any, queries: Embeddings, passages: Embeddings, above: np.ndarray) -> np.ndarray:
    """Scores [Q, R] as found, NaN for what was not."""
    scan = open_scan(output, queries, vocabulary=VOCABULARY, device="cpu")
    result = np.full((len(queries.rows), len(passages.rows)), np.nan)
    for block in scan.cut(passages, 0):
        query, row, score = scan.score(passages, block, above)
        assert np.isnan(result[query, row]).all(), "a pair is found once"
        assert ((row >= block.start) & (row < block.stop)).all()
        result[query, row] = score
    return result


@pytest.mark.parametrize("output", ["dense", "sparse", "colbert"])
@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 2),
    queries=st.integers(1, 5),
    rows=st.integers(1, 30),
    dtype=st.sampled_from([np.float16, np.float32]),
    size=st.sampled_from([1, 7, 1 << 20]),
    above=st.sampled_from([-np.inf, 0.0, 0.7]),
)
def test_scores_are_the_naive_ones(
    output: str, seed: int, queries: int, rows: int, dtype: Any, size: int, above: float
) -> None:
    left, right = make_embeddings(seed, queries, dtype), make_embeddings(seed + 1, rows, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "MIN_ROWS", min(size, 256))
        patch.setattr(kernels, "BLOCK_SCORES", {"cpu": size})
        patch.setattr(kernels, "BLOCK_PRODUCTS", size)
        patch.setattr(kernels, "QUERY_VECTORS", {"cpu": size})
        patch.setattr(kernels, "ROW_VECTORS", {"cpu": size})
        result = scan_all(output, left, right, np.full(queries, above, np.float32))
    expected = naive(output, left, right)
    there = ~np.isnan(result)
    clear = np.abs(expected - above) > 1e-4
    shared = naive("sparse", left, right) > 0 if output == "sparse" else np.ones_like(there)
    assert np.array_equal(there[clear], ((expected > above) & shared)[clear])
    assert result[there] == pytest.approx(expected[there], abs=1e-4)


def test_colbert_of_all_pairs_is_colbert_of_pairs() -> None:
    left, right = make_embeddings(1, 4), make_embeddings(2, 9)
    assert left.colbert_vecs is not None
    assert right.colbert_vecs is not None
    query, row = (each.ravel() for each in np.mgrid[0:4, 0:9])
    expected = score_colbert(left.colbert_vecs, right.colbert_vecs, query, row)
    result = scan_all("colbert", left, right, np.full(4, -np.inf, np.float32))
    assert result.ravel() == pytest.approx(expected, abs=1e-6)


def test_a_row_without_vectors_is_not_found() -> None:
    left, right = make_embeddings(1, 2), make_embeddings(3, 40, least=0)
    assert right.colbert_vecs is not None
    result = scan_all("colbert", left, right, np.full(2, -np.inf, np.float32))
    empty = np.diff(right.colbert_vecs.indptr) == 0
    assert empty.any()
    assert np.array_equal(np.isnan(result), np.tile(empty, (2, 1)))


def test_blocks_grow_with_what_has_been_seen() -> None:
    sizes: Callable[..., list[int]] = lambda *args, **kw: [run.stop - run.start for run in cut_rows(*args, **kw)]  # noqa: E731
    assert sizes(3000, seen=0, most=1000) == [256, 256, 512, 1000, 976]
    assert sizes(3000, seen=5000, most=1000) == [1000] * 3
    assert sizes(0, seen=0, most=10) == []


def test_one_query_does_not_widen_a_whole_part_at_once() -> None:
    rows = kernels.BLOCK_BYTES["cpu"] // 64
    passages = Embeddings(
        rows=np.arange(rows), dense_vecs=np.zeros((rows, 32), np.float16), lexical_weights=None, colbert_vecs=None
    )
    queries = Embeddings(
        rows=np.arange(1), dense_vecs=np.zeros((1, 32), np.float32), lexical_weights=None, colbert_vecs=None
    )
    blocks = list(open_scan("dense", queries, vocabulary=1, device="cpu").cut(passages, rows))
    assert sum(block.stop - block.start for block in blocks) == rows
    assert max(block.stop - block.start for block in blocks) * 32 * 4 <= kernels.BLOCK_BYTES["cpu"]


def test_a_mapped_file_is_read_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    passages = make_embeddings(1, 9)
    assert passages.dense_vecs is not None
    passages.dense_vecs.flags.writeable = False
    found = scan_all("dense", make_embeddings(2, 2), passages, np.full(2, -np.inf, np.float32))
    assert found == pytest.approx(naive("dense", make_embeddings(2, 2), passages), abs=1e-4)
    assert not recwarn.list
