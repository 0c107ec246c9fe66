"""Embeddings of batches, longest row first, back to a window's rows in corpus order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.records import Embeddings, LexicalWeights, TokenMatrices


def order_rows(batches: Iterable[Embeddings], *, start: int, stop: int) -> Embeddings:
    """Collect the batches of the rows [start, stop) into one record with rows ascending.

    How many ColBERT vectors a row has is what its batch says. Batches are let go of one by one as their matrices are
    put in their places, so no more than the window and one batch is held.
    """
    arrived: list[NDArray[np.int64]] = []
    dense: list[NDArray[np.float16]] = []
    lexical: list[LexicalWeights] = []
    matrices: list[TokenMatrices] = []
    for batch in batches:
        arrived.append(batch.rows)
        if batch.dense_vecs is not None:
            dense.append(batch.dense_vecs)
        if batch.lexical_weights is not None:
            lexical.append(batch.lexical_weights)
        if batch.colbert_vecs is not None:
            matrices.append(batch.colbert_vecs)
    # order[i]: where the window's row i stands among the rows as they arrived
    order = np.argsort(np.concatenate(arrived), kind="stable")
    assert len(order) == stop - start
    return Embeddings(
        rows=np.arange(start, stop),
        dense_vecs=np.concatenate(dense)[order] if dense else None,
        lexical_weights=_order_weights(lexical, order) if lexical else None,
        colbert_vecs=_order_matrices(matrices, order) if matrices else None,
    )


def _order_matrices(parts: list[TokenMatrices], order: NDArray[np.int64]) -> TokenMatrices:
    """Put matrices in order, emptying `parts`."""
    lengths = np.concatenate([np.diff(part.indptr) for part in parts])
    indptr = np.zeros(len(order) + 1, np.int64)
    np.cumsum(lengths[order], out=indptr[1:])
    begins = np.empty(len(order), np.int64)
    begins[order] = indptr[:-1]
    first, num_vectors = parts[0], int(indptr[-1])
    vectors = np.empty((num_vectors, first.vectors.shape[1]), first.vectors.dtype)
    scales = None if first.scales is None else np.empty(num_vectors, np.float32)
    weights = None if first.weights is None else np.empty(num_vectors, np.float32)
    done = 0
    while parts:
        part = parts.pop(0)
        mine = begins[done : done + len(part.indptr) - 1]
        done += len(mine)
        for values, into in ((part.vectors, vectors), (part.scales, scales), (part.weights, weights)):
            if values is not None and into is not None:
                _place(values, part.indptr, mine, into)
    return TokenMatrices(indptr=indptr, vectors=vectors, scales=scales, weights=weights)


def _place(values: NDArray[Any], indptr: NDArray[np.int64], begins: NDArray[np.int64], into: NDArray[Any]) -> None:
    for row, begin in enumerate(begins.tolist()):
        first, last = indptr[row], indptr[row + 1]
        into[begin : begin + last - first] = values[first:last]


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
