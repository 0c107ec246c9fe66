"""Scores of pairs of rows by all the outputs that are wanted."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from m3cli.records import Embeddings, Output
from m3cli.retrieval.maxsim import Rows, score_colbert, score_dense, score_sparse


def score_rows(
    queries: Embeddings, passages: Embeddings, query_rows: Rows, passage_rows: Rows, *, outputs: Collection[Output]
) -> dict[Output, NDArray[np.float32]]:
    """Return [P] float32 for each output, for the pairs (query_rows[i], passage_rows[i]): places in the embeddings."""
    scores: dict[Output, NDArray[np.float32]] = {}
    if "dense" in outputs:
        assert queries.dense_vecs is not None
        assert passages.dense_vecs is not None
        scores["dense"] = score_dense(queries.dense_vecs, passages.dense_vecs, query_rows, passage_rows)
    if "sparse" in outputs:
        assert queries.lexical_weights is not None
        assert passages.lexical_weights is not None
        scores["sparse"] = score_sparse(queries.lexical_weights, passages.lexical_weights, query_rows, passage_rows)
    if "colbert" in outputs:
        assert queries.colbert_vecs is not None
        assert passages.colbert_vecs is not None
        scores["colbert"] = score_colbert(queries.colbert_vecs, passages.colbert_vecs, query_rows, passage_rows)
    return scores
