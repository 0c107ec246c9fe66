"""Rows of documents from rows of chunks: `--long-docs merge` and `both`.

A document of several chunks becomes one row:
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

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.config import ColbertForm, LongDocs, VectorDtype
from m3cli.encoder.colbert import choose_vectors, keep_vectors
from m3cli.encoder.embeddings import join_chunks, select_chunks, select_rows
from m3cli.records import Chunks, Embeddings, LexicalWeights, TokenMatrices

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
