from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.encoder.embeddings import Buffers, restore_order, select_rows
from m3cli.encoder.encode import batch_rows
from m3cli.records import Embeddings, LexicalWeights, TokenMatrices
from tests.encoder.test_encode import LENGTHS


@given(LENGTHS.filter(len), st.integers(2, 120), st.data())
def test_rows_come_back_in_corpus_order(lengths: np.ndarray, budget: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(lengths) - 1))
    batches = []
    for chosen in batch_rows(lengths[start:], max_batch_tokens=budget):
        rows = chosen + start
        sizes = lengths[rows] - 1
        # Row r: dense [r], weights {r: r, ..} r % 3 of them, and a matrix whose entries are all r.
        weights = rows % 3
        batches.append(
            Embeddings(
                rows=rows,
                dense_vecs=rows[:, None].astype(np.float16),
                lexical_weights=LexicalWeights(
                    indptr=np.concatenate(([0], np.cumsum(weights))),
                    indices=np.repeat(rows, weights).astype(np.uint32),
                    values=np.repeat(rows, weights).astype(np.float32),
                ),
                colbert_vecs=TokenMatrices(
                    indptr=np.concatenate(([0], np.cumsum(sizes))),
                    vectors=np.repeat(rows, sizes)[:, None].astype(np.float16),
                ),
            )
        )
    result = restore_order(iter(batches), start=start, stop=len(lengths))
    expected = np.arange(start, len(lengths))
    assert result.dense_vecs is not None
    assert result.lexical_weights is not None
    assert result.colbert_vecs is not None
    assert result.dense_vecs[:, 0].tolist() == expected.tolist()
    assert result.lexical_weights.indices.tolist() == np.repeat(expected, expected % 3).tolist()
    assert np.diff(result.lexical_weights.indptr).tolist() == (expected % 3).tolist()
    assert result.colbert_vecs.vectors[:, 0].tolist() == np.repeat(expected, lengths[start:] - 1).tolist()
    assert np.diff(result.colbert_vecs.indptr).tolist() == (lengths[start:] - 1).tolist()


def make_embeddings(num_rows: int) -> Embeddings:
    """Row r has r weights and r + 1 vectors, all of them r."""
    numbers = np.arange(num_rows)
    return Embeddings(
        rows=numbers,
        dense_vecs=np.repeat(numbers, 4).reshape(-1, 4).astype(np.float16),
        lexical_weights=LexicalWeights(
            indptr=np.concatenate(([0], np.cumsum(numbers))),
            indices=np.repeat(numbers, numbers).astype(np.uint32),
            values=np.repeat(numbers, numbers).astype(np.float32),
        ),
        colbert_vecs=TokenMatrices(
            indptr=np.concatenate(([0], np.cumsum(numbers + 1))),
            vectors=np.repeat(numbers, numbers + 1)[:, None].repeat(4, axis=1).astype(np.float16),
        ),
    )


@pytest.mark.parametrize("chosen", [[], [3], [2, 3, 4], [4, 0, 2], [1, 1, 5]])
def test_rows_are_picked_in_the_order_asked_for(chosen: list[int]) -> None:
    rows = np.arange(len(chosen)) + 100
    picked = select_rows(make_embeddings(6), np.array(chosen, np.int64), rows=rows)
    assert picked.rows is rows
    assert picked.dense_vecs is not None
    assert picked.lexical_weights is not None
    assert picked.colbert_vecs is not None
    assert picked.dense_vecs[:, 0].tolist() == chosen
    assert np.diff(picked.lexical_weights.indptr).tolist() == chosen
    assert picked.lexical_weights.values.tolist() == [index for index in chosen for _ in range(index)]
    assert np.diff(picked.colbert_vecs.indptr).tolist() == [index + 1 for index in chosen]
    assert picked.colbert_vecs.vectors[:, 3].tolist() == [index for index in chosen for _ in range(index + 1)]


def test_memory_is_taken_again_when_nothing_refers_to_it() -> None:
    buffers = Buffers()
    first = buffers.empty((100, 4), np.dtype(np.float16))
    address, part = first.ctypes.data, first[3:5]
    second = buffers.empty((90, 4), np.dtype(np.float16))
    assert second.ctypes.data != address
    del first
    third = buffers.empty((100, 8), np.dtype(np.int8))
    assert third.ctypes.data != address, "a part of it is in use"
    part[:] = 7
    del part
    fourth = buffers.empty((100, 8), np.dtype(np.int8))
    assert fourth.ctypes.data == address
    del second, third, fourth
    large = buffers.empty((1000, 4), np.dtype(np.float16))
    assert large.shape == (1000, 4)
    assert not buffers._free, "those that were too small are freed"


def test_windows_in_reused_memory_are_the_same() -> None:
    buffers = Buffers()
    for num_rows in (6, 9, 3):
        expected = make_embeddings(num_rows)
        made = restore_order(iter([expected]), start=0, stop=num_rows, buffers=buffers)
        assert made.colbert_vecs is not None
        assert expected.colbert_vecs is not None
        assert made.colbert_vecs.vectors.tobytes() == expected.colbert_vecs.vectors.tobytes()


def test_what_is_not_there_stays_so() -> None:
    nothing = Embeddings(rows=np.arange(2), dense_vecs=None, lexical_weights=None, colbert_vecs=None)
    picked = select_rows(nothing, np.array([1]), rows=np.array([0]))
    assert [picked.dense_vecs, picked.lexical_weights, picked.colbert_vecs] == [None, None, None]
