"""Some rows of embeddings or chunks, as a record of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.records import Chunks, Embeddings, LexicalWeights, TokenMatrices


def select_rows(embeddings: Embeddings, places: NDArray[np.int64], *, rows: NDArray[np.int64]) -> Embeddings:
    """Return the embeddings at `places` [R], in that order, as those of the rows `rows` [R] of a shard."""
    dense, lexical, colbert = embeddings.dense_vecs, embeddings.lexical_weights, embeddings.colbert_vecs
    if lexical is not None:
        indptr, take = _select_spans(lexical.indptr, places)
        lexical = LexicalWeights(indptr=indptr, indices=lexical.indices[take], values=lexical.values[take])
    if colbert is not None:
        colbert = take_vectors(colbert, *_select_spans(colbert.indptr, places))
    return Embeddings(
        rows=rows,
        dense_vecs=None if dense is None else dense[places],
        lexical_weights=lexical,
        colbert_vecs=colbert,
    )


def take_vectors(
    matrices: TokenMatrices, indptr: NDArray[np.int64], take: NDArray[np.int64] | NDArray[np.bool_] | slice
) -> TokenMatrices:
    """Return some of the vectors, with what belongs to each of them, as rows that begin at `indptr`."""
    scales, weights = matrices.scales, matrices.weights
    return TokenMatrices(
        indptr=indptr,
        vectors=matrices.vectors[take],
        scales=None if scales is None else scales[take],
        weights=None if weights is None else weights[take],
    )


def select_chunks(chunks: Chunks, rows: NDArray[np.int64]) -> Chunks:
    """Return some rows, in that order, of the documents that they are of."""
    cu_seqlens, take = _select_spans(chunks.cu_seqlens, rows)
    return Chunks(
        input_ids=chunks.input_ids[take],
        cu_seqlens=cu_seqlens,
        document=chunks.document[rows],
        chunk_index=chunks.chunk_index[rows],
        num_chunks=chunks.num_chunks[rows],
        char_start=chunks.char_start[rows],
        char_end=chunks.char_end[rows],
        truncated=chunks.truncated[rows],
        num_repeated=chunks.num_repeated[rows],
    )


def join_chunks(first: Chunks, second: Chunks) -> Chunks:
    """Return the rows of both, one after the other."""
    return Chunks(
        input_ids=np.concatenate((first.input_ids, second.input_ids)),
        cu_seqlens=np.concatenate((first.cu_seqlens, second.cu_seqlens[1:] + first.cu_seqlens[-1])),
        document=np.concatenate((first.document, second.document)),
        chunk_index=np.concatenate((first.chunk_index, second.chunk_index)),
        num_chunks=np.concatenate((first.num_chunks, second.num_chunks)),
        char_start=np.concatenate((first.char_start, second.char_start)),
        char_end=np.concatenate((first.char_end, second.char_end)),
        truncated=np.concatenate((first.truncated, second.truncated)),
        num_repeated=np.concatenate((first.num_repeated, second.num_repeated)),
    )


def _select_spans(
    indptr: NDArray[np.int64], places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64] | slice]:
    """Return where the picked spans begin, and what to take of the values that `indptr` counts in."""
    begins = indptr[places]
    lengths = indptr[places + 1] - begins
    picked = np.zeros(len(places) + 1, np.int64)
    np.cumsum(lengths, out=picked[1:])
    if len(places) and (np.diff(places) == 1).all():
        return picked, slice(int(begins[0]), int(begins[0] + picked[-1]))
    return picked, np.arange(picked[-1]) + np.repeat(begins - picked[:-1], lengths)


def concat_embeddings(parts: Sequence[Embeddings]) -> Embeddings:
    """Put one or more records with the same outputs one after the other."""
    dense = [part.dense_vecs for part in parts if part.dense_vecs is not None]
    lexical = [part.lexical_weights for part in parts if part.lexical_weights is not None]
    colbert = [part.colbert_vecs for part in parts if part.colbert_vecs is not None]
    return Embeddings(
        rows=np.concatenate([part.rows for part in parts]),
        dense_vecs=np.concatenate(dense) if dense else None,
        lexical_weights=_join_weights(lexical) if lexical else None,
        colbert_vecs=_join_matrices(colbert) if colbert else None,
    )


def _join_weights(parts: Sequence[LexicalWeights]) -> LexicalWeights:
    return LexicalWeights(
        indptr=_join_indptr([part.indptr for part in parts]),
        indices=np.concatenate([part.indices for part in parts]),
        values=np.concatenate([part.values for part in parts]),
    )


def _join_matrices(parts: Sequence[TokenMatrices]) -> TokenMatrices:
    scales = [part.scales for part in parts if part.scales is not None]
    weights = [part.weights for part in parts if part.weights is not None]
    return TokenMatrices(
        indptr=_join_indptr([part.indptr for part in parts]),
        vectors=np.concatenate([part.vectors for part in parts]),
        scales=np.concatenate(scales) if scales else None,
        weights=np.concatenate(weights) if weights else None,
    )


def _join_indptr(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    lengths = np.concatenate([np.diff(part) for part in parts])
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))


def restore_order(batches: Iterable[Embeddings], *, start: int, stop: int) -> Embeddings:
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
