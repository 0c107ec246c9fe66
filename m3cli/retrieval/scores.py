"""Which scores there are, what each is made of, and how the weighted ones are averaged.

The names are FlagEmbedding's. A weighted score is a weighted *average*, as its `compute_score` gives it (its
`modeling.py` has another, undivided sum with weights 1, 0.3, 1 for training); weights stand in the order dense,
sparse, colbert.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.config import ALL_OUTPUTS
from m3cli.errors import UsageError
from m3cli.records import Embeddings, LexicalWeights, Output, TokenMatrices

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
    """Return what must be computed for some modes, in the order dense, sparse, colbert."""
    return tuple(output for output in ALL_OUTPUTS if any(output in PARTS[mode] for mode in modes))


def modes_of(outputs: Sequence[Output]) -> tuple[str, ...]:
    """Return the modes that some outputs are enough for."""
    return tuple(mode for mode in MODES if set(PARTS[mode]) <= set(outputs))


def check_weights(modes: Sequence[str], weights: Weights) -> None:
    """Refuse weights that leave nothing to divide by in one of the modes."""
    for mode in modes:
        if len(PARTS[mode]) > 1 and sum(weights[ALL_OUTPUTS.index(output)] for output in PARTS[mode]) == 0:
            raise UsageError(
                f"--weights {','.join(f'{weight:g}' for weight in weights)}: the weights of {mode} sum to 0; "
                f"change them, or leave {mode} out with --modes"
            )


def combine_scores(
    scores: Mapping[Output, NDArray[np.float32]], modes: Sequence[str], *, weights: Weights = DEFAULT_WEIGHTS
) -> dict[str, NDArray[np.float32]]:
    """Return [P] float32 for each mode: its part, or the weighted average of its parts."""
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


RRF_K = 60


def resolve_weights(typed: Weights | None, outputs: Sequence[Output]) -> Weights:
    """Return weights in the order dense, sparse, colbert; 0 for what is not there, 1 for the rest if none were typed.

    Raises:
        UsageError: one was typed for an output that is not there, or there is only one output.
    """
    if len(outputs) < 2:
        raise UsageError(f"--mode hybrid needs two outputs, and there is only {outputs[0]}: use --mode {outputs[0]}")
    there = [output in outputs for output in ALL_OUTPUTS]
    if typed is None:
        return 1.0 * there[0], 1.0 * there[1], 1.0 * there[2]
    for output, has, weight in zip(ALL_OUTPUTS, there, typed, strict=True):
        if weight and not has:
            raise UsageError(
                f"--weights gives {output} {weight:g}, and the folder has no {output}, only {', '.join(outputs)}: "
                f"give it 0, or encode with --outputs {output},..."
            )
    return typed


def average_scores(scores: Mapping[Output, Scores], weights: Weights) -> Scores:
    """Return [P] weighted averages; an output that is not there must weigh 0."""
    length = len(next(iter(scores.values())))
    whole = {output: scores.get(output, np.zeros(length, np.float32)) for output in ALL_OUTPUTS}
    return combine_scores(whole, ["colbert+sparse+dense"], weights=weights)["colbert+sparse+dense"]


def fuse_ranks(ranks: Mapping[Output, NDArray[np.int64]], weights: Weights) -> Scores:
    """Return [P] reciprocal rank fusion of ranks that count from 0; -1 for a pair that a ranking does not have."""
    by_output = dict(zip(ALL_OUTPUTS, weights, strict=True))
    parts = [
        np.where(rank >= 0, by_output[output] / (RRF_K + 1 + np.maximum(rank, 0)), 0.0)
        for output, rank in ranks.items()
    ]
    fused: Scores = np.sum(parts, axis=0).astype(np.float32)
    return fused
