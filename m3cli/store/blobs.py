"""Values of a binary column that are the items of a row one after the other, such as a ColBERT matrix, read back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def read_blobs(array: pa.Array, size: int) -> tuple[NDArray[np.int64], NDArray[np.uint8] | None]:
    """Return where rows begin [R + 1] among items of `size` bytes, and the bytes of all items.

    None in place of the bytes: a value is missing, or no whole number of items.
    """
    if not len(array):
        return np.zeros(1, np.int64), np.empty(0, np.uint8)
    _, places, data = array.buffers()
    offsets = np.frombuffer(places, np.int64)[array.offset : array.offset + len(array) + 1]
    indptr = (offsets - offsets[0]) // size
    if array.null_count or (np.diff(offsets) % size).any():
        return indptr, None
    return indptr, np.frombuffer(data or b"", np.uint8)[offsets[0] : offsets[-1]]
