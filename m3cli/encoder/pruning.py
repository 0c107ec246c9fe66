"""The vectors of a row's tokens that weigh the most: M3 gives the signal for free, its lexical weights.

A token's weight is the one at its position, before the maximum over the row that the sparse output takes. `</s>` has
none, so it is the first to go.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from m3cli.encoder.picking import take_vectors
from m3cli.records import TokenMatrices


def keep_vectors(matrices: TokenMatrices, mask: NDArray[np.bool_]) -> TokenMatrices:
    """Return the vectors that `mask` [V] is true for, in their rows and their order."""
    kept = np.concatenate((np.zeros(1, np.int64), np.cumsum(mask, dtype=np.int64)))
    return take_vectors(matrices, kept[matrices.indptr], mask)


def choose_vectors(matrices: TokenMatrices, *, top_k: int) -> NDArray[np.bool_]:
    """Return which vectors [V] are of the `top_k` heaviest tokens of their row.

    Of equal weights the earlier token is taken.
    """
    assert matrices.weights is not None
    weights, lengths = matrices.weights, np.diff(matrices.indptr)
    row = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((np.arange(len(weights)), -weights, row))
    rank = np.empty(len(weights), np.int64)
    rank[order] = np.arange(len(weights)) - np.repeat(matrices.indptr[:-1], lengths)
    mask: NDArray[np.bool_] = rank < top_k
    return mask
