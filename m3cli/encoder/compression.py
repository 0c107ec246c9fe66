"""ColBERT matrices as the heads make them to what is stored of them: chosen by weight, pooled, quantised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.config import ColbertForm
from m3cli.encoder.pooling import BLOCK_VECTORS, pool_vectors
from m3cli.encoder.pruning import choose_vectors, keep_vectors
from m3cli.encoder.quantising import quantise_binary, quantise_int8
from m3cli.records import Embeddings, TokenMatrices


def compress_rows(embeddings: Embeddings, form: ColbertForm) -> Embeddings:
    """Return embeddings with their ColBERT matrices as they are to be stored; without any, as they are."""
    if embeddings.colbert_vecs is None:
        return embeddings
    return replace(embeddings, colbert_vecs=compress_matrices(embeddings.colbert_vecs, form))


def compress_matrices(matrices: TokenMatrices, form: ColbertForm) -> TokenMatrices:
    """Choose, pool and quantise the float32 vectors of some rows, each of which ends in its `</s>`.

    Vectors of another type are taken for what an older folder has stored in this form, and left alone.
    """
    if matrices.vectors.dtype != np.float32:
        return matrices
    protected = np.zeros(len(matrices.vectors), np.bool_)
    protected[matrices.indptr[1:][np.diff(matrices.indptr) > 0] - 1] = True
    if form.top_k is not None:
        mask = choose_vectors(matrices, top_k=form.top_k)
        matrices, protected = keep_vectors(matrices, mask), protected[mask]
    if form.pool > 1:
        matrices = pool_vectors(matrices, factor=form.pool, protected=protected)
    if form.dtype == "int8":
        rounded, scales = quantise_int8(matrices.vectors)
        return TokenMatrices(indptr=matrices.indptr, vectors=rounded, scales=scales)
    stored = quantise_binary(matrices.vectors) if form.dtype == "binary" else matrices.vectors.astype(np.float16)
    return TokenMatrices(indptr=matrices.indptr, vectors=stored)


def bound_vectors(num_vectors: NDArray[Any], form: ColbertForm) -> NDArray[np.int64]:
    """Return how many vectors [R] are stored at most of rows that have so many [R] before."""
    vectors = num_vectors.astype(np.int64)
    if form.top_k is not None:
        vectors = np.minimum(vectors, form.top_k)
    if form.pool == 1:
        return vectors
    # Each block is rounded up, and the protected vector stands by itself.
    bound: NDArray[np.int64] = np.minimum(vectors, vectors // form.pool + -(-vectors // BLOCK_VECTORS) + 1)
    return bound
