"""Rows of embeddings between the model and the disk: reordered, merged to documents, ColBERT matrices made smaller.

With `--long-docs merge` a document of several chunks becomes one row:
- dense: the mean of the chunks' vectors, weighted by num_tokens and normalised;
- sparse: the largest weight of each token id;
- ColBERT: the chunks' matrices one after the other, each token of the text once, with the last chunk's `</s>`.

So a merged row has one `<s>`, each token of the text once, the prefix once and one `</s>`, and num_tokens - 1 vectors.
Documents of one chunk do not change. With `both` the chunks' rows remain, and the document's own row, chunk_index -1,
follows them. Its ColBERT matrix is empty, because the chunks have those vectors.

Chunks arrive in windows. For a document that continues in the next window, memory holds the sum of dense vectors
(float64), the largest weights and the ColBERT vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.config import ColbertForm, LongDocs, VectorDtype
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


class _Loan:
    """Memory on loan: every array over it, also a part of one, refers to this and keeps it."""

    def __init__(self, memory: NDArray[np.uint8], free: list[NDArray[np.uint8]]) -> None:
        self.memory, self.free = memory, free
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self.free.append(self.memory)


class Buffers:
    """Memory of ColBERT vectors, taken again when nothing refers to it: new pages take longer than the copy to them."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []

    def empty(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an uninitialised array [V, D]."""
        num_bytes = shape[0] * shape[1] * dtype.itemsize
        memory = np.empty(0, np.uint8)
        # What is too small is replaced.
        while self._free and len(memory) < num_bytes:
            memory = self._free.pop()
        if len(memory) < num_bytes:
            memory = np.empty(num_bytes, np.uint8)
        # numpy refers an array to the object that it was made from, and a part of it to the same object.
        return np.asarray(_Loan(memory, self._free))[:num_bytes].view(dtype).reshape(shape)


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


DOCUMENT_ROW = -1
"chunk_index of a document's own row, which follows its chunks' rows"


def merge_chunks(chunks: Chunks) -> Chunks:
    """Return one row for each document with the tokens of its merged row; all its chunks must be in `chunks`."""
    first, last = chunks.chunk_index == 0, chunks.chunk_index == chunks.num_chunks - 1
    num_rows = int(first.sum())
    keep = _keep_once(chunks)
    kept = np.concatenate(([0], np.cumsum(keep)))
    return Chunks(
        input_ids=chunks.input_ids[keep],
        cu_seqlens=kept[np.append(chunks.cu_seqlens[:-1][first], chunks.cu_seqlens[-1])],
        document=chunks.document[first],
        chunk_index=np.zeros(num_rows, np.int32),
        num_chunks=np.ones(num_rows, np.int32),
        char_start=chunks.char_start[first],
        char_end=chunks.char_end[last],
        truncated=chunks.truncated[last],
        num_repeated=np.zeros(num_rows, np.int32),
    )


def add_document_rows(chunks: Chunks, *, taken: NDArray[np.int64]) -> Chunks:
    """Return all rows, and the own row of each document of several chunks after them; `taken` rows include theirs."""
    fresh = np.setdiff1d(np.flatnonzero(chunks.num_chunks > 1), taken)
    merged = merge_chunks(select_chunks(chunks, fresh))
    own = replace(
        merged,
        chunk_index=np.full(merged.num_rows, DOCUMENT_ROW, np.int32),
        num_chunks=chunks.num_chunks[fresh[chunks.chunk_index[fresh] == 0]],
    )
    both = join_chunks(chunks, own)
    return select_chunks(both, np.argsort(both.document, kind="stable"))


def plan_rows(chunks: Chunks, *, long_docs: LongDocs, taken: NDArray[np.int64]) -> Chunks:
    """Return the rows that are written for rows that are encoded or reused (`taken`)."""
    if long_docs == "merge":
        return merge_chunks(chunks)
    if long_docs == "both":
        return add_document_rows(chunks, taken=taken)
    return chunks


def _keep_once(chunks: Chunks) -> NDArray[np.bool_]:
    """Return whether each token [N] is kept: the first `<s>`, the last `</s>`, and no repeated tokens."""
    later = np.flatnonzero(chunks.chunk_index > 0)
    begins = chunks.cu_seqlens[later]
    # The running sum of the steps is 1 on tokens that are left out, else 0.
    steps = np.zeros(len(chunks.input_ids) + 1, np.int8)
    steps[begins] = 1
    steps[begins + 1 + chunks.num_repeated[later]] -= 1
    keep: NDArray[np.bool_] = np.cumsum(steps[:-1], dtype=np.int8) == 0
    continued = (chunks.chunk_index >= 0) & (chunks.chunk_index < chunks.num_chunks - 1)
    keep[chunks.cu_seqlens[1:][continued] - 1] = False
    return keep


@dataclass(slots=True)
class _Document:
    """The chunks of an incomplete document, merged so far."""

    dense: NDArray[np.float64] | None = None
    "[D] sum of vectors times tokens"
    indices: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    values: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    matrices: list[TokenMatrices] = field(default_factory=list)
    "of one row each"


class Merger:
    """Merges the rows of one shard, which arrive in order."""

    def __init__(
        self,
        chunks: Chunks,
        *,
        taken: NDArray[np.int64],
        long_docs: LongDocs,
        dense_dtype: VectorDtype,
        colbert_form: ColbertForm,
    ) -> None:
        self._chunks = chunks
        self._long_docs = long_docs
        self._dense_dtype = dense_dtype
        self._form = colbert_form
        self._keep = _keep_once(chunks) if long_docs == "merge" else np.empty(0, np.bool_)
        self._row_numbers = _number_rows(chunks, long_docs=long_docs, taken=taken)
        self._open = _Document()

    def number(self, embeddings: Embeddings) -> Embeddings:
        """Return the embeddings of unmerged rows under the numbers with which they are written."""
        return replace(embeddings, rows=self._row_numbers[embeddings.rows])

    def feed(self, window: Embeddings) -> Iterator[Embeddings]:
        """Accept the next rows, ascending, and yield the complete rows to write, in any order."""
        several = self._chunks.num_chunks[window.rows] > 1
        if self._long_docs == "both":
            yield self.number(self._round(window))
        elif not several.all():
            alone = np.flatnonzero(~several)
            yield self.number(self._round(select_rows(window, alone, rows=window.rows[alone])))
        many = np.flatnonzero(several)
        borders = np.flatnonzero(np.diff(self._chunks.document[window.rows[many]])) + 1
        for indices in np.split(many, borders) if len(many) else ():
            self._add(window, int(indices[0]), int(indices[-1]) + 1)
            last_row = int(window.rows[indices[-1]])
            if self._chunks.chunk_index[last_row] == self._chunks.num_chunks[last_row] - 1:
                yield self._close(last_row, window)
            else:
                self._prune()

    def _add(self, window: Embeddings, first: int, last: int) -> None:
        """Add the chunks at [first, last) of a window to the open document."""
        document, rows = self._open, window.rows[first:last]
        if window.dense_vecs is not None:
            weights = self._chunks.num_tokens[rows].astype(np.float64)
            added = weights @ window.dense_vecs[first:last].astype(np.float64)
            document.dense = added if document.dense is None else document.dense + added
        if (lexical := window.lexical_weights) is not None:
            span = slice(lexical.indptr[first], lexical.indptr[last])
            document.indices, document.values = _take_largest(
                np.concatenate((document.indices, lexical.indices[span])),
                np.concatenate((document.values, lexical.values[span])),
            )
        if window.colbert_vecs is not None and self._long_docs == "merge":
            document.matrices.append(self._take_once(window.colbert_vecs, rows, first, last))

    def _take_once(self, matrices: TokenMatrices, rows: NDArray[np.int64], first: int, last: int) -> TokenMatrices:
        """Return the vectors of consecutive rows as one row, each token of the text once."""
        begin, end = int(matrices.indptr[first]), int(matrices.indptr[last])
        tokens = np.ones(int(self._chunks.cu_seqlens[rows[-1] + 1] - self._chunks.cu_seqlens[rows[0]]), np.bool_)
        tokens[self._chunks.cu_seqlens[rows] - self._chunks.cu_seqlens[rows[0]]] = False  # <s> has no vector
        mask = self._keep[self._chunks.cu_seqlens[rows[0]] : self._chunks.cu_seqlens[rows[-1] + 1]][tokens]
        joined = TokenMatrices(
            indptr=np.array([0, end - begin]),
            vectors=matrices.vectors[begin:end],
            weights=None if matrices.weights is None else matrices.weights[begin:end],
        )
        return keep_vectors(joined, mask)

    def _prune(self) -> None:
        """Drop vectors that cannot be among the heaviest of the document."""
        top_k, matrices = self._form.top_k, self._open.matrices
        if top_k is not None and matrices and sum(len(part.vectors) for part in matrices) > 2 * top_k:
            joined = _join_rows(matrices)
            self._open.matrices = [keep_vectors(joined, choose_vectors(joined, top_k=top_k))]

    def _close(self, last_row: int, window: Embeddings) -> Embeddings:
        """Return the row of the open document, whose last chunk is `last_row`."""
        document, self._open = self._open, _Document()
        number = self._row_numbers[last_row] + (1 if self._long_docs == "both" else 0)
        lexical = matrices = None
        if window.lexical_weights is not None:
            indptr = np.array([0, len(document.values)])
            lexical = LexicalWeights(indptr=indptr, indices=document.indices, values=document.values)
        if window.colbert_vecs is not None:
            matrices = _join_rows(document.matrices) if document.matrices else _empty_row(window.colbert_vecs)
        return Embeddings(
            rows=np.array([number]),
            dense_vecs=None if document.dense is None else self._normalise(document.dense),
            lexical_weights=lexical,
            colbert_vecs=matrices,
        )

    def _normalise(self, total: NDArray[np.float64]) -> NDArray[Any]:
        mean: NDArray[Any] = (total / max(float(np.linalg.norm(total)), 1e-12)).astype(self._dense_dtype)
        return mean[None]

    def _round(self, embeddings: Embeddings) -> Embeddings:
        if embeddings.dense_vecs is None:
            return embeddings
        return replace(embeddings, dense_vecs=embeddings.dense_vecs.astype(self._dense_dtype, copy=False))


def _number_rows(chunks: Chunks, *, long_docs: LongDocs, taken: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number [R] with which each row is written; with merge, its document's."""
    if long_docs == "merge":
        return chunks.document
    adds = (chunks.num_chunks > 1) & (chunks.chunk_index == chunks.num_chunks - 1)
    adds[taken] = False
    numbers: NDArray[np.int64] = np.arange(chunks.num_rows) + np.cumsum(adds) - adds
    return numbers


def _take_largest(
    indices: NDArray[np.uint32], values: NDArray[np.float32]
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Return the distinct token ids, ascending, with their largest weights."""
    if not len(indices):
        return indices, values
    order = np.argsort(indices, kind="stable")
    ids = indices[order]
    starts = np.flatnonzero(np.concatenate(([True], ids[1:] != ids[:-1])))
    return ids[starts], np.maximum.reduceat(values[order], starts)


def _join_rows(parts: list[TokenMatrices]) -> TokenMatrices:
    """Return the vectors of several rows as one row."""
    weights = [part.weights for part in parts if part.weights is not None]
    vectors = np.concatenate([part.vectors for part in parts]) if len(parts) > 1 else parts[0].vectors
    return TokenMatrices(
        indptr=np.array([0, len(vectors)]),
        vectors=vectors,
        weights=np.concatenate(weights) if weights else None,
    )


def _empty_row(like: TokenMatrices) -> TokenMatrices:
    weights = None if like.weights is None else np.empty(0, np.float32)
    return TokenMatrices(indptr=np.zeros(2, np.int64), vectors=like.vectors[:0].copy(), weights=weights)


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
