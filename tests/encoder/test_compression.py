from __future__ import annotations

import numpy as np
import pytest

from m3cli.config import ColbertForm
from m3cli.encoder.colbert import compress_matrices
from m3cli.encoder.embeddings import restore_order
from m3cli.records import Embeddings, TokenMatrices

LENGTHS = [5, 1, 12]


def make() -> TokenMatrices:
    random = np.random.default_rng(1)
    vectors = random.standard_normal((sum(LENGTHS), 16)).astype(np.float32)
    weights = random.random(len(vectors)).astype(np.float32)
    indptr = np.concatenate(([0], np.cumsum(LENGTHS)))
    weights[indptr[1:] - 1] = 0.0
    return TokenMatrices(
        indptr=indptr, vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True), weights=weights
    )


def test_plain_is_float16_of_the_same_vectors() -> None:
    stored = compress_matrices(make(), ColbertForm())
    assert np.array_equal(stored.vectors, make().vectors.astype(np.float16))
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
    stored = compress_matrices(make(), form)
    assert np.diff(stored.indptr).tolist() == counts
    assert stored.vectors.dtype == dtype
    assert stored.vectors.shape == (sum(counts), width)
    assert (stored.scales is not None) == (form.dtype == "int8")


def test_what_is_stored_already_is_left_alone() -> None:
    form = ColbertForm(pool=2, dtype="int8")
    stored = compress_matrices(make(), form)
    assert compress_matrices(stored, form) is stored


@pytest.mark.parametrize("form", [ColbertForm(dtype="int8"), ColbertForm(pool=3), ColbertForm(top_k=2, dtype="binary")])
def test_rows_of_any_length_are_put_in_order(form: ColbertForm) -> None:
    whole = compress_matrices(make(), form)
    parts = []
    for row in (2, 0, 1):
        span = slice(whole.indptr[row], whole.indptr[row + 1])
        matrices = TokenMatrices(
            indptr=np.array([0, span.stop - span.start]),
            vectors=whole.vectors[span],
            scales=None if whole.scales is None else whole.scales[span],
        )
        parts.append(Embeddings(rows=np.array([row + 7]), dense_vecs=None, lexical_weights=None, colbert_vecs=matrices))
    made = restore_order(iter(parts), start=7, stop=10).colbert_vecs
    assert made is not None
    assert np.array_equal(made.indptr, whole.indptr)
    assert np.array_equal(made.vectors, whole.vectors)
    if whole.scales is None:
        assert made.scales is None
    else:
        assert made.scales is not None
        assert np.array_equal(made.scales, whole.scales)
