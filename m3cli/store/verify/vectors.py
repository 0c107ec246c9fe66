"""Vectors and weights of some rows: of norm 1, finite, above 0, ascending, as many as the rows have tokens.

Norms are taken in float32 over blocks that stay in the processor's cache: 1.4 GB/s of float16 on one core. Rounding a
vector of norm 1 to float16 changes its norm by 2^-11 at most; NORM_TOLERANCE is twice that. An int8 vector has norm 1
once it is multiplied by its scale; signs have it always.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.records import TokenMatrices
from m3cli.store.layout import RowForm
from m3cli.store.verify.rows import Mask, name_rows

NORM_TOLERANCE = 1e-3
BLOCK_BYTES = 1 << 20


def check_norms(vectors: NDArray[Any], scales: NDArray[Any] | None = None) -> Mask:
    """Tell which vectors [N, D], times their scales [N], are not of norm 1; NaN and infinity are not."""
    bad = np.empty(len(vectors), np.bool_)
    step = max(1, BLOCK_BYTES // max(1, vectors.shape[1] * 4))
    for start in range(0, len(vectors), step):
        block = vectors[start : start + step].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt(np.einsum("ij,ij->i", block, block))
            if scales is not None:
                norms *= scales[start : start + step]
            bad[start : start + step] = ~(np.abs(norms - 1) <= NORM_TOLERANCE)
    return bad


def check_dense(vectors: NDArray[Any], *, first_row: int) -> list[str]:
    """Check dense vectors [R, D]."""
    return name_rows(check_norms(vectors), first_row=first_row, what="the dense vector's norm is not 1")


def check_weights(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    values: NDArray[Any],
    *,
    num_tokens: NDArray[Any],
    vocabulary: int,
    first_row: int,
) -> list[str]:
    """Check lexical weights as CSR: indptr [R + 1] from 0, indices and values [Z]."""
    lengths = np.diff(indptr)
    if len(lengths) != len(num_tokens) or indptr[0] != 0 or (lengths < 0).any() or indptr[-1] != len(indices):
        return ["the places where rows begin do not ascend from 0 to the number of weights"]
    if len(indices) != len(values):
        return [f"{len(indices):,} token ids and {len(values):,} weights"]
    with np.errstate(invalid="ignore"):
        weight = ~((values > 0) & (values < np.inf))
    outside = (indices < 0) | (indices >= vocabulary)
    falls = np.zeros(len(indices), np.bool_)
    falls[1:] = indices[1:] <= indices[:-1]
    falls[indptr[:-1][lengths > 0]] = False
    more = lengths > num_tokens

    def of_rows(bad: Mask) -> Mask:
        rows = np.zeros(len(lengths), np.bool_)
        rows[np.searchsorted(indptr, np.flatnonzero(bad), side="right") - 1] = True
        return rows

    return [
        *name_rows(of_rows(weight), first_row=first_row, what="a lexical weight is not finite and above 0"),
        *name_rows(of_rows(outside), first_row=first_row, what=f"a token id is not below {vocabulary:,}"),
        *name_rows(of_rows(falls), first_row=first_row, what="token ids do not ascend"),
        *name_rows(more, first_row=first_row, what="more lexical weights than tokens"),
    ]


def check_matrices(
    matrices: TokenMatrices, form: RowForm, *, num_tokens: NDArray[Any], chunk_index: NDArray[Any], first_row: int
) -> list[str]:
    """Check ColBERT matrices of rows with so many tokens; a document's own row beside its chunks has none."""
    lengths, vectors = np.diff(matrices.indptr), matrices.vectors
    if len(lengths) != len(num_tokens) or (lengths < 0).any() or matrices.indptr[-1] != len(vectors):
        return ["the places where rows begin do not ascend to the number of vectors"]
    signs = form.colbert.dtype == "binary"
    bad = np.zeros(len(vectors), np.bool_) if signs else check_norms(vectors, matrices.scales)
    rows = np.zeros(len(lengths), np.bool_)
    rows[np.searchsorted(matrices.indptr, np.flatnonzero(bad), side="right") - 1] = True
    most = np.where(chunk_index >= 0, num_tokens - 1, 0)
    if form.exact_vectors:
        wrong, what = lengths != most, "not one ColBERT vector a token but <s>"
    else:
        wrong, what = (lengths > most) | (lengths < np.minimum(most, 1)), "no ColBERT vector, or more than tokens"
    return [
        *name_rows(wrong, first_row=first_row, what=what),
        *name_rows(rows, first_row=first_row, what="a ColBERT vector's norm is not 1"),
    ]
