from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.config import ColbertForm, LongDocs
from m3cli.encoder.embeddings import Merger, plan_rows, restore_order, select_rows
from m3cli.records import Chunks, Embeddings, LexicalWeights, TokenMatrices

DIM = 4
NONE = np.empty(0, np.int64)

DOCUMENTS = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=5), min_size=1, max_size=8
)
"of each document the chunks: text tokens, and how many of them the chunk before has too"


def make_chunks(documents: list[list[tuple[int, int]]]) -> Chunks:
    """Number every token of a document once; an overlap has the numbers that it repeats."""
    ids: list[int] = []
    rows: list[tuple[int, int, int, int, int]] = []
    for number, chunks in enumerate(documents):
        seen = 0
        for index, (size, overlap) in enumerate(chunks):
            repeated = min(overlap, size - 1, seen) if index else 0
            ids += [0, *range(10 + seen - repeated, 10 + seen - repeated + size), 2]
            seen += size - repeated
            rows.append((number, index, len(chunks), size + 2, repeated))
    document, chunk_index, num_chunks, lengths, repeated_of = np.array(rows).T
    return Chunks(
        input_ids=np.array(ids, np.int32),
        cu_seqlens=np.concatenate(([0], np.cumsum(lengths))),
        document=document,
        chunk_index=chunk_index.astype(np.int32),
        num_chunks=num_chunks.astype(np.int32),
        char_start=np.arange(len(rows)),
        char_end=np.arange(len(rows)) + 1,
        truncated=np.zeros(len(rows), np.bool_),
        num_repeated=repeated_of.astype(np.int32),
    )


def make_embeddings(chunks: Chunks, seed: int) -> Embeddings:
    random = np.random.default_rng(seed)
    dense = random.normal(size=(chunks.num_rows, DIM)).astype(np.float32)
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    sizes = random.integers(0, 5, chunks.num_rows)
    indices = [np.sort(random.choice(20, size, replace=False)) for size in sizes]
    num_vectors = len(chunks.input_ids) - chunks.num_rows
    return Embeddings(
        rows=np.arange(chunks.num_rows),
        dense_vecs=dense,
        lexical_weights=LexicalWeights(
            indptr=np.concatenate(([0], np.cumsum(sizes))),
            indices=np.concatenate([np.empty(0), *indices]).astype(np.uint32),
            values=random.random(int(sizes.sum()), np.float32),
        ),
        colbert_vecs=TokenMatrices(
            indptr=chunks.cu_seqlens - np.arange(chunks.num_rows + 1),
            vectors=random.normal(size=(num_vectors, DIM)).astype(np.float32),
            weights=random.random(num_vectors, np.float32),
        ),
    )


def merge_naively(chunks: Chunks, result: Embeddings, document: int) -> tuple[Any, dict[int, float], Any]:
    """Merge one document as the README says it, row by row and token by token."""
    rows = np.flatnonzero(chunks.document == document)
    assert result.dense_vecs is not None
    assert result.lexical_weights is not None
    assert result.colbert_vecs is not None
    dense = sum(chunks.num_tokens[row] * result.dense_vecs[row].astype(np.float64) for row in rows)
    lexical: dict[int, float] = {}
    vectors = []
    for row in rows.tolist():
        for place in range(result.lexical_weights.indptr[row], result.lexical_weights.indptr[row + 1]):
            token, weight = int(result.lexical_weights.indices[place]), float(result.lexical_weights.values[place])
            lexical[token] = max(weight, lexical.get(token, 0.0))
        matrix = result.colbert_vecs.vectors[result.colbert_vecs.indptr[row] : result.colbert_vecs.indptr[row + 1]]
        vectors += list(matrix[chunks.num_repeated[row] : -1])
        if row == rows[-1]:
            vectors.append(matrix[-1])
    return dense / np.linalg.norm(dense), lexical, np.array(vectors)


def run_merger(
    chunks: Chunks, result: Embeddings, long_docs: LongDocs, cuts: list[int], form: ColbertForm | None = None
) -> Embeddings:
    """Feed rows in windows that end at `cuts`."""
    merger = Merger(chunks, taken=NONE, long_docs=long_docs, dense_dtype="float32", colbert_form=form or ColbertForm())
    parts: list[Embeddings] = []
    borders = sorted({0, chunks.num_rows, *(cut % (chunks.num_rows + 1) for cut in cuts)})
    for start, stop in pairwise(borders):
        rows = np.arange(start, stop)
        parts += merger.feed(select_rows(result, rows, rows=rows))
        numbers = np.sort(np.concatenate([NONE, *(part.rows for part in parts)]))
        assert numbers.tolist() == list(range(len(numbers))), "windows give what follows, and nothing else"
    return restore_order(parts, start=0, stop=sum(len(part.rows) for part in parts))


@given(DOCUMENTS, st.lists(st.integers(0, 40), max_size=4), st.integers(0, 99))
def test_merged_rows_are_the_naive_ones_in_whatever_windows(
    documents: list[list[tuple[int, int]]], cuts: list[int], seed: int
) -> None:
    chunks = make_chunks(documents)
    result = make_embeddings(chunks, seed)
    rows = plan_rows(chunks, long_docs="merge", taken=NONE)
    merged = run_merger(chunks, result, "merge", cuts)
    assert merged.dense_vecs is not None
    assert merged.lexical_weights is not None
    assert merged.colbert_vecs is not None
    assert rows.document.tolist() == list(range(len(documents)))
    for document in range(len(documents)):
        dense, lexical, vectors = merge_naively(chunks, result, document)
        ids = rows.input_ids[rows.cu_seqlens[document] : rows.cu_seqlens[document + 1]]
        assert ids.tolist() == [0, *range(10, 10 + len(ids) - 2), 2], "each token of the text once"
        np.testing.assert_allclose(merged.dense_vecs[document], dense, atol=1e-6)
        span = slice(merged.lexical_weights.indptr[document], merged.lexical_weights.indptr[document + 1])
        got = zip(
            merged.lexical_weights.indices[span].tolist(), merged.lexical_weights.values[span].tolist(), strict=True
        )
        assert list(got) == sorted(lexical.items())
        first, last = merged.colbert_vecs.indptr[document : document + 2]
        assert last - first == rows.num_tokens[document] - 1
        np.testing.assert_array_equal(merged.colbert_vecs.vectors[first:last], vectors)


@given(DOCUMENTS, st.lists(st.integers(0, 40), max_size=4))
def test_both_has_the_chunks_and_behind_them_the_document(
    documents: list[list[tuple[int, int]]], cuts: list[int]
) -> None:
    chunks = make_chunks(documents)
    result = make_embeddings(chunks, 1)
    rows = plan_rows(chunks, long_docs="both", taken=NONE)
    both, merged = run_merger(chunks, result, "both", cuts), run_merger(chunks, result, "merge", [])
    own = np.flatnonzero(rows.chunk_index == -1)
    assert rows.document[own].tolist() == [number for number, parts in enumerate(documents) if len(parts) > 1]
    assert (np.diff(rows.document) >= 0).all()
    assert all(rows.chunk_index[row - 1] == rows.num_chunks[row] - 1 for row in own)
    assert both.dense_vecs is not None
    assert both.colbert_vecs is not None
    assert merged.dense_vecs is not None
    np.testing.assert_array_equal(both.dense_vecs[own], merged.dense_vecs[rows.document[own]])
    assert (np.diff(both.colbert_vecs.indptr)[own] == 0).all()
    left = np.setdiff1d(np.arange(rows.num_rows), own)
    np.testing.assert_array_equal(both.dense_vecs[left], result.dense_vecs)
    assert result.colbert_vecs is not None
    np.testing.assert_array_equal(both.colbert_vecs.vectors, result.colbert_vecs.vectors)


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_vectors_let_go_of_early_are_not_among_the_heaviest(top_k: int) -> None:
    chunks = make_chunks([[(9, 2)] * 6])
    result = make_embeddings(chunks, 3)
    complete = run_merger(chunks, result, "merge", []).colbert_vecs
    thin = run_merger(chunks, result, "merge", [1, 2, 3, 4, 5], ColbertForm(top_k=top_k)).colbert_vecs
    assert complete is not None
    assert complete.weights is not None
    assert thin is not None
    assert thin.weights is not None
    assert len(thin.vectors) < len(complete.vectors)
    assert np.sort(thin.weights)[-top_k:].tolist() == np.sort(complete.weights)[-top_k:].tolist()


def test_rows_taken_over_stay_as_they_are() -> None:
    chunks = make_chunks([[(4, 0), (5, 1)], [(3, 0)], [(6, 0), (2, 0)]])
    chunks = replace(chunks, chunk_index=np.array([0, 1, 0, 0, 1], np.int32))
    rows = plan_rows(chunks, long_docs="both", taken=np.array([0, 1]))
    assert rows.document.tolist() == [0, 0, 1, 2, 2, 2]
    assert rows.chunk_index.tolist() == [0, 1, 0, 0, 1, -1]
