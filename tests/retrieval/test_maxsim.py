"""The kernels against plain loops over small random rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from m3cli.records import LexicalWeights, TokenMatrices
from m3cli.retrieval import scores
from m3cli.retrieval.scores import expand_rows, score_colbert, score_dense, score_sparse

RANDOM = np.random.default_rng(5)
DIM = 8


def make_matrices(lengths: list[int], dtype: Any = np.float32) -> TokenMatrices:
    vectors = RANDOM.standard_normal((sum(lengths), DIM)).astype(dtype)
    return TokenMatrices(indptr=np.concatenate(([0], np.cumsum(lengths))), vectors=vectors)


def make_weights(rows: list[dict[int, float]]) -> LexicalWeights:
    return LexicalWeights(
        indptr=np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64),
        indices=np.array([token for row in rows for token in sorted(row)], np.uint32),
        values=np.array([row[token] for row in rows for token in sorted(row)], np.float32),
    )


def matrix(matrices: TokenMatrices, row: int) -> Any:
    return matrices.vectors[matrices.indptr[row] : matrices.indptr[row + 1]].astype(np.float64)


@pytest.fixture(params=[3, 4096])
def _pairs_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "PAIRS_AT_ONCE", request.param)


@pytest.fixture
def rows() -> tuple[Any, Any]:
    return RANDOM.integers(0, 4, 30), RANDOM.integers(0, 5, 30)


@pytest.mark.usefixtures("_pairs_at_once")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_dense(rows: tuple[Any, Any], dtype: Any) -> None:
    queries, passages = (RANDOM.standard_normal((count, DIM)).astype(dtype) for count in (4, 5))
    expected = [queries[q].astype(np.float64) @ passages[p].astype(np.float64) for q, p in zip(*rows, strict=True)]
    made = score_dense(queries, passages, *rows)
    assert made.dtype == np.float32
    assert made == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("_pairs_at_once")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_colbert(rows: tuple[Any, Any], dtype: Any) -> None:
    queries, passages = make_matrices([1, 4, 2, 7], dtype), make_matrices([3, 1, 9, 2, 5], dtype)
    expected = [(matrix(queries, q) @ matrix(passages, p).T).max(axis=1).mean() for q, p in zip(*rows, strict=True)]
    made = score_colbert(queries, passages, *rows)
    assert made.dtype == np.float32
    assert made == pytest.approx(expected, abs=1e-5)


def test_colbert_of_a_side_without_vectors_is_no_number() -> None:
    queries, passages = make_matrices([2, 0]), make_matrices([0, 3])
    made = score_colbert(queries, passages, np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    assert np.isnan(made).tolist() == [True, False, True, True]


def test_colbert_does_not_floor_at_0() -> None:
    one, other = (TokenMatrices(indptr=np.array([0, 1]), vectors=np.array([[sign]], np.float32)) for sign in (1, -1))
    assert score_colbert(one, other, np.zeros(1, np.int64), np.zeros(1, np.int64)).tolist() == [-1.0]


@pytest.mark.usefixtures("_pairs_at_once")
def test_sparse(rows: tuple[Any, Any]) -> None:
    queries = [{int(token): float(RANDOM.random()) for token in RANDOM.integers(0, 12, 5)} for _ in range(3)] + [{}]
    passages = [{int(token): float(RANDOM.random()) for token in RANDOM.integers(0, 12, 8)} for _ in range(4)] + [{}]
    expected = [
        sum(weight * passages[p].get(token, 0.0) for token, weight in queries[q].items())
        for q, p in zip(*rows, strict=True)
    ]
    made = score_sparse(make_weights(queries), make_weights(passages), *rows)
    assert made.dtype == np.float32
    assert made == pytest.approx(expected, abs=1e-5)


def test_sparse_of_the_largest_token_ids() -> None:
    weights = make_weights([{250_001: 0.5}, {2**32 - 1: 2.0}])
    rows = np.array([0, 1, 0]), np.array([0, 1, 1])
    assert score_sparse(weights, weights, *rows).tolist() == [0.25, 4.0, 0.0]


def test_sparse_of_no_weights_at_all() -> None:
    empty = make_weights([{}, {}])
    assert score_sparse(empty, empty, np.array([0, 1]), np.array([1, 0])).tolist() == [0.0, 0.0]


def test_expand_rows() -> None:
    take, owner = expand_rows(np.array([10, 3, 7]), np.array([2, 0, 3]))
    assert take.tolist() == [10, 11, 7, 8, 9]
    assert owner.tolist() == [0, 0, 2, 2, 2]
    assert [len(each) for each in expand_rows(np.empty(0, np.int64), np.empty(0, np.int64))] == [0, 0]


def test_no_pairs() -> None:
    none = np.empty(0, np.int64)
    assert len(score_dense(np.ones((1, 2)), np.ones((1, 2)), none, none)) == 0
    assert len(score_sparse(make_weights([{1: 1.0}]), make_weights([{1: 1.0}]), none, none)) == 0
    assert len(score_colbert(make_matrices([1]), make_matrices([1]), none, none)) == 0
