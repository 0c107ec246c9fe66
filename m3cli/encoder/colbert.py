"""Compression of ColBERT matrices: vectors chosen by weight, pooled and quantised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.config import ColbertForm
from m3cli.encoder.embeddings import take_vectors
from m3cli.records import Embeddings, TokenMatrices, concat_ranges


def compress_rows(embeddings: Embeddings, form: ColbertForm) -> Embeddings:
    """Return embeddings with their ColBERT matrices in the form that is stored."""
    if embeddings.colbert_vecs is None:
        return embeddings
    return replace(embeddings, colbert_vecs=compress_matrices(embeddings.colbert_vecs, form))


def compress_matrices(matrices: TokenMatrices, form: ColbertForm) -> TokenMatrices:
    """Choose, pool and quantise the float32 vectors of some rows, each of which ends in its `</s>`.

    Vectors of another type are in this form, from the device or a previous folder, and are returned unchanged.
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
    """Return the most vectors [R] that are stored of rows with `num_vectors` [R]."""
    vectors = num_vectors.astype(np.int64)
    if form.top_k is not None:
        vectors = np.minimum(vectors, form.top_k)
    if form.pool == 1:
        return vectors
    # Each block is rounded up, and the protected vector is a cluster of its own.
    bound: NDArray[np.int64] = np.minimum(vectors, vectors // form.pool + -(-vectors // BLOCK_VECTORS) + 1)
    return bound


BLOCK_VECTORS = 512


def pool_vectors(matrices: TokenMatrices, *, factor: int, protected: NDArray[np.bool_]) -> TokenMatrices:
    """Merge the vectors of each row into one for every `factor` of them, rounded up.

    Args:
        matrices: float32 vectors of norm 1.
        factor: 1 or more.
        protected: [V] vectors that are not merged.
    """
    cluster = np.empty(len(matrices.vectors), np.int64)
    indptr = np.zeros(len(matrices.indptr), np.int64)
    total = 0
    for row, (first, last) in enumerate(zip(matrices.indptr[:-1].tolist(), matrices.indptr[1:].tolist(), strict=True)):
        span = slice(first, last)
        cluster[span] = _number_clusters(matrices.vectors[span], factor=factor, protected=protected[span]) + total
        total = int(cluster[span].max(initial=total - 1)) + 1
        indptr[row + 1] = total
    order = np.argsort(cluster, kind="stable")
    begins = np.searchsorted(cluster[order], np.arange(total))
    sums = np.add.reduceat(matrices.vectors[order], begins, axis=0) if total else matrices.vectors[:0]
    sums /= np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return TokenMatrices(indptr=indptr, vectors=sums)


def _number_clusters(vectors: NDArray[np.float32], *, factor: int, protected: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the cluster [V] of each vector of a row, numbered by their first vectors."""
    labels = np.arange(len(vectors))
    free = np.flatnonzero(~protected)
    for block in np.array_split(free, -(-len(free) // BLOCK_VECTORS) or 1):
        if len(block) > 1:
            labels[block] = block[_cluster(vectors[block], num_clusters=-(-len(block) // factor))]
    _, numbers = np.unique(labels, return_inverse=True)
    return numbers.reshape(-1)


def _cluster(vectors: NDArray[np.float32], *, num_clusters: int) -> NDArray[np.int64]:
    """Return for each vector the index of the first one of its cluster."""
    from scipy.cluster.hierarchy import linkage  # noqa: PLC0415  0.3 s, only where vectors are pooled
    from scipy.spatial.distance import squareform  # noqa: PLC0415

    count = len(vectors)
    distances = 2.0 - 2.0 * (vectors @ vectors.T).astype(np.float64)
    np.sqrt(np.maximum(distances, 0.0, out=distances), out=distances)
    merges = linkage(squareform(distances, checks=False), "ward")[: count - num_clusters, :2].astype(np.int64).tolist()
    # From the last merge to the first, pass the cluster on to the two parts of each.
    top = list(range(count + len(merges)))
    for merge in range(len(merges) - 1, -1, -1):
        for part in merges[merge]:
            top[part] = top[count + merge]
    _, first, numbers = np.unique(top[:count], return_index=True, return_inverse=True)
    firsts: NDArray[np.int64] = first[numbers.reshape(-1)]
    return firsts


def keep_vectors(matrices: TokenMatrices, mask: NDArray[np.bool_]) -> TokenMatrices:
    """Return the vectors for which `mask` [V] is true, in the same rows and order."""
    kept = np.concatenate((np.zeros(1, np.int64), np.cumsum(mask, dtype=np.int64)))
    return take_vectors(matrices, kept[matrices.indptr], mask)


def choose_vectors(matrices: TokenMatrices, *, top_k: int) -> NDArray[np.bool_]:
    """Return whether each vector [V] belongs to the `top_k` heaviest tokens of its row; of equal ones, the first."""
    assert matrices.weights is not None
    weights, lengths = matrices.weights, np.diff(matrices.indptr)
    row = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((np.arange(len(weights)), -weights, row))
    rank = np.empty(len(weights), np.int64)
    _, rank[order] = concat_ranges(0, lengths)
    mask: NDArray[np.bool_] = rank < top_k
    return mask


BLOCK_BYTES = 1 << 20
"of float32, which fit the processor's cache"


def quantise_int8(vectors: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round float32 vectors [V, D] to int8 [V, D] with scales [V]; a vector of zeros has scale 0."""
    rounded = np.empty(vectors.shape, np.int8)
    scales = np.zeros(len(vectors), np.float32)
    step = max(1, BLOCK_BYTES // max(1, vectors.shape[1] * 4))
    for start in range(0, len(vectors), step):
        block = vectors[start : start + step]
        largest = np.maximum(block.max(axis=1), -block.min(axis=1))
        factor = np.divide(127.0, largest, out=np.zeros_like(largest), where=largest > 0)
        numbers = np.rint(block * factor[:, None])
        rounded[start : start + step] = numbers
        norm = np.sqrt(np.einsum("ij,ij->i", numbers, numbers))
        np.divide(1.0, norm, out=scales[start : start + step], where=norm > 0)
    return rounded, scales


def quantise_binary(vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the signs [V, D / 8] of vectors [V, D], eight in a byte."""
    return np.packbits(vectors > 0, axis=1)
