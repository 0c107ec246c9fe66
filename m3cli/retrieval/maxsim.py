"""Scores of wanted pairs and of no others: dense, sparse and ColBERT, as FlagEmbedding's `compute_score` means them.

Sources: `FlagEmbedding/finetune/embedder/encoder_only/m3/modeling.py`, whose `compute_*_score` build all B x B scores
and keep the diagonal. One difference: the reference has no mask on the passage side, and a padded position is a zero
vector, so where a passage was padded in its batch, a query token's maximum is floored at 0 there. Here nothing is
padded and nothing is floored, as in its own `colbert_score` for two single matrices.

Values are float16 or float32 as they come, multiplied as float32; ColBERT vectors that are stored as int8 or as signs
are numbers again first, each side for itself: a query keeps its precision before a corpus of signs. Shapes: P pairs,
R rows, D width of a vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.records import LexicalWeights, TokenMatrices

Scores = NDArray[np.float32]
Rows = NDArray[np.int64]

PAIRS_AT_ONCE = 4096
"pairs whose rows are copied side by side: 16 MiB of dense vectors 1024 wide a side"
_ID_BITS = 32


def score_dense(queries: NDArray[Any], passages: NDArray[Any], query_rows: Rows, passage_rows: Rows, /) -> Scores:
    """Return [P] inner products of dense vectors.

    Args:
        queries: [R, D].
        passages: [R', D].
        query_rows: [P], rows of `queries`.
        passage_rows: [P], rows of `passages`.
    """
    scores = np.empty(len(query_rows), np.float32)
    for part in _parts(len(query_rows)):
        left = queries[query_rows[part]].astype(np.float32, copy=False)
        right = passages[passage_rows[part]].astype(np.float32, copy=False)
        np.einsum("ij,ij->i", left, right, out=scores[part])
    return scores


def score_sparse(queries: LexicalWeights, passages: LexicalWeights, query_rows: Rows, passage_rows: Rows, /) -> Scores:
    """Return [P] sums of the products of the weights that both sides have; 0 where they share no token."""
    query_lengths, passage_lengths = np.diff(queries.indptr), np.diff(passages.indptr)
    scores = np.zeros(len(query_rows), np.float32)
    for part in _parts(len(query_rows)):
        rows = query_rows[part]
        take, owner = expand_rows(queries.indptr[rows], query_lengths[rows])
        # (place of the passage among those of this part, token id) as one number, ascending as ids do within a row
        distinct, places = np.unique(passage_rows[part], return_inverse=True)
        held, holder = expand_rows(passages.indptr[distinct], passage_lengths[distinct])
        keys = (holder << _ID_BITS) | passages.indices[held].astype(np.int64)
        if not len(keys):
            continue
        wanted = (places[owner] << _ID_BITS) | queries.indices[take].astype(np.int64)
        found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        shared = np.flatnonzero(keys[found] == wanted)
        products = queries.values[take[shared]] * passages.values[held[found[shared]]]
        scores[part] = np.bincount(owner[shared], weights=products, minlength=len(rows))
    return scores


def decode_vectors(matrices: TokenMatrices, places: slice | NDArray[np.int64] = slice(None), /) -> NDArray[np.float32]:
    """Return some of the vectors as float32 [V, D] of norm 1, whatever they are stored as.

    int8 vectors are multiplied by their scales; signs, the first one in the highest bit of a byte, are
    +-1 / sqrt(D).
    """
    vectors = np.asarray(matrices.vectors)[places]  # memory-mapped arrays slice slowly
    wide: NDArray[np.float32]
    if vectors.dtype == np.uint8:
        wide = np.unpackbits(vectors, axis=1).astype(np.float32)
        unit = np.float32(1 / np.sqrt(max(wide.shape[1], 1)))
        wide *= 2 * unit
        wide -= unit
        return wide
    wide = vectors.astype(np.float32, copy=False)
    return wide if matrices.scales is None else wide * matrices.scales[places, None]


def score_colbert(queries: TokenMatrices, passages: TokenMatrices, query_rows: Rows, passage_rows: Rows, /) -> Scores:
    """Return [P] means over the query's vectors of the greatest inner product with a vector of the passage.

    One matmul a distinct passage, with the vectors of all its queries side by side. A side without vectors has no
    score: NaN.
    """
    scores = np.empty(len(query_rows), np.float32)
    order = np.argsort(passage_rows, kind="stable")
    for part in _parts(len(order)):
        pairs = order[part]
        scores[pairs] = _score_matrices(queries, passages, query_rows[pairs], passage_rows[pairs])
    return scores


def _score_matrices(queries: TokenMatrices, passages: TokenMatrices, query_rows: Rows, passage_rows: Rows) -> Scores:
    """Score pairs that are sorted by passage."""
    lengths = np.diff(queries.indptr)[query_rows]
    take, owner = expand_rows(queries.indptr[query_rows], lengths)
    best = np.empty(len(take), np.float32)
    ends = np.concatenate(([0], np.cumsum(lengths)))
    firsts = np.flatnonzero(np.diff(passage_rows, prepend=-1))
    for first, last in zip(firsts, [*firsts[1:], len(passage_rows)], strict=True):
        run = slice(ends[first], ends[last])
        begin, end = passages.indptr[passage_rows[first]], passages.indptr[passage_rows[first] + 1]
        if begin == end:
            best[run] = np.nan
            continue
        side, other = decode_vectors(queries, take[run]), decode_vectors(passages, slice(begin, end))
        (side @ other.T).max(axis=1, out=best[run])
    sums = np.bincount(owner, weights=best, minlength=len(query_rows))
    means = np.full(len(query_rows), np.nan)
    np.divide(sums, lengths, out=means, where=lengths > 0)
    return means.astype(np.float32)


def expand_rows(begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places of all items of some runs, one run after the other, and the number of each item's run."""
    owner = np.repeat(np.arange(len(begins)), lengths)
    ends = np.cumsum(lengths)
    take = np.arange(ends[-1] if len(ends) else 0) + np.repeat(begins - (ends - lengths), lengths)
    return take, owner


def _parts(length: int) -> list[slice]:
    return [slice(start, start + PAIRS_AT_ONCE) for start in range(0, length, PAIRS_AT_ONCE)]
