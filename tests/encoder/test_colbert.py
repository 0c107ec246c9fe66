from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage

from m3cli.config import ColbertForm
from m3cli.encoder import embeddings as pooling
from m3cli.encoder.embeddings import (
    choose_vectors,
    compress_matrices,
    keep_vectors,
    pool_vectors,
    quantise_binary,
    quantise_int8,
    restore_order,
)
from m3cli.encoder.heads import NO_LENGTH, NOT_FINITE, quantise_vectors
from m3cli.records import Embeddings, TokenMatrices
from m3cli.retrieval.scores import decode_vectors

LENGTHS = [5, 1, 12]


def make_matrices() -> TokenMatrices:
    random = np.random.default_rng(1)
    vectors = random.standard_normal((sum(LENGTHS), 16)).astype(np.float32)
    weights = random.random(len(vectors)).astype(np.float32)
    indptr = np.concatenate(([0], np.cumsum(LENGTHS)))
    weights[indptr[1:] - 1] = 0.0
    return TokenMatrices(
        indptr=indptr, vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True), weights=weights
    )


def test_plain_is_float16_of_the_same_vectors() -> None:
    stored = compress_matrices(make_matrices(), ColbertForm())
    assert np.array_equal(stored.vectors, make_matrices().vectors.astype(np.float16))
    assert stored.weights is None
    assert stored.scales is None


@pytest.mark.parametrize(
    ("form", "counts", "dtype", "width"),
    [
        (ColbertForm(dtype="int8"), [5, 1, 12], np.int8, 16),
        (ColbertForm(dtype="binary"), [5, 1, 12], np.uint8, 2),
        (ColbertForm(pool=2), [3, 1, 7], np.float16, 16),  # </s> by itself, and half of the others
        (ColbertForm(top_k=4), [4, 1, 4], np.float16, 16),
        (ColbertForm(top_k=4, pool=2), [2, 1, 2], np.float16, 16),  # chosen first, </s> is gone, then pooled
        (ColbertForm(top_k=4, pool=4, dtype="int8"), [1, 1, 1], np.int8, 16),
    ],
)
def test_chosen_then_pooled_then_quantised(form: ColbertForm, counts: list[int], dtype: type, width: int) -> None:
    stored = compress_matrices(make_matrices(), form)
    assert np.diff(stored.indptr).tolist() == counts
    assert stored.vectors.dtype == dtype
    assert stored.vectors.shape == (sum(counts), width)
    assert (stored.scales is not None) == (form.dtype == "int8")


def test_what_is_stored_already_is_left_alone() -> None:
    form = ColbertForm(pool=2, dtype="int8")
    stored = compress_matrices(make_matrices(), form)
    assert compress_matrices(stored, form) is stored


@pytest.mark.parametrize("form", [ColbertForm(dtype="int8"), ColbertForm(pool=3), ColbertForm(top_k=2, dtype="binary")])
def test_rows_of_any_length_are_put_in_order(form: ColbertForm) -> None:
    complete = compress_matrices(make_matrices(), form)
    parts = []
    for row in (2, 0, 1):
        span = slice(complete.indptr[row], complete.indptr[row + 1])
        matrices = TokenMatrices(
            indptr=np.array([0, span.stop - span.start]),
            vectors=complete.vectors[span],
            scales=None if complete.scales is None else complete.scales[span],
        )
        parts.append(Embeddings(rows=np.array([row + 7]), dense_vecs=None, lexical_weights=None, colbert_vecs=matrices))
    result = restore_order(iter(parts), start=7, stop=10).colbert_vecs
    assert result is not None
    assert np.array_equal(result.indptr, complete.indptr)
    assert np.array_equal(result.vectors, complete.vectors)
    if complete.scales is None:
        assert result.scales is None
    else:
        assert result.scales is not None
        assert np.array_equal(result.scales, complete.scales)


def as_matrices(rows: list[list[float]]) -> TokenMatrices:
    """One vector a weight; vector v is [v]."""
    weights = np.array([weight for row in rows for weight in row], np.float32)
    return TokenMatrices(
        indptr=np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64),
        vectors=np.arange(len(weights), dtype=np.float32)[:, None],
        scales=weights + 1,
        weights=weights,
    )


def test_what_is_kept_stays_in_its_row_with_all_that_belongs_to_it() -> None:
    matrices = as_matrices([[0.5, 0.1], [], [0.2, 0.3, 0.0]])
    kept = keep_vectors(matrices, np.array([True, False, False, True, True]))
    assert kept.indptr.tolist() == [0, 1, 1, 3]
    assert kept.vectors[:, 0].tolist() == [0, 3, 4]
    assert kept.weights is not None
    assert kept.scales is not None
    assert kept.weights.tolist() == np.array([0.5, 0.3, 0], np.float32).tolist()
    assert kept.scales.tolist() == np.array([1.5, 1.3, 1], np.float32).tolist()


def test_of_equal_weights_the_earlier_token_is_taken() -> None:
    assert choose_vectors(as_matrices([[0.2, 0.2, 0.2]]), top_k=2).tolist() == [True, True, False]


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3]), max_size=9), max_size=6),
    st.integers(1, 5),
)
def test_chosen_as_a_loop_would(rows: list[list[float]], most: int) -> None:
    mask = choose_vectors(as_matrices(rows), top_k=most)
    expected: list[bool] = []
    for row in rows:
        weights = np.array(row, np.float32)
        order = sorted(range(len(row)), key=lambda index: (-weights[index], index))
        expected += [index in order[:most] for index in range(len(row))]
    assert mask.tolist() == expected


def make_rows(lengths: list[int], *, dim: int = 8, seed: int = 0) -> TokenMatrices:
    vectors = np.random.default_rng(seed).standard_normal((sum(lengths), dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return TokenMatrices(indptr=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64), vectors=vectors)


def protect_last(matrices: TokenMatrices) -> NDArray[np.bool_]:
    protected = np.zeros(len(matrices.vectors), np.bool_)
    protected[matrices.indptr[1:][np.diff(matrices.indptr) > 0] - 1] = True
    return protected


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 6), st.integers(0, 5))
def test_one_vector_for_every_k_and_the_protected_ones(lengths: list[int], factor: int, seed: int) -> None:
    matrices = make_rows(lengths, seed=seed)
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
    matrices = make_rows([length])
    pooled = pool_vectors(matrices, factor=3, protected=np.zeros(length, np.bool_))
    merges, count = linkage(matrices.vectors.astype(np.float64), "ward"), -(-length // 3)
    labels = (
        fcluster(merges, count, criterion="maxclust") if count > 1 else np.zeros(length)
    )  # one is two in scipy 1.12
    means = []
    for label in dict.fromkeys(labels.tolist()):
        mean = matrices.vectors[labels == label].sum(axis=0)
        means.append(mean / np.linalg.norm(mean))
    assert pooled.vectors == pytest.approx(np.array(means), abs=1e-5)


def test_rows_do_not_know_of_each_other() -> None:
    matrices = make_rows([13, 0, 30])
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
    monkeypatch.setattr(pooling, "BLOCK_VECTORS", 10)
    matrices = make_rows([25])
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


def make_vectors(count: int, dim: int) -> np.ndarray:
    vectors = np.random.default_rng(3).standard_normal((count, dim)).astype(np.float32)
    result: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return result


def test_int8_vectors_have_norm_1_and_point_the_same_way() -> None:
    vectors = make_vectors(3000, 128)  # more than a block
    rounded, scales = quantise_int8(vectors)
    assert rounded.dtype == np.int8
    assert scales.dtype == np.float32
    assert np.abs(rounded).max(axis=1).tolist() == [127] * 3000
    decoded = rounded * scales[:, None]
    assert np.linalg.norm(decoded, axis=1) == pytest.approx(np.ones(3000), abs=1e-6)
    assert np.einsum("ij,ij->i", decoded, vectors).min() > 0.9998


def test_a_vector_of_zeros_stays_one() -> None:
    rounded, scales = quantise_int8(np.zeros((1, 4), np.float32))
    assert not rounded.any()
    assert scales.tolist() == [0.0]


def test_signs_stand_in_the_order_that_vespa_unpacks() -> None:
    # The first of eight numbers is the highest bit: 1000 0001, 0100 0000.
    vectors = np.full((1, 16), -0.1, np.float32)
    vectors[0, [0, 7, 9]] = 0.1
    vectors[0, 8] = 0.0
    assert quantise_binary(vectors).tolist() == [[0x81, 0x40]]


@pytest.mark.parametrize("indices", [slice(2, 5), np.array([4, 0])])
def test_what_is_stored_is_decoded_to_float32_of_norm_1(indices: slice | np.ndarray) -> None:
    vectors, indptr = make_vectors(6, 64), np.array([0, 6])
    rounded, scales = quantise_int8(vectors)
    from_int8 = decode_vectors(TokenMatrices(indptr=indptr, vectors=rounded, scales=scales), indices)
    from_signs = decode_vectors(TokenMatrices(indptr=indptr, vectors=quantise_binary(vectors)), indices)
    from_half = decode_vectors(TokenMatrices(indptr=indptr, vectors=vectors.astype(np.float16)), indices)
    assert from_int8 == pytest.approx(vectors[indices], abs=2e-3)
    assert np.array_equal(from_signs, np.where(vectors[indices] > 0, 0.125, -0.125))
    assert from_half == pytest.approx(vectors[indices], abs=1e-3)
    assert {each.dtype for each in (from_int8, from_signs, from_half)} == {np.dtype(np.float32)}


@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 64, 1024]))
def test_a_device_quantises_as_the_host_does(seed: int, width: int) -> None:
    draw = np.random.default_rng(seed)
    vectors = draw.standard_normal((20, width), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[3], vectors[5, 1], vectors[6, 0] = 0, np.nan, np.inf
    good = np.delete(np.arange(20), [5, 6])
    made = {name: tensor.numpy() for name, tensor in quantise_vectors(torch.from_numpy(vectors), "int8").items()}
    rounded, scales = quantise_int8(vectors[good])
    assert made["colbert_vecs"][good].tobytes() == rounded.tobytes()
    np.testing.assert_allclose(made["colbert_scales"][good], scales, rtol=1e-6)
    assert made["colbert_errors"].tolist() == [0, 0, 0, NO_LENGTH, 0, NOT_FINITE, NOT_FINITE, *[0] * 13]
    signs = quantise_vectors(torch.from_numpy(vectors), "binary")
    assert signs["colbert_vecs"].numpy().tobytes() == quantise_binary(vectors).tobytes()
    assert signs["colbert_errors"].tolist() == made["colbert_errors"].tolist()
