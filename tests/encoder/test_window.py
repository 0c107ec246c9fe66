from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from m3cli.encoder.batcher import batch_rows
from m3cli.encoder.embeddings import restore_order
from m3cli.records import Embeddings, LexicalWeights, TokenMatrices
from tests.encoder.test_batcher import LENGTHS


@given(LENGTHS.filter(len), st.integers(2, 120), st.data())
def test_rows_come_back_in_corpus_order(lengths: np.ndarray, budget: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(lengths) - 1))
    batches = []
    for places in batch_rows(lengths[start:], max_batch_tokens=budget):
        rows = places + start
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
    made = restore_order(iter(batches), start=start, stop=len(lengths))
    expected = np.arange(start, len(lengths))
    assert made.dense_vecs is not None
    assert made.lexical_weights is not None
    assert made.colbert_vecs is not None
    assert made.dense_vecs[:, 0].tolist() == expected.tolist()
    assert made.lexical_weights.indices.tolist() == np.repeat(expected, expected % 3).tolist()
    assert np.diff(made.lexical_weights.indptr).tolist() == (expected % 3).tolist()
    assert made.colbert_vecs.vectors[:, 0].tolist() == np.repeat(expected, lengths[start:] - 1).tolist()
    assert np.diff(made.colbert_vecs.indptr).tolist() == (lengths[start:] - 1).tolist()
