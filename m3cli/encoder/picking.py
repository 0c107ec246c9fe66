"""Some rows of embeddings or chunks, as a record of their own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from m3cli.records import Chunks, Embeddings, LexicalWeights, TokenMatrices


def pick_rows(embeddings: Embeddings, places: NDArray[np.int64], *, rows: NDArray[np.int64]) -> Embeddings:
    """Return the embeddings at `places` [R], in that order, as those of the rows `rows` [R] of a shard."""
    dense, lexical, colbert = embeddings.dense_vecs, embeddings.lexical_weights, embeddings.colbert_vecs
    if lexical is not None:
        indptr, take = _pick_spans(lexical.indptr, places)
        lexical = LexicalWeights(indptr=indptr, indices=lexical.indices[take], values=lexical.values[take])
    if colbert is not None:
        colbert = take_vectors(colbert, *_pick_spans(colbert.indptr, places))
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


def pick_chunks(chunks: Chunks, rows: NDArray[np.int64]) -> Chunks:
    """Return some rows, in that order, of the documents that they are of."""
    cu_seqlens, take = _pick_spans(chunks.cu_seqlens, rows)
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


def _pick_spans(
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
