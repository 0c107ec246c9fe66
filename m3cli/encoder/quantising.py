"""Vectors in fewer bits: int8 with a scale each, or the signs alone.

int8: the largest number of a vector becomes 127 or -127. Its scale is not the one that number was divided by but the
one that gives the rounded vector norm 1 again, as every other is scored.
binary: bit 1 for a number above 0, the first number in the highest bit of the first byte (`np.packbits`), which is what
Vespa's `unpack_bits` reads by default and what its and Qdrant's quantisation take for a sign.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 1 << 20
"of float32; what stays in the processor's cache"


def quantise_int8(vectors: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round float32 vectors [V, D] to int8 [V, D] with scales [V]; a vector of zeros has scale 0."""
    rounded = np.empty(vectors.shape, np.int8)
    scales = np.zeros(len(vectors), np.float32)
    step = max(1, BLOCK_BYTES // max(1, vectors.shape[1] * 4))
    for start in range(0, len(vectors), step):
        block = vectors[start : start + step]
        peak = np.maximum(block.max(axis=1), -block.min(axis=1))
        factor = np.divide(127.0, peak, out=np.zeros_like(peak), where=peak > 0)
        numbers = np.rint(block * factor[:, None])
        rounded[start : start + step] = numbers
        norm = np.sqrt(np.einsum("ij,ij->i", numbers, numbers))
        np.divide(1.0, norm, out=scales[start : start + step], where=norm > 0)
    return rounded, scales


def quantise_binary(vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the signs [V, D / 8] of vectors [V, D], eight to a byte."""
    return np.packbits(vectors > 0, axis=1)
