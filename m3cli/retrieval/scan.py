"""Scores of all queries against slices of a part's rows, by output, with those above the queries' thresholds.

Dense and ColBERT scores are matmuls in float32 by torch, on all cores or a GPU, in blocks that fit a cache or a device.
Sparse scores are one product of two CSR matrices. ColBERT scores are those of `score_colbert`, for all pairs.
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
from m3cli.retrieval.scores import Rows, Scores, TopRows, decode_vectors

MIN_ROWS = 256
BLOCK_SCORES = {"cpu": 1 << 21, "cuda": 1 << 26}
"scores of dense vectors that are computed together"
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"of dense vectors that are converted together: on a CPU they are multiplied while they are in its cache"
BLOCK_PRODUCTS = 1 << 22
"limit of products of lexical weights, if every row shares a token with every query"
QUERY_VECTORS = {"cpu": 1 << 11, "cuda": 1 << 12}
ROW_VECTORS = {"cpu": 1 << 11, "cuda": 1 << 15}
"ColBERT vectors that are multiplied together: 16 MiB of products on a CPU, 512 MiB on a GPU, with fewer launches"

Found = tuple[Rows, Rows, Scores]
"query, row of the part and score: [H] each"


class Scan(Protocol):
    """Queries in the form in which parts are scored against them."""

    def cut(self, embeddings: Embeddings, seen: int) -> Iterator[slice]:
        """Yield slices of a part's rows that are scored together, after `seen` rows in total."""

    def score(self, embeddings: Embeddings, block: slice, above: Scores) -> Found:
        """Return the scores of a slice of rows above the queries' thresholds [Q], without NaN."""


def open_scan(output: Output, queries: Embeddings, *, vocabulary: int, device: str) -> Scan:
    """Return the queries prepared for one output."""
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
    """Score a part and offer the scores above the thresholds.

    Args:
        scan: the queries.
        embeddings: of R rows.
        top: the lists so far.
        rows: [R] positions in the corpus; negative: never a hit.
        find_keys: returns the keys [N] of N rows of the part.
        seen: rows of the corpus before this part.
    """
    for block in scan.cut(embeddings, seen):
        query, row, score = scan.score(embeddings, block, top.thresholds)
        wanted = rows[row] >= 0
        if not wanted.all():
            query, row, score = query[wanted], row[wanted], score[wanted]
        top.offer(query, rows[row], find_keys(row), score)


def cut_rows(num_rows: int, *, seen: int, most: int) -> Iterator[slice]:
    """Yield slices no longer than the rows before them, so that thresholds are useful early."""
    start = 0
    while start < num_rows:
        stop = min(num_rows, start + min(max(MIN_ROWS, seen + start), most))
        yield slice(start, stop)
        start = stop


class DenseScan:
    """Dense vectors of queries."""

    def __init__(self, queries: NDArray[np.floating], *, device: str) -> None:
        self._queries = torch.from_numpy(np.array(queries, np.float32)).to(device)
        self._device = device
        kind = device.partition(":")[0]
        width = 4 * queries.shape[1]
        self._most = max(MIN_ROWS, min(BLOCK_SCORES[kind] // max(len(queries), 1), BLOCK_BYTES[kind] // width))
        # Reused by all blocks: new memory costs more than one query's product.
        self._wide = torch.empty((self._most, queries.shape[1]) if kind == "cpu" else 0)

    def cut(self, embeddings: Embeddings, seen: int) -> Iterator[slice]:
        """Cut a part's rows."""
        return cut_rows(len(embeddings.rows), seen=seen, most=self._most)

    def score(self, embeddings: Embeddings, block: slice, above: Scores) -> Found:
        """Score a slice of rows."""
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
        most = max(MIN_ROWS, BLOCK_PRODUCTS // max(self._num_queries, 1))
        return cut_rows(len(embeddings.rows), seen=seen, most=most)

    def score(self, embeddings: Embeddings, block: slice, above: Scores) -> Found:
        """Score a slice of rows."""
        assert embeddings.lexical_weights is not None
        products = _csr(embeddings.lexical_weights, block, self._vocabulary) @ self._postings
        good = np.flatnonzero(products.data > above[products.indices])
        row = np.repeat(np.arange(block.start, block.stop), np.diff(products.indptr))
        return products.indices[good].astype(np.int64), row[good], products.data[good]


class ColbertScan:
    """ColBERT matrices of queries."""

    def __init__(self, queries: TokenMatrices, *, device: str) -> None:
        self._device = device
        kind = device.partition(":")[0]
        self._most = ROW_VECTORS[kind]
        self._slices: list[tuple[torch.Tensor, torch.Tensor]] = []  # vectors of queries, and their lengths
        lengths = np.diff(queries.indptr)
        for rows in cut_slices(queries.indptr, most=QUERY_VECTORS[kind]):
            vectors = _vectors_of(queries, rows, device)
            self._slices.append((vectors, torch.from_numpy(lengths[rows]).to(device)))

    def cut(self, embeddings: Embeddings, seen: int) -> Iterator[slice]:  # noqa: ARG002 - few rows are many vectors
        """Cut a part's rows."""
        assert embeddings.colbert_vecs is not None
        return cut_slices(embeddings.colbert_vecs.indptr, most=self._most)

    def score(self, embeddings: Embeddings, block: slice, above: Scores) -> Found:
        """Score a slice of rows; a row or a query without vectors has no score."""
        assert embeddings.colbert_vecs is not None
        matrices = embeddings.colbert_vecs
        vectors = _vectors_of(matrices, block, self._device)
        lengths = torch.from_numpy(np.diff(matrices.indptr[block.start : block.stop + 1])).to(self._device)
        return _select(
            torch.cat([_score_matrices(*each, vectors, lengths) for each in self._slices]), above, block.start
        )


def _score_matrices(
    queries: torch.Tensor, query_lengths: torch.Tensor, passages: torch.Tensor, passage_lengths: torch.Tensor
) -> torch.Tensor:
    """Return [Q, R] means over a query's vectors of the best product with a row's vectors."""
    products = passages @ queries.T
    best = torch.segment_reduce(products, "max", lengths=passage_lengths, axis=0, unsafe=True)
    return torch.segment_reduce(best.T.contiguous(), "mean", lengths=query_lengths, axis=0, unsafe=True)


def _vectors_of(matrices: TokenMatrices, rows: slice, device: str) -> torch.Tensor:
    """Return the vectors of a slice of rows as float32 on the device."""
    span = slice(matrices.indptr[rows.start], matrices.indptr[rows.stop])
    if matrices.vectors.dtype.kind != "f":
        return torch.from_numpy(decode_vectors(matrices, span)).to(device)
    return _widen(matrices.vectors[span], device)


def _widen(vectors: NDArray[np.floating], device: str, *, into: torch.Tensor | None = None) -> torch.Tensor:
    """Return vectors as float32 on a device, on a CPU optionally in the memory of `into`.

    The conversion is the only copy and uses all cores: numpy's takes several times as long as one query's matmul.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about a read-only mapped file, which is not written
        narrow = torch.from_numpy(np.asarray(vectors))
    if into is not None and len(into) and narrow.dtype != torch.float32:
        return into[: len(narrow)].copy_(narrow)
    return narrow.to(device).float()


def _select(scores: torch.Tensor, above: Scores, first_row: int) -> Found:
    """Return query, row and score of the scores [Q, R] above the thresholds."""
    if scores.device.type == "cpu":
        values = scores.numpy()
        indices = np.flatnonzero(values > above[:, None])
        query, row = np.divmod(indices, max(values.shape[1], 1))
        return query, row + first_row, values.ravel()[indices]
    found = torch.nonzero(scores > torch.from_numpy(above).to(scores.device)[:, None], as_tuple=True)
    query, row = (each.cpu().numpy() for each in found)
    return query, row + first_row, scores[found].cpu().numpy()


def _csr(weights: LexicalWeights, rows: slice, vocabulary: int) -> csr_matrix:
    indptr = weights.indptr[rows.start : rows.stop + 1]
    held = slice(indptr[0], indptr[-1])
    arrays = weights.values[held], weights.indices[held].astype(np.int32), indptr - indptr[0]
    return csr_matrix(arrays, shape=(len(indptr) - 1, vocabulary))


def cut_slices(indptr: NDArray[np.int64], *, most: int) -> Iterator[slice]:
    """Yield slices of rows with at most `most` items by their indptr; a row with more is a slice of its own."""
    start, num_rows = 0, len(indptr) - 1
    while start < num_rows:
        stop = max(start + 1, int(np.searchsorted(indptr, indptr[start] + most, side="right")) - 1)
        yield slice(start, stop)
        start = stop
