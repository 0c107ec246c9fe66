from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage

from m3cli.encoder import colbert
from m3cli.encoder.colbert import pool_vectors
from m3cli.records import TokenMatrices


def make(lengths: list[int], *, dim: int = 8, seed: int = 0) -> TokenMatrices:
    vectors = np.random.default_rng(seed).standard_normal((sum(lengths), dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return TokenMatrices(indptr=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64), vectors=vectors)


def protect_last(matrices: TokenMatrices) -> NDArray[np.bool_]:
    protected = np.zeros(len(matrices.vectors), np.bool_)
    protected[matrices.indptr[1:][np.diff(matrices.indptr) > 0] - 1] = True
    return protected


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 6), st.integers(0, 5))
def test_one_vector_for_every_k_and_the_protected_ones(lengths: list[int], factor: int, seed: int) -> None:
    matrices = make(lengths, seed=seed)
    pooled = pool_vectors(matrices, factor=factor, protected=protect_last(matrices))
    expected = [-(-(length - 1) // factor) + 1 if length else 0 for length in lengths]
    assert np.diff(pooled.indptr).tolist() == expected
    assert np.abs(np.linalg.norm(pooled.vectors, axis=1) - 1).max(initial=0) < 1e-5
    for row, length in enumerate(lengths):
        if length:
            last = pooled.vectors[pooled.indptr[row + 1] - 1]
            assert last == pytest.approx(matrices.vectors[matrices.indptr[row + 1] - 1], abs=1e-6)


@pytest.mark.parametrize("length", [2, 7, 40])
def test_clusters_are_those_of_scipy_in_the_order_of_their_first_tokens(length: int) -> None:
    matrices = make([length])
    pooled = pool_vectors(matrices, factor=3, protected=np.zeros(length, np.bool_))
    labels = fcluster(linkage(matrices.vectors.astype(np.float64), "ward"), -(-length // 3), criterion="maxclust")
    means = []
    for label in dict.fromkeys(labels.tolist()):
        mean = matrices.vectors[labels == label].sum(axis=0)
        means.append(mean / np.linalg.norm(mean))
    assert pooled.vectors == pytest.approx(np.array(means), abs=1e-5)


def test_rows_do_not_know_of_each_other() -> None:
    matrices = make([13, 0, 30])
    both = pool_vectors(matrices, factor=2, protected=protect_last(matrices))
    alone = TokenMatrices(indptr=np.array([0, 30]), vectors=matrices.vectors[13:])
    second = pool_vectors(alone, factor=2, protected=protect_last(alone))
    assert np.array_equal(both.vectors[both.indptr[2] :], second.vectors)


def test_tokens_that_are_equal_fall_together() -> None:
    unit = np.eye(4, dtype=np.float32)
    matrices = TokenMatrices(indptr=np.array([0, 8]), vectors=unit[[0, 1, 2, 3, 0, 1, 2, 3]])
    pooled = pool_vectors(matrices, factor=2, protected=np.zeros(8, np.bool_))
    assert np.array_equal(pooled.vectors, unit)


def test_a_long_row_is_pooled_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colbert, "BLOCK_VECTORS", 10)
    matrices = make([25])
    none = np.zeros(25, np.bool_)
    pooled = pool_vectors(matrices, factor=2, protected=none)
    parts = [matrices.vectors[span] for span in (slice(0, 9), slice(9, 17), slice(17, 25))]
    alone = [
        pool_vectors(
            TokenMatrices(indptr=np.array([0, len(part)]), vectors=part), factor=2, protected=none[: len(part)]
        )
        for part in parts
    ]
    assert np.array_equal(pooled.vectors, np.concatenate([part.vectors for part in alone]))
