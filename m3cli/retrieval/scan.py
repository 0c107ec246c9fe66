"""Scores of all queries against a run of a part's rows, by each output; those above the queries' thresholds are kept.

Dense and ColBERT are matmuls in float32, by torch on all cores or on a GPU, in blocks that a cache or a device holds.
Sparse is one product of two CSR matrices: each weight of a row meets the queries that have its token, and no others.
ColBERT is `maxsim.score_colbert`'s mean over the query's vectors of the best product, for all pairs instead of some.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from m3cli.records import Embeddings, LexicalWeights, Output, TokenMatrices
from m3cli.retrieval.scores import decode_vectors
from m3cli.retrieval.top import Rows, Scores, TopRows

LEAST_ROWS = 256
BLOCK_SCORES = {"cpu": 1 << 21, "cuda": 1 << 26}
"scores of dense vectors that are looked at together"
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"of dense vectors that are widened together: on a CPU they are multiplied while they are in its cache"
BLOCK_PRODUCTS = 1 << 22
"most products of lexical weights, if every row shares a token with every query"
BLOCK_VECTORS = 1 << 11
"ColBERT vectors of a side that are multiplied together: 16 MiB of products"

Found = tuple[Rows, Rows, Scores]
"queries, rows of the part, and their scores: [H] each"


class Scan(Protocol):
    """Queries that are held, ready to be scored against part after part."""

    def cut(self, embeddings: Embeddings, seen: int) -> Iterator[slice]:
        """Cut a part's rows into runs that are scored together, `seen` rows having been scored before."""

    def score(self, embeddings: Embeddings, block: slice, above: Scores) -> Found:
        """Return what is above the queries' thresholds [Q] in a run of rows; a score that is no number is not."""


def open_scan(output: Output, queries: Embeddings, *, vocabulary: int, device: str) -> Scan:
    """Make queries ready to be scored by one output."""
    if output == "dense":
        assert queries.dense_vecs is not None
        return DenseScan(queries.dense_vecs, device=device)
    if output == "sparse":
        assert queries.lexical_weights is not None
        return SparseScan(queries.lexical_weights, vocabulary=vocabulary)
    assert queries.colbert_vecs is not None
    return ColbertScan(queries.colbert_vecs, device=device)


def scan_part(
    scan: Scan, embeddings: Embeddings, top: TopRows, *, rows: Rows, find_keys: Callable[[Rows], Rows], seen: int
) -> None:
    """Score a part and offer what is good.

    Args:
        scan: the queries.
        embeddings: of R rows.
        top: the lists so far.
        rows: [R] places in the corpus; a negative one: not to be found.
        find_keys: returns [N] keys of N rows of the part: what each is a part of.
        seen: rows of the corpus before this part.
    """
    for block in scan.cut(embeddings, seen):
        query, row, score = scan.score(embeddings, block, top.thresholds)
        wanted = rows[row] >= 0
        if not wanted.all():
            query, row, score = query[wanted], row[wanted], score[wanted]
        top.offer(query, rows[row], find_keys(row), score)


def cut_rows(num_rows: int, *, seen: int, most: int) -> Iterator[slice]:
    """Cut rows into runs that are no longer than what came before, so that few of them pass a threshold in vain."""
    start = 0
    while start < num_rows:
        stop = min(num_rows, start + min(max(LEAST_ROWS, seen + start), most))
        yield slice(start, stop)
        start = stop


class DenseScan:
    """Dense vectors of queries."""

    def __init__(self, queries: NDArray[np.floating], *, device: str) -> None:
        self._queries = torch.from_numpy(np.array(queries, np.float32)).to(device)
        self._device = device
        kind = device.partition(":")[0]
        width = 4 * queries.shape[1]
        self._most = max(LEAST_ROWS, min(BLOCK_SCORES[kind] // max(len(queries), 1), BLOCK_BYTES[kind] // width))
        # Kept from block to block: memory that is new each time costs more than one query's product.
        self._wide = torch.empty((self._most, queries.shape[1]) if kind == "cpu" else 0)

    def cut(self, embeddings: Embeddings, seen: int) -> Iterator[slice]:
        """Cut a part's rows."""
        return cut_rows(len(embeddings.rows), seen=seen, most=self._most)

    def score(self, embeddings: Embeddings, block: slice, above: Scores) -> Found:
        """Score a run of rows."""
        assert embeddings.dense_vecs is not None
        vectors = _widen(embeddings.dense_vecs[block], self._device, into=self._wide)
        return _select(self._queries @ vectors.T, above, block.start)


class SparseScan:
    """Lexical weights of queries, by token."""

    def __init__(self, queries: LexicalWeights, *, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._num_queries = len(queries.indptr) - 1
        self._postings = _csr(queries, slice(0, self._num_queries), vocabulary).T.tocsr()

    def cut(self, embeddings: Embeddings, seen: int) -> Iterator[slice]:
        """Cut a part's rows."""
        most = max(LEAST_ROWS, BLOCK_PRODUCTS // max(self._num_queries, 1))
        return cut_rows(len(embeddings.rows), seen=seen, most=most)

    def score(self, embeddings: Embeddings, block: slice, above: Scores) -> Found:
        """Score a run of rows."""
        assert embeddings.lexical_weights is not None
        products = _csr(embeddings.lexical_weights, block, self._vocabulary) @ self._postings
        good = np.flatnonzero(products.data > above[products.indices])
        row = np.repeat(np.arange(block.start, block.stop), np.diff(products.indptr))
        return products.indices[good].astype(np.int64), row[good], products.data[good]


class ColbertScan:
    """ColBERT matrices of queries."""

    def __init__(self, queries: TokenMatrices, *, device: str) -> None:
        self._device = device
        self._runs: list[tuple[torch.Tensor, torch.Tensor]] = []  # of vectors of whole queries, and their lengths
        lengths = np.diff(queries.indptr)
        for run in cut_runs(queries.indptr, most=BLOCK_VECTORS):
            vectors = _vectors_of(queries, run, device)
            self._runs.append((vectors, torch.from_numpy(lengths[run]).to(device)))

    def cut(self, embeddings: Embeddings, seen: int) -> Iterator[slice]:  # noqa: ARG002 - few rows are many vectors
        """Cut a part's rows."""
        assert embeddings.colbert_vecs is not None
        return cut_runs(embeddings.colbert_vecs.indptr, most=BLOCK_VECTORS)

    def score(self, embeddings: Embeddings, block: slice, above: Scores) -> Found:
        """Score a run of rows; a row or a query without vectors has no score."""
        assert embeddings.colbert_vecs is not None
        matrices = embeddings.colbert_vecs
        vectors = _vectors_of(matrices, block, self._device)
        lengths = torch.from_numpy(np.diff(matrices.indptr[block.start : block.stop + 1])).to(self._device)
        return _select(torch.cat([_score_matrices(*run, vectors, lengths) for run in self._runs]), above, block.start)


def _score_matrices(
    queries: torch.Tensor, query_lengths: torch.Tensor, passages: torch.Tensor, passage_lengths: torch.Tensor
) -> torch.Tensor:
    """Return [Q, R] means over a query's vectors of the best product with a row's vectors."""
    products = passages @ queries.T
    best = torch.segment_reduce(products, "max", lengths=passage_lengths, axis=0, unsafe=True)
    return torch.segment_reduce(best.T.contiguous(), "mean", lengths=query_lengths, axis=0, unsafe=True)


def _vectors_of(matrices: TokenMatrices, rows: slice, device: str) -> torch.Tensor:
    """Return the vectors of a run of rows as float32 on the device."""
    span = slice(matrices.indptr[rows.start], matrices.indptr[rows.stop])
    if matrices.vectors.dtype.kind != "f":
        return torch.from_numpy(decode_vectors(matrices, span)).to(device)
    return _widen(matrices.vectors[span], device)


def _widen(vectors: NDArray[np.floating], device: str, *, into: torch.Tensor | None = None) -> torch.Tensor:
    """Return vectors as float32 on a device; what is read from a disk is narrow until it is there.

    There is no copy but the wide one, made by all cores: numpy's takes several times as long as one query's matmul. On
    a CPU it may be made `into` a tensor with room for it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a mapped file must not be written to, and nobody does
        narrow = torch.from_numpy(np.asarray(vectors))
    if into is not None and len(into) and narrow.dtype != torch.float32:
        return into[: len(narrow)].copy_(narrow)
    return narrow.to(device).float()


def _select(scores: torch.Tensor, above: Scores, first_row: int) -> Found:
    """Return the queries, rows and scores of what is above the thresholds in [Q, R] scores."""
    if scores.device.type == "cpu":
        values = scores.numpy()
        places = np.flatnonzero(values > above[:, None])
        query, row = np.divmod(places, max(values.shape[1], 1))
        return query, row + first_row, values.ravel()[places]
    places_there = torch.nonzero(scores > torch.from_numpy(above).to(scores.device)[:, None], as_tuple=True)
    query, row = (place.cpu().numpy() for place in places_there)
    return query, row + first_row, scores[places_there].cpu().numpy()


def _csr(weights: LexicalWeights, rows: slice, vocabulary: int) -> csr_matrix:
    indptr = weights.indptr[rows.start : rows.stop + 1]
    held = slice(indptr[0], indptr[-1])
    arrays = weights.values[held], weights.indices[held].astype(np.int32), indptr - indptr[0]
    return csr_matrix(arrays, shape=(len(indptr) - 1, vocabulary))


def cut_runs(indptr: NDArray[np.int64], *, most: int) -> Iterator[slice]:
    """Cut rows into runs of at most `most` items, row i having indptr[i] to indptr[i + 1]; a row of more is a run."""
    start, num_rows = 0, len(indptr) - 1
    while start < num_rows:
        stop = max(start + 1, int(np.searchsorted(indptr, indptr[start] + most, side="right")) - 1)
        yield slice(start, stop)
        start = stop
