from __future__ import annotations

import numpy as np
import pytest

from m3cli.encoder.embeddings import select_rows
from m3cli.records import Embeddings, LexicalWeights, TokenMatrices


def make(num_rows: int) -> Embeddings:
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


@pytest.mark.parametrize("places", [[], [3], [2, 3, 4], [4, 0, 2], [1, 1, 5]])
def test_rows_are_picked_in_the_order_asked_for(places: list[int]) -> None:
    rows = np.arange(len(places)) + 100
    picked = select_rows(make(6), np.array(places, np.int64), rows=rows)
    assert picked.rows is rows
    assert picked.dense_vecs is not None
    assert picked.lexical_weights is not None
    assert picked.colbert_vecs is not None
    assert picked.dense_vecs[:, 0].tolist() == places
    assert np.diff(picked.lexical_weights.indptr).tolist() == places
    assert picked.lexical_weights.values.tolist() == [place for place in places for _ in range(place)]
    assert np.diff(picked.colbert_vecs.indptr).tolist() == [place + 1 for place in places]
    assert picked.colbert_vecs.vectors[:, 3].tolist() == [place for place in places for _ in range(place + 1)]


def test_what_is_not_there_stays_so() -> None:
    nothing = Embeddings(rows=np.arange(2), dense_vecs=None, lexical_weights=None, colbert_vecs=None)
    picked = select_rows(nothing, np.array([1]), rows=np.array([0]))
    assert [picked.dense_vecs, picked.lexical_weights, picked.colbert_vecs] == [None, None, None]
