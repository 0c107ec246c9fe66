"""Target `faiss`: the dense vectors as one `IndexFlatIP`, written without FAISS.

The file is a header of 45 bytes and the vectors, row after row, in float32. The number of rows is known before the
first is written, so the index is written from front to back, and never held in memory.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from m3cli.exporters.npy import KEYS_NAME, write_keys
from m3cli.exporters.rows import README_NAME, LeftOut, OpenFile, Read, Shape, Target, fill_template, widen

INDEX_NAME = "index.faiss"
_UNUSED = 1 << 20
"two members of the header that FAISS itself writes and ignores"
_INNER_PRODUCT = 0


def write(read: Read, open_file: OpenFile, shape: Shape, lost: LeftOut) -> None:
    """Write the index and the keys."""
    index, keys = open_file(INDEX_NAME), open_file(KEYS_NAME)
    index.write(make_header(dim=shape.dim, rows=shape.rows))
    for part in read(None):
        write_keys(keys, part, lost)
        assert part.embeddings.dense_vecs is not None
        index.write(widen(part.embeddings.dense_vecs).data)


def make_header(*, dim: int, rows: int) -> bytes:
    """Return what comes before the vectors in a file of an IndexFlatIP."""
    index = struct.pack("<4siqqq?i", b"IxFI", dim, rows, _UNUSED, _UNUSED, True, _INNER_PRODUCT)
    return index + struct.pack("<Q", rows * dim)


def describe(shape: Shape) -> Mapping[str, bytes]:  # noqa: ARG001  the same for all
    """Write the README."""
    return {README_NAME: fill_template("faiss.md")}


TARGET = Target(outputs=("dense",), write=write, describe=describe, whole=True, number_bytes=4)
