"""Like token vectors of a row merged into their mean: hierarchical token pooling (arXiv 2409.14683).

Ward's clustering of the vectors, which are of norm 1, so that near means like; the tree is cut where one cluster for
every K vectors is left, and each becomes the mean of its vectors, brought to norm 1 again. Clusters stand in the order
of their first tokens. The paper protects the markers before the text; M3's `<s>` has no vector, and its marker behind
the text, `</s>`, is the protected one here.

A clustering takes memory and time by the square of its vectors, so that a longer run is cut into blocks of nearly equal
size: tokens that are alike but far apart in a long text stay apart. On one core, 1024 wide: 5 us a token in rows of 220
tokens, 15 us in blocks of 512.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from m3cli.records import TokenMatrices

BLOCK_VECTORS = 512


def pool_vectors(matrices: TokenMatrices, *, factor: int, protected: NDArray[np.bool_]) -> TokenMatrices:
    """Merge the vectors of each row into one for every `factor` of them, rounded up.

    Args:
        matrices: float32 vectors of norm 1.
        factor: 1 or more.
        protected: [V] vectors that stay as they are.
    """
    cluster = np.empty(len(matrices.vectors), np.int64)
    indptr = np.zeros(len(matrices.indptr), np.int64)
    total = 0
    for row, (first, last) in enumerate(zip(matrices.indptr[:-1].tolist(), matrices.indptr[1:].tolist(), strict=True)):
        span = slice(first, last)
        cluster[span] = _number_clusters(matrices.vectors[span], factor=factor, protected=protected[span]) + total
        total = int(cluster[span].max(initial=total - 1)) + 1
        indptr[row + 1] = total
    order = np.argsort(cluster, kind="stable")
    begins = np.searchsorted(cluster[order], np.arange(total))
    sums = np.add.reduceat(matrices.vectors[order], begins, axis=0) if total else matrices.vectors[:0]
    sums /= np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return TokenMatrices(indptr=indptr, vectors=sums)


def _number_clusters(vectors: NDArray[np.float32], *, factor: int, protected: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the cluster [V] of each vector of a row, numbered by their first vectors."""
    labels = np.arange(len(vectors))
    free = np.flatnonzero(~protected)
    for block in np.array_split(free, -(-len(free) // BLOCK_VECTORS) or 1):
        if len(block) > 1:
            labels[block] = block[_cluster(vectors[block], num_clusters=-(-len(block) // factor))]
    _, numbers = np.unique(labels, return_inverse=True)
    return numbers.reshape(-1)


def _cluster(vectors: NDArray[np.float32], *, num_clusters: int) -> NDArray[np.int64]:
    """Return for each of some vectors the first one of its cluster."""
    count = len(vectors)
    distances = 2.0 - 2.0 * (vectors @ vectors.T).astype(np.float64)
    np.sqrt(np.maximum(distances, 0.0, out=distances), out=distances)
    merges = linkage(squareform(distances, checks=False), "ward")[: count - num_clusters, :2].astype(np.int64).tolist()
    # From the last merge to the first each hands its cluster down to the two it was made of.
    top = list(range(count + len(merges)))
    for merge in range(len(merges) - 1, -1, -1):
        for part in merges[merge]:
            top[part] = top[count + merge]
    _, first, numbers = np.unique(top[:count], return_index=True, return_inverse=True)
    firsts: NDArray[np.int64] = first[numbers.reshape(-1)]
    return firsts
