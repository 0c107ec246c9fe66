"""Embeddings of several batches as one record, rows in the order in which they came."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from m3cli.records import Embeddings, LexicalWeights, TokenMatrices


def join_embeddings(parts: Sequence[Embeddings]) -> Embeddings:
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
