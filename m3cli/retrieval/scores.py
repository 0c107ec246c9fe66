"""Scores of pairs by output, their weighted averages, rank fusion, and the best rows of each query.

Names are FlagEmbedding's. A weighted score is a weighted *average*, as in its `compute_score` (not the sum in its
`modeling.py`, which is for training). Weights are in the order dense, sparse, colbert.

While a corpus is scanned, `TopRows` is offered the rows above a query's threshold. Ranks are by score, best first,
equal scores in corpus order. Rows with the same key (the chunks of a document) count once, by the best of them. Memory
holds the lists and about as many offered rows that are not merged yet.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.config import ALL_OUTPUTS
from m3cli.errors import UsageError
from m3cli.records import Embeddings, LexicalWeights, Output, TokenMatrices, concat_ranges

PARTS: dict[str, tuple[Output, ...]] = {
    "dense": ("dense",),
    "sparse": ("sparse",),
    "colbert": ("colbert",),
    "sparse+dense": ("dense", "sparse"),
    "colbert+sparse+dense": ("dense", "sparse", "colbert"),
}
MODES = tuple(PARTS)
"in the order of the output's columns"
Weights = tuple[float, float, float]
DEFAULT_WEIGHTS: Weights = (1.0, 1.0, 1.0)


def parts_of(modes: Sequence[str]) -> tuple[Output, ...]:
    """Return the outputs of some modes, in the order dense, sparse, colbert."""
    return tuple(output for output in ALL_OUTPUTS if any(output in PARTS[mode] for mode in modes))


def modes_of(outputs: Sequence[Output]) -> tuple[str, ...]:
    """Return the modes that need only these outputs."""
    return tuple(mode for mode in MODES if set(PARTS[mode]) <= set(outputs))


def check_weights(modes: Sequence[str], weights: Weights) -> None:
    """Check that the weights of each mode do not sum to 0."""
    for mode in modes:
        if len(PARTS[mode]) > 1 and sum(weights[ALL_OUTPUTS.index(output)] for output in PARTS[mode]) == 0:
            raise UsageError(
                f"--weights {','.join(f'{weight:g}' for weight in weights)}: the weights of {mode} sum to 0; "
                f"change them, or remove {mode} from --modes"
            )


def combine_scores(
    scores: Mapping[Output, NDArray[np.float32]], modes: Sequence[str], *, weights: Weights = DEFAULT_WEIGHTS
) -> dict[str, NDArray[np.float32]]:
    """Return [P] float32 for each mode: the score of its output, or the weighted average of several."""
    by_output = dict(zip(ALL_OUTPUTS, weights, strict=True))
    combined: dict[str, NDArray[np.float32]] = {}
    for mode in modes:
        parts = PARTS[mode]
        if len(parts) == 1:
            combined[mode] = scores[parts[0]]
            continue
        total = sum(by_output[part] for part in parts)
        average = sum(scores[part].astype(np.float64) * (by_output[part] / total) for part in parts)
        combined[mode] = np.asarray(average, np.float32)
    return combined


Scores = NDArray[np.float32]
Rows = NDArray[np.int64]

PAIRS_AT_ONCE = 4096
"pairs whose rows are copied at once: 16 MiB of dense vectors 1024 wide for each side"
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
    """Return [P] sums of products of the weights of common tokens; 0 without a common token."""
    query_lengths, passage_lengths = np.diff(queries.indptr), np.diff(passages.indptr)
    scores = np.zeros(len(query_rows), np.float32)
    for part in _parts(len(query_rows)):
        rows = query_rows[part]
        take, owner = expand_rows(queries.indptr[rows], query_lengths[rows])
        # A key is (index of the distinct passage << 32) | token id; keys ascend.
        distinct, indices = np.unique(passage_rows[part], return_inverse=True)
        passage_take, passage_owner = expand_rows(passages.indptr[distinct], passage_lengths[distinct])
        keys = (passage_owner << _ID_BITS) | passages.indices[passage_take].astype(np.int64)
        if not len(keys):
            continue
        wanted = (indices[owner] << _ID_BITS) | queries.indices[take].astype(np.int64)
        found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        shared = np.flatnonzero(keys[found] == wanted)
        products = queries.values[take[shared]] * passages.values[passage_take[found[shared]]]
        scores[part] = np.bincount(owner[shared], weights=products, minlength=len(rows))
    return scores


def decode_vectors(matrices: TokenMatrices, chosen: slice | NDArray[np.int64] = slice(None), /) -> NDArray[np.float32]:
    """Return some vectors as float32 [V, D] of norm 1.

    int8 vectors are multiplied by their scales; signs, the first one in the highest bit of a byte, are +-1 / sqrt(D).
    """
    vectors = np.asarray(matrices.vectors)[chosen]  # memory-mapped arrays slice slowly
    wide: NDArray[np.float32]
    if vectors.dtype == np.uint8:
        wide = np.unpackbits(vectors, axis=1).astype(np.float32)
        unit = np.float32(1 / np.sqrt(max(wide.shape[1], 1)))
        wide *= 2 * unit
        wide -= unit
        return wide
    wide = vectors.astype(np.float32, copy=False)
    return wide if matrices.scales is None else wide * matrices.scales[chosen, None]


def score_colbert(queries: TokenMatrices, passages: TokenMatrices, query_rows: Rows, passage_rows: Rows, /) -> Scores:
    """Return [P] means over the query's vectors of the greatest inner product with a vector of the passage.

    Each distinct passage is multiplied once with the vectors of all its queries. Without vectors the score is NaN.
    """
    scores = np.empty(len(query_rows), np.float32)
    order = np.argsort(passage_rows, kind="stable")
    for part in _parts(len(order)):
        pairs = order[part]
        scores[pairs] = _score_matrices(queries, passages, query_rows[pairs], passage_rows[pairs])
    return scores


def _score_matrices(queries: TokenMatrices, passages: TokenMatrices, query_rows: Rows, passage_rows: Rows) -> Scores:
    """Return the scores of pairs that are sorted by passage."""
    lengths = np.diff(queries.indptr)[query_rows]
    take, owner = expand_rows(queries.indptr[query_rows], lengths)
    best = np.empty(len(take), np.float32)
    ends = np.concatenate(([0], np.cumsum(lengths)))
    firsts = np.flatnonzero(np.diff(passage_rows, prepend=-1))
    for first, last in zip(firsts, [*firsts[1:], len(passage_rows)], strict=True):
        span = slice(ends[first], ends[last])
        begin, end = passages.indptr[passage_rows[first]], passages.indptr[passage_rows[first] + 1]
        if begin == end:
            best[span] = np.nan
            continue
        of_queries, of_passage = decode_vectors(queries, take[span]), decode_vectors(passages, slice(begin, end))
        (of_queries @ of_passage.T).max(axis=1, out=best[span])
    sums = np.bincount(owner, weights=best, minlength=len(query_rows))
    means = np.full(len(query_rows), np.nan)
    np.divide(sums, lengths, out=means, where=lengths > 0)
    return means.astype(np.float32)


def expand_rows(begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the index of each item of some ranges, one after the other, and the number of its range."""
    return concat_ranges(begins, lengths)[1], np.repeat(np.arange(len(begins)), lengths)


def _parts(length: int) -> list[slice]:
    return [slice(start, start + PAIRS_AT_ONCE) for start in range(0, length, PAIRS_AT_ONCE)]


def score_rows(
    queries: Embeddings, passages: Embeddings, query_rows: Rows, passage_rows: Rows, *, outputs: Collection[Output]
) -> dict[Output, NDArray[np.float32]]:
    """Return [P] float32 for each output, for pairs of rows (query_rows[i], passage_rows[i])."""
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


RRF_K = 60


def resolve_weights(weights: Weights | None, outputs: Sequence[Output]) -> Weights:
    """Return the weights, checked; None: 1 for each output, 0 for missing ones.

    Raises:
        UsageError: a missing output has a weight, or there is only one output.
    """
    if len(outputs) < 2:
        raise UsageError(f"--mode hybrid needs two outputs, and there is only {outputs[0]}: use --mode {outputs[0]}")
    available = [output in outputs for output in ALL_OUTPUTS]
    if weights is None:
        return 1.0 * available[0], 1.0 * available[1], 1.0 * available[2]
    for output, has, weight in zip(ALL_OUTPUTS, available, weights, strict=True):
        if weight and not has:
            raise UsageError(
                f"--weights gives {output} {weight:g}, and the folder has no {output}, only {', '.join(outputs)}: "
                f"give it 0, or encode with --outputs {output},..."
            )
    return weights


def average_scores(scores: Mapping[Output, Scores], weights: Weights) -> Scores:
    """Return [P] weighted averages; a missing output has weight 0."""
    length = len(next(iter(scores.values())))
    complete = {output: scores.get(output, np.zeros(length, np.float32)) for output in ALL_OUTPUTS}
    return combine_scores(complete, ["colbert+sparse+dense"], weights=weights)["colbert+sparse+dense"]


def fuse_ranks(ranks: Mapping[Output, NDArray[np.int64]], weights: Weights) -> Scores:
    """Return [P] reciprocal rank fusion of ranks from 0; -1: the ranking lacks the pair."""
    by_output = dict(zip(ALL_OUTPUTS, weights, strict=True))
    parts = [
        np.where(rank >= 0, by_output[output] / (RRF_K + 1 + np.maximum(rank, 0)), 0.0)
        for output, rank in ranks.items()
    ]
    fused: Scores = np.sum(parts, axis=0).astype(np.float32)
    return fused


_MIN_WAITING = 1 << 12
"offered rows before a merge; without one there is no threshold, and each row's id is hashed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """The best rows of some queries, H in total, sorted by query, then best first."""

    query: Rows
    "[H]"
    row: Rows
    "[H] position in the corpus"
    key: Rows
    "[H] distinct within a query"
    score: Scores
    "[H]"

    @property
    def rank(self) -> Rows:
        """[H] rank for the query, from 0."""
        return number_runs(self.query)


class TopRows:
    """The `limit` best rows of each of Q queries so far."""

    def __init__(self, num_queries: int, *, limit: int, threshold: float = -np.inf) -> None:
        self.thresholds: Scores = np.full(num_queries, threshold, np.float32)
        "[Q] lower bound of useful scores"
        self.limit = limit
        self._enough = max(num_queries * limit, _MIN_WAITING)
        self._held: list[tuple[Rows, Rows, Rows, Scores]] = []
        self._waiting = 0

    def offer(self, query: Rows, row: Rows, key: Rows, score: Scores) -> None:
        """Offer rows, [H] each, which follow those of earlier calls in the corpus."""
        if not len(query):
            return
        self._held.append((query, row, key, score))
        self._waiting += len(query)
        if self._waiting >= self._enough:
            self._merge()

    def finish(self) -> Ranked:
        """Return the best rows."""
        self._merge()
        query, row, key, score = self._held[0]
        return Ranked(query=query, row=row, key=key, score=score)

    def _merge(self) -> None:
        empty = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        ranked = rank_rows(*map(np.concatenate, zip(empty, *self._held, strict=True)), limit=self.limit)
        last = np.flatnonzero(ranked.rank == self.limit - 1)
        self.thresholds[ranked.query[last]] = ranked.score[last]
        self._held, self._waiting = [(ranked.query, ranked.row, ranked.key, ranked.score)], 0


def list_best(score: Scores, key: Rows, *, limit: int, threshold: float) -> Rows:
    """Return the numbers of all rows of a query that can be among its `limit` best keys, of [R] scores and keys."""
    rows = np.flatnonzero(score > threshold)
    count, score = limit, score[rows]
    while count < len(rows):
        best: Rows = rows[score >= np.partition(score, -count)[-count]]
        if len(np.unique(key[best])) >= limit:
            return best
        count *= 4
    return rows


def rank_rows(query: Rows, row: Rows, key: Rows, score: Scores, *, limit: int) -> Ranked:
    """Rank rows of several queries, [H] each in any order, with at most `limit` keys for each query."""
    order = np.lexsort((row, -score, query))
    query, row, key, score = query[order], row[order], key[order], score[order]
    by_key = np.lexsort((key, query))  # stable: the best row of a key comes first
    repeated = (np.diff(query[by_key], prepend=-1) == 0) & (np.diff(key[by_key], prepend=0) == 0)
    repeated[:1] = False
    kept = np.ones(len(query), np.bool_)
    kept[by_key[repeated]] = False
    query, row, key, score = query[kept], row[kept], key[kept], score[kept]
    best = number_runs(query) < limit
    return Ranked(query=query[best], row=row[best], key=key[best], score=score[best])


def number_runs(values: Rows) -> Rows:
    """Return [H] the number of each value among equal neighbours, from 0."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    lengths = np.diff(starts, append=len(values))
    return concat_ranges(0, lengths)[1]
