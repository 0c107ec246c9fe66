"""Embeddings of batches, longest row first, back to a window's rows in corpus order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from m3cli.records import Chunks, Embeddings, LexicalWeights, TokenMatrices


def order_rows(batches: Iterable[Embeddings], chunks: Chunks, *, start: int, stop: int) -> Embeddings:
    """Collect the batches of the rows [start, stop) into one record with rows ascending.

    ColBERT matrices are placed as their batch arrives, so no more than the window and one batch is held.
    """
    rows = np.arange(start, stop)
    indptr = chunks.cu_seqlens[start : stop + 1] - chunks.cu_seqlens[start] - np.arange(stop - start + 1)
    arrived: list[NDArray[np.int64]] = []
    dense: list[NDArray[np.float16]] = []
    lexical: list[LexicalWeights] = []
    vectors: NDArray[np.float16] | None = None
    for batch in batches:
        arrived.append(batch.rows)
        if batch.dense_vecs is not None:
            dense.append(batch.dense_vecs)
        if batch.lexical_weights is not None:
            lexical.append(batch.lexical_weights)
        if (matrices := batch.colbert_vecs) is not None:
            if vectors is None:
                vectors = np.empty((int(indptr[-1]), matrices.vectors.shape[1]), matrices.vectors.dtype)
            _place_matrices(matrices, indptr[batch.rows - start], vectors)
    # order[i]: where the window's row i stands among the rows as they arrived
    order = np.argsort(np.concatenate(arrived), kind="stable")
    assert len(order) == len(rows)
    return Embeddings(
        rows=rows,
        dense_vecs=np.concatenate(dense)[order] if dense else None,
        lexical_weights=_order_weights(lexical, order) if lexical else None,
        colbert_vecs=None if vectors is None else TokenMatrices(indptr=indptr, vectors=vectors),
    )


def _place_matrices(matrices: TokenMatrices, begins: NDArray[np.int64], vectors: NDArray[np.float16]) -> None:
    for row, begin in enumerate(begins):
        first, last = matrices.indptr[row], matrices.indptr[row + 1]
        vectors[begin : begin + last - first] = matrices.vectors[first:last]


def _order_weights(parts: Sequence[LexicalWeights], order: NDArray[np.int64]) -> LexicalWeights:
    lengths = np.concatenate([np.diff(part.indptr) for part in parts])
    begins = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    indptr = np.zeros(len(order) + 1, np.int64)
    np.cumsum(lengths[order], out=indptr[1:])
    # Weight i of the ordered rows stands at begins[row] + (i - indptr[row]) among those that arrived.
    take = np.arange(indptr[-1]) + np.repeat(begins[order] - indptr[:-1], lengths[order])
    return LexicalWeights(
        indptr=indptr,
        indices=np.concatenate([part.indices for part in parts])[take],
        values=np.concatenate([part.values for part in parts])[take],
    )
