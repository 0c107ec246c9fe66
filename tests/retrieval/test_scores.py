"""The kernels against plain loops over small random rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from m3cli.errors import UsageError
from m3cli.records import LexicalWeights, Output, TokenMatrices
from m3cli.retrieval import scores
from m3cli.retrieval.scores import (
    MODES,
    average_scores,
    check_weights,
    combine_scores,
    expand_rows,
    fuse_ranks,
    modes_of,
    parts_of,
    resolve_weights,
    score_colbert,
    score_dense,
    score_sparse,
)

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
    result = score_dense(queries, passages, *rows)
    assert result.dtype == np.float32
    assert result == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("_pairs_at_once")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_colbert(rows: tuple[Any, Any], dtype: Any) -> None:
    queries, passages = make_matrices([1, 4, 2, 7], dtype), make_matrices([3, 1, 9, 2, 5], dtype)
    expected = [(matrix(queries, q) @ matrix(passages, p).T).max(axis=1).mean() for q, p in zip(*rows, strict=True)]
    result = score_colbert(queries, passages, *rows)
    assert result.dtype == np.float32
    assert result == pytest.approx(expected, abs=1e-5)


def test_colbert_of_a_side_without_vectors_is_no_number() -> None:
    queries, passages = make_matrices([2, 0]), make_matrices([0, 3])
    result = score_colbert(queries, passages, np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    assert np.isnan(result).tolist() == [True, False, True, True]


def test_colbert_scores_may_be_negative() -> None:
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
    result = score_sparse(make_weights(queries), make_weights(passages), *rows)
    assert result.dtype == np.float32
    assert result == pytest.approx(expected, abs=1e-5)


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


SCORES: dict[Output, np.ndarray] = {
    "dense": np.array([0.6], np.float32),
    "sparse": np.array([0.2], np.float32),
    "colbert": np.array([0.8], np.float32),
}


def test_weighted_scores_are_averages() -> None:
    result = combine_scores(SCORES, MODES, weights=(0.4, 0.2, 0.8))
    assert result["sparse+dense"] == pytest.approx((0.4 * 0.6 + 0.2 * 0.2) / 0.6)
    assert result["colbert+sparse+dense"] == pytest.approx((0.4 * 0.6 + 0.2 * 0.2 + 0.8 * 0.8) / 1.4)
    assert all(values.dtype == np.float32 for values in result.values())


def test_parts_and_modes() -> None:
    assert parts_of(["sparse+dense"]) == ("dense", "sparse")
    assert parts_of(["colbert"]) == ("colbert",)
    assert modes_of(["dense", "sparse"]) == ("dense", "sparse", "sparse+dense")
    assert modes_of(["dense", "colbert"]) == ("dense", "colbert")
    assert modes_of(["dense", "sparse", "colbert"]) == MODES


def test_weights_must_leave_something_to_divide_by_in_each_mode() -> None:
    check_weights(("dense", "colbert"), (0.0, 0.0, 1.0))
    check_weights(("colbert+sparse+dense",), (0.0, 0.0, 1.0))
    with pytest.raises(UsageError, match=r"0,0,1.*sparse\+dense sum to 0"):
        check_weights(MODES, (0.0, 0.0, 1.0))


def test_weights_of_what_is_there() -> None:
    assert resolve_weights(None, ["dense", "sparse", "colbert"]) == (1, 1, 1)
    assert resolve_weights(None, ["dense", "colbert"]) == (1, 0, 1)
    assert resolve_weights((1, 0.3, 0), ["dense", "sparse"]) == (1, 0.3, 0)


def test_a_typed_weight_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="colbert 1, and the folder has no colbert, only dense, sparse"):
        resolve_weights((1, 1, 1), ["dense", "sparse"])


def test_one_output_is_no_hybrid() -> None:
    with pytest.raises(UsageError, match="only dense: use --mode dense"):
        resolve_weights(None, ["dense"])


def test_averages_are_those_of_score() -> None:
    random = np.random.default_rng(1)
    scores = {output: random.random(5, np.float32) for output in ("dense", "sparse", "colbert")}
    whole = combine_scores(scores, ["colbert+sparse+dense"], weights=(1, 0.3, 2))["colbert+sparse+dense"]  # type: ignore[arg-type]
    assert average_scores(scores, (1, 0.3, 2)) == pytest.approx(whole)  # type: ignore[arg-type]
    two = {output: scores[output] for output in ("dense", "sparse")}
    assert average_scores(two, (1, 3, 0)) == pytest.approx((scores["dense"] + 3 * scores["sparse"]) / 4)  # type: ignore[arg-type]


def test_reciprocal_ranks() -> None:
    ranks = {"dense": np.array([0, -1, 4]), "sparse": np.array([1, 0, -1]), "colbert": np.array([-1, -1, 2])}
    result = fuse_ranks(ranks, (1, 1, 2))  # type: ignore[arg-type]
    assert result == pytest.approx([1 / 61 + 1 / 62, 1 / 61, 1 / 65 + 2 / 63])
