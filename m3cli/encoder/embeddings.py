"""Select, concatenate and reorder rows of embeddings and chunks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.records import Chunks, Embeddings, LexicalWeights, TokenMatrices, concat_ranges

_CHUNK_MEMBERS = tuple(field.name for field in fields(Chunks) if field.name not in ("input_ids", "cu_seqlens"))
"with one value a row"


def select_rows(embeddings: Embeddings, indices: NDArray[np.int64], *, rows: NDArray[np.int64]) -> Embeddings:
    """Return the embeddings at `indices` [R], in that order, as the rows `rows` [R] of a shard."""
    dense, lexical, colbert = embeddings.dense_vecs, embeddings.lexical_weights, embeddings.colbert_vecs
    if lexical is not None:
        indptr, take = _select_spans(lexical.indptr, indices)
        lexical = LexicalWeights(indptr=indptr, indices=lexical.indices[take], values=lexical.values[take])
    if colbert is not None:
        colbert = take_vectors(colbert, *_select_spans(colbert.indptr, indices))
    return Embeddings(
        rows=rows,
        dense_vecs=None if dense is None else dense[indices],
        lexical_weights=lexical,
        colbert_vecs=colbert,
    )


def take_vectors(
    matrices: TokenMatrices, indptr: NDArray[np.int64], take: NDArray[np.int64] | NDArray[np.bool_] | slice
) -> TokenMatrices:
    """Return some vectors with their scales and weights, as rows with a new `indptr`."""
    scales, weights = matrices.scales, matrices.weights
    return TokenMatrices(
        indptr=indptr,
        vectors=matrices.vectors[take],
        scales=None if scales is None else scales[take],
        weights=None if weights is None else weights[take],
    )


def select_chunks(chunks: Chunks, rows: NDArray[np.int64]) -> Chunks:
    """Return some rows, in that order; their documents keep their numbers."""
    cu_seqlens, take = _select_spans(chunks.cu_seqlens, rows)
    members = {name: getattr(chunks, name)[rows] for name in _CHUNK_MEMBERS}
    return Chunks(input_ids=chunks.input_ids[take], cu_seqlens=cu_seqlens, **members)


def join_chunks(first: Chunks, second: Chunks) -> Chunks:
    """Return the rows of both, one after the other."""
    return Chunks(
        input_ids=np.concatenate((first.input_ids, second.input_ids)),
        cu_seqlens=np.concatenate((first.cu_seqlens, second.cu_seqlens[1:] + first.cu_seqlens[-1])),
        **{name: np.concatenate((getattr(first, name), getattr(second, name))) for name in _CHUNK_MEMBERS},
    )


def _select_spans(
    indptr: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64] | slice]:
    """Return the indptr of some rows, and the indices of their values: a slice of consecutive rows, a view."""
    if len(rows) and (np.diff(rows) == 1).all():
        bounds = indptr[rows[0] : rows[-1] + 2]
        return bounds - bounds[0], slice(int(bounds[0]), int(bounds[-1]))
    return concat_ranges(indptr[rows], indptr[rows + 1] - indptr[rows])


def concat_embeddings(parts: Sequence[Embeddings]) -> Embeddings:
    """Return one or more records with the same outputs as one."""
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


class Buffers:
    """Memory of ColBERT vectors, taken again when nothing refers to it: new pages take longer than the copy to them."""

    def __init__(self) -> None:
        self._held: list[NDArray[np.uint8]] = []

    def empty(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an uninitialised array [V, D]."""
        num_bytes = shape[0] * shape[1] * dtype.itemsize
        # Arrays over a buffer refer to it, whoever holds them. A free one has the list, `each` and the argument.
        free = [each for each in self._held if sys.getrefcount(each) == _REFERENCES]
        buffer = next((each for each in free if len(each) >= num_bytes), None)
        if buffer is None:
            buffer = np.empty(num_bytes, np.uint8)
            # Free ones are too small, and are replaced.
            self._held = [each for each in self._held if all(each is not other for other in free)] + [buffer]
        return buffer[:num_bytes].view(dtype).reshape(shape)


_REFERENCES = 3


def restore_order(
    batches: Iterable[Embeddings], *, start: int, stop: int, buffers: Buffers | None = None
) -> Embeddings:
    """Return the batches of the rows [start, stop) as one record with rows ascending.

    Each batch's matrices are freed after they are copied. So memory holds the window and one batch.
    """
    rows: list[NDArray[np.int64]] = []
    dense: list[NDArray[np.float16]] = []
    lexical: list[LexicalWeights] = []
    matrices: list[TokenMatrices] = []
    for batch in batches:
        rows.append(batch.rows)
        if batch.dense_vecs is not None:
            dense.append(batch.dense_vecs)
        if batch.lexical_weights is not None:
            lexical.append(batch.lexical_weights)
        if batch.colbert_vecs is not None:
            matrices.append(batch.colbert_vecs)
    # order[i]: index of the window's row i in the batches
    order = np.argsort(np.concatenate(rows), kind="stable")
    assert len(order) == stop - start
    return Embeddings(
        rows=np.arange(start, stop),
        dense_vecs=np.concatenate(dense)[order] if dense else None,
        lexical_weights=_order_weights(lexical, order) if lexical else None,
        colbert_vecs=_order_matrices(matrices, order, buffers or Buffers()) if matrices else None,
    )


def _order_matrices(parts: list[TokenMatrices], order: NDArray[np.int64], buffers: Buffers) -> TokenMatrices:
    """Return matrices in order, and empty `parts`."""
    lengths = np.concatenate([np.diff(part.indptr) for part in parts])
    indptr = np.zeros(len(order) + 1, np.int64)
    np.cumsum(lengths[order], out=indptr[1:])
    begins = np.empty(len(order), np.int64)
    begins[order] = indptr[:-1]
    first, num_vectors = parts[0], int(indptr[-1])
    vectors = buffers.empty((num_vectors, first.vectors.shape[1]), first.vectors.dtype)
    scales = None if first.scales is None else np.empty(num_vectors, np.float32)
    weights = None if first.weights is None else np.empty(num_vectors, np.float32)
    while parts:
        part = parts.pop(0)
        part_begins, begins = np.split(begins, [len(part.indptr) - 1])
        for values, into in ((part.vectors, vectors), (part.scales, scales), (part.weights, weights)):
            if values is not None and into is not None:
                _copy_rows(values, part.indptr, part_begins, into)
    return TokenMatrices(indptr=indptr, vectors=vectors, scales=scales, weights=weights)


def _copy_rows(values: NDArray[Any], indptr: NDArray[np.int64], begins: NDArray[np.int64], into: NDArray[Any]) -> None:
    for row, begin in enumerate(begins.tolist()):
        first, last = indptr[row], indptr[row + 1]
        into[begin : begin + last - first] = values[first:last]


def _order_weights(parts: Sequence[LexicalWeights], order: NDArray[np.int64]) -> LexicalWeights:
    lengths = np.concatenate([np.diff(part.indptr) for part in parts])
    begins = np.cumsum(lengths) - lengths
    indptr, take = concat_ranges(begins[order], lengths[order])
    return LexicalWeights(
        indptr=indptr,
        indices=np.concatenate([part.indices for part in parts])[take],
        values=np.concatenate([part.values for part in parts])[take],
    )
